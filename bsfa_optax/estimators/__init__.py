"""Estimators of the dominant subspace, and what another one is written with."""

from bsfa_optax._learned import Decomposition, Estimator, from_rows
from bsfa_optax._vectors import inner, Layout, layout
from bsfa_optax.estimators._dct import dct
from bsfa_optax.estimators._hessian import hessian_lanczos, HessianState
from bsfa_optax.estimators._kronecker import kronecker, KroneckerFactors
from bsfa_optax.estimators._pca import pca, PCAState

__all__ = [
  'Decomposition',
  'Estimator',
  'HessianState',
  'KroneckerFactors',
  'Layout',
  'PCAState',
  'dct',
  'from_rows',
  'hessian_lanczos',
  'inner',
  'kronecker',
  'layout',
  'pca',
]
