"""Where pages live on after a worker has let them go: host memory, and a disk behind it."""
