"""The engine in a worker, and in main with ``num_workers=0``. Runs in: worker."""
