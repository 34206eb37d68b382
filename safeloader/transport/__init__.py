"""How batches cross from worker to main, both ends. Runs in: both."""
