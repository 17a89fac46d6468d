"""A long run under load while everything is killed, stopped, cut and slowed: `make soak`."""
