"""Matrices among the parameters: which, of what rank, and their arithmetic.

On an explicit mesh every product says where its result lies. Small matrices are
decomposed where their batch index lies, so that a stack split over its layers needs no
communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from bsfa_optax import _check, _svd, _vectors
from bsfa_optax._vectors import accumulator, product, resharded, sharding_of, spec_of

BatchAxes = int | Callable[[str, Any], int]


def check(rank: Any, leaves: Any, batch_axes: Any) -> None:
  """Raises unless these options of a choice are of the right kind."""
  if not isinstance(rank, float):
    _check.positive_int(rank=rank)
  elif not 0 < rank <= 1:
    raise ValueError(
      'rank must be a positive integer or a share of the shorter side in (0, 1], got'
      f' {rank!r}.'
    )
  _check.predicate(leaves=leaves)
  if not callable(batch_axes) and not (isinstance(batch_axes, int) and batch_axes >= 0):
    raise ValueError(
      'batch_axes must be the number of leading axes that index layers, or a function'
      f' (name, leaf) -> number, got {batch_axes!r}; 1 for layers stacked for a scan.'
    )


def ranks(
  params: Any, rank: int | float, leaves: _vectors.Predicate, batch_axes: BatchAxes
) -> Any:
  """For each leaf the rank to work with, 0 if it is left alone; a box is a leaf."""
  _vectors.check_arrays(params)
  names, nodes, treedef = _vectors.flatten(params, _vectors.is_box)
  arrays = [jax.tree.leaves(node)[0] for node in nodes]
  count = batch_axes if callable(batch_axes) else lambda name, leaf: batch_axes
  batch = list(map(count, names, arrays))
  chosen = _vectors.choose(names, arrays, [tuple(range(n)) for n in batch], leaves)
  found = []
  for name, x, n, (yes, _) in zip(names, arrays, batch, chosen, strict=True):
    is_matrix = np.ndim(x) == 2 + n and jnp.issubdtype(x.dtype, jnp.floating)
    if yes and not is_matrix and leaves is not None:
      raise ValueError(
        f'leaves chose {name!r}, which is no real matrix: shape {np.shape(x)}, dtype'
        f' {jnp.result_type(x)}, with batch_axes {n}. Leave it out, or say how many'
        ' leading axes index layers in batch_axes; split a complex leaf with'
        ' optax.contrib.split_real_and_imaginary.'
      )
    found.append(_rank(rank, name, x) if yes and is_matrix else 0)
  if found and not any(found):
    raise ValueError(
      f'leaves chose no matrix among {len(found)} arrays; name some in `leaves`, or say'
      ' in batch_axes how many leading axes index layers.'
    )
  return treedef.unflatten(found)


def _rank(rank: int | float, name: str, leaf: Any) -> int:
  shorter = min(leaf.shape[-2:])
  if isinstance(rank, float):
    return max(1, round(rank * shorter))
  if rank > shorter:
    raise ValueError(
      f'rank must be at most the shorter side of a matrix, got rank {rank} for {name!r}'
      f' of shape {leaf.shape}; lower it, give a share such as 0.25, or leave the leaf'
      ' out with `leaves`.'
    )
  return rank


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def restarted(old: optax.OptState, new: optax.OptState) -> optax.OptState:
  """The new state with the schedules' counts, and injected numbers, of the old."""

  def choose(old, new):
    if isinstance(old, _INJECTED):
      return old._replace(inner_state=restarted(old.inner_state, new.inner_state))
    return old if isinstance(old, optax.ScaleByScheduleState) else new

  has_count = lambda x: isinstance(x, (optax.ScaleByScheduleState, *_INJECTED))
  return jax.tree.map(choose, old, new, is_leaf=has_count)


def each_matrix(f: Callable, x: jax.Array) -> Any:
  """Results of `f`, which takes `(batch, n, m)`, for every matrix of `(*batch, n, m)`.

  A matrix is whole where it is decomposed; one split within itself is gathered.
  """
  spec = spec_of(x)[:-2]

  def local(x):
    results = f(x.reshape(-1, *x.shape[-2:]))
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), results)

  x = resharded(x, x, (*spec, None, None))
  if any(spec):
    specs = PartitionSpec(*spec)
    return jax.shard_map(local, in_specs=specs, out_specs=specs)(x)
  return local(x)


def orthonormal(y: jax.Array) -> jax.Array:
  """Columns that span what those of `(*batch, n, k)` span, by Cholesky QR, twice."""
  # The second time takes away what the first lost to an ill-conditioned Gram matrix.
  for _ in range(2):
    inverse = each_matrix(_svd.inverse_cholesky, product('sk,sl->kl', y, y))
    y = product('sk,lk->sl', y, inverse)
  return y


def greatest(score: jax.Array, count: int) -> jax.Array:
  """Indices of the greatest `(*batch, n)`, int32; top_k would gather the batch."""
  order = jnp.argsort(score, axis=-1, descending=True)
  return order[..., :count].astype(jnp.int32)


def gaussian(key: jax.Array, like: jax.Array, columns: int) -> jax.Array:
  """Normal numbers `(*batch, n, columns)` for `like` of shape `(*batch, m, n)`."""
  *batch, _, short = spec_of(like)
  shape = (*like.shape[:-2], like.shape[-1], columns)
  where = sharding_of(like, (*batch, short, None))
  return jax.random.normal(key, shape, accumulator(like.dtype), out_sharding=where)


def top_directions(g: jax.Array, rank: int, key: jax.Array) -> jax.Array:
  """The top right singular vectors of `(*batch, m, n)` as columns `(*batch, n, rank)`.

  Orthogonal iteration from a random start (Halko, Martinsson, Tropp, 2011). The matrix
  is used in products alone, and so is never gathered.
  """
  g = g.astype(accumulator(g.dtype))
  # In units of its norm, so that neither a tiny nor a huge gradient leaves the range.
  square = jnp.square(g).sum((-2, -1), keepdims=True)
  scale = lax.rsqrt(jnp.where(square > 0, square, 1))
  step = lambda q: product('ms,mk->sk', g, product('ms,sk->mk', g, q) * scale) * scale
  q = orthonormal(gaussian(key, g, min(rank + _svd.OVERSAMPLING, g.shape[-1])))
  for _ in range(_svd.POWER_ITERATIONS):
    # A little of q itself, so that a singular matrix leaves columns of full rank.
    q = orthonormal(step(q) + 1e-5 * q)
  image = product('ms,sk->mk', g, q) * scale
  _, vectors = each_matrix(_vectors.eigh, product('mk,ml->kl', image, image))
  return product('sk,rk->sr', q, vectors[..., :rank, :])
