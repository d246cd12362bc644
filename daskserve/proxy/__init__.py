"""HTTP servers; on the transport thread of a worker, or of the scheduler."""
