"""The controller: runs in the Dask scheduler process and owns the desired state."""
