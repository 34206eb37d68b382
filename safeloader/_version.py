"""The version, so that the build reads it without importing torch. Runs in: both."""

__version__ = "0.1.0"
