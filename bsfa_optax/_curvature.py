"""Products of curvature matrices with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _lanczos, _vectors
from bsfa_optax._leaves import Layout, Vector


def hessian(
  layout: Layout, params: optax.Params, value_fn: Callable[..., jax.Array]
) -> _lanczos.Matvec:
  """Products with each block's diagonal block of the Hessian of `value_fn`."""
  leaves = layout.select(params)
  gradient = jax.grad(lambda leaves: value_fn(layout.replace(params, leaves)))
  _, product = jax.linearize(gradient, leaves)
  return _block_by_block(layout, lambda v: _cast(product(_cast(v, leaves)), v))


def gauss_newton(
  layout: Layout,
  params: optax.Params,
  output_fn: Callable[..., Any],
  loss_fn: Callable[..., jax.Array],
) -> _lanczos.Matvec:
  """The same for J^T (Hessian of `loss_fn` at the outputs) J."""
  leaves = layout.select(params)
  outputs, forward = jax.linearize(
    lambda leaves: output_fn(layout.replace(params, leaves)), leaves
  )
  backward = jax.linear_transpose(forward, leaves)
  _, inner = jax.linearize(jax.grad(loss_fn), outputs)
  return _block_by_block(
    layout, lambda v: _cast(backward(inner(forward(_cast(v, leaves))))[0], v)
  )


def _cast(v: Vector, like: Vector) -> Vector:
  return [x.astype(p.dtype) for x, p in zip(v, like, strict=True)]


def _block_by_block(layout: Layout, matvec: _lanczos.Matvec) -> _lanczos.Matvec:
  """Products with the diagonal blocks of a matrix, from one with all of it for each."""
  if layout.count == 1:
    return matvec

  def products(leaves):
    def add(out, index):
      here = jnp.arange(layout.count) == index
      zeros = [jnp.zeros_like(x) for x in leaves]
      product = matvec(_vectors.select(layout, here, leaves, zeros))
      return _vectors.select(layout, here, product, out), None

    zeros = [jnp.zeros_like(x) for x in leaves]
    return jax.lax.scan(add, zeros, jnp.arange(layout.count))[0]

  return products
