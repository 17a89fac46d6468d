"""What the workers of both pools share around the engine: service, loop, registration."""
