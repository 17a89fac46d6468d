"""The hinge: page pool, identity, directory, transports."""
