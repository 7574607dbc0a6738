"""Batches of small matrices, decomposed safely on every platform."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import P
import jax.numpy as jnp

from bsfa_optax import _vectors


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


LARGE = 2**22  # entries: more at once gain no speed, only need memory


def by_size(
  function: Callable, matrices: list[jax.Array], mesh_axis: str | None = None
) -> list[Any]:
  """Applies a function of `(batch, n, n)` to arrays of matrices `(..., n, n)`.

  All matrices of one size are one batch; a large one goes through in portions.

  Args:
    function: returns an array, or a tree of arrays, with the batch axis first.
    matrices: arrays of any batch shapes.
    mesh_axis: the devices along this axis of the mesh take equal shares of a batch, and
      gather what they found; by default each has the whole of it.

  Returns:
    For each array what `function` gives, with its own batch axes.
  """
  out: list[Any] = [None] * len(matrices)
  for n in sorted({x.shape[-1] for x in matrices}):
    members = [i for i, x in enumerate(matrices) if x.shape[-1] == n]
    batch = jnp.concatenate([matrices[i].reshape(-1, n, n) for i in members])
    if mesh_axis is None:
      found = _in_portions(function, batch)
    else:
      found = _distributed(functools.partial(_in_portions, function), batch, mesh_axis)
    start = 0
    for i in members:
      shape = matrices[i].shape[:-2]
      stop = start + math.prod(shape)
      out[i] = jax.tree.map(
        lambda x, a=start, b=stop, s=shape: x[a:b].reshape(*s, *x.shape[1:]), found
      )
      start = stop
  return out


def _in_portions(function: Callable, batch: jax.Array) -> Any:
  portion = max(LARGE // batch.shape[-1] ** 2, 1)
  if len(batch) <= portion:
    return function(batch)
  single = lambda x: jax.tree.map(lambda y: y[0], function(x[None]))
  return jax.lax.map(single, batch, batch_size=portion)


def _distributed(function: Callable, batch: jax.Array, mesh_axis: str) -> Any:
  """`function(batch)`, of which each device along a mesh axis makes its share."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh_axis not in mesh.axis_names:
    raise ValueError(
      f'distribute_over must be an axis of the mesh in use, got {mesh_axis!r}, but that'
      f' has {list(mesh.axis_names)}; call the update within jax.set_mesh(mesh).'
    )
  rows = -(-len(batch) // mesh.shape[mesh_axis]) * mesh.shape[mesh_axis]
  filled = batch[jnp.arange(rows) % len(batch)]  # each device has as many
  filled = _vectors.resharded(filled, batch, (mesh_axis, None, None))
  share = jax.shard_map(
    function, in_specs=P(mesh_axis), out_specs=P(mesh_axis), axis_names={mesh_axis}
  )
  found = jax.tree.map(_vectors.replicate, share(filled))
  return jax.tree.map(lambda x: x[: len(batch)], _vectors.keep_replicated(found))
