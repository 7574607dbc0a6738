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
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from bsfa_optax import _linalg

OVERSAMPLING = 8
POWER_ITERATIONS = 2


@_linalg._one_by_one_on_cpu
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U, S, V^T of `(batch, m, n)`."""
  return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def spec_of(x: Any) -> tuple[Any, ...]:
  """The partition of every axis of an array or `jax.ShapeDtypeStruct`."""
  sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
  if sharding is None:
    sharding = getattr(jax.typeof(x), 'sharding', None)
  spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
  return spec + (None,) * (x.ndim - len(spec))


def sharding_for(x: Any, spec: Sequence[Any]) -> NamedSharding | None:
  """`spec` on the explicit mesh of `x`; None where there is no explicit mesh."""
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty or AxisType.Explicit not in mesh.axis_types:
    return None
  return NamedSharding(mesh, PartitionSpec(*spec))


def place(x: jax.Array, like: Any, spec: Sequence[Any]) -> jax.Array:
  """`x` with `spec` on the explicit mesh of `like`."""
  sharding = sharding_for(like, spec)
  return x if sharding is None else jax.sharding.reshard(x, sharding)


def zeros(like: Any, shape: Sequence[int], spec: Sequence[Any]) -> jax.Array:
  """Zeros in the dtype and on the mesh of `like`."""
  return jnp.zeros(shape, like.dtype, out_sharding=sharding_for(like, spec))


def product(
  subscripts: str, *operands: jax.Array, precision: Any = lax.Precision.HIGHEST
) -> jax.Array:
  """`einsum` behind batch axes that all operands share; the result in float32 or wider.

  Args:
    subscripts: as for einsum, in lower case, without the batch axes.
    *operands: arrays whose leading axes that have no letter are batch axes.
    precision: as for einsum. If it is None, the operands keep their dtype.
  """
  inputs, output = subscripts.split('->')
  terms = inputs.split(',')
  batch = string.ascii_uppercase[: operands[0].ndim - len(terms[0])]
  terms, output = [batch + term for term in terms], batch + output
  dtype = functools.reduce(np.promote_types, [x.dtype for x in operands])
  wide = np.promote_types(dtype, np.float32)
  partition: dict[str, Any] = {}
  for term, x in zip(terms, operands, strict=True):
    partition |= {c: axis for c, axis in zip(term, spec_of(x), strict=True) if axis}
  return jnp.einsum(
    ','.join(terms) + '->' + output,
    *(x.astype(dtype if precision is None else wide) for x in operands),
    precision=precision,
    preferred_element_type=wide,
    out_sharding=sharding_for(operands[0], [partition.get(c) for c in output]),
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
  if any(spec) and sharding_for(x, spec) is not None:
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


def greatest(score: jax.Array, count: int) -> jax.Array:
  """Indices of the greatest `(*batch, n)`, int32; top_k would gather the batch."""
  order = jnp.argsort(score, axis=-1, descending=True)
  return order[..., :count].astype(jnp.int32)


def gaussian(key: jax.Array, like: jax.Array, columns: int) -> jax.Array:
  """Normal numbers `(*batch, n, columns)` for `like` of shape `(*batch, m, n)`."""
  spec = spec_of(like)
  shape = (*like.shape[:-2], like.shape[-1], columns)
  dtype = np.promote_types(like.dtype, np.float32)
  return place(jax.random.normal(key, shape, dtype), like, (*spec[:-2], spec[-1], None))


def top_directions(g: jax.Array, rank: int, key: jax.Array) -> jax.Array:
  """The top right singular vectors of `(*batch, m, n)` as columns `(*batch, n, rank)`.

  Orthogonal iteration from a random start (Halko, Martinsson, Tropp, 2011). The matrix
  is used in products alone, and so is never gathered.
  """
  g = g.astype(np.promote_types(g.dtype, np.float32))
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
