"""Products of curvature matrices with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from bsfa_optax import _blocks, _lanczos, _svd


def hessian(
  parts: _blocks.Blocks, params: optax.Params, value_fn: Callable[..., jax.Array]
) -> _lanczos.Matvec:
  """Products with each block's diagonal block of the Hessian of `value_fn`."""
  leaves = parts.select(params)
  gradient = jax.grad(lambda leaves: value_fn(parts.replace(params, leaves)))
  _, product = jax.linearize(gradient, leaves)
  return _lanczos.block_by_block(parts, lambda v: _cast(product(_cast(v, leaves)), v))


def gauss_newton(
  parts: _blocks.Blocks,
  params: optax.Params,
  output_fn: Callable[..., Any],
  loss_fn: Callable[..., jax.Array],
) -> _lanczos.Matvec:
  """The same for J^T (Hessian of `loss_fn` at the outputs) J."""
  leaves = parts.select(params)
  outputs, forward = jax.linearize(
    lambda leaves: output_fn(parts.replace(params, leaves)), leaves
  )
  backward = jax.linear_transpose(forward, leaves)
  _, inner = jax.linearize(jax.grad(loss_fn), outputs)
  return _lanczos.block_by_block(
    parts, lambda v: _cast(backward(inner(forward(_cast(v, leaves))))[0], v)
  )


def _cast(v: _svd.Leaves, like: _svd.Leaves) -> _svd.Leaves:
  return [x.astype(p.dtype) for x, p in zip(v, like, strict=True)]
