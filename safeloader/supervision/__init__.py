"""Where the workers are and what became of them, both ends. Runs in: both."""
