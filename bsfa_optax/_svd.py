"""Truncated singular value decompositions of tall stacks, a batch of blocks at once.

Each solver sees the stacked rows of every block only through small matrices: Gram
matrices (one all-reduce on a mesh) and linear combinations of rows (local). All
blocks' small eigenproblems are solved as one batch.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bsfa_optax import _vectors
from bsfa_optax._vectors import Layout, Vector

OVERSAMPLING = 8
POWER_ITERATIONS = 2


class Rows(NamedTuple):
  """The matrix A = diag(scales) @ rows of each block, (n, size of the block)."""

  layout: Layout
  stacks: tuple[Vector, ...]  # stood on top of each other: n rows in all
  scales: jax.Array  # (blocks, n)

  def _contract(self, a: Vector, b: Vector) -> jax.Array:
    return _vectors.inner(self.layout, a, b).astype(self.scales.dtype)

  def gram(self) -> jax.Array:
    """A A^T, (blocks, n, n)."""
    n = len(self.stacks)
    products: list[list[Any]] = [[None] * n for _ in range(n)]
    for i, j in itertools.combinations_with_replacement(range(n), 2):
      products[i][j] = self._contract(self.stacks[i], self.stacks[j])
      products[j][i] = jnp.matrix_transpose(products[i][j])
    return self.scales[:, :, None] * jnp.block(products) * self.scales[:, None]

  def dot(self, other: Vector) -> jax.Array:
    """A B^T for a stack B of q rows, (blocks, n, q)."""
    inner = [self._contract(a, other) for a in self.stacks]
    return self.scales[:, :, None] * jnp.concatenate(inner, axis=1)

  def combine(self, weights: jax.Array) -> Vector:
    """W A for weights (blocks, q, n), as a stack of q rows."""
    ends = list(itertools.accumulate(stack[0].shape[0] for stack in self.stacks))
    pieces = jnp.split(weights * self.scales[:, None], ends[:-1], axis=2)
    parts = list(map(functools.partial(_vectors.mix, self.layout), pieces, self.stacks))
    return [functools.reduce(jnp.add, leaf) for leaf in zip(*parts, strict=True)]


def gram_svd(a: Rows, rank: int) -> tuple[jax.Array, Vector]:
  """The top right singular vectors of A from the eigenvectors of A A^T.

  Returns:
    Squared singular values (blocks, rank), descending, 0 where A has no further
    direction, and the singular vectors as a stack of `rank` rows.
  """
  narrow = any(x.dtype != a.scales.dtype for stack in a.stacks for x in stack)
  variance, left = _top(a.gram(), rank, 1e-4 if narrow else None)
  inverse = masked_reciprocal(jnp.sqrt(variance))
  rows = a.combine(inverse[:, :, None] * left)
  # Above that floor narrow rows are orthonormal to their own rounding, and a second
  # pass would need a wide copy of them.
  return variance, rows if narrow else orthonormalize(a.layout, rows)


def randomized_svd(
  a: Rows, rank: int, warm_start: Vector, key: jax.Array
) -> tuple[jax.Array, Vector]:
  """The top right singular vectors of A by a randomized range finder.

  Halko, Martinsson, Tropp (2011), with the sketch taken from the left, so that it
  never leaves the row space of A, and Cholesky QR in place of Householder QR.

  Args:
    a: the rows.
    rank: singular vectors wanted.
    warm_start: a stack of `rank` rows near the wanted ones (zero rows are ignored).
    key: a random key for the rest of the sketch.

  Returns:
    As `gram_svd`.
  """
  n = a.scales.shape[1]
  size = min(rank + OVERSAMPLING, n)
  sketch = jax.random.normal(key, (size, n), a.scales.dtype)
  sketch = jnp.broadcast_to(sketch, (a.scales.shape[0], size, n))
  warm = jnp.matrix_transpose(a.dot(warm_start))  # V A^T, one power iteration ahead
  norm = jnp.linalg.norm(warm, axis=2, keepdims=True)
  warm = jnp.where(norm > 0, warm * masked_reciprocal(norm), sketch[:, :rank])
  sketch = jnp.concatenate([warm, sketch[:, rank:]], axis=1)
  for _ in range(POWER_ITERATIONS):
    _, sketch, _ = _orthonormal_range(a, sketch)
  found, sketch, inverse = _orthonormal_range(a, sketch)
  variance, right = _top(sketch @ jnp.matrix_transpose(sketch), rank)
  present = (variance > 0).astype(variance.dtype)[:, :, None]
  rows = _vectors.mix(a.layout, (present * right) @ inverse, found)
  return variance, orthonormalize(a.layout, rows)


def cheaper_solver(rank: int, rows: int) -> Literal['gram', 'randomized']:
  """The solver with fewer operations for `rows` rows, by count of row products."""
  size = min(rank + OVERSAMPLING, rows)
  gram = rows * rows + rank * rows
  # A range takes W A and A Y^T, and Y Y^T in between; then the warm start and V.
  ranges = (POWER_ITERATIONS + 1) * (2 * size * rows + size * size)
  randomized = ranges + rank * rows + rank * size
  return 'gram' if gram <= randomized else 'randomized'


def _orthonormal_range(
  a: Rows, sketch: jax.Array
) -> tuple[Vector, jax.Array, jax.Array]:
  """Y = W A, then Q A^T for Q = R^-1 Y with orthonormal rows, and R^-1."""
  # Only the span of W counts. With orthonormal rows, Y spreads over no more orders of
  # magnitude than A, and less of it is lost to the shift of its Gram matrix.
  sketch = inverse_cholesky(sketch @ jnp.matrix_transpose(sketch)) @ sketch
  found = a.combine(sketch)
  gram = _vectors.inner(a.layout, found, found).astype(sketch.dtype)
  inverse = inverse_cholesky(gram)
  return found, inverse @ jnp.matrix_transpose(a.dot(found)), inverse


def _top(
  gram: jax.Array, rank: int, floor: float | None = None
) -> tuple[jax.Array, jax.Array]:
  """The top eigenvalues (blocks, rank) and, as rows, the eigenvectors of each."""
  values, vectors = _vectors.eigh(gram)
  values, vectors = values[:, :rank], vectors[:, :rank]
  # What is below the rounding of the greatest is noise, not a direction.
  floor = floor or 32 * float(jnp.finfo(values.dtype).eps)
  values = jnp.where(values > floor * values[:, :1], values, 0)
  return values, vectors


def masked_reciprocal(x: jax.Array) -> jax.Array:
  return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def inverse_cholesky(gram: jax.Array) -> jax.Array:
  """R^-1 with R R^T = gram, shifted so that a singular matrix is no error."""
  n = gram.shape[-1]
  trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
  some = trace > jnp.finfo(gram.dtype).tiny
  # Of unit trace, as the shift of a tiny Gram matrix would underflow.
  size = jnp.where(some, trace, 1)
  shift = jnp.where(some, 8 * n * jnp.finfo(gram.dtype).eps, 1)
  eye = jnp.eye(n, dtype=gram.dtype)[None]
  inverse = _vectors.inverse_cholesky(gram / size + shift * eye)
  # Where products underflowed the matrix may be indefinite: no direction can be told.
  inverse = jnp.where(jnp.isfinite(inverse).all((1, 2), keepdims=True), inverse, 0)
  return inverse / jnp.sqrt(size)


def orthonormalize(layout: Layout, rows: Vector) -> Vector:
  """Makes nearly orthonormal rows orthonormal to rounding; zero rows stay zero."""
  gram = _vectors.inner(layout, rows, rows)
  eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
  absent = jnp.diagonal(gram, axis1=1, axis2=2)[:, :, None] < 0.5
  inverse = _vectors.inverse_cholesky(gram + jnp.where(absent, eye, 0))
  # Rows too far from orthonormal have no factor: better kept as they are.
  inverse = jnp.where(jnp.isfinite(inverse).all((1, 2), keepdims=True), inverse, eye)
  return _vectors.mix(layout, inverse, rows)
