"""What the estimators share that take single axes of a leaf into a basis.

Here every leaf is a block of its own, and the principal directions are products of
basis vectors of some of its axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bsfa_optax import _blocks, _stack
from bsfa_optax._estimator import SpectralFunction


def partition(
  name: str,
  params: Any,
  blocks: _blocks.BlockLabels,
  batch_axes: _blocks.BatchAxes,
  axis_name: str | Sequence[str] | None,
) -> _blocks.Blocks:
  """The blocks of the estimator `name`, one for each labelled leaf, in their order."""
  parts = _blocks.resolve(params, blocks, batch_axes, axis_name)
  for block in parts.blocks:
    if len(block.leaves) > 1:
      raise ValueError(
        f'blocks must label every leaf differently for {name}, got {block.label!r} for'
        f' {len(block.leaves)} leaves; use pca for blocks of several leaves.'
      )
  return parts


def named_axes(
  params: Any, parts: _blocks.Blocks, axes: _blocks.BatchAxes
) -> list[tuple[int, ...]]:
  """For each leaf in a block the axes that may have a basis, ascending.

  Args:
    params: parameters or updates; abstract and boxed (Flax) leaves are fine.
    parts: their blocks.
    axes: see `bsfa_optax.kronecker`.

  Returns:
    The named axes, or all but the batch axes where none are named.

  Raises:
    ValueError: for an axis out of range, a batch axis, or no named axes for a leaf that
      is split in `jax.shard_map`.
  """
  tree = _blocks.unbox(params)
  specs = _blocks.broadcast(axes, tree, _blocks.is_axes, 'axes')
  found = []
  for block, i, batch, split, x in zip(
    parts.blocks,
    parts.leaves,
    parts.batch_axes,
    parts.split,
    parts.select(tree),
    strict=True,
  ):
    spec = specs[i].value
    if spec is None and split:
      raise ValueError(
        f'axes must be given for {block.label!r}, which is split over the manual mesh'
        f' axes {list(split)}, got None; name the axes that each device holds whole, ()'
        ' if there are none.'
      )
    if spec is None:
      found.append(tuple(a for a in range(x.ndim) if a not in batch))
      continue
    value = (spec,) if isinstance(spec, int) else spec
    if not _blocks.is_axes(value) or any(not -x.ndim <= a < x.ndim for a in value):
      raise ValueError(
        f'axes must lie within the axes of each leaf, got {spec} for {block.label!r} of'
        f' shape {x.shape}; use None for all axes and () for none.'
      )
    value = tuple(sorted({a % x.ndim for a in value}))
    if set(value) & set(batch):
      raise ValueError(
        f'axes must not be batch axes, got axes={spec} for {block.label!r}, whose batch'
        f' axes are {batch}; name an axis in one of them only.'
      )
    found.append(value)
  return found


def filtered(
  f: SpectralFunction,
  v: jax.Array,
  coefficients: jax.Array,
  bases: tuple[jax.Array, ...],
  axes: tuple[int, ...],
  batch_axes: tuple[int, ...],
  variance: jax.Array,
  dominant: jax.Array,
  present: jax.Array,
) -> jax.Array:
  """f(C) v for a leaf with known coefficients in the eigenbasis of C.

  Args:
    f: the spectral function.
    v: the leaf.
    coefficients: `_stack.rotate` of it.
    bases: as for `_stack.rotate`.
    axes: as for `_stack.rotate`.
    batch_axes: as for `_stack.rotate`.
    variance: relative variances, to broadcast to the leaf.
    dominant: booleans, likewise.
    present: booleans with axes of size 1 but for batch axes; where false, the leaf is
      left alone.

  Returns:
    An array of the shape and dtype of `v`.
  """
  # Written as a change of what f makes of the mean variance, so that f = 1 gives
  # back the update to the last bit.
  single = (1,) * v.ndim
  base = f(jnp.ones(single, variance.dtype), jnp.zeros(single, bool))
  base = jnp.where(present, base, 1)
  excess = jnp.where(present, f(variance, dominant) - base, 0)
  change = excess.astype(coefficients.dtype) * coefficients
  change = _stack.rotate(change, bases, axes, batch_axes, inverse=True)
  out = base.astype(change.dtype) * v.astype(change.dtype) + change
  return out.astype(v.dtype)
