"""Ray: actors, controller, local cluster. Ray is imported here only."""
