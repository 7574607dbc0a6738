"""Sweeps of optimizers; see `python -m benchmarks --help`."""

import os

# Its threads and XLA's get in each other's way; it is read as JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
