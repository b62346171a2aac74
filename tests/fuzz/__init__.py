"""Random requests of a server's own OpenAPI document: see ``python -m tests.fuzz --help``."""
