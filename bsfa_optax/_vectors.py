"""Layouts, and the arithmetic on block vectors: the one place that knows of meshes.

A *vector* is a list of arrays, one for each part of a `Layout`; a *stack* is a vector
of which every array has rows in front, ``(rows, *shape)``. Both keep the parameters'
shape, and so their sharding. Nothing is ever flattened: on a mesh a Gram matrix is a
local product and one all-reduce of a small matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import re
import string
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

Vector = list[jax.Array]  # an array for each part of a layout


class Leaf(NamedTuple):
  """A leaf of the parameters and what is known of it before any number is."""

  name: str
  position: int  # in jax.tree.leaves(params)
  shape: tuple[int, ...]
  dtype: Any
  batch_axes: tuple[int, ...]  # ascending
  why: str  # why it is filtered, or is not
  filtered: bool
  axes: tuple[int, ...] = ()  # those that may have a factor, ascending
  split: tuple[str, ...] = ()  # the manual mesh axes (jax.shard_map) that split it


class Part(NamedTuple):
  """One array of a vector: a leaf, or leaves alike behind a new first axis."""

  leaves: tuple[Leaf, ...]
  stacked: bool
  shape: tuple[int, ...]
  batch_axes: tuple[int, ...]  # the first of a stacked part is one
  batch_shape: tuple[int, ...]
  inner_axes: tuple[int, ...]  # those within a block
  size: int  # entries in one block, of all shards
  axes: tuple[int, ...]  # those that may have a factor
  names: tuple[str, ...]  # for each index of the batch axes
  split: tuple[str, ...]


class Block(NamedTuple):
  """Parts with one dominant subspace for each index of their batch axes."""

  names: tuple[str, ...]  # of its rows
  parts: tuple[int, ...]  # positions among `Layout.parts`
  batch_shape: tuple[int, ...]
  size: int  # entries in one block of the batch
  rows: range  # where the blocks stand in a `(Layout.count, ...)` array


@dataclasses.dataclass(frozen=True)
class Layout:
  """The parts and blocks of a tree of parameters; static.

  Attributes:
    leaves: all leaves of the parameters, filtered or not.
    parts: the arrays of a vector.
    blocks: which parts share a subspace.
  """

  leaves: tuple[Leaf, ...]
  parts: tuple[Part, ...]
  blocks: tuple[Block, ...]

  @property
  def count(self) -> int:
    """Number of blocks, every batch index counted."""
    return self.blocks[-1].rows.stop if self.blocks else 0

  @property
  def sizes(self) -> list[int]:
    """Number of parameters in each of the `count` blocks."""
    return [b.size for b in self.blocks for _ in range(math.prod(b.batch_shape))]

  @property
  def names(self) -> list[str]:
    """A name for each of the `count` blocks."""
    return [name for block in self.blocks for name in block.names]

  @property
  def dtype(self) -> Any:
    """The dtype of numbers of blocks: that of the widest leaf, at least float32."""
    leaves = [leaf for part in self.parts for leaf in part.leaves]
    # Widened one by one: NumPy has no dtype for bfloat16 and float16 together.
    return np.result_type(np.float32, *[accumulator(leaf.dtype) for leaf in leaves])

  def map(self, f: Callable[..., Any], *vectors: Sequence[Any]) -> list[Any]:
    """``f(part, x, ...)`` for each part and what the vectors have of it."""
    return [f(*each) for each in zip(self.parts, *vectors, strict=True)]

  def select(self, tree: Any) -> Vector:
    """The vector of a tree like the parameters: an array for each part."""
    leaves = [*map(jnp.asarray, jax.tree.leaves(tree))]  # may be Python numbers

    def values(part: Part) -> jax.Array:
      own = [leaves[leaf.position] for leaf in part.leaves]
      return _stack(own) if part.stacked else own[0]

    return self.map(values)

  def replace(self, tree: Any, vector: Sequence[Any]) -> Any:
    """`tree` with its filtered leaves taken from a vector, in their own dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    for part, value in zip(self.parts, vector, strict=True):
      for i, leaf in enumerate(part.leaves):
        row = lax.index_in_dim(value, i, keepdims=False) if part.stacked else value
        old = jnp.asarray(leaves[leaf.position])
        leaves[leaf.position] = like(row.astype(old.dtype), old)
    return jax.tree.unflatten(structure, leaves)

  def gather(self, values: Sequence[jax.Array]) -> jax.Array:
    """Sums `(*batch, ...)` values within each block into `(count, ...)`."""
    dtype = np.result_type(*[x.dtype for x in values])
    # In one dtype, for one all-reduce; small numbers, unlike the parts themselves.
    values = self.sum_over_shards([x.astype(dtype) for x in values])
    found = []
    for block in self.blocks:
      total = functools.reduce(jnp.add, [values[i] for i in block.parts])
      found.append(total.reshape((-1, *total.shape[len(block.batch_shape) :])))
    return jnp.concatenate(found)

  def scatter(self, values: jax.Array) -> Vector:
    """Splits `(count, ...)` into a `(*batch, ...)` array for each part."""
    out: list[Any] = [None] * len(self.parts)
    for block in self.blocks:
      own = values[block.rows.start : block.rows.stop]
      for i in block.parts:
        out[i] = own.reshape(block.batch_shape + values.shape[1:])
    return out

  def sum_over_shards(self, values: Sequence[Any]) -> list[Any]:
    """Sums the values of each part over the mesh axes of `jax.shard_map` that split it.

    Args:
      values: for each part an array or a tree of arrays.

    Returns:
      The sums. The parts split in the same way share one all-reduce.
    """
    out = list(values)
    # A dictionary, which has an order: all processes must reduce in the same one.
    for axes in {part.split: None for part in self.parts if part.split}:
      members = [i for i, part in enumerate(self.parts) if part.split == axes]
      totals = lax.psum([out[i] for i in members], axes)
      for i, total in zip(members, totals, strict=True):
        out[i] = total
    return out


