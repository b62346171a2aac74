"""A server under load for a long time: see ``python -m tests.soak --help``."""
