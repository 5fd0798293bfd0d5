"""Measurements behind the figures of the documentation, each a command: ``python -m benchmarks.NAME``."""
