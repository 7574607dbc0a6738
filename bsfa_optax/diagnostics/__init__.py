"""Diagnostics of dominant subspaces: overlaps, spectra and curvature, with plots.

The functions are pure and may be jitted where not said otherwise (inside
`jax.shard_map` they see one shard). Each works block by block on a layout, which
``estimator.layout(params)`` or `bsfa_optax.estimators.layout` gives, and leaves sharded
trees where they are. A basis is a tree of stacks ``(rank, *shape)`` of orthonormal
rows, such as ``PCAState.basis`` or ``HessianTopK.basis``; zero rows stand for absent
directions.

The plots take values collected over steps, and need Matplotlib:
``pip install 'bsfa-optax[plots]'``.
"""

from bsfa_optax.diagnostics._curvature import (
  curvature_energy,
  CurvatureEnergy,
  CurvatureSplit,
  hessian_top_k,
  HessianTopK,
)
from bsfa_optax.diagnostics._plots import (
  plot_curvature_energy,
  plot_dominant_fraction,
  plot_hessian_spectrum,
  plot_overlap,
  plot_principal_angles,
  plot_spectrum,
)
from bsfa_optax.diagnostics._subspaces import (
  dominant_fraction,
  principal_angles,
  projector,
  spectrum,
  subspace_overlap,
)

__all__ = [
  'CurvatureEnergy',
  'CurvatureSplit',
  'HessianTopK',
  'curvature_energy',
  'dominant_fraction',
  'hessian_top_k',
  'plot_curvature_energy',
  'plot_dominant_fraction',
  'plot_hessian_spectrum',
  'plot_overlap',
  'plot_principal_angles',
  'plot_spectrum',
  'principal_angles',
  'projector',
  'spectrum',
  'subspace_overlap',
]
