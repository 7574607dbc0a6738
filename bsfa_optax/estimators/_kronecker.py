"""Principal components with a Kronecker-factored covariance, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bsfa_optax import _check, _learned, _vectors
from bsfa_optax._vectors import Part


class KroneckerFactors(NamedTuple):
  """Memory of the `kronecker` estimator: a `KroneckerFactors` for each part.

  A part is a leaf, or all leaves that are alike behind a first axis: its batch.

  Attributes:
    basis: for each factored axis of n entries the eigenvectors as columns,
      (*batch, n, n), in the storage dtype.
    spectrum: for each factored axis the eigenvalues, descending, float32 (*batch, n).
  """

  basis: tuple[jax.Array, ...]
  spectrum: tuple[jax.Array, ...]


def kronecker(
  *,
  decay: float = 0.9,
  refresh_every: _learned.Interval | None = None,
  max_size: int = 2048,
  max_ratio: float = 4.0,
  storage_dtype: Any = jnp.float32,
  leaves: _vectors.Predicate = None,
  axes: _vectors.Axes = None,
  batch_axes: _vectors.Axes = None,
  axis_name: str | Sequence[str] | None = None,
) -> _learned.Estimator:
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
    storage_dtype: dtype of the stored eigenvectors.
    leaves: which leaves are filtered, as in `bsfa_optax.scale_by_whitening`, like all
      options that follow. Every leaf is a block of its own.
    axes: the axes of which the two longest within `max_size` and `max_ratio` have a
      factor. A leaf without one is left alone.
    batch_axes: axes that index blocks within a leaf.
    axis_name: mesh axes of ``jax.shard_map`` that split the parameters.

  Returns:
    An `Estimator`. It is the identity until the first refresh.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy, and at
      ``init`` if `axes` names an axis that a leaf has not or that is a batch axis.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> from bsfa_optax.state import state_bytes
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.kronecker(refresh_every=5))
    >>> matrix = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    >>> state_bytes(tx, matrix) // 4 - (128**2 + 128) - (256**2 + 256)  # three numbers
    3

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
  _check.fraction(decay=decay)
  interval = _learned.growing(50) if refresh_every is None else refresh_every
  _check.interval(refresh_every=interval)
  _check.positive_int(max_size=max_size)
  _check.positive(max_ratio=max_ratio)
  _check.floating(storage_dtype=storage_dtype)

  layout_of = _vectors.layouts_with_factors(leaves, axes, batch_axes, axis_name)

  def factored(layout):
    return [_factored_axes(part, max_size, max_ratio) for part in layout.parts]

  def init(layout, params):
    def factors(part, own):
      sizes = [part.shape[axis] for axis in own]
      batch = part.batch_shape
      return KroneckerFactors(
        tuple(jnp.tile(jnp.eye(n, dtype=storage_dtype), (*batch, 1, 1)) for n in sizes),
        tuple(jnp.zeros((*batch, n), jnp.float32) for n in sizes),
      )

    return _learned.for_each_part(layout, factors, factored(layout))

  def learn(layout, vector, memory, count, params, **extra_args):
    own = factored(layout)

    def refresh(vector, memory):
      bases, spectra = map(list, zip(*memory, strict=True))
      rotated = _vectors.rotate(layout, vector, bases, own)
      moments = layout.sum_over_shards(layout.map(_moments, rotated, own))
      sums = jax.tree.map(functools.partial(_decayed, decay), spectra, moments)
      matrices, structure = jax.tree.flatten(sums)
      # All factors of one size are one batch.
      turned = _vectors.by_size(_vectors.eigh, matrices)
      # Rounding may leave the least eigenvalues of a covariance below 0.
      values = jax.tree.unflatten(structure, [jnp.maximum(x, 0) for x, _ in turned])
      turns = jax.tree.unflatten(structure, [rows for _, rows in turned])
      return tuple(map(KroneckerFactors, jax.tree.map(_turned, bases, turns), values))

    due = _learned.is_due(count, interval)
    return jax.lax.cond(due, refresh, _learned.keep, vector, memory)

  def decompose(layout, vector, memory):
    own = factored(layout)
    variance = layout.map(_relative_variance, memory, own)
    bases = [old.basis for old in memory]
    dominant = [x > 1 for x in variance]
    return _learned.from_axes(layout, vector, bases, own, variance, dominant)

  return _learned.Estimator(layout_of, init, learn, decompose)


def _factored_axes(part: Part, max_size: int, max_ratio: float) -> tuple[int, ...]:
  # Shards are smaller than the block, but no factored axis is split.
  fit = [
    axis
    for axis in part.axes
    if 1 < (n := part.shape[axis]) <= max_size and n <= max_ratio * (part.size // n)
  ]
  # The two longest: those of a convolution's kernel that count channels.
  fit.sort(key=part.shape.__getitem__)
  return tuple(sorted(fit[-2:]))


def _moments(part: Part, x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
  return tuple(_vectors.second_moment(x, axis, part.batch_axes) for axis in axes)


def _relative_variance(
  part: Part, factors: KroneckerFactors, axes: tuple[int, ...]
) -> jax.Array:
  """Variance of each coefficient over the mean one, to broadcast to the part."""
  ndim = len(part.shape)
  variance = jnp.ones((1,) * ndim, jnp.float32)
  for axis, spectrum in zip(axes, factors.spectrum, strict=True):
    # Each factor over its own mean: the product is then over the block's mean.
    mean = spectrum.mean(-1, keepdims=True)
    relative = spectrum / jnp.where(mean > 0, mean, 1)
    variance = variance * _vectors.along(relative, (*part.batch_axes, axis), ndim)
  return variance


def _decayed(decay: float, spectrum: jax.Array, moment: jax.Array) -> jax.Array:
  """The covariance in its last eigenbasis, with one more update in it."""
  # Of unit trace: a large update, as early in training, counts no more than another.
  norm = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None]
  moment = (moment / jnp.where(norm > 0, norm, 1)).astype(jnp.float32)
  eye = jnp.broadcast_to(jnp.eye(moment.shape[-1], dtype=moment.dtype), moment.shape)
  return decay * spectrum[..., None] * eye + (1 - decay) * moment


def _turned(basis: jax.Array, turn: jax.Array) -> jax.Array:
  """The basis, columns, turned by orthonormal rows."""
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  new = dot(basis.astype(turn.dtype), jnp.matrix_transpose(turn))
  # A Newton-Schulz step keeps it orthonormal: rounding would add up over refreshes.
  new = 1.5 * new - 0.5 * dot(new, dot(jnp.matrix_transpose(new), new))
  return new.astype(basis.dtype)
