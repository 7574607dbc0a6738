"""Spectral functions of a matrix known by its top eigenvectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _blocks, _stack, _svd
from bsfa_optax._estimator import SpectralFunction


def apply(
  f: SpectralFunction,
  updates: optax.Updates,
  parts: _blocks.Blocks,
  basis: _svd.Leaves,
  variance: jax.Array,
  rest: jax.Array,
  active: jax.Array,
) -> tuple[optax.Updates, jax.Array]:
  """`f(C) v`, where C is diagonal in `basis` and a multiple of 1 beside it.

  Args:
    f: the spectral function.
    updates: the updates v.
    parts: their blocks.
    basis: orthonormal rows of each block, stacks (rank, *shape).
    variance: the relative variance along each row, (blocks, rank); 0 where there is no
      direction.
    rest: the relative variance along all other directions, (blocks,).
    active: blocks to filter, booleans (blocks,).

  Returns:
    As `Estimator.apply`.
  """
  values = parts.select(updates)
  dominant = variance > 0
  f_kept = f(variance, dominant)
  f_rest = jnp.where(active, f(rest, jnp.zeros_like(active)), 1)

  along = _svd.contract(parts, basis, [v[None] for v in values])[:, :, 0]
  kept = active[:, None] & dominant
  excess = jnp.where(kept, f_kept - f_rest[:, None], 0) * along
  changes = _svd.combine(parts, excess[:, None, :], basis)
  filtered = []
  for v, change, base, axes in zip(
    values, changes, parts.scatter(f_rest), parts.batch_axes, strict=True
  ):
    dtype = np.promote_types(v.dtype, change.dtype)
    base = _stack.expand(base.astype(dtype), v, axes)
    out = base * v.astype(dtype) + change[0].astype(dtype)
    filtered.append(out.astype(v.dtype))
  norm = _stack.block_squared_norm(parts, values)
  inside = jnp.where(kept, jnp.square(along), 0).sum(1)
  fraction = jnp.sqrt(inside / jnp.where(norm > 0, norm, 1)).astype(variance.dtype)
  return parts.replace(updates, filtered), fraction
