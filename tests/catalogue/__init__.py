"""Faults injected for real, each with what must be said of it."""
