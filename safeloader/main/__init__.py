"""The engine in the training process. Runs in: main."""
