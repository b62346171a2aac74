"""Stands in for setuptools while pip downloads vLLM's source: see ``build_meta``."""
