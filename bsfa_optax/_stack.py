"""Arithmetic on stacks: arrays of k or m block-shaped rows.

A stack of a leaf of shape ``shape`` is an array ``(rows, *shape)``: the rows keep
the parameter's shape, and so its sharding, with an unsharded row axis in front.
Everything that contracts or mixes rows is here, and nothing is ever flattened:
on a mesh a Gram matrix is a local product and one all-reduce of a small matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
import string
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax

from bsfa_optax import _blocks


class Stack(NamedTuple):
  """Marks a state leaf with a row axis in front of the parameter's own axes.

  The marker keeps `optax.tree.map_params` with a tree of specs from putting a
  parameter's spec on an array that has one axis more: it raises instead.
  """

  rows: Any  # (rows, *shape)


def zeros(params: Any, blocks: _blocks.Blocks, rows: int, dtype: Any = None) -> Any:
  """A tree like `params` with a zero `Stack` for each leaf in a block.

  Leaves in no block become `optax.MaskedNode`. Flax metadata is kept, with a
  leading unsharded axis.
  """
  position = iter(range(len(jax.tree.leaves(params))))
  members = set(blocks.leaves)

  def stack(node):
    if not jax.tree.leaves(node) or next(position) not in members:
      return optax.MaskedNode()
    boxed = jax.tree.map(
      lambda p: jnp.broadcast_to(jnp.zeros_like(p, dtype), (rows, *p.shape)), node
    )
    return Stack(_add_row_axis(boxed))

  return jax.tree.map(stack, params, is_leaf=_blocks.is_box)


def _add_row_axis(node: Any) -> Any:
  """Tells Flax metadata around a stack that its first axis is unsharded."""
  if not _blocks.is_box(node):
    return node
  if hasattr(node, 'get_metadata'):  # nnx.Variable; it changes in place
    from flax import nnx  # a Variable exists, so Flax is there

    nnx.spmd.add_axis(node, 0, {nnx.PARTITION_NAME: None})
    return node
  return node.add_axis(0, {'partition_name': None})  # linen's AxisMetadata


def accumulator(dtype: Any) -> Any:
  """The dtype in which contractions over a leaf of `dtype` accumulate."""
  return np.promote_types(dtype, np.float32)


def sharding_of(x: jax.Array, spec: Any) -> NamedSharding | None:
  """`spec` on the explicit mesh of `x`; None where there is no explicit mesh."""
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty or AxisType.Explicit not in mesh.axis_types:
    return None
  return NamedSharding(mesh, PartitionSpec(*spec))


def spec_of(x: jax.Array) -> tuple[Any, ...]:
  """The partition of every axis of `x` on an explicit mesh (else None)."""
  spec = tuple(jax.typeof(x).sharding.spec)
  return spec + (None,) * (x.ndim - len(spec))


def keep_replicated(state: Any) -> Any:
  """`state` with all but its stacks on every device of an auto mesh in context.

  Left to itself the compiler may split a new value otherwise than the old one, and
  compile the next step anew.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.are_all_axes_auto:
    return state

  def constrain(x):
    if isinstance(x, Stack) or not isinstance(x, jax.core.Tracer):
      return x
    return lax.with_sharding_constraint(x, PartitionSpec())

  return jax.tree.map(constrain, state, is_leaf=lambda x: isinstance(x, Stack))


def replicate(x: jax.Array) -> jax.Array:
  """`x` on every device of an explicit mesh: small per-block numbers only."""
  sharding = sharding_of(x, (None,) * x.ndim)
  return x if sharding is None else jax.sharding.reshard(x, sharding)


def contract(a: jax.Array, b: jax.Array, batch_axes: tuple[int, ...]) -> jax.Array:
  """Inner products of rows: `(r, *shape), (q, *shape) -> (*batch, r, q)`."""
  dtype = accumulator(np.promote_types(a.dtype, b.dtype))
  batch = tuple(1 + axis for axis in batch_axes)
  inner = tuple(i for i in range(1, a.ndim) if i not in batch)
  spec = spec_of(a)
  out = lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    ((inner, inner), (batch, batch)),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=dtype,
    out_sharding=sharding_of(a, [*(spec[i] for i in batch), None, None]),
  )
  return replicate(out)


def combine(
  weights: jax.Array, rows: jax.Array, batch_axes: tuple[int, ...]
) -> jax.Array:
  """Linear combinations of rows: `(*batch, q, r), (r, *shape) -> (q, *shape)`."""
  dtype = accumulator(rows.dtype)
  batch = tuple(1 + axis for axis in batch_axes)
  n = len(batch)
  spec = spec_of(rows)
  rest = [i for i in range(1, rows.ndim) if i not in batch]
  batch_spec = [spec[i] for i in batch]
  weights = weights.astype(dtype)
  if (sharding := sharding_of(rows, [*batch_spec, None, None])) is not None and n:
    weights = jax.sharding.reshard(weights, sharding)
  out = lax.dot_general(
    weights,
    rows.astype(dtype),
    (((n + 1,), (0,)), (tuple(range(n)), batch)),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=dtype,
    out_sharding=sharding_of(rows, [*batch_spec, None, *(spec[i] for i in rest)]),
  )  # (*batch, q, *rest)
  return jnp.moveaxis(out, tuple(range(n)), batch) if n else out


