"""Estimators of the dominant subspace, one file each."""

from bsfa_optax.estimators._dct import dct
from bsfa_optax.estimators._hessian import hessian_lanczos, HessianState
from bsfa_optax.estimators._kronecker import kronecker, KroneckerState
from bsfa_optax.estimators._pca import pca, PCAState

__all__ = [
  'HessianState',
  'KroneckerState',
  'PCAState',
  'dct',
  'hessian_lanczos',
  'kronecker',
  'pca',
]
