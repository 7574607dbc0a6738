"""All that the reproductions use of `bsfa_optax`: estimators, filters, measurements."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bsfa_optax
from bsfa_optax import dct, hessian_lanczos, kronecker, pca
from bsfa_optax.diagnostics import (
  curvature_energy,
  dominant_fraction,
  hessian_top_k,
  projector,
  spectrum,
  subspace_overlap,
)
from bsfa_optax.estimators import Estimator, layout

__all__ = [
  'ALL',
  'Estimator',
  'Watcher',
  'chi',
  'curvature_energy',
  'curvature_watchers',
  'dct',
  'dominant_masks',
  'dominant_size',
  'filtered',
  'held_projector',
  'hessian_lanczos',
  'hessian_top_k',
  'hidden',
  'kronecker',
  'last_layer',
  'layout',
  'learner',
  'overlap_watchers',
  'pca',
  'projector',
  'subspace_overlap',
  'top_hessian',
]

ALL = 'all'  # the whole model as one block
WINDOWS = (8, 16, 32, 64)
DECAYS = (0.9, 0.95, 0.99)
RANKS = (8, 16, 32)


# Filters.


def filtered(
  base: optax.GradientTransformation,
  alpha: Any,
  gamma: Any,
  estimator: Estimator,
  *,
  of_gradients: bool = False,
  exponent: float | None = None,
) -> optax.GradientTransformation:
  """BSFA over a base optimizer; it learns from updates, or from gradients."""
  last = bsfa_optax.bsfa(alpha, gamma, exponent=exponent, estimator=estimator)
  if of_gradients:
    return bsfa_optax.accelerate(base, last, history=optax.identity())
  return optax.chain(base, last)


def chi(estimator: Estimator, state: Any, gradient: Any) -> jax.Array:
  """Share of a gradient that is in the dominant subspace, of the only block."""
  learned = optax.tree.get(state, 'memory')
  fraction, _ = dominant_fraction(estimator, learned, gradient)
  return fraction[0]


# Blocks.


def last_layer(params: Any) -> Any:
  """Blocks of the small LLaMA: four matrices of the last layer and the output layer."""
  chosen = ('layers.1.attention.query', 'layers.1.attention.output')
  chosen += ('layers.1.mlp.up', 'layers.1.mlp.down', 'head')

  def label(path, leaf):
    del leaf
    name = '.'.join(str(key.key) for key in path[:-1])
    return name.removeprefix('layers.1.') if name in chosen else None

  return jax.tree_util.tree_map_with_path(label, params)


def hidden(params: Any) -> Any:
  """Blocks of the MLP: the matrices of its hidden layers.

  The Hessian of the output layer is that of ten independent linear regressions: every
  eigenvalue is there ten times, so that no top space of another rank is determined.
  """

  def label(path, leaf):
    first, *inner = (str(key.key) for key in path)
    return f'hidden layer {inner[0]}' if first == 'layers' and leaf.ndim > 1 else None

  return jax.tree_util.tree_map_with_path(label, params)


# Estimators that only watch.


class Watcher(NamedTuple):
  """An estimator that only learns.

  Attributes:
    estimator: what learns.
    recent: the last updates make its whole state, so that it need not see more.
  """

  estimator: Estimator
  recent: bool = False


def overlap_watchers(blocks: Any) -> dict[str, Watcher]:
  """All whose overlap with the Hessian's top space is measured."""
  chosen = {
    f'window {m}, rank 8': Watcher(
      pca(8, history=m, decay=0.0, blocks=blocks), recent=True
    )
    for m in WINDOWS
  }
  pairs = [(0.95, k) for k in RANKS] + [(decay, 16) for decay in DECAYS]
  for decay, rank in dict.fromkeys(pairs):
    chosen[f'decay {decay:g}, rank {rank}'] = Watcher(
      pca(rank, history=8, decay=decay, blocks=blocks)
    )
  chosen['kronecker'] = Watcher(kronecker(refresh_every=2, blocks=blocks))
  chosen['dct'] = Watcher(dct(blocks=blocks), recent=True)
  return chosen


def curvature_watchers(whole_model: str, rank: int) -> dict[str, Estimator]:
  """All whose share of the curvature energy is measured; the first has one block."""
  return {
    whole_model: pca(rank, history=8, blocks=ALL),
    f'pca, rank {rank} a matrix': pca(rank, history=8),
    'kronecker': kronecker(refresh_every=2),
  }


def learner(estimator: Estimator) -> Callable[[Any, Any], Any]:
  """Jitted: state and a stack of updates to the state after them."""

  @functools.partial(jax.jit, donate_argnums=0)
  def learn(state, history):
    step = lambda state, v: (estimator.update(v, state, None), None)
    return jax.lax.scan(step, state, history)[0]

  return learn


def top_hessian(
  loss: Callable[[Any, Any], jax.Array], rank: int, blocks: Any, **options: Any
) -> tuple[Estimator, Callable[[Any, Any, Any], Any]]:
  """An estimator of the Hessian's top space, and its jitted refresh.

  The refresh takes a state, parameters and a batch.
  """
  lanczos = hessian_lanczos(rank, refresh_every=1, blocks=blocks, **options)

  @jax.jit
  def refresh(state, params, batch):
    value_fn = lambda params: loss(params, batch)
    return lanczos.update(params, state, params, value_fn=value_fn)

  return lanczos, refresh


# What is dominant.


def dominant_masks(estimator: Estimator, state: Any, update: Any) -> list[jax.Array]:
  """What is dominant, in every call that `apply` makes of a spectral function."""
  masks: list[jax.Array] = []

  def record(variance, dominant):
    masks.append(dominant)
    return variance

  estimator.apply(record, update, state)
  return masks


def held_projector(
  estimator: Estimator, masks: list[jax.Array], state: Any
) -> Callable[[Any], Any]:
  """The projector on what the masks say; `dct` would choose anew for each vector."""

  def project(tree):
    position = iter(masks)
    replay = lambda variance, _: next(position).astype(variance.dtype)
    return estimator.apply(replay, tree, state)[0]

  return project


def dominant_size(
  estimator: Estimator, masks: list[jax.Array], state: Any, update: Any
) -> jax.Array:
  """Dimensions of the dominant space of each block."""
  if hasattr(state, 'basis'):
    spectra = spectrum(state, estimator.blocks(update))
    return jnp.stack([(x > 0).sum() for x in spectra])
  # `kronecker` and `dct` call f for the rest and for the directions of each leaf.
  leaves = estimator.blocks(update).select(update)
  pairs = zip(masks[1::2], leaves, strict=True)
  return jnp.stack([jnp.broadcast_to(m, x.shape).sum() for m, x in pairs])