def _stack(values: Sequence[jax.Array]) -> jax.Array:
  """Leaves alike behind a new first axis, sharded as the first of them."""
  dtypes = {x.dtype for x in values}
  if len(dtypes) > 1:  # NumPy has none for both halves
    dtypes = {accumulator(x) for x in dtypes}
  dtype = np.result_type(*dtypes)
  return jnp.stack([like(x.astype(dtype), values[0]) for x in values])


class Stack(NamedTuple):
  """Marks a state leaf with a row axis in front of the parameter's own axes.

  The marker keeps `optax.tree.map_params` with a tree of specs from putting a
  parameter's spec on an array that has one axis more: it raises instead.
  """

  rows: Any  # (rows, *shape)


def block_zeros(layout: Layout, *trailing: int, dtype: Any = np.float32) -> jax.Array:
  """Zeros `(blocks, *trailing)`; of one block if there is none, for Orbax' sake.

  It saves no empty arrays.
  """
  return jnp.zeros((max(layout.count, 1), *trailing), dtype)


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


def resharded(x: jax.Array, like: jax.Array, spec: Sequence[Any]) -> jax.Array:
  """`x` split by `spec` over the explicit mesh of `like`, if that is on one."""
  sharding = sharding_of(like, spec)
  if sharding is None or jax.typeof(x).sharding == sharding:
    return x
  return jax.sharding.reshard(x, sharding)


def replicate(x: jax.Array) -> jax.Array:
  """`x` on every device of an explicit mesh: small per-block numbers only."""
  return resharded(x, x, (None,) * x.ndim)


def whole(x: jax.Array, axis: int) -> jax.Array:
  """`x` with one axis unsharded on an explicit mesh."""
  return resharded(x, x, [s if i != axis else None for i, s in enumerate(spec_of(x))])


def like(x: jax.Array, other: jax.Array) -> jax.Array:
  """`x` with the sharding that `other` has on an explicit mesh."""
  return resharded(x, other, spec_of(other))


def varying_axes(x: jax.Array) -> frozenset[str]:
  """The manual mesh axes along which `x` differs; none with ``check_vma=False``."""
  kind = jax.typeof(x)
  if hasattr(kind, 'manual_axis_type'):
    return kind.manual_axis_type.varying
  return getattr(kind, 'vma', frozenset())


