"""What runs in a worker process, or in the main process with ``num_workers=0``."""
