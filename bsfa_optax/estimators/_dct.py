"""The strongest frequencies of each update, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _blocks, _check, _separable, _stack
from bsfa_optax._estimator import Estimator

MAX_SIZE = 46340  # 2 n^2 < 2^32: beyond, the phases of the basis would overflow


def dct(
  rank: int = 16,
  *,
  axes: _blocks.BatchAxes = None,
  blocks: _blocks.BlockLabels = None,
  batch_axes: _blocks.BatchAxes = None,
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
    axes: the axes among which to choose: a tree like the parameters (or a prefix of it)
      with leaves None, int or tuple of ints, or a function from parameters to such
      a tree. None stands for all but the batch axes. Taken is the shortest axis of
      more than `rank` entries (of equal ones the last), or the longest if there is
      none. Name the axes that a mesh leaves whole; `bsfa_optax.kronecker` shows how. A
      leaf without a named axis is left alone.
    blocks: labels of the leaves to filter, None for those to leave alone; see
      `bsfa_optax.pca`. Here every leaf is a block of its own.
    batch_axes: axes that index blocks within a leaf; see `bsfa_optax.pca`.
    axis_name: mesh axes of ``jax.shard_map`` that split the parameters; see
      `bsfa_optax.pca`. They must not split batch axes nor `axes`, which have to be
      given for each leaf that is split.

  Returns:
    An `Estimator`.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy, and at
      ``init`` if one label stands for several leaves, or `axes` names an axis that a
      leaf has not or that is a batch axis.

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
  _check.positive_int('rank', rank)

  def partition(params):
    return _separable.partition('dct', params, blocks, batch_axes, axis_name)

  def transformed_axes(params, parts):
    """For each leaf in a block its axis with a basis, in a tuple (empty if none)."""
    chosen = []
    for x, named in zip(
      parts.select(_blocks.unbox(params)),
      _separable.named_axes(params, parts, axes),
      strict=True,
    ):
      size = lambda axis, x=x: x.shape[axis]
      long = [axis for axis in named if size(axis) > rank]
      best = min(reversed(long), key=size) if long else max(named, key=size, default=-1)
      if best >= 0 and size(best) > MAX_SIZE:
        raise ValueError(
          f'axes must have at most {MAX_SIZE} entries for dct, got axis {best} of a'
          f' leaf of shape {x.shape}; name a shorter one, or () to leave it alone.'
        )
      chosen.append((best,) if best >= 0 else ())
    return chosen

  def init(params):
    transformed_axes(params, partition(params))  # for its errors
    return optax.EmptyState()

  def update(updates, state, params=None, **extra_args):
    del updates, params, extra_args
    return state

  def apply(f, updates, state):
    del state
    parts = partition(updates)
    if not parts.count:
      return updates, jnp.zeros((1,), jnp.float32)
    rotated, energies = [], []
    values, chosen = parts.select(updates), transformed_axes(updates, parts)
    bases = [
      tuple(cosines(v.shape[axis], _stack.accumulator(v.dtype)) for axis in along)
      for v, along in zip(values, chosen, strict=True)
    ]
    for v, basis, along, batch in zip(
      values, bases, chosen, parts.batch_axes, strict=True
    ):
      # One basis for the whole batch.
      rotated.append(_stack.rotate(v, basis, along, ()))
      energies.append(_stack.squared_norm(rotated[-1], tuple(sorted(batch + along))))
    energies = parts.sum_over_shards(energies)

    filtered, fractions = [], []
    for v, coefficients, energy, basis, along, batch in zip(
      values, rotated, energies, bases, chosen, parts.batch_axes, strict=True
    ):
      others = tuple(a for a in range(v.ndim) if a not in batch + along)
      energy = jnp.expand_dims(energy, others)
      total = energy.sum(along, keepdims=True)
      share = energy / jnp.where(total > 0, total, 1)
      dominant = jnp.zeros(energy.shape, bool)
      for axis in along:
        dominant = strongest(share, rank, axis)
      variance = share * math.prod(v.shape[axis] for axis in along)
      present = bool(along) & (total > 0)
      filtered.append(
        _separable.filtered(
          f, v, coefficients, basis, along, (), variance, dominant, present
        )
      )
      inside = jnp.where(dominant, share, 0).sum(along)
      fractions.append(jnp.sqrt(inside).astype(jnp.float32).reshape(-1))
    return parts.replace(updates, filtered), jnp.concatenate(fractions)

  return Estimator(init, update, apply, partition)


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
