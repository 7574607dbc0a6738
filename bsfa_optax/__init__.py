"""The Bulk-Space-Filtration-Accelerator as Optax transformations."""

from bsfa_optax import diagnostics as diagnostics
from bsfa_optax import estimators as estimators
from bsfa_optax import low_rank as low_rank
from bsfa_optax import projected as projected
from bsfa_optax import state as state
from bsfa_optax._learned import FilterState
from bsfa_optax.estimators import dct, hessian_lanczos, kronecker, pca
from bsfa_optax.filter import (
  accelerate,
  bsfa,
  bsfa_adafactor,
  bsfa_adamw,
  interpolated,
  split_by_subspace,
)
from bsfa_optax.state import summary
from bsfa_optax.whitening import (
  muon_dimension_numbers,
  scale_by_whitening,
  WhiteningFactors,
)

__version__ = '0.1.0'

__all__ = [
  'FilterState',
  'WhiteningFactors',
  'accelerate',
  'bsfa',
  'bsfa_adafactor',
  'bsfa_adamw',
  'dct',
  'hessian_lanczos',
  'interpolated',
  'kronecker',
  'muon_dimension_numbers',
  'pca',
  'scale_by_whitening',
  'split_by_subspace',
  'summary',
]