def keep_replicated(state: Any) -> Any:
  """`state` with all but its stacks on every device of an auto mesh in context.

  Left to itself the compiler may split a new value otherwise than the old one, and
  compile the next step anew.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.are_all_axes_auto:
    return state  # elsewhere shardings are part of types, or one device is seen

  def constrain(x):
    if isinstance(x, Stack) or not isinstance(x, jax.core.Tracer):
      return x
    return lax.with_sharding_constraint(x, PartitionSpec())

  return jax.tree.map(constrain, state, is_leaf=lambda x: isinstance(x, Stack))


# On single arrays.


def product(
  subscripts: str,
  x: jax.Array,
  y: jax.Array,
  spec: Any = None,
  precision: Any = lax.Precision.HIGHEST,
) -> jax.Array:
  """`jnp.einsum` in the accumulators' dtype.

  Axes in front without a letter are batch axes, of which an operand has all or none.
  On an explicit mesh an axis of the result is split as that of its letter in an
  operand, unless a `spec` says otherwise.
  """
  # Full precision, unless told otherwise: in TF32 or bfloat16, which accelerators take
  # by default, the rounding of a Gram matrix would pass for directions.
  dtype = np.promote_types(accumulator(x.dtype), accumulator(y.dtype))
  if x.dtype != y.dtype:
    x, y = x.astype(dtype), y.astype(dtype)
  first, second, output = re.split(',|->', subscripts)
  leading = [string.ascii_uppercase[: x.ndim - len(first)]]
  leading += [string.ascii_uppercase[: y.ndim - len(second)]]
  first, second = leading[0] + first, leading[1] + second
  output = max(leading, key=len) + output
  if spec is None:
    axes = (*zip(first, spec_of(x), strict=True), *zip(second, spec_of(y), strict=True))
    partition = {letter: axis for letter, axis in axes if axis}
    spec = [partition.get(letter) for letter in output]
  return jnp.einsum(
    f'{first},{second}->{output}',
    x,
    y,
    precision=precision,
    preferred_element_type=dtype,
    out_sharding=sharding_of(x, spec),
  )


def _by_rows(a: jax.Array, b: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Products of the rows of two stacks, summed over `axes` of a row, `(*rest, r, q)`.

  For CPUs, where a product would first copy narrow rows in a wide dtype; a sum of
  products is fused. The compiler would also take a slice of a wide copy of the stack,
  and that out of the loop: hence the bits and the barrier.
  """
  dtype = np.promote_types(accumulator(a.dtype), accumulator(b.dtype))

  def row(x, i):
    bits = lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
    bits = lax.dynamic_index_in_dim(bits, i, keepdims=False)
    return lax.bitcast_convert_type(bits, x.dtype).astype(dtype)

  def pair(number):
    x, y, number = lax.optimization_barrier((a, b, number))
    i, j = jnp.divmod(number, len(b))
    return replicate((row(x, i) * row(y, j)).sum(axes))

  products = lax.map(pair, jnp.arange(len(a) * len(b)))
  return jnp.moveaxis(
    products.reshape(len(a), len(b), *products.shape[1:]), (0, 1), (-2, -1)
  )


def _letters(ndim: int, batch_axes: tuple[int, ...]) -> tuple[str, str]:
  """Names for `product` of all axes of an array, and of its batch axes."""
  letters = string.ascii_lowercase[:ndim]
  return letters, ''.join(letters[axis] for axis in batch_axes)


def multiply(
  x: jax.Array,
  matrix: jax.Array,
  axis: int,
  batch_axes: tuple[int, ...],
  *,
  inverse: bool = False,
  precision: Any = lax.Precision.HIGHEST,
) -> jax.Array:
  """The fibres of `x` along an axis times a matrix, `(*batch, n, n)`, or its transpose.

  Of the shape and sharding of `x`, in the accumulators' dtype. The platform's own
  precision is None.
  """
  x = x.astype(accumulator(x.dtype))
  letters, batch = _letters(x.ndim, batch_axes)
  own, new = letters[axis], letters.replace(letters[axis], 'z')
  subscripts = f'{letters},{batch}{f"z{own}" if inverse else f"{own}z"}->{new}'
  return product(subscripts, x, matrix.astype(x.dtype), spec_of(x), precision)


