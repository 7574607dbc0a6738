"""Products and decompositions of matrices behind batch axes, on a mesh and off it.

On an explicit mesh every product says where its result lies: an axis of the result is
split as the same axis of an operand is. Small matrices are decomposed where their batch
index lies, so that a stack split over its layers needs no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import string
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from bsfa_optax import _linalg
from bsfa_optax._vectors import accumulator, sharding_of, spec_of

OVERSAMPLING = 8
POWER_ITERATIONS = 2


@_linalg._one_by_one_on_cpu
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U, S, V^T of `(batch, m, n)`."""
  return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def place(x: jax.Array, like: Any, spec: Sequence[Any]) -> jax.Array:
  """`x` with `spec` on the explicit mesh of `like`."""
  sharding = sharding_of(like, spec)
  return x if sharding is None else jax.sharding.reshard(x, sharding)


def zeros(like: Any, shape: Sequence[int], spec: Sequence[Any]) -> jax.Array:
  """Zeros in the dtype and on the mesh of `like`."""
  return jnp.zeros(shape, like.dtype, out_sharding=sharding_of(like, spec))


def product(
  subscripts: str, *operands: jax.Array, precision: Any = lax.Precision.HIGHEST
) -> jax.Array:
  """`einsum` behind batch axes; the result in float32 or wider.

  Args:
    subscripts: as for einsum, in lower case, without the batch axes.
    *operands: arrays; leading axes that have no letter are batch axes, which an operand
      has all or none of.
    precision: as for einsum. If it is None, the operands keep their dtype.
  """
  inputs, output = subscripts.split('->')
  terms = inputs.split(',')
  own = [x.ndim - len(term) for x, term in zip(operands, terms, strict=True)]
  terms = [string.ascii_uppercase[:n] + x for n, x in zip(own, terms, strict=True)]
  output = string.ascii_uppercase[: max(own)] + output
  dtype = functools.reduce(np.promote_types, [x.dtype for x in operands])
  wide = accumulator(dtype)
  partition: dict[str, Any] = {}
  for term, x in zip(terms, operands, strict=True):
    partition |= {c: axis for c, axis in zip(term, spec_of(x), strict=True) if axis}
  return jnp.einsum(
    ','.join(terms) + '->' + output,
    *(x.astype(dtype if precision is None else wide) for x in operands),
    precision=precision,
    preferred_element_type=wide,
    out_sharding=sharding_of(operands[0], [partition.get(c) for c in output]),
  )


def each_matrix(f: Callable, x: jax.Array) -> Any:
  """Results of `f`, which takes `(batch, n, m)`, for every matrix of `(*batch, n, m)`.

  A matrix is whole where it is decomposed; one split within itself is gathered.
  """
  spec = spec_of(x)[:-2]

  def local(x):
    results = f(x.reshape(-1, *x.shape[-2:]))
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), results)

  x = place(x, x, (*spec, None, None))
  if any(spec) and sharding_of(x, spec) is not None:
    specs = PartitionSpec(*spec)
    return jax.shard_map(local, in_specs=specs, out_specs=specs)(x)
  return local(x)


def orthonormal(y: jax.Array) -> jax.Array:
  """Columns that span what those of `(*batch, n, k)` span, by Cholesky QR, twice."""
  k = y.shape[-1]
  for _ in range(2):
    gram = product('sk,sl->kl', y, y)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    shift = jnp.where(trace > 0, k * jnp.finfo(gram.dtype).eps * trace, 1)
    eye = jnp.eye(k, dtype=gram.dtype).reshape((1,) * (gram.ndim - 2) + (k, k))
    inverse = each_matrix(_linalg.inverse_cholesky, gram + shift * eye)
    y = product('sk,lk->sl', y, inverse)
  return y


def one_hot(index: jax.Array, n: int, dtype: Any) -> jax.Array:
  """Rows of the identity, `(*batch, r, n)` for indices `(*batch, r)`."""
  shape = (*index.shape, n)
  columns = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
  columns = place(columns, index, (*spec_of(index), None))
  return (columns == index[..., None]).astype(dtype)


def greatest(score: jax.Array, count: int) -> jax.Array:
  """Indices of the greatest `(*batch, n)`, int32; top_k would gather the batch."""
  order = jnp.argsort(score, axis=-1, descending=True)
  return order[..., :count].astype(jnp.int32)


def gaussian(key: jax.Array, like: jax.Array, columns: int) -> jax.Array:
  """Normal numbers `(*batch, n, columns)` for `like` of shape `(*batch, m, n)`."""
  spec = spec_of(like)
  shape = (*like.shape[:-2], like.shape[-1], columns)
  dtype = accumulator(like.dtype)
  return place(jax.random.normal(key, shape, dtype), like, (*spec[:-2], spec[-1], None))


def top_directions(g: jax.Array, rank: int, key: jax.Array) -> jax.Array:
  """The top right singular vectors of `(*batch, m, n)` as columns `(*batch, n, rank)`.

  Orthogonal iteration from a random start (Halko, Martinsson, Tropp, 2011). The matrix
  is used in products alone, and so is never gathered.
  """
  g = g.astype(accumulator(g.dtype))
  square = jnp.square(g).sum((-2, -1), keepdims=True)
  scale = lax.rsqrt(jnp.where(square > 0, square, 1))
  step = lambda q: product('ms,mk->sk', g, product('ms,sk->mk', g, q) * scale) * scale
  q = orthonormal(gaussian(key, g, min(rank + OVERSAMPLING, g.shape[-1])))
  for _ in range(POWER_ITERATIONS):
    # A little of q itself, so that a singular matrix leaves columns of full rank.
    q = orthonormal(step(q) + 1e-5 * q)
  image = product('ms,sk->mk', g, q) * scale
  _, vectors = each_matrix(_linalg.eigh, product('mk,ml->kl', image, image))
  return product('sk,rk->sr', q, vectors[..., :rank, :])
