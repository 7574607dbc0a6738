"""Which leaves make up which block, and how per-block numbers are laid out.

A *block* is a set of parameter leaves that share one dominant subspace. By
default every leaf with two or more axes is a block of its own. Axes named as
*batch axes* (the layer axis of scanned layers, say) multiply the blocks: a leaf
``(L, m, n)`` with batch axis 0 is ``L`` blocks of shape ``(m, n)``.

All per-block numbers of an optimizer live in single arrays with a leading axis
of ``Blocks.count`` entries, so that the small eigenproblems of one refresh are
one batch and diagnostics are one array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BlockLabels = Any | Callable[[optax.Params], Any] | None
BatchAxes = Any | Callable[[optax.Params], Any] | None


class Block(NamedTuple):
  """A group of leaves with one dominant subspace for each batch index."""

  label: str
  leaves: tuple[int, ...]  # positions among `Blocks.leaves`
  batch_shape: tuple[int, ...]  # the batch axes that all its leaves share
  size: int  # parameters in one block of the batch
  rows: slice  # where the block stands in a `(Blocks.count, ...)` array


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The blocks of a parameter tree; a static function of its shapes."""

  blocks: tuple[Block, ...]
  leaves: tuple[int, ...]  # leaves in a block, as positions in jax.tree.leaves
  batch_axes: tuple[tuple[int, ...], ...]  # for each of `leaves`, ascending
  # For each of `leaves` the manual mesh axes (`jax.shard_map`) that split it.
  split: tuple[tuple[str, ...], ...]

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
    names = []
    for block in self.blocks:
      if block.batch_shape:
        for i in range(math.prod(block.batch_shape)):
          index, rest = [], i
          for n in reversed(block.batch_shape):
            rest, j = divmod(rest, n)
            index.append(str(j))
          names.append(f'{block.label}[{",".join(reversed(index))}]')
      else:
        names.append(block.label)
    return names

  def select(self, tree: Any) -> list[jax.Array]:
    """The leaves of `tree` (shaped like the parameters) that are in a block."""
    leaves = jax.tree.leaves(tree)
    return [leaves[i] for i in self.leaves]

  def replace(self, tree: Any, values: Sequence[Any]) -> Any:
    """`tree` with the leaves that are in a block replaced by `values`."""
    leaves, structure = jax.tree.flatten(tree)
    for i, value in zip(self.leaves, values, strict=True):
      leaves[i] = value
    return jax.tree.unflatten(structure, leaves)

  def gather(self, values: Sequence[jax.Array], trailing: int = 0) -> jax.Array:
    """Sums `(*batch, ...)` values within each block into `(count, ...)`.

    Args:
      values: an array for each of `leaves`, its batch axes first.
      trailing: number of axes behind the batch axes.
    """
    dtype = functools.reduce(np.promote_types, [x.dtype for x in values])
    values = self.sum_over_shards([x.astype(dtype) for x in values])
    parts = []
    for block in self.blocks:
      total = sum(values[i] for i in block.leaves[1:]) if block.leaves[1:] else 0
      total = values[block.leaves[0]] + total
      parts.append(total.reshape((-1, *total.shape[total.ndim - trailing :])))
    return jnp.concatenate(parts)

  def sum_over_shards(self, values: Sequence[Any]) -> list[Any]:
    """Sums the values of each leaf over the mesh axes of `jax.shard_map` that split it.

    Args:
      values: for each of `leaves` an array or a tree of arrays.

    Returns:
      The sums. The leaves split in the same way share one all-reduce.
    """
    out = list(values)
    for axes in {axes: None for axes in self.split if axes}:
      members = [i for i, split in enumerate(self.split) if split == axes]
      totals = jax.lax.psum([out[i] for i in members], axes)
      for i, total in zip(members, totals, strict=True):
        out[i] = total
    return out

  def scatter(self, values: jax.Array) -> list[jax.Array]:
    """Splits `(count, ...)` into a `(*batch, ...)` array for each of `leaves`."""
    out: list[Any] = [None] * len(self.leaves)
    for block in self.blocks:
      part = values[block.rows].reshape(block.batch_shape + values.shape[1:])
      for i in block.leaves:
        out[i] = part
    return out


def is_box(node: Any) -> bool:
  """Whether `node` is Flax metadata around a leaf (Variable or Partitioned)."""
  return hasattr(node, 'add_axis')


def unbox(tree: Any) -> Any:
  """Drops Flax metadata: every box becomes the leaf in it."""

  def inner(node):
    if not is_box(node):
      return node
    leaves = jax.tree.leaves(node)
    return leaves[0] if leaves else optax.MaskedNode()

  return jax.tree.map(inner, tree, is_leaf=is_box)


def is_axes(x: Any) -> bool:
  return (
    x is None
    or isinstance(x, int)
    or (type(x) is tuple and all(isinstance(i, int) for i in x))
  )


def broadcast(spec: Any, tree: Any, is_leaf: Callable, option: str) -> list[Any]:
  """The leaf of `spec` (a tree prefix of `tree`) for each leaf of `tree`."""
  if not jax.tree.leaves(tree):  # optax's placeholder for parameters, for one
    return []
  if callable(spec):
    spec = spec(tree)
  try:
    return jax.tree.leaves(
      jax.tree.map(
        lambda s, sub: jax.tree.map(lambda _: _Leaf(s), sub),
        spec,
        tree,
        is_leaf=is_leaf,
      ),
      is_leaf=lambda x: isinstance(x, _Leaf),
    )
  except (ValueError, TypeError, KeyError) as e:
    raise ValueError(
      f'{option} must be a tree with the structure of the parameters (or a prefix'
      f' of it), got {jax.tree.structure(spec, is_leaf=is_leaf)} for parameters'
      f' {jax.tree.structure(tree)}; pass a function of the parameters to build it.'
    ) from e


