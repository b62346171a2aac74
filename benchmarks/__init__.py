"""Benchmarks: ``python -m benchmarks demo`` and ``python -m benchmarks figures``."""
