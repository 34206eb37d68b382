"""What ``python -m safeloader`` can do, a file for each command. Runs in: main."""
