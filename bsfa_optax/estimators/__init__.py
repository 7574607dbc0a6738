"""Estimators of the dominant subspace, one file each."""

from bsfa_optax.estimators._kronecker import kronecker, KroneckerState
from bsfa_optax.estimators._pca import pca, PCAState

__all__ = ['KroneckerState', 'PCAState', 'kronecker', 'pca']
