"""Top eigenpairs of symmetric matrices known by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsfa_optax import _linalg, _vectors
from bsfa_optax._leaves import Layout, Vector

Matvec = Callable[[Vector], Vector]


def top_eigenpairs(
  layout: Layout,
  matvec: Matvec,
  warm_start: Vector,
  iterations: int,
  key: jax.Array,
  tolerance: float,
) -> tuple[jax.Array, Vector]:
  """The Lanczos method for all blocks at once, orthogonalised twice in every iteration.

  Every vector has the shapes of the leaves, and so their sharding: unlike
  `matfree.decomp.tridiag_sym`, which ravels its vectors, this gathers nothing. The
  searched space holds the warm start and the Krylov space of the sum of its products
  (a thick restart), or else the Krylov space of a random vector. Where that ends
  early, a random vector takes it up, so that as many iterations as the block has
  entries find the whole spectrum.

  Args:
    layout: the layout.
    matvec: products of every block's matrix A with the vector in the block: from leaves
      as `layout.select` gives them to leaves of the same shapes and dtypes.
    warm_start: for each leaf a stack of as many rows as eigenpairs are wanted, near the
      eigenvectors, in the dtype to work in; zeros for a block without one.
    iterations: dimensions of the searched space (one product each), more than rows.
    key: a random key.
    tolerance: relative error of the products; eigenvalues under this share of the
      greatest in size count as 0.

  Returns:
    The greatest eigenvalues (blocks, rank), descending, and orthonormal eigenvectors as
    stacks (rank, *shape). Directions that a block does not have are zero rows of
    eigenvalue 0. The eigenvalues are NaN for a block with a product that is not finite.
  """
  m, rank = iterations, warm_start[0].shape[0]
  dtype = functools.reduce(np.promote_types, [x.dtype for x in warm_start])
  eps = jnp.finfo(dtype).eps
  like = [x[0] for x in warm_start]

  def norm(w):
    return jnp.sqrt(_vectors.squared_norms(layout, w)).astype(dtype)

  def along(rows, w):
    return _vectors.inner(layout, rows, [x[None] for x in w])[:, :, 0]  # (blocks, m)

  def reject(w, rows):
    inside = _vectors.mix(layout, along(rows, w)[:, None], rows)
    return [x - y[0] for x, y in zip(w, inside, strict=True)]

  is_warm = norm(like) > 0

  def body(j, carry):
    rows, w, products, exists = carry
    given = [jax.lax.dynamic_index_in_dim(x, j, 0, False) for x in warm_start]
    w_or_given = _vectors.select(layout, is_warm & (j < rank), given, w)
    new, size = reject(w_or_given, rows), norm(w_or_given)
    rest = norm(new)
    usable = (rest > 32 * eps * size) & jnp.isfinite(rest)  # else it is rounding
    other = _vectors.random_unit(layout, like, jax.random.fold_in(key, j))
    new = _vectors.select(
      layout, usable, _vectors.scale(layout, new, _reciprocal(rest)), other
    )
    new = reject(new, rows)
    rest = norm(new)
    found = rest > jnp.sqrt(eps)  # else the rows span the whole block
    new = _vectors.scale(layout, new, jnp.where(found, _reciprocal(rest), 0))
    rows = [
      jax.lax.dynamic_update_index_in_dim(r, x, j, 0)
      for r, x in zip(rows, new, strict=True)
    ]
    product = matvec(new)
    total = [x + y for x, y in zip(w, product, strict=True)]
    w = _vectors.select(layout, is_warm & (j < rank), total, product)
    products = jax.lax.dynamic_update_index_in_dim(products, along(rows, product), j, 2)
    exists = jax.lax.dynamic_update_index_in_dim(exists, found, j, 1)
    return rows, w, products, exists

  rows = [jnp.broadcast_to(jnp.zeros_like(x), (m, *x.shape)) for x in like]
  w = [jnp.zeros_like(x) for x in like]
  products = jnp.zeros((layout.count, m, m), dtype)
  exists = jnp.zeros((layout.count, m), bool)
  rows, _, products, exists = jax.lax.fori_loop(0, m, body, (rows, w, products, exists))

  # Column j holds the products of A q_j with q_i, i <= j: the upper triangle of the
  # projected matrix, wherever the rows come from.
  finite = jnp.isfinite(products).all((1, 2))
  upper = jnp.triu(jnp.where(finite[:, None, None], products, 0))
  projected = upper + jnp.matrix_transpose(jnp.triu(upper, 1))
  # Absent directions get an eigenvalue below all others, to come last.
  lowest = -1 - 2 * jnp.linalg.norm(projected, axis=(1, 2))
  absent = jnp.where(exists, 0, lowest[:, None])
  values, vectors = _linalg.eigh(
    projected + absent[:, :, None] * jnp.eye(m, dtype=dtype)[None]
  )
  present = jnp.arange(m)[None] < exists.sum(1, keepdims=True)
  values = jnp.where(present, values, 0)
  size = jnp.abs(values)
  noise = max(tolerance, 32 * float(eps)) * size.max(1, keepdims=True)
  values = jnp.where(size > noise, values, 0)[:, :rank]
  vectors = jnp.where(present[:, :, None], vectors, 0)[:, :rank]
  basis = _vectors.mix(layout, vectors, rows)
  return jnp.where(finite[:, None], values, jnp.nan), basis


def _reciprocal(x: jax.Array) -> jax.Array:
  return 1 / jnp.where(x > 0, x, 1)
