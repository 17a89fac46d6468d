"""gRPC plumbing that every service shares: servers, error mapping, step streams."""
