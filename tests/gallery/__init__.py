"""Every text that a user can get, in one page of the documentation: ``python -m tests.gallery``."""
