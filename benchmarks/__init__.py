"""Benchmarks: the stock loader and SafeDataLoader side by side, in turn, in one run."""
