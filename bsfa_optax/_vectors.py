"""Arithmetic on block vectors: the one place that knows of meshes.

A *vector* is a list of arrays, one for each part of a `Layout`; a *stack* is a vector
of which every array has rows in front, ``(rows, *shape)``. Both keep the parameters'
shape, and so their sharding. Nothing is ever flattened: on a mesh a Gram matrix is a
local product and one all-reduce of a small matrix.
"""

from __future__ import annotations

import functools
import string
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax

from bsfa_optax import _leaves
from bsfa_optax._leaves import Layout, Vector


class Stack(NamedTuple):
  """Marks a state leaf with a row axis in front of the parameter's own axes.

  The marker keeps `optax.tree.map_params` with a tree of specs from putting a
  parameter's spec on an array that has one axis more: it raises instead.
  """

  rows: Any  # (rows, *shape)


def zeros(params: Any, layout: Layout, rows: int, dtype: Any = None) -> Any:
  """A tree like `params` with a zero `Stack` for each leaf in a block.

  Leaves in no block become `optax.MaskedNode`. Flax metadata is kept, with a
  leading unsharded axis. For layouts whose parts are single leaves.
  """
  position = iter(range(len(layout.leaves)))

  def make(node):
    if not jax.tree.leaves(node) or not layout.leaves[next(position)].filtered:
      return optax.MaskedNode()
    boxed = jax.tree.map(
      lambda p: jnp.broadcast_to(jnp.zeros_like(p, dtype), (rows, *jnp.shape(p))), node
    )
    return Stack(_add_row_axis(boxed))

  return jax.tree.map(make, params, is_leaf=_leaves.is_box)


def _add_row_axis(node: Any) -> Any:
  """Tells Flax metadata around a stack that its first axis is unsharded."""
  if not _leaves.is_box(node):
    return node
  if hasattr(node, 'get_metadata'):  # nnx.Variable; it changes in place
    from flax import nnx  # a Variable exists, so Flax is there

    nnx.spmd.add_axis(node, 0, {nnx.PARTITION_NAME: None})
    return node
  return node.add_axis(0, {'partition_name': None})  # linen's AxisMetadata


# Precision and shardings.


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


def whole(x: jax.Array, axis: int) -> jax.Array:
  """`x` with one axis unsharded on an explicit mesh."""
  spec = [None if i == axis else entry for i, entry in enumerate(spec_of(x))]
  if spec == [*spec_of(x)] or (sharding := sharding_of(x, spec)) is None:
    return x
  return jax.sharding.reshard(x, sharding)


# On single arrays.


