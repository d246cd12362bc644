"""What carries requests between processes: from proxies and handles to replicas."""
