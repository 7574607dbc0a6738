"""The Bulk-Space-Filtration-Accelerator as an Optax transformation."""

from bsfa_optax._alias import bsfa_adamw
from bsfa_optax._blocks import block_names
from bsfa_optax._estimator import Estimator
from bsfa_optax._filter import bsfa, BSFAState
from bsfa_optax._format import check_state_format, state_format
from bsfa_optax._sharding import abstract_state, state_shardings
from bsfa_optax._stack import state_bytes
from bsfa_optax.estimators import kronecker, pca

__all__ = [
  'BSFAState',
  'Estimator',
  'abstract_state',
  'block_names',
  'bsfa',
  'bsfa_adamw',
  'check_state_format',
  'kronecker',
  'pca',
  'state_bytes',
  'state_format',
  'state_shardings',
]
