"""Batches of small matrices, decomposed safely on every platform."""

from __future__ import annotations

from collections.abc import Callable
import math
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


LARGE = 2**22  # entries: more at once gain no speed, only need memory


def by_size(function: Callable, matrices: list[jax.Array]) -> list[Any]:
  """Applies a function of `(batch, n, n)` to arrays of matrices `(..., n, n)`.

  All matrices of one size are one batch; a large one goes through in portions.

  Args:
    function: returns an array, or a tree of arrays, with the batch axis first.
    matrices: arrays of any batch shapes.

  Returns:
    For each array what `function` gives, with its own batch axes.
  """
  out: list[Any] = [None] * len(matrices)
  for n in sorted({x.shape[-1] for x in matrices}):
    members = [i for i, x in enumerate(matrices) if x.shape[-1] == n]
    batch = jnp.concatenate([matrices[i].reshape(-1, n, n) for i in members])
    portion = max(LARGE // n**2, 1)
    if len(batch) <= portion:
      found = function(batch)
    else:
      single = lambda x: jax.tree.map(lambda y: y[0], function(x[None]))
      found = jax.lax.map(single, batch, batch_size=portion)
    start = 0
    for i in members:
      shape = matrices[i].shape[:-2]
      stop = start + math.prod(shape)
      out[i] = jax.tree.map(
        lambda x, a=start, b=stop, s=shape: x[a:b].reshape(*s, *x.shape[1:]), found
      )
      start = stop
  return out
