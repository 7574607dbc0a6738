"""Batches of small matrices, decomposed safely on every platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _one_by_one_on_cpu(decompose: Callable) -> Callable:
  # On CPU a batched LAPACK call waits, on a thread of XLA's pool, for work it hands to
  # the same pool: two such calls at once (two matrix sizes, two simulated devices) can
  # wait for each other for ever. A single matrix is decomposed in place.
  def batched(x: jax.Array) -> Any:
    return jax.lax.platform_dependent(
      x, cpu=lambda x: jax.lax.map(decompose, x), default=jax.vmap(decompose)
    )

  return batched


@_one_by_one_on_cpu
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues, descending, and as rows the eigenvectors of `(batch, n, n)`."""
  values, vectors = jnp.linalg.eigh(matrix)
  return values[::-1], vectors.T[::-1]


@_one_by_one_on_cpu
def inverse_cholesky(gram: jax.Array) -> jax.Array:
  """R^-1 with R R^T = gram and R lower triangular; NaN where gram is not definite."""
  factor = jnp.linalg.cholesky(gram)
  eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
  return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)


@_one_by_one_on_cpu
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U, S, V^T of `(batch, m, n)`."""
  return tuple(jnp.linalg.svd(matrix, full_matrices=False))
