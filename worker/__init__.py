"""What the workers of all pools share around the engine: service, loop, registration."""
