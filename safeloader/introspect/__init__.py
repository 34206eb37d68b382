"""Looks at objects and at the machine; knows no loader. Runs in: both."""
