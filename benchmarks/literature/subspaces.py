"""All that the reproductions use of `bsfa_optax`: estimators, filters, measurements."""

from __future__ import annotations

from collections.abc import Callable
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bsfa_optax
from bsfa_optax import dct, hessian_lanczos, kronecker
from bsfa_optax.diagnostics import (
  curvature_energy,
  dominant_fraction,
  hessian_top_k,
  projector,
  subspace_overlap,
)
from bsfa_optax.estimators import Estimator, layout

__all__ = [
  'HIDDEN',
  'WHOLE',
  'Estimator',
  'Watcher',
  'chi',
  'curvature_energy',
  'curvature_watchers',
  'dct',
  'dominant',
  'filtered',
  'hessian_lanczos',
  'hessian_top_k',
  'kronecker',
  'last_layer',
  'layout',
  'learner',
  'matrices',
  'overlap_watchers',
  'pca',
  'projector',
  'subspace_overlap',
  'top_hessian',
  'unlearnt',
]

# As the sources: rows as the parameters are.
pca = functools.partial(bsfa_optax.pca, storage_dtype=None)

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


# Blocks. Every leaf chosen is one.


_LAST_LAYER = re.compile(
  r'(layers/1/(attention/(query|output)|mlp/(up|down))|head)/kernel'
)


def matrices(name: str, leaf: Any) -> bool:
  """All matrices, those of the output layer included."""
  del name
  return leaf.ndim > 1


def last_layer(name: str, leaf: Any) -> bool:
  """Of the small LLaMA four matrices of the last layer and the output layer."""
  del leaf
  return bool(_LAST_LAYER.fullmatch(name))


def hidden(name: str, leaf: Any) -> bool:
  """Of the MLP the matrices of the hidden layers.

  The Hessian of the output layer is that of ten independent linear regressions: every
  eigenvalue is there ten times, so that no top space of another rank is determined.
  """
  return name.startswith('layers/') and leaf.ndim > 1


# Options of an estimator or a layout.
HIDDEN = {'leaves': hidden}
WHOLE = {'labels': 'all'}  # all leaves together are a block


# Estimators that only watch.


class Watcher(NamedTuple):
  """An estimator that only learns.

  Attributes:
    estimator: what learns.
    recent: the last updates make its whole state, so that it need not see more.
  """

  estimator: Estimator
  recent: bool = False


def overlap_watchers(blocks: dict[str, Any]) -> dict[str, Watcher]:
  """All whose overlap with the Hessian's top space is measured."""
  chosen = {
    f'window {m}, rank 8': Watcher(pca(8, history=m, decay=0.0, **blocks), recent=True)
    for m in WINDOWS
  }
  pairs = [(0.95, k) for k in RANKS] + [(decay, 16) for decay in DECAYS]
  for decay, rank in dict.fromkeys(pairs):
    chosen[f'decay {decay:g}, rank {rank}'] = Watcher(
      pca(rank, history=8, decay=decay, **blocks)
    )
  chosen['kronecker'] = Watcher(kronecker(refresh_every=2, **blocks))
  chosen['dct'] = Watcher(dct(**blocks), recent=True)
  return chosen


def curvature_watchers(whole_model: str, rank: int) -> dict[str, Estimator]:
  """All whose share of the curvature energy is measured; the first has one block."""
  return {
    whole_model: pca(rank, history=8, **WHOLE),
    f'pca, rank {rank} a matrix': pca(rank, history=8, leaves=matrices),
    'kronecker': kronecker(refresh_every=2, leaves=matrices),
  }


class Learned(NamedTuple):
  """What an estimator has learnt, and from how many vectors."""

  memory: Any
  count: jax.Array


def unlearnt(estimator: Estimator, params: Any) -> Learned:
  memory = estimator.init(estimator.layout(params), params)
  return Learned(memory, jnp.zeros((), jnp.int32))


def _after(estimator: Estimator, state: Learned, v: Any, *args: Any, **extra: Any):
  layout = estimator.layout(v)
  memory = estimator.learn(layout, layout.select(v), *state, *args, **extra)
  return Learned(memory, state.count + 1)


def learner(estimator: Estimator) -> Callable[[Learned, Any], Learned]:
  """Jitted: what is learnt, after a stack of updates more."""

  @functools.partial(jax.jit, donate_argnums=0)
  def learn(state, history):
    step = lambda state, v: (_after(estimator, state, v, None), None)
    return jax.lax.scan(step, state, history)[0]

  return learn


def top_hessian(
  loss: Callable[[Any, Any], jax.Array], rank: int, blocks: dict[str, Any], **options
) -> tuple[Estimator, Callable[[Learned, Any, Any], Learned]]:
  """An estimator of the Hessian's top space, and its jitted refresh.

  The refresh takes what is learnt, parameters and a batch.
  """
  lanczos = hessian_lanczos(rank, refresh_every=1, **blocks, **options)

  @jax.jit
  def refresh(state, params, batch):
    value_fn = lambda params: loss(params, batch)
    return _after(lanczos, state, params, params, value_fn=value_fn)

  return lanczos, refresh


# What is dominant.


def dominant(
  estimator: Estimator, memory: Any, update: Any
) -> tuple[Callable[[Any], Any], dict[str, jax.Array]]:
  """The projector on what is dominant in an update, and its dimensions by block.

  `diagnostics.projector` chooses anew for each vector that it projects, which makes a
  difference for `dct`.
  """
  layout = estimator.layout(update)
  held = estimator.decompose(layout, layout.select(update), memory)

  def decompose(layout, vector, memory):
    found = estimator.decompose(layout, vector, memory)
    return found._replace(dominant=held.dominant, ready=held.ready)

  counted = [
    jnp.broadcast_to(chosen & ready, c.shape).astype(jnp.int32)
    for chosen, ready, c in zip(
      held.dominant, held.spread(held.ready), held.coefficients, strict=True
    )
  ]
  sizes = dict(zip(layout.names, held.collect(counted), strict=True))
  return projector(estimator._replace(decompose=decompose), memory), sizes
