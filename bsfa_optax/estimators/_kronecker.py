"""Principal components with a Kronecker-factored covariance, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _blocks, _check, _linalg, _separable, _stack
from bsfa_optax._estimator import Estimator


class Factors(NamedTuple):
  """Eigendecompositions of the covariance factors of one leaf.

  Attributes:
    basis: for each factored axis of n entries the eigenvectors as columns,
      (*batch, n, n), in the storage dtype.
    spectrum: for each factored axis the eigenvalues, descending, float32 (*batch, n).
  """

  basis: tuple[jax.Array, ...]
  spectrum: tuple[jax.Array, ...]


class KroneckerState(NamedTuple):
  """State of the `kronecker` estimator.

  Attributes:
    kronecker_step: updates seen, int32 ().
    factors: a `Factors` for each leaf in a block, in a tree like the parameters.
    explained_variance: share of the variance that the dominant directions (those of
      more than mean variance) held at the last refresh, float32 (blocks,).
  """

  kronecker_step: jax.Array
  factors: Any
  explained_variance: jax.Array


def kronecker(
  *,
  decay: float = 0.9,
  refresh_every: int | Callable[[jax.Array], jax.Array] | None = None,
  max_size: int = 2048,
  max_ratio: float = 4.0,
  axes: _blocks.BatchAxes = None,
  storage_dtype: Any = jnp.float32,
  blocks: _blocks.BlockLabels = None,
  batch_axes: _blocks.BatchAxes = None,
  axis_name: str | Sequence[str] | None = None,
) -> Estimator:
  r"""Principal components with a Kronecker-factored covariance of the updates.

  For a matrix block with updates :math:`G` the covariance is taken as
  :math:`R \otimes L`, with :math:`L` and :math:`R` the exponential moving averages of
  :math:`G G^\top / |G|^2` and :math:`G^\top G / |G|^2`. Its principal directions are
  the outer products of the eigenvectors of both, and the variance along the pair
  (i, j) is :math:`l_i r_j`: all directions of the block are resolved, where `pca`
  keeps a few. Of arrays with more axes the two longest have a factor: those of a
  convolution's kernel that count the channels, not its window. A direction is dominant
  where its variance exceeds the block's mean.

  Only eigenvectors and eigenvalues are stored, no covariance factors: each refresh
  takes the update of its step into the factors' eigenbasis, adds it there to the
  decayed eigenvalues, and rotates the basis by the eigenvectors of the sum. The
  memory for an (m, n) matrix is ``m * m + n * n`` entries.

  On a mesh the eigenvectors are replicated, and along an axis that is not sharded the
  update is rotated where it is. Name these axes in `axes`. Then, on one mesh axis, a
  step of `bsfa_optax.bsfa` has two all-reduces (is the update finite; norms) and a
  refresh one more, of the second moments of the factored axes, ``n * n`` entries for
  an axis of n: XLA merges those of all leaves. A rotation along a sharded axis
  all-gathers the update along it: twice a step, there and back, and three times more
  at a refresh.

  Args:
    decay: weight of the past at a refresh, in [0, 1).
    refresh_every: updates between two refreshes, each of which uses one update; or a
      schedule of it, from the number of updates seen before, int32 (), rounded down
      and at least 1. Refreshed is at the updates whose number, from 1, is a multiple
      of it. By default it grows by one every 50 updates, from 1 to 5: the basis moves
      fastest at the beginning.
    max_size: axes with more entries have no factor, as for the vocabulary axis of an
      embedding. A refresh costs about ``9 * n**3`` operations for an axis of n.
    max_ratio: nor have axes with more than this many times the entries of all other
      axes together: the factor would cost far more than the update.
    axes: the axes of which the two longest within `max_size` and `max_ratio` have a
      factor: a tree like the parameters (or a prefix of it) with leaves None, int or
      tuple of ints, or a function from parameters to such a tree. None stands for all
      that are no batch axes. A leaf without a factored axis is left alone.
    storage_dtype: dtype of the stored eigenvectors.
    blocks: labels of the leaves to filter, None for those to leave alone; see
      `bsfa_optax.pca`. Here every leaf is a block of its own.
    batch_axes: axes that index blocks within a leaf; see `bsfa_optax.pca`.
    axis_name: mesh axes of ``jax.shard_map`` that split the parameters; see
      `bsfa_optax.pca`. They must not split batch axes nor `axes`, which have to be
      given for each leaf that is split.

  Returns:
    An `Estimator`. It is the identity until the first refresh.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy, and at
      ``init`` if one label stands for several leaves, or `axes` names an axis that a
      leaf has not or that is a batch axis.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.kronecker(refresh_every=5))
    >>> matrix = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    >>> bsfa_optax.state_bytes(tx, matrix) // 4 - (128**2 + 128) - (256**2 + 256)
    4

    The axes that a mesh leaves whole:

    >>> def whole(x):
    ...   spec = (*x.sharding.spec, *[None] * x.ndim)
    ...   return tuple(axis for axis in range(x.ndim) if spec[axis] is None)
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> sharding = jax.NamedSharding(mesh, jax.P('fsdp', None))
    >>> params = {'kernel': jax.device_put(jnp.ones((8, 4)), sharding)}
    >>> axes = jax.tree.map(whole, params)
    >>> axes
    {'kernel': (1,)}
    >>> estimator = bsfa_optax.kronecker(axes=axes)

  References:
    Gupta, Koren, Singer, `Shampoo: Preconditioned Stochastic Tensor Optimization
    <https://arxiv.org/abs/1802.09568>`_, 2018

    Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
    <https://arxiv.org/abs/2409.11321>`_, 2024
  """
  _check.in_range('decay', decay, 0.0, 1.0)
  interval = _growing if refresh_every is None else refresh_every
  if not callable(interval):
    _check.positive_int('refresh_every', interval)
  _check.positive_int('max_size', max_size)
  _check.positive('max_ratio', max_ratio)
  _check.floating('storage_dtype', storage_dtype)

  def partition(params):
    return _separable.partition('kronecker', params, blocks, batch_axes, axis_name)

  def factored_axes(params, parts):
    """For each leaf in a block the axes with a factor."""
    named = _separable.named_axes(params, parts, axes)
    found = []
    # Shards are smaller, but no factored axis is split: all devices agree.
    for x, axes_of_leaf, block in zip(
      parts.select(_blocks.unbox(params)), named, parts.blocks, strict=True
    ):
      fit = [
        axis
        for axis in axes_of_leaf
        if 1 < (n := x.shape[axis]) <= max_size and n <= max_ratio * (block.size // n)
      ]
      fit.sort(key=x.shape.__getitem__)
      found.append(tuple(sorted(fit[-2:])))
    return found

  def leaves_of(parts, tree, state):
    """Leaf, factors, factored axes and batch axes of each leaf in a block."""
    factors = jax.tree.leaves(state.factors, is_leaf=_is_factors)
    factors = [x for x in factors if _is_factors(x)]
    return list(
      zip(
        parts.select(tree),
        factors,
        factored_axes(tree, parts),
        parts.batch_axes,
        strict=True,
      )
    )

  def init(params):
    parts = partition(params)
    leaves, structure = jax.tree.flatten(_blocks.unbox(params))
    factors: list[Any] = [optax.MaskedNode()] * len(leaves)
    for i, factored, batch in zip(
      parts.leaves, factored_axes(params, parts), parts.batch_axes, strict=True
    ):
      shape = leaves[i].shape
      stack = tuple(shape[axis] for axis in batch)
      sizes = [shape[axis] for axis in factored]
      eye = lambda n, stack=stack: jnp.tile(
        jnp.eye(n, dtype=storage_dtype), (*stack, 1, 1)
      )
      factors[i] = Factors(
        tuple(eye(n) for n in sizes),
        tuple(jnp.zeros((*stack, n), jnp.float32) for n in sizes),
      )
    return KroneckerState(
      kronecker_step=jnp.zeros((), jnp.int32),
      factors=jax.tree.unflatten(structure, factors),
      explained_variance=jnp.zeros((max(parts.count, 1),), jnp.float32),
    )

  def refresh(updates, state):
    parts = partition(updates)
    leaves = leaves_of(parts, updates, state)
    local = []
    for v, factor, factored, batch in leaves:
      rotated = _stack.rotate(v, factor.basis, factored, batch)
      local.append([_stack.second_moment(rotated, axis, batch) for axis in factored])
    bases, moments = {}, {}  # by (leaf, axis)
    for i, sums in enumerate(parts.sum_over_shards(local)):
      _, factor, factored, batch = leaves[i]
      for axis, basis, spectrum, moment in zip(factored, *factor, sums, strict=True):
        norm = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None]
        moment = (moment / jnp.where(norm > 0, norm, 1)).astype(jnp.float32)
        eye = jnp.eye(spectrum.shape[-1], dtype=spectrum.dtype)
        past = spectrum[..., None] * eye.reshape((1,) * len(batch) + eye.shape)
        bases[i, axis] = basis
        moments[i, axis] = decay * past + (1 - decay) * moment
    spectra = {}
    # All decompositions of one size are one batch.
    for n in sorted({m.shape[-1] for m in moments.values()}):
      keys = [key for key, m in moments.items() if m.shape[-1] == n]
      values, vectors = _linalg.eigh(
        jnp.concatenate([moments[key].reshape(-1, n, n) for key in keys])
      )
      start = 0
      for key in keys:
        shape = moments[key].shape
        stop = start + moments[key].size // n**2
        turn = jnp.matrix_transpose(vectors[start:stop]).reshape(shape)
        bases[key] = _rotated(bases[key], turn)
        spectra[key] = jnp.maximum(values[start:stop], 0).reshape(shape[:-1])
        start = stop
    new, explained = [], []
    for i, (v, _, factored, batch) in enumerate(leaves):
      factor = Factors(
        tuple(bases[i, axis] for axis in factored),
        tuple(spectra[i, axis] for axis in factored),
      )
      variance = relative_variance(factor, v.ndim, factored, batch)
      inside = jnp.where(variance > 1, variance, 0)
      rest = tuple(axis for axis in range(v.ndim) if axis not in batch)
      shape = tuple(v.shape[axis] for axis in batch)
      explained.append(jnp.broadcast_to(inside.mean(rest), shape).reshape(-1))
      new.append(factor)
    position = iter(new)
    return state._replace(
      factors=jax.tree.map(
        lambda _: next(position), state.factors, is_leaf=_is_factors
      ),
      explained_variance=jnp.concatenate(explained),
    )

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    before = state.kronecker_step
    state = state._replace(kronecker_step=optax.safe_increment(before))
    if not partition(updates).count:
      return state
    every = interval(before) if callable(interval) else interval
    due = state.kronecker_step % jnp.maximum(jnp.int32(every), 1) == 0
    return _stack.keep_replicated(jax.lax.cond(due, refresh, _keep, updates, state))

  def apply(f, updates, state):
    parts = partition(updates)
    if not parts.count:
      return updates, jnp.zeros_like(state.explained_variance)
    filtered, norms = [], []
    for v, factor, factored, batch in leaves_of(parts, updates, state):
      rotated = _stack.rotate(v, factor.basis, factored, batch)
      variance = relative_variance(factor, v.ndim, factored, batch)
      rest = tuple(axis for axis in range(v.ndim) if axis not in batch)
      # A leaf without a factored axis has no directions: it is left alone, as is all
      # before the first refresh.
      learned = bool(factored) & (variance > 0).any(rest, keepdims=True)
      dominant = learned & (variance > 1)
      filtered.append(
        _separable.filtered(
          f, v, rotated, factor.basis, factored, batch, variance, dominant, learned
        )
      )
      both = (rotated, jnp.where(dominant, rotated, 0))
      norms.append(jnp.stack([_stack.squared_norm(x, batch) for x in both], -1))
    norm, inside = parts.gather(norms, 1).T
    fraction = inside / jnp.where(norm > 0, norm, 1)
    return parts.replace(updates, filtered), jnp.sqrt(fraction)

  return Estimator(init, update, apply, partition)


def relative_variance(
  factor: Factors, ndim: int, axes: tuple[int, ...], batch_axes: tuple[int, ...]
) -> jax.Array:
  """Variance of each coefficient over the mean one, to broadcast to the leaf."""
  variance = jnp.ones((1,) * ndim, jnp.float32)
  for axis, spectrum in zip(axes, factor.spectrum, strict=True):
    mean = spectrum.mean(-1, keepdims=True)
    relative = spectrum / jnp.where(mean > 0, mean, 1)
    variance = variance * _stack.along_axis(relative, axis, batch_axes, ndim)
  return variance


def _growing(updates_seen: jax.Array) -> jax.Array:
  return jnp.minimum(1 + updates_seen // 50, 5)


def _rotated(basis: jax.Array, turn: jax.Array) -> jax.Array:
  """`basis @ turn`, kept orthonormal by a Newton-Schulz step: rounding would add up."""
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  new = dot(basis.astype(turn.dtype), turn)
  new = 1.5 * new - 0.5 * dot(new, dot(jnp.matrix_transpose(new), new))
  return new.astype(basis.dtype)


def _is_factors(x: Any) -> bool:
  return isinstance(x, Factors)


def _keep(updates: Any, state: Any) -> Any:
  del updates
  return state
