"""Ways to pull pages out of another worker's pool, one file each."""
