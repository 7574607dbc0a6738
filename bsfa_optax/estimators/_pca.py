"""Principal components of the updates, block by block."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsfa_optax import _check, _svd, _vectors
from bsfa_optax._learned import Decomposition, Estimator, from_rows, is_due, keep
from bsfa_optax._vectors import Layout, Vector


class PCAState(NamedTuple):
  """Memory of the `pca` estimator.

  Attributes:
    basis: orthonormal rows of each block, stacks (rank, *shape), in the storage
      dtype.
    history: the last updates, stacks (history, *shape), in the storage dtype.
    squared_norms: of the updates in the history, float (blocks, history).
    variance: sum of squares of the history along each row of the basis, float
      (blocks, rank), descending; 0 where there is no direction.
    total_variance: sum of squares of the history, float (blocks,).
    is_complete: whether as many updates are in as the basis has rows, bool ().
  """

  basis: Any
  history: Any
  squared_norms: jax.Array
  variance: jax.Array
  total_variance: jax.Array
  is_complete: jax.Array


def pca(
  rank: int = 2,
  history: int = 4,
  *,
  decay: float = 0.95,
  refresh_every: int | None = None,
  solver: Literal['auto', 'gram', 'randomized'] = 'auto',
  storage_dtype: Any = jnp.bfloat16,
  leaves: _vectors.Predicate = None,
  labels: _vectors.Labels = None,
  batch_axes: _vectors.Axes = None,
  axis_name: str | Sequence[str] | None = None,
) -> Estimator:
  r"""Principal component analysis of past updates, block by block.

  At a refresh the dominant subspace becomes the span of the top `rank` right
  singular vectors of

  .. math::
    A = \begin{bmatrix} \sqrt{\beta^m}\,\mathrm{diag}(s)\,V \\ H \end{bmatrix},

  where :math:`V` and :math:`s` are the previous directions and singular values,
  :math:`H` the last :math:`m` = `history` updates, the one of age
  :math:`i` scaled by :math:`\sqrt{\beta^i}`, and :math:`\beta` = `decay`. So the
  directions are those of an exponential moving covariance, truncated to `rank`
  directions. With ``decay=0`` the history is a plain window of the last `history`
  updates: the paper's PPE, and with one block a leaf its BPPE.

  Memory is ``rank + history`` rows of each block's size, and a refresh needs room for
  `rank` more: by default 12 bytes a parameter, and up to 4 more during a refresh. In
  float32 a refresh needs twice what the basis takes, and the randomized solver more:
  `bsfa_optax.state.temporary_bytes` tells.

  With decay neither an update nor the past counts for more than updates of ten times
  the median norm of the history would: one huge update does not drown all others.

  Args:
    rank: directions to keep in each block (k).
    history: updates in the buffer (m).
    decay: weight of an update relative to the next one, in [0, 1); the memory
      is ``1 / (1 - decay)`` updates. 0 stands for a window in which all `history`
      rows count the same.
    refresh_every: updates between two refreshes. Defaults to `history`, which is also
      the only value with ``decay > 0``: there every update must count exactly once.
    solver: ``'gram'`` decomposes the Gram matrix of the rows; ``'randomized'`` is a
      randomized range finder (8 more rows than `rank`, 2 power iterations, warm
      started from the last basis, orthonormalised by Cholesky QR); ``'auto'`` takes
      the one with fewer operations. Directions with singular values under about 2e-3
      (float32; 1e-7 in float64, 1e-2 in bfloat16) of the greatest count as absent.
    storage_dtype: dtype of the stored rows; None for the parameters' own.
    leaves: which leaves are filtered, as in `bsfa_optax.scale_by_whitening`; each is a
      block of its own.
    labels: instead of `leaves`, labels that group leaves into blocks: a tree like the
      parameters (or a prefix of it) with string leaves, or a function from parameters
      to such a tree. Leaves with the same label are one block, leaves labelled None are
      left alone. ``labels='all'`` makes all parameters one block.
    batch_axes: axes that index blocks within a leaf, as in
      `bsfa_optax.scale_by_whitening`.
    axis_name: mesh axes of ``jax.shard_map`` that split the parameters (never their
      batch axes), as in `bsfa_optax.scale_by_whitening`.

  Returns:
    An `Estimator`. It is the identity until ``max(history, rank)`` updates are in
    (``history`` with ``decay=0``).

  Raises:
    ValueError: for an option out of range, with its name, value and remedy.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax import bsfa, pca
    >>> ppe = pca(rank=4, history=16, decay=0.0, refresh_every=4)
    >>> tx = optax.chain(optax.sgd(0.1), bsfa(0.5, 2.0, estimator=ppe))
    >>> state = tx.init({'kernel': jnp.zeros((8, 8))})
    >>> optax.tree.get(state, 'total_variance').shape
    (1,)

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025

    Halko, Martinsson, Tropp, `Finding Structure with Randomness: Probabilistic
    Algorithms for Constructing Approximate Matrix Decompositions
    <https://arxiv.org/abs/0909.4061>`_, 2011
  """
  if refresh_every is None:
    refresh_every = history
  _check.positive_int(rank=rank, history=history, refresh_every=refresh_every)
  _check.fraction(decay=decay)
  _check.floating(storage_dtype=storage_dtype)
  if decay == 0 and rank > history:
    raise ValueError(
      f'rank must not exceed history when decay is 0, got rank={rank} and'
      f' history={history}; raise history, lower rank, or set decay > 0.'
    )
  if decay > 0 and refresh_every != history:
    raise ValueError(
      'refresh_every must be history when decay > 0, so that every update counts'
      f' once; got refresh_every={refresh_every} for history={history}; leave it out,'
      ' or set decay=0 for a sliding window.'
    )
  _check.one_of('auto', 'gram', 'randomized', solver=solver)
  if solver == 'auto':
    solver = _svd.cheaper_solver(rank, history + (rank if decay > 0 else 0))
  first_refresh = refresh_every * math.ceil(max(history, rank) / refresh_every)

  layout_of = functools.partial(
    _vectors.layout,
    leaves=leaves,
    labels=labels,
    batch_axes=batch_axes,
    axis_name=axis_name,
  )

  def init(layout, params):
    zeros = functools.partial(_vectors.block_zeros, layout, dtype=layout.dtype)
    return PCAState(
      basis=_vectors.zeros(params, layout, rank, storage_dtype),
      history=_vectors.zeros(params, layout, history, storage_dtype),
      squared_norms=zeros(history),
      variance=zeros(rank),
      total_variance=zeros(),
      is_complete=jnp.zeros((), bool),
    )

  def learn(layout, vector, memory, count, params, **extra_args):
    index = count % history
    written = [
      jax.lax.dynamic_update_index_in_dim(rows, value.astype(rows.dtype), index, 0)
      for rows, value in zip(jax.tree.leaves(memory.history), vector, strict=True)
    ]
    norms = _vectors.squared_norms(layout, vector).astype(memory.variance.dtype)
    memory = memory._replace(
      history=_like(memory.history, written),
      squared_norms=memory.squared_norms.at[:, index].set(norms),
    )
    is_complete = count >= first_refresh - 1  # count + 1 may overflow
    due = is_due(count, refresh_every)
    if decay == 0:
      due &= is_complete
    refresh = functools.partial(_refreshed, layout, decay, solver)
    return jax.lax.cond(due, refresh, keep, vector, memory, count, is_complete)

  return Estimator(layout_of, init, learn, _decompose)


def _refreshed(
  layout: Layout,
  decay: float,
  solver: str,
  vector: Vector,
  memory: PCAState,
  count: jax.Array,
  is_complete: jax.Array,
) -> PCAState:
  """The memory with the basis computed anew; the vector is in its history already."""
  past, weights = _weights(memory, decay)
  samples, old = jax.tree.leaves(memory.history), jax.tree.leaves(memory.basis)
  rank = memory.variance.shape[1]
  # The matrix A of `pca`, and the sum of squares, in which directions that were dropped
  # earlier still count.
  total = (weights * memory.squared_norms).sum(1)
  if past is None:
    a = _svd.Rows(layout, (samples,), jnp.sqrt(weights))
  else:
    squares = jnp.concatenate([past[:, None] * memory.variance, weights], 1)
    a = _svd.Rows(layout, (old, samples), jnp.sqrt(squares))
    total += past * memory.total_variance
  if solver == 'gram':
    variance, basis = _svd.gram_svd(a, rank)
  else:
    key = jax.random.fold_in(jax.random.key(0), count)
    variance, basis = _svd.randomized_svd(a, rank, old, key)
  return memory._replace(
    basis=_like(memory.basis, basis),
    variance=variance,
    total_variance=jnp.maximum(total, variance.sum(1)),
    is_complete=is_complete,
  )


def _decompose(layout: Layout, vector: Vector, memory: PCAState) -> Decomposition:
  total, variance = memory.total_variance, memory.variance
  rank = variance.shape[1]
  ready = (total > 0) & memory.is_complete
  mean = jnp.where(ready, total, 1) / jnp.array(layout.sizes, total.dtype)
  others = jnp.array([max(n - rank, 1) for n in layout.sizes], total.dtype)
  rest = (total - variance.sum(1)) / others / mean  # per direction, relative
  basis = jax.tree.leaves(memory.basis)
  return from_rows(layout, vector, basis, variance / mean[:, None], rest, ready)


def _weights(memory: PCAState, decay: float) -> tuple[Any, jax.Array]:
  """Of the past (blocks,), or None, and of the buffer's rows (blocks, history).

  In a full buffer row i has the age history - 1 - i. With decay, neither a row nor the
  past counts for more than updates of ten times the buffer's median norm: else all
  others would be lost in the rounding of one huge update.
  """
  squares = memory.squared_norms
  history = squares.shape[1]
  if decay == 0:
    return None, jnp.ones_like(squares)
  zeros = (squares <= 0).sum(1, keepdims=True)  # the median of the others, the lower
  middle = (history - 1 + zeros) // 2
  limit = 100 * jnp.take_along_axis(jnp.sort(squares), middle, 1)
  weight = lambda x, limit: jnp.where((limit > 0) & (x > limit), limit / x, 1)
  ages = np.arange(history)[::-1]
  decays = jnp.array(decay**ages, squares.dtype)[None]
  past = weight(memory.total_variance, limit[:, 0] / (1 - decay))
  return decay**history * past, decays * weight(squares, limit)


def _like(tree: Any, vector: Vector) -> Any:
  """A vector in the structure and dtypes of the stacks in `tree`."""
  old, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(
    structure, [new.astype(x.dtype) for new, x in zip(vector, old, strict=True)]
  )
