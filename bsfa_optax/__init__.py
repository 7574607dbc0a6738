"""The Bulk-Space-Filtration-Accelerator as an Optax transformation."""

from bsfa_optax import diagnostics as diagnostics
from bsfa_optax._alias import bsfa_adamw
from bsfa_optax._blocks import block_names
from bsfa_optax._estimator import Estimator
from bsfa_optax._filter import accelerate, AccelerateState, bsfa, BSFAState
from bsfa_optax._format import check_state_format, state_format
from bsfa_optax._interpolated import bulk_only, dominant_only, interpolated
from bsfa_optax._sharding import abstract_state, state_shardings
from bsfa_optax._split import split_by_subspace, SplitState
from bsfa_optax._stack import state_bytes
from bsfa_optax.estimators import dct, hessian_lanczos, kronecker, pca

__all__ = [
  'AccelerateState',
  'BSFAState',
  'Estimator',
  'SplitState',
  'abstract_state',
  'accelerate',
  'block_names',
  'bsfa',
  'bsfa_adamw',
  'bulk_only',
  'check_state_format',
  'dct',
  'dominant_only',
  'hessian_lanczos',
  'interpolated',
  'kronecker',
  'pca',
  'split_by_subspace',
  'state_bytes',
  'state_format',
  'state_shardings',
]