def second_moment(x: jax.Array, axis: int, batch_axes: tuple[int, ...]) -> jax.Array:
  """Sum of outer products of the fibres of `x` along an axis, `(*batch, n, n)`."""
  x = x.astype(accumulator(x.dtype))
  letters, batch = _letters(x.ndim, batch_axes)
  own, other = letters[axis], letters.replace(letters[axis], 'z')
  split = [spec_of(x)[axis] for axis in batch_axes]
  subscripts = f'{letters},{other}->{batch}{own}z'
  return replicate(product(subscripts, x, x, [*split, None, None]))


def energy(
  x: jax.Array, axes: tuple[int, ...] | None = None, keepdims: bool = False
) -> jax.Array:
  """Sum of squares over some axes (all by default)."""
  squares = jnp.square(x.astype(accumulator(x.dtype)))
  return replicate(squares.sum(axes, keepdims=keepdims))


def along(values: jax.Array, axes: tuple[int, ...], ndim: int) -> jax.Array:
  """`values` of some `axes` of a leaf, with axes of size 1 to broadcast to all."""
  values = values.transpose(sorted(range(len(axes)), key=axes.__getitem__))
  return jnp.expand_dims(values, tuple(i for i in range(ndim) if i not in axes))


def expand(values: jax.Array, like: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """`along`, with the sharding that `like` has on the axes."""
  spec = [s if i in axes else None for i, s in enumerate(spec_of(like))]
  return resharded(along(values, axes, like.ndim), like, spec)


# On vectors.


def spread(layout: Layout, values: jax.Array, like: Vector) -> Vector:
  """Numbers of blocks, `(blocks,)`, to broadcast to the arrays of a vector."""
  return layout.map(
    lambda part, x, own: expand(own, x, part.batch_axes), like, layout.scatter(values)
  )


def sums(layout: Layout, vector: Vector) -> jax.Array:
  """Sum of the entries of every block, `(blocks,)`."""
  total = lambda part, x: replicate(x.sum(part.inner_axes))
  return layout.gather(layout.map(total, vector))


def squared_norms(layout: Layout, vector: Vector) -> jax.Array:
  """Squared norm of every block, `(blocks,)`."""
  return layout.gather(layout.map(lambda part, x: energy(x, part.inner_axes), vector))


def inner(layout: Layout, a: Vector, b: Vector) -> jax.Array:
  """A B^T for stacks of r and q rows, `(blocks, r, q)`."""

  def products(part: Part, x: jax.Array, y: jax.Array) -> jax.Array:
    axes, batch = _letters(len(part.shape), part.batch_axes)
    contract = lambda x, y: replicate(product(f'y{axes},z{axes}->{batch}yz', x, y))
    if x.dtype == accumulator(x.dtype):
      return contract(x, y)
    by_rows = functools.partial(_by_rows, axes=part.inner_axes)
    return lax.platform_dependent(x, y, cpu=by_rows, default=contract)

  return layout.gather(layout.map(products, a, b))


def mix(layout: Layout, weights: jax.Array, stacks: Vector) -> Vector:
  """W A for weights `(blocks, q, r)` and a stack A of r rows, as a stack of q rows."""

  def combine(part: Part, w: jax.Array, x: jax.Array) -> jax.Array:
    w = w.astype(accumulator(x.dtype))
    if x.dtype != w.dtype:  # a sum is fused, where a product would copy the rows
      w = jnp.moveaxis(w, (-1, -2), (0, 1))
      own = (0, *(1 + axis for axis in part.batch_axes))
      terms = [
        expand(a, x[:1], own) * row[None].astype(w.dtype)
        for a, row in zip(w, x, strict=True)
      ]
      return functools.reduce(jnp.add, terms)
    axes, batch = _letters(len(part.shape), part.batch_axes)
    split = [spec_of(x)[1 + axis] for axis in part.batch_axes]
    # A batch axis of a product has to be split alike in both factors.
    w = resharded(w, x, [*split, None, None])
    return product(f'y{axes},{batch}zy->z{axes}', x, w)

  return layout.map(combine, layout.scatter(weights), stacks)


def rotate(
  layout: Layout,
  vector: Vector,
  bases: Sequence[Sequence[jax.Array]],
  axes: Sequence[tuple[int, ...]],
  *,
  shared: bool = False,
  inverse: bool = False,
) -> Vector:
  """Coefficients of a vector in orthonormal bases of some axes of its parts.

  Args:
    layout: the layout.
    vector: the vector.
    bases: for each part a basis as columns, `(*batch, n, n)`, for each of its `axes`.
    axes: for each part the axes to rotate.
    shared: whether a basis is the same for the whole batch, `(n, n)`.
    inverse: back from coefficients.

  Returns:
    Arrays of the shapes and shardings of the vector's, in the accumulators' dtypes.
  """

  def rotated(part, x, own_bases, own_axes):
    batch_axes = () if shared else part.batch_axes
    for axis, basis in zip(own_axes, own_bases, strict=True):
      x = multiply(x, basis, axis, batch_axes, inverse=inverse)
    return x.astype(accumulator(x.dtype))

  return layout.map(rotated, vector, bases, axes)


def scale(layout: Layout, vector: Vector, factors: jax.Array) -> Vector:
  """Every block times its factor, `(blocks,)`."""
  by_part = spread(layout, factors, vector)
  return jax.tree.map(lambda x, s: x * s.astype(x.dtype), vector, by_part)


def select(layout: Layout, which: jax.Array, new: Vector, old: Vector) -> Vector:
  """The blocks of `new` where `which`, `(blocks,)`, is true, else those of `old`."""
  return jax.tree.map(jnp.where, spread(layout, which, new), new, old)


def with_norm_of(
  layout: Layout, filtered: Vector, vector: Vector, rounding: float = 0.0
) -> Vector:
  """`filtered` with the norm that each block has in `vector`.

  As it is where no more is left of a block than `rounding`, in units of the norm times
  the rounding error of a number: that must not be blown up.
  """
  new, target = squared_norms(layout, filtered), squared_norms(layout, vector)
  # The coarsest rounding there is, as a block may have leaves of two dtypes.
  eps = max(jnp.finfo(accumulator(x.dtype)).eps for x in vector)
  real = new > (rounding * eps) ** 2 * target
  ratio = jnp.sqrt(jnp.where(real, target / jnp.where(real, new, 1), 1))
  return scale(layout, filtered, ratio)


def random(draw: Callable[..., jax.Array], like: Vector, key: jax.Array) -> Vector:
  """A vector of draws, of `jax.random.normal` for one, in the accumulators' dtypes."""
  keys = jax.random.split(key, len(like))
  return [
    draw(k, x.shape, accumulator(x.dtype), out_sharding=sharding_of(x, spec_of(x)))
    for k, x in zip(keys, like, strict=True)
  ]


def all_finite(layout: Layout, vector: Vector) -> jax.Array:
  """Whether a vector can be learnt from: finite, also when squared and summed, ()."""

  def usable(x):  # False for NaN, and where sums of squares could overflow
    largest = jnp.finfo(accumulator(x.dtype)).max
    # Entries under the limit have a sum of squares of a 1024th: room for many leaves.
    limit = jnp.sqrt(largest / (1024 * max(x.size, 1)))
    return (jnp.abs(x).astype(largest.dtype) < limit).all()

  finite = jnp.stack([usable(x) for x in vector]).all()
  # Shards must agree, as learning from an update takes all of them.
  axes = varying_axes(finite).union(*(part.split for part in layout.parts))
  return lax.pmin(finite.astype(jnp.int32), tuple(axes)) > 0 if axes else finite


# On small square matrices.

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
  return lax.map(single, batch, batch_size=portion)


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
  filled = resharded(filled, batch, (mesh_axis, None, None))
  spec = PartitionSpec(mesh_axis)
  share = jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names={mesh_axis})
  found = jax.tree.map(replicate, share(filled))
  return jax.tree.map(lambda x: x[: len(batch)], keep_replicated(found))