class _Leaf(NamedTuple):
  value: Any


def varying_axes(x: jax.Array) -> frozenset[str]:
  """The manual mesh axes along which `x` differs; none with ``check_vma=False``."""
  kind = jax.typeof(x)
  if hasattr(kind, 'manual_axis_type'):
    return kind.manual_axis_type.varying
  return getattr(kind, 'vma', frozenset())


def _split_axes(name: str, leaf: Any, axis_names: tuple[str, ...]) -> tuple[str, ...]:
  """Those of `axis_names` that split a leaf: it varies over no others."""
  if not isinstance(leaf, jax.core.Tracer):
    return ()
  varying = varying_axes(leaf)
  if rest := varying.difference(axis_names):
    raise ValueError(
      f'{name!r} varies over the manual mesh axes {sorted(rest)}: average gradients of'
      ' replicated parameters over them first (jax.lax.pmean); if they split the'
      " parameters, name them in the estimator's axis_name."
    )
  split = []
  for axis in axis_names:
    try:
      checked = varying_axes(jax.lax.axis_index(axis))
    except NameError:  # not in a function mapped over this axis
      continue
    if axis in varying or not checked:
      split.append(axis)
  return tuple(split)


def resolve(
  params: Any,
  labels: BlockLabels = None,
  batch_axes: BatchAxes = None,
  axis_name: str | Sequence[str] | None = None,
) -> Blocks:
  """Works out the blocks of `params` from shapes alone.

  Args:
    params: parameters or updates; abstract and boxed (Flax) leaves are fine.
    labels: see `bsfa_optax.pca`.
    batch_axes: see `bsfa_optax.pca`.
    axis_name: see `bsfa_optax.pca`.

  Returns:
    The static `Blocks`.

  Raises:
    ValueError: for a spec of another structure, an axis out of range, leaves of one
      block with different batch shapes, or leaves split over other mesh axes.
    TypeError: for parameters that are not real floating-point numbers.
  """
  tree = unbox(params)
  flat = jax.tree_util.tree_leaves_with_path(tree)
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in flat]
  for name, (_, leaf) in zip(names, flat, strict=True):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      remedy = (
        'wrap the transformation in optax.contrib.split_real_and_imaginary'
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        else 'leave the leaf out with optax.masked or optax.partition'
      )
      raise TypeError(
        f'parameters must be floating-point, got {leaf.dtype} for {name!r}; {remedy}.'
      )

  axes = []
  for name, (_, leaf), spec in zip(
    names, flat, broadcast(batch_axes, tree, is_axes, 'batch_axes'), strict=True
  ):
    value = spec.value
    value = () if value is None else (value,) if isinstance(value, int) else value
    if not is_axes(value) or any(not -leaf.ndim <= a < leaf.ndim for a in value):
      raise ValueError(
        f'batch_axes must lie within the axes of each leaf, got {spec.value} for'
        f' {name!r} of shape {leaf.shape}; use None for leaves without one.'
      )
    axes.append(tuple(sorted({a % leaf.ndim for a in value})))

  if labels is None:
    chosen = [
      name if leaf.ndim - len(ax) >= 2 else None
      for name, (_, leaf), ax in zip(names, flat, axes, strict=True)
    ]
  else:
    is_label = lambda x: x is None or isinstance(x, str)
    chosen = [s.value for s in broadcast(labels, tree, is_label, 'blocks')]

  groups: dict[str, list[int]] = {}
  for i, label in enumerate(chosen):
    if label is not None:
      groups.setdefault(str(label), []).append(i)
  leaves = tuple(i for i, label in enumerate(chosen) if label is not None)
  position = {leaf: i for i, leaf in enumerate(leaves)}
  axis_names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
  split = {i: _split_axes(names[i], flat[i][1], axis_names) for i in leaves}
  shards = lambda i: math.prod(jax.lax.axis_size(axis) for axis in split[i])

  blocks, start = [], 0
  for label, members in groups.items():
    shapes = {tuple(flat[i][1].shape[a] for a in axes[i]) for i in members}
    if len(shapes) > 1:
      raise ValueError(
        f'leaves of one block must have the same batch shape, got {sorted(shapes)}'
        f' in block {label!r}; give them different labels or other batch_axes.'
      )
    batch_shape = shapes.pop()
    total = sum(math.prod(flat[i][1].shape) * shards(i) for i in members)
    count = math.prod(batch_shape)
    blocks.append(
      Block(
        label=label,
        leaves=tuple(position[i] for i in members),
        batch_shape=batch_shape,
        size=total // max(count, 1),
        rows=slice(start, start + count),
      )
    )
    start += count
  return Blocks(
    tuple(blocks),
    leaves,
    tuple(axes[i] for i in leaves),
    tuple(split[i] for i in leaves),
  )


def block_names(
  params: optax.Params, blocks: BlockLabels = None, batch_axes: BatchAxes = None
) -> list[str]:
  """Names for the entries of the per-block diagnostics.

  Args:
    params: the parameters, or anything with their structure and shapes
      (``jax.ShapeDtypeStruct`` leaves are enough).
    blocks: the value given to the estimator; see `bsfa_optax.pca`.
    batch_axes: the value given to the estimator; see `bsfa_optax.pca`.

  Returns:
    One name for each entry of, for example,
    ``optax.tree.get(state, 'dominant_fraction')``.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> params = {'dense': {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3))}}
    >>> bsfa_optax.block_names(params)
    ['dense/kernel']
  """
  return resolve(params, blocks, batch_axes).names