def row_norms(a: jax.Array, batch_axes: tuple[int, ...]) -> jax.Array:
  """Squared norms of the rows of a stack: `(r, *shape) -> (*batch, r)`."""
  batch = tuple(1 + axis for axis in batch_axes)
  inner = tuple(i for i in range(1, a.ndim) if i not in batch)
  squares = jnp.square(a.astype(accumulator(a.dtype)))
  return replicate(jnp.moveaxis(squares.sum(inner), 0, -1))


def squared_norm(x: jax.Array, batch_axes: tuple[int, ...]) -> jax.Array:
  """Squared norm of a leaf for each batch index: `shape -> (*batch,)`."""
  return row_norms(x[None], batch_axes)[..., 0]


def block_squared_norm(parts: _blocks.Blocks, leaves: Sequence[jax.Array]) -> jax.Array:
  """Squared norm of every block, `(parts.count,)`."""
  return parts.gather(
    [squared_norm(*x) for x in zip(leaves, parts.batch_axes, strict=True)]
  )


def along_axis(
  values: jax.Array, axis: int, batch_axes: tuple[int, ...], ndim: int
) -> jax.Array:
  """`(*batch, n)` with axes of size 1, to broadcast along `axis` of a leaf."""
  present = (*batch_axes, axis)
  values = values.transpose(sorted(range(len(present)), key=present.__getitem__))
  return jnp.expand_dims(values, tuple(i for i in range(ndim) if i not in present))


def expand(
  values: jax.Array, like: jax.Array, batch_axes: tuple[int, ...]
) -> jax.Array:
  """Per-block numbers `(*batch,)` with axes of size 1 to broadcast to `like`."""
  others = tuple(i for i in range(like.ndim) if i not in batch_axes)
  out = jnp.expand_dims(values, others)
  if batch_axes and (sharding_of(like, ())) is not None:
    spec = spec_of(like)
    out = jax.sharding.reshard(
      out,
      sharding_of(
        like, [spec[i] if i in batch_axes else None for i in range(like.ndim)]
      ),
    )
  return out


def rotate(
  x: jax.Array,
  bases: tuple[jax.Array, ...],
  axes: tuple[int, ...],
  batch_axes: tuple[int, ...],
  inverse: bool = False,
) -> jax.Array:
  """Coefficients of a leaf in orthonormal bases of some of its axes.

  Args:
    x: the leaf, `shape`.
    bases: for each of `axes` a basis as columns, `(*batch, n, n)`.
    axes: the axes to rotate.
    batch_axes: the axes that index blocks.
    inverse: back from coefficients to the leaf.

  Returns:
    An array of the shape and sharding of `x`, in the accumulator's dtype.
  """
  dtype = accumulator(x.dtype)
  x = x.astype(dtype)
  letters = string.ascii_lowercase[: x.ndim]
  batch = ''.join(letters[a] for a in batch_axes)
  for axis, basis in zip(axes, bases, strict=True):
    old, new = letters[axis], 'z'
    matrix = new + old if inverse else old + new
    x = jnp.einsum(
      f'{letters},{batch}{matrix}->{letters.replace(old, new)}',
      x,
      basis.astype(dtype),
      precision=lax.Precision.HIGHEST,
      preferred_element_type=dtype,
      out_sharding=sharding_of(x, spec_of(x)),
    )
  return x


def second_moment(x: jax.Array, axis: int, batch_axes: tuple[int, ...]) -> jax.Array:
  """Sum of outer products of the fibres along `axis`: `shape -> (*batch, n, n)`."""
  return contract(
    jnp.moveaxis(x, axis, 0),
    jnp.moveaxis(x, axis, 0),
    tuple(a - (a > axis) for a in batch_axes),
  )


def state_bytes(tx: optax.GradientTransformation, params: optax.Params) -> int:
  """Bytes of optimizer state, before anything is allocated.

  Args:
    tx: any Optax transformation.
    params: the parameters, or anything with their structure, shapes and dtypes
      (``jax.ShapeDtypeStruct`` leaves are enough).

  Returns:
    The bytes of all arrays in ``tx.init(params)``, over all devices, each counted
    once.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp, optax
    >>> params = {'kernel': jax.ShapeDtypeStruct((128, 128), jnp.float32)}
    >>> bsfa_optax.state_bytes(optax.adam(1e-3), params)  # two moments, one count
    131076
  """
  state = jax.eval_shape(tx.init, params)
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
