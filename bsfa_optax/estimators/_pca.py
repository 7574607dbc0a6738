"""Principal components of the updates, block by block."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsfa_optax import _blocks, _check, _low_rank, _stack, _svd
from bsfa_optax._estimator import Estimator


class PCAState(NamedTuple):
  """State of the `pca` estimator.

  Attributes:
    pca_step: updates seen, int32 ().
    basis: orthonormal rows of each block, stacks (rank, *shape), in the storage
      dtype.
    history: the last updates, stacks (history, *shape), in the storage dtype.
    variance: sum of squares of the history along each row of the basis, float
      (blocks, rank), descending; 0 where there is no direction.
    total_variance: sum of squares of the history, float (blocks,).
    explained_variance: share of `total_variance` that the basis holds at the last
      refresh, float (blocks,).
  """

  pca_step: jax.Array
  basis: Any
  history: Any
  variance: jax.Array
  total_variance: jax.Array
  explained_variance: jax.Array


def pca(
  rank: int = 16,
  history: int = 8,
  *,
  decay: float = 0.95,
  centered: bool = False,
  sample_every: int = 1,
  refresh_every: int | None = None,
  solver: Literal['auto', 'gram', 'randomized'] = 'auto',
  storage_dtype: Any = None,
  blocks: _blocks.BlockLabels = None,
  batch_axes: _blocks.BatchAxes = None,
  axis_name: str | Sequence[str] | None = None,
) -> Estimator:
  r"""Principal component analysis of past updates, block by block.

  At a refresh the dominant subspace becomes the span of the top `rank` right
  singular vectors of

  .. math::
    A = \begin{bmatrix} \sqrt{\beta^m}\,\mathrm{diag}(s)\,V \\ H \end{bmatrix},

  where :math:`V` and :math:`s` are the previous directions and singular values,
  :math:`H` the last :math:`m` = `history` sampled updates, the one of age
  :math:`i` scaled by :math:`\sqrt{\beta^i}`, and :math:`\beta` = `decay`. So the
  directions are those of an exponential moving covariance, truncated to `rank`
  directions. With ``decay=0`` the history is a plain window of the last `history`
  updates: the paper's PPE, and with one block a leaf its BPPE.

  Memory is ``rank + history`` rows of each block's size.

  Args:
    rank: directions to keep in each block (k).
    history: sampled updates in the buffer (m).
    decay: weight of a sampled update relative to the next one, in [0, 1); the memory
      is ``1 / (1 - decay)`` samples. 0 stands for a window in which all `history`
      rows count the same.
    centered: subtract the mean of the buffered updates before the analysis. With
      ``decay > 0`` every buffer is centred on its own mean.
    sample_every: keep every so many-th update.
    refresh_every: updates between two refreshes. Defaults to
      ``history * sample_every``, which is also the only value with ``decay > 0``:
      there every sample must count exactly once.
    solver: ``'gram'`` decomposes the Gram matrix of the rows; ``'randomized'`` is a
      randomized range finder (8 more rows than `rank`, 2 power iterations, warm
      started from the last basis, orthonormalised by Cholesky QR); ``'auto'`` takes
      the one with fewer operations. Directions with singular values under about 2e-3
      (float32; 1e-7 in float64) of the greatest count as absent.
    storage_dtype: dtype of the stored rows; the parameters' own by default.
    blocks: labels that group leaves into blocks: a tree like the parameters (or a
      prefix of it) with string leaves, or a function from parameters to such a
      tree. Leaves with the same label are one block, leaves labelled None are left
      alone. By default each leaf with two or more axes is its own block.
    batch_axes: axes that index blocks within a leaf: a tree like the parameters (or
      a prefix of it) with leaves None, int or tuple of ints, or a function from
      parameters to such a tree. A leaf (L, m, n) with batch axis 0 is L blocks.
    axis_name: mesh axes of ``jax.shard_map`` that split the parameters (never their
      batch axes). What is summed over a block is then summed over these too. A leaf
      that does not vary over an axis is not split by it; with ``check_vma=False`` every
      leaf is taken to be split. Not for jit, which needs no help.

  Returns:
    An `Estimator`. It is the identity until ``max(history, rank)`` samples are in
    (``history`` with ``decay=0``).

  Raises:
    ValueError: for an option out of range, with its name, value and remedy.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax import bsfa, pca
    >>> ppe = pca(rank=4, history=16, decay=0.0, refresh_every=4)
    >>> tx = optax.chain(optax.sgd(0.1), bsfa(0.5, 2.0, estimator=ppe))
    >>> state = tx.init({'kernel': jnp.zeros((8, 8))})
    >>> optax.tree.get(state, 'explained_variance').shape
    (1,)

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025

    Halko, Martinsson, Tropp, `Finding Structure with Randomness: Probabilistic
    Algorithms for Constructing Approximate Matrix Decompositions
    <https://arxiv.org/abs/0909.4061>`_, 2011
  """
  _check.positive_int('rank', rank)
  _check.positive_int('history', history)
  _check.positive_int('sample_every', sample_every)
  _check.in_range('decay', decay, 0.0, 1.0)
  if refresh_every is None:
    refresh_every = history * sample_every
  _check.positive_int('refresh_every', refresh_every)
  _check.floating('storage_dtype', storage_dtype)
  if decay == 0 and rank > history:
    raise ValueError(
      f'rank must not exceed history when decay is 0, got rank={rank} and'
      f' history={history}; raise history, lower rank, or set decay > 0.'
    )
  if decay > 0 and refresh_every != history * sample_every:
    raise ValueError(
      'refresh_every must be history * sample_every when decay > 0, so that every'
      f' sample counts once; got refresh_every={refresh_every} for'
      f' history={history} and sample_every={sample_every}; leave it out, or set'
      ' decay=0 for a sliding window.'
    )
  if centered and history == 1:
    raise ValueError(
      'centered needs history of at least 2 (one row minus its mean is zero), got'
      ' history=1; raise history or set centered=False.'
    )
  if solver not in ('auto', 'gram', 'randomized'):
    raise ValueError(f"solver must be 'auto', 'gram' or 'randomized', got {solver!r}.")
  rows = history + (rank if decay > 0 else 0)
  if solver == 'auto':
    solver = _svd.cheaper_solver(rank, rows)
  samples_needed = max(history, rank)  # rank <= history in a plain window
  updates_needed = (samples_needed - 1) * sample_every + 1
  first_refresh = refresh_every * math.ceil(updates_needed / refresh_every)
  # In a full decayed buffer, position i holds the sample of age history - 1 - i.
  weights = [decay ** (history - 1 - i) if decay > 0 else 1.0 for i in range(history)]

  def partition(params):
    return _blocks.resolve(params, blocks, batch_axes, axis_name)

  def init(params):
    parts = partition(params)
    dtypes = [x.dtype for x in parts.select(params)]
    dtype = functools.reduce(np.promote_types, dtypes, np.dtype('float32'))
    count = max(parts.count, 1)  # Orbax saves no empty arrays
    return PCAState(
      pca_step=jnp.zeros((), jnp.int32),
      basis=_stack.zeros(params, parts, rank, storage_dtype),
      history=_stack.zeros(params, parts, history, storage_dtype),
      variance=jnp.zeros((count, rank), dtype),
      total_variance=jnp.zeros((count,), dtype),
      explained_variance=jnp.zeros((count,), dtype),
    )

  def rows_of(parts, state):
    """The matrix A of the docstring."""
    dtype, count = state.variance.dtype, state.variance.shape[0]
    weight = jnp.array(weights, dtype)
    mix = jnp.diag(jnp.sqrt(weight))
    if centered:
      mix = mix @ (jnp.eye(history, dtype=dtype) - (weight / weight.sum())[None])
    mix = jnp.broadcast_to(mix, (count, history, history))
    samples = jax.tree.leaves(state.history)
    if decay == 0:
      return _svd.Rows(parts, (samples,), mix)
    scale = jnp.sqrt(decay**history * state.variance)[:, :, None]
    kept = scale * jnp.eye(rank, dtype=dtype)[None]
    mix = jnp.concatenate(
      [
        jnp.pad(kept, ((0, 0), (0, 0), (0, history))),
        jnp.pad(mix, ((0, 0), (0, 0), (rank, 0))),
      ],
      axis=1,
    )
    return _svd.Rows(parts, (jax.tree.leaves(state.basis), samples), mix)

  def sampled_variance(parts, state):
    """Sum of squares of the buffer about its mean if centred, (blocks,)."""
    samples = jax.tree.leaves(state.history)
    weight = jnp.array(weights, state.variance.dtype)
    total = (
      parts.gather(
        [_stack.row_norms(*x) for x in zip(samples, parts.batch_axes, strict=True)], 1
      )
      * weight[None]
    ).sum(1)
    if centered:
      mean = jnp.broadcast_to(weight / weight.sum(), (parts.count, 1, history))
      means = _svd.combine(parts, mean, samples)
      norms = parts.gather(
        [_stack.row_norms(*x) for x in zip(means, parts.batch_axes, strict=True)], 1
      )
      total -= weight.sum() * norms[:, 0]
    return total

  def refresh(updates, state):
    parts = partition(updates)
    a = rows_of(parts, state)
    if solver == 'gram':
      variance, basis = _svd.gram_svd(a, rank)
    else:
      key = jax.random.fold_in(jax.random.key(0), state.pca_step)
      variance, basis = _svd.randomized_svd(a, rank, jax.tree.leaves(state.basis), key)
    # Directions dropped earlier still count in the total.
    total = decay**history * state.total_variance + sampled_variance(parts, state)
    total = jnp.maximum(total, variance.sum(1))
    share = variance.sum(1) / jnp.where(total > 0, total, 1)
    return state._replace(
      basis=_like(state.basis, basis),
      variance=variance,
      total_variance=total,
      explained_variance=share,
    )

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    parts = partition(updates)
    if not parts.count:
      return state._replace(pca_step=state.pca_step + 1)
    index = (state.pca_step // sample_every) % history
    due = state.pca_step % sample_every == 0

    def write(rows, value):
      value = value.astype(rows.dtype)
      if sample_every > 1:
        value = jnp.where(
          due, value, jax.lax.dynamic_index_in_dim(rows, index, 0, False)
        )
      return jax.lax.dynamic_update_index_in_dim(rows, value, index, 0)

    written = map(write, jax.tree.leaves(state.history), parts.select(updates))
    step = state.pca_step + 1
    state = state._replace(pca_step=step, history=_like(state.history, list(written)))
    ready = step >= (first_refresh if decay == 0 else refresh_every)
    complete = ready & (step % refresh_every == 0)
    return _stack.keep_replicated(
      jax.lax.cond(complete, refresh, _keep, updates, state)
    )

  def apply(f, updates, state):
    parts = partition(updates)
    if not parts.count:
      return updates, jnp.zeros_like(state.total_variance)
    active = state.pca_step >= first_refresh
    total, variance = state.total_variance, state.variance
    active &= total > 0
    mean = jnp.where(active, total, 1) / jnp.array(parts.sizes, total.dtype)
    rest = jnp.array([max(n - rank, 1) for n in parts.sizes], total.dtype)
    rest = (total - variance.sum(1)) / rest / mean  # per direction, relative
    basis = jax.tree.leaves(state.basis)
    relative = variance / mean[:, None]
    return _low_rank.apply(f, updates, parts, basis, relative, rest, active)

  return Estimator(init, update, apply, partition)


def _keep(updates, state):
  del updates
  return state


def _like(tree, leaves):
  """`leaves` in the structure and dtypes of the stacks in `tree`."""
  old, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(
    structure, [new.astype(x.dtype) for new, x in zip(leaves, old, strict=True)]
  )
