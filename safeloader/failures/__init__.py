"""What went wrong, as data and in words. Runs in: both."""