def contract(a: jax.Array, b: jax.Array, batch_axes: tuple[int, ...]) -> jax.Array:
  """Inner products of rows: `(r, *shape), (q, *shape) -> (*batch, r, q)`."""
  dtype = np.promote_types(accumulator(a.dtype), accumulator(b.dtype))
  batch = tuple(1 + axis for axis in batch_axes)
  inner = tuple(i for i in range(1, a.ndim) if i not in batch)
  spec = spec_of(a)
  if a.dtype != b.dtype:
    a, b = a.astype(dtype), b.astype(dtype)
  out = lax.dot_general(
    a,
    b,
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
  if rows.dtype != dtype:  # a sum is fused, where a product would copy the rows
    weights = jnp.moveaxis(weights.astype(dtype), (-1, -2), (0, 1))
    terms = [
      expand(w, rows[:1], (0, *batch)) * row[None].astype(dtype)
      for w, row in zip(weights, rows, strict=True)
    ]
    return functools.reduce(jnp.add, terms)
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


def contract_by_rows(
  a: jax.Array, b: jax.Array, batch_axes: tuple[int, ...]
) -> jax.Array:
  """`contract` without copies of narrow stacks in the accumulator's dtype.

  Only the compiler for CPUs makes them. It would also take a slice of a wide copy of
  the stack, and that out of the loop: hence the bits and the barrier.
  """
  dtype = np.promote_types(accumulator(a.dtype), accumulator(b.dtype))

  def row(x, i):
    x, i = lax.optimization_barrier((x, i))
    bits = lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
    bits = lax.dynamic_index_in_dim(bits, i)
    return lax.bitcast_convert_type(bits, x.dtype).astype(dtype)

  def by_rows(a, b):
    pair = lambda x, j: contract(x, row(b, j), batch_axes)[..., 0, 0]
    line = lambda x: lax.map(lambda j: pair(x, j), jnp.arange(len(b)))
    out = lax.map(lambda i: line(row(a, i)), jnp.arange(len(a)))
    return jnp.moveaxis(out, (0, 1), (-2, -1))

  whole = lambda a, b: contract(a, b, batch_axes)
  return lax.platform_dependent(a, b, cpu=by_rows, default=whole)


def row_norms(a: jax.Array, batch_axes: tuple[int, ...]) -> jax.Array:
  """Squared norms of the rows of a stack: `(r, *shape) -> (*batch, r)`."""
  batch = tuple(1 + axis for axis in batch_axes)
  inner = tuple(i for i in range(1, a.ndim) if i not in batch)
  squares = jnp.square(a.astype(accumulator(a.dtype)))
  return replicate(jnp.moveaxis(squares.sum(inner), 0, -1))


def squared_norm(x: jax.Array, batch_axes: tuple[int, ...]) -> jax.Array:
  """Squared norm for each batch index: `shape -> (*batch,)`."""
  return row_norms(x[None], batch_axes)[..., 0]


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
  """Coefficients of an array in orthonormal bases of some of its axes.

  Args:
    x: the array, `shape`.
    bases: for each of `axes` a basis as columns, `(*batch, n, n)`.
    axes: the axes to rotate.
    batch_axes: the axes that index blocks.
    inverse: back from coefficients.

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
  fibres = jnp.moveaxis(x, axis, 0)
  return contract(fibres, fibres, tuple(a - (a > axis) for a in batch_axes))


# On vectors.


def squared_norms(layout: Layout, vector: Vector) -> jax.Array:
  """Squared norm of every block, `(blocks,)`."""
  return layout.gather(
    [
      squared_norm(x, part.batch_axes)
      for x, part in zip(vector, layout.parts, strict=True)
    ]
  )


def stack_norms(layout: Layout, stacks: Vector) -> jax.Array:
  """Squared norms of the rows of a stack in every block, `(blocks, rows)`."""
  norms = [
    row_norms(x, part.batch_axes) for x, part in zip(stacks, layout.parts, strict=True)
  ]
  return layout.gather(norms, 1)


def inner(layout: Layout, a: Vector, b: Vector) -> jax.Array:
  """A B^T for stacks of r and q rows, `(blocks, r, q)`."""
  narrow = lambda x: x.dtype != accumulator(x.dtype)
  return layout.gather(
    [
      (contract_by_rows if narrow(x) else contract)(x, y, part.batch_axes)
      for x, y, part in zip(a, b, layout.parts, strict=True)
    ],
    2,
  )


def mix(layout: Layout, weights: jax.Array, stacks: Vector) -> Vector:
  """W A for weights `(blocks, q, r)` and a stack A of r rows, as a stack of q rows."""
  return [
    combine(w, x, part.batch_axes)
    for w, x, part in zip(layout.scatter(weights), stacks, layout.parts, strict=True)
  ]


def scale(layout: Layout, vector: Vector, factors: jax.Array) -> Vector:
  """Every block times its factor, `(blocks,)`."""
  return [
    x * expand(s.astype(x.dtype), x, part.batch_axes)
    for s, x, part in zip(layout.scatter(factors), vector, layout.parts, strict=True)
  ]


def select(layout: Layout, which: jax.Array, new: Vector, old: Vector) -> Vector:
  """The blocks of `new` where `which`, `(blocks,)`, is true, else those of `old`."""
  return [
    jnp.where(expand(s, x, part.batch_axes), x, y)
    for s, x, y, part in zip(layout.scatter(which), new, old, layout.parts, strict=True)
  ]


def with_norm_of(
  layout: Layout, filtered: Vector, vector: Vector, rounding: float = 0.0
) -> Vector:
  """`filtered` with the norm that each block has in `vector`.

  As it is where no more is left of a block than `rounding`, in units of the norm times
  the rounding error of a number: that must not be blown up.
  """
  norms = [
    layout.totals(
      [squared_norm(x, p.batch_axes) for x, p in zip(v, layout.parts, strict=True)]
    )
    for v in (filtered, vector)
  ]
  out = []
  for x, part, new, target in zip(filtered, layout.parts, *norms, strict=True):
    real = new > (rounding * jnp.finfo(new.dtype).eps) ** 2 * target
    ratio = jnp.sqrt(jnp.where(real, target / jnp.where(real, new, 1), 1))
    out.append(x * expand(ratio.astype(x.dtype), x, part.batch_axes))
  return out


def random_unit(layout: Layout, like: Vector, key: jax.Array) -> Vector:
  """A random vector in every block, of norm about 1."""
  keys = jax.random.split(key, len(like))
  vector = [
    jax.random.normal(
      k, x.shape, accumulator(x.dtype), out_sharding=sharding_of(x, spec_of(x))
    )
    for k, x in zip(keys, like, strict=True)
  ]
  return scale(layout, vector, jnp.array(layout.sizes, jnp.float32) ** -0.5)


def random_signs(layout: Layout, like: Vector, key: jax.Array) -> Vector:
  """A vector of random signs, in the accumulators' dtype."""
  keys = jax.random.split(key, len(like))
  return [
    jax.random.rademacher(
      k, x.shape, accumulator(x.dtype), out_sharding=sharding_of(x, spec_of(x))
    )
    for k, x in zip(keys, like, strict=True)
  ]
