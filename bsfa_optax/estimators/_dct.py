"""The strongest frequencies of each update, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check, _vectors
from bsfa_optax._learned import Estimator, from_axes
from bsfa_optax._vectors import Part

MAX_SIZE = 46340  # 2 n^2 < 2^32: beyond, the phases of the basis would overflow


def dct(
  rank: int = 16,
  *,
  leaves: _vectors.Predicate = None,
  axes: _vectors.Axes = None,
  batch_axes: _vectors.Axes = None,
  axis_name: str | Sequence[str] | None = None,
) -> Estimator:
  r"""The strongest frequencies of each update, leaf by leaf.

  The basis is fixed: the orthogonal discrete cosine transform (DCT-II) along one axis
  of the leaf,

  .. math::
    D_{ij} = \sqrt{c_j / n}\, \cos\frac{\pi (2 i + 1) j}{2 n},
    \qquad c_0 = 1, \quad c_j = 2 .

  Only which of its columns are dominant depends on the update :math:`v`: the `rank`
  ones along which :math:`v` has most energy (sum of squares). The variance of a
  frequency is its energy. So there is no decomposition and no history: the state is
  empty, the filter works from the first update on, and it is nonlinear, as the
  projector follows :math:`v`. Another history, as of `bsfa_optax.accelerate`, is
  not looked at. A step costs two products of each leaf with an (n, n)
  matrix, which is made anew in every step.

  On a mesh, along an unsharded axis, a step sums n energies over the devices, for all
  leaves in one all-reduce; along a sharded axis the update is all-gathered twice.

  Args:
    rank: frequencies to take as dominant; all with any energy if the axis has no more.
    leaves: which leaves are filtered, as in `bsfa_optax.scale_by_whitening`, like all
      options that follow. Every leaf is a block of its own.
    axes: the axes among which to choose. Taken is the shortest axis of more than `rank`
      entries (of equal ones the last), or the longest if there is none. Name the axes
      that a mesh leaves whole. A leaf without a named axis is left alone.
    batch_axes: axes that index blocks within a leaf.
    axis_name: mesh axes of ``jax.shard_map`` that split the parameters.

  Returns:
    An `Estimator`.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy, and at
      ``init`` if `axes` names an axis that a leaf has not or that is a batch axis.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> tx = bsfa_optax.bsfa(0.0, 1.0, estimator=bsfa_optax.dct(rank=1))
    >>> constant = jnp.ones((8, 4))  # all of frequency 0
    >>> ripple = jnp.ones((8, 1)) * jnp.array([[1.0, -1.0, -1.0, 1.0]])
    >>> filtered, _ = tx.update(3 * constant + ripple, tx.init(constant))
    >>> bool(jnp.allclose(filtered, ripple, atol=1e-5))
    True

  References:
    Modoranu, Safaryan, Schultheis, Ryabinin, Chumachenko, Alistarh, `FFT-based
    Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
    Models <https://arxiv.org/abs/2505.17967>`_, 2025
  """
  _check.positive_int(rank=rank)

  stacked = _vectors.layouts_with_factors(leaves, axes, batch_axes, axis_name)
  transformed = functools.partial(_transformed_axis, rank=rank)

  def layout_of(params):
    layout = stacked(params)
    layout.map(transformed)  # for its error
    return layout

  init = lambda layout, params: optax.EmptyState()
  learn = lambda layout, vector, memory, *_, **extra_args: memory

  def decompose(layout, vector, memory):
    chosen = layout.map(transformed)

    def bases_of(part, x, own):
      dtype = _vectors.accumulator(x.dtype)
      return [cosines(part.shape[axis], dtype) for axis in own]

    def energies(part, x, own):
      others = tuple(axis for axis in part.inner_axes if axis not in own)
      return _vectors.energy(x, others, keepdims=True)

    def found(part, energy, own):
      total = energy.sum(own, keepdims=True)
      share = energy / jnp.where(total > 0, total, 1)
      # Without an axis there is one number, and it is not above its mean.
      dominant = strongest(share, rank, own[0]) if own else share > 1
      return share * math.prod(part.shape[axis] for axis in own), dominant

    bases = layout.map(bases_of, vector, chosen)
    rotated = _vectors.rotate(layout, vector, bases, chosen)
    summed = layout.sum_over_shards(layout.map(energies, rotated, chosen))
    variance, dominant = map(list, zip(*layout.map(found, summed, chosen), strict=True))
    return from_axes(layout, vector, bases, chosen, variance, dominant)

  return Estimator(layout_of, init, learn, decompose)


def _transformed_axis(part: Part, rank: int) -> tuple[int, ...]:
  """The axis of a part with a basis, in a tuple (empty if there is none)."""
  size = part.shape.__getitem__
  long = [axis for axis in part.axes if size(axis) > rank]
  if not part.axes:
    return ()
  best = min(reversed(long), key=size) if long else max(part.axes, key=size)
  if size(best) > MAX_SIZE:
    raise ValueError(
      f'axes must have at most {MAX_SIZE} entries for dct, got axis'
      f' {best - part.stacked} of a leaf of shape {part.leaves[0].shape}; name a'
      ' shorter one, or () to leave it alone.'
    )
  return (best,)


def cosines(n: int, dtype: Any) -> jax.Array:
  """The orthogonal DCT-II basis as columns, (n, n), lowest frequency first."""
  i, j = (jax.lax.broadcasted_iota(np.uint32, (n, n), axis) for axis in (0, 1))
  # In integers, as the rounding of a phase of many turns would spoil the cosine.
  phase = (2 * i + 1) * j % (4 * n)
  scale = jnp.where(j == 0, math.sqrt(1 / n), math.sqrt(2 / n)).astype(dtype)
  return scale * jnp.cos(phase.astype(dtype) * (math.pi / (2 * n)))


def strongest(energy: jax.Array, rank: int, axis: int) -> jax.Array:
  """The `rank` greatest along `axis` that are not 0; of equal ones the first."""
  order = jnp.argsort(energy, axis, stable=True, descending=True)
  return (jnp.argsort(order, axis) < rank) & (energy > 0)
