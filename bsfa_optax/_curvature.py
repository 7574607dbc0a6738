"""Curvature matrices: products with vectors, and their top eigenpairs by Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _vectors
from bsfa_optax._svd import masked_reciprocal
from bsfa_optax._vectors import Layout, Vector

Matvec = Callable[[Vector], Vector]


def hessian(
  layout: Layout, params: optax.Params, value_fn: Callable[..., jax.Array]
) -> Matvec:
  """Products with each block's diagonal block of the Hessian of `value_fn`."""
  # That of Gauss-Newton for a model of which the parameters are the outputs.
  loss_fn = lambda leaves: value_fn(layout.replace(params, leaves))
  return gauss_newton(layout, params, layout.select, loss_fn)


def gauss_newton(
  layout: Layout,
  params: optax.Params,
  output_fn: Callable[..., Any],
  loss_fn: Callable[..., jax.Array],
) -> Matvec:
  """The same for J^T (Hessian of `loss_fn` at the outputs) J."""
  leaves = layout.select(params)
  # Linearized once: all products share the forward passes.
  outputs, forward = jax.linearize(
    lambda leaves: output_fn(layout.replace(params, leaves)), leaves
  )
  backward = jax.linear_transpose(forward, leaves)
  _, inner = jax.linearize(jax.grad(loss_fn), outputs)
  cast = lambda v, like: jax.tree.map(lambda x, p: x.astype(p.dtype), v, like)

  def product(v):
    (out,) = backward(inner(forward(cast(v, leaves))))
    return cast(out, v)

  def products(v):
    zeros = jax.tree.map(jnp.zeros_like, v)

    def add(out, index):
      here = jnp.arange(layout.count) == index
      alone = product(_vectors.select(layout, here, v, zeros))
      return _vectors.select(layout, here, alone, out), None

    # One after another: all at once they would hold the model's activations that often.
    return jax.lax.scan(add, zeros, jnp.arange(layout.count))[0]

  return product if layout.count == 1 else products


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
  dtype = np.result_type(*[x.dtype for x in warm_start])
  eps = jnp.finfo(dtype).eps
  like = [x[0] for x in warm_start]

  def norm(w):
    return jnp.sqrt(_vectors.squared_norms(layout, w)).astype(dtype)

  def along(rows, w):
    return _vectors.inner(layout, rows, [x[None] for x in w])[:, :, 0]  # (blocks, m)

  def reject(w, rows):
    inside = _vectors.mix(layout, along(rows, w)[:, None], rows)
    return jax.tree.map(lambda x, y: x - y[0], w, inside)

  is_warm = norm(like) > 0
  unit = jnp.array(layout.sizes, jnp.float32) ** -0.5

  def body(j, carry):
    rows, w, products, exists = carry
    given = [jax.lax.dynamic_index_in_dim(x, j, 0, False) for x in warm_start]
    w_or_given = _vectors.select(layout, is_warm & (j < rank), given, w)
    new, size = reject(w_or_given, rows), norm(w_or_given)
    rest = norm(new)
    usable = (rest > 32 * eps * size) & jnp.isfinite(rest)  # else it is rounding
    new = _vectors.scale(layout, new, masked_reciprocal(rest))
    other = _vectors.random(jax.random.normal, like, jax.random.fold_in(key, j))
    other = _vectors.scale(layout, other, unit)  # of norm about 1
    new = _vectors.select(layout, usable, new, other)
    new = reject(new, rows)  # a second time: rounding of the first is gone, too
    rest = norm(new)
    found = rest > jnp.sqrt(eps)  # else the rows span the whole block
    new = _vectors.scale(layout, new, jnp.where(found, masked_reciprocal(rest), 0))
    rows = jax.tree.map(
      lambda r, x: jax.lax.dynamic_update_index_in_dim(r, x, j, 0), rows, new
    )
    product = matvec(new)
    total = jax.tree.map(jnp.add, w, product)
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
  values, vectors = _vectors.eigh(
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
