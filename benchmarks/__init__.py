"""Sweeps of optimizers; see `python -m benchmarks --help`."""
