"""User code and all that surrounds it; in a worker."""
