"""What crosses between the main process and the workers; imported by both sides."""
