"""From a tree of parameters to vectors, and the arithmetic on them.

From shapes and names alone a tree of parameters becomes a `Layout`: *parts*, each one
leaf or a stack of leaves that are alike (the same shape, the same path up to digits,
so the same matrix of every layer), and *blocks*, the sets of entries that share one
dominant subspace. A *vector* is then a list of arrays, one a part, and what is written
once for a part is traced and compiled once however many layers there are; a *stack* is
a vector of which every array has rows in front, ``(rows, *shape)``.

Both keep the parameters' shape, and so their sharding, of which this file alone knows.
Nothing is ever flattened: on a mesh a Gram matrix is a local product and one all-reduce
of a small matrix.

Top to bottom: layouts, which leaves, how a layout is made, trees, precision and
shardings, arithmetic on single arrays, on vectors, and on small square matrices.
"""

from __future__ import annotations

from collections import Counter
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
import optax

from bsfa_optax import _check

Vector = list[jax.Array]  # an array for each part of a layout
Predicate = Callable[[str, Any], bool] | None
Labels = Any | Callable[[optax.Params], Any] | None
Axes = Any | Callable[[optax.Params], Any] | None


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
  parts: tuple[int, ...]  # positions among `Layout.parts`, of one batch shape
  size: int  # entries in one block of the batch


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
    return len(self.names)

  @property
  def sizes(self) -> list[int]:
    """Number of parameters in each of the `count` blocks."""
    return [block.size for block in self.blocks for _ in block.names]

  @property
  def names(self) -> list[str]:
    """A name for each of the `count` blocks."""
    return [name for block in self.blocks for name in block.names]

  @property
  def dtype(self) -> Any:
    """The dtype of numbers of blocks: that of the widest leaf, at least float32."""
    return accumulator(*[leaf.dtype for part in self.parts for leaf in part.leaves])

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
    flat = lambda part, x: x.reshape(-1, *x.shape[len(part.batch_axes) :])
    rows = self.map(flat, values)
    owned = [[rows[i] for i in block.parts] for block in self.blocks]
    return jnp.concatenate([functools.reduce(jnp.add, own) for own in owned])

  def scatter(self, values: jax.Array) -> Vector:
    """Splits `(count, ...)` into a `(*batch, ...)` array for each part."""
    out: list[Any] = [None] * len(self.parts)
    ends = np.cumsum([len(block.names) for block in self.blocks])
    for block, own in zip(self.blocks, jnp.split(values, ends[:-1]), strict=True):
      for i in block.parts:
        out[i] = own.reshape(self.parts[i].batch_shape + values.shape[1:])
    return out

  def sum_over_shards(self, values: Sequence[Any]) -> list[Any]:
    """Sums the values of each part over the mesh axes of `jax.shard_map` that split it.

    Args:
      values: for each part an array or a tree of arrays.

    Returns:
      The sums.
    """
    total = lambda part, x: lax.psum(x, part.split) if part.split else x
    return self.map(total, values)


def _stack(values: Sequence[jax.Array]) -> jax.Array:
  """Leaves alike behind a new first axis, sharded as the first of them."""
  dtypes = {x.dtype for x in values}
  dtype = accumulator(*dtypes) if len(dtypes) > 1 else values[0].dtype
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


# Which leaves.

_TABLE = 'table of embeddings'
_TABLES = re.compile(r'embed|(^|_)emb(_|$)|wte|lookup|vocab')
_POSITIONS = re.compile(r'(^|_)pos|wpe')
_NORMS = re.compile(r'norm|^ln(_|\d|f|$)|^bn(_|\d|$)')
_HEADS = re.compile(
  r'(^|(?<!multi)_)head(_|\d|$)|^unembed|logits|classifier|readout|^output_layer$|vocab_proj'
)
_VECTORS = re.compile(r'bias|^scale|_scale$|^gamma$|^beta$|^offset$')
_ROUTERS = re.compile(r'router|gating')
_PROJECTIONS = re.compile(r'patch|proj|conv|linear|dense')
_LONGEST_WINDOW = 11  # of a convolution


def default_rule(
  names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> list[tuple[bool, str]]:
  """Whether each leaf is filtered, and why; shapes are those of a single block.

  By name and shape, for Flax, Equinox, Haiku and plain trees. A leaf without a telling
  name is an output layer if it has an axis of a vocabulary's length and nothing like
  it (the same path up to digits) is there twice, as it is of the layers' matrices.
  """
  paths = [re.sub(r'(/(raw_)?value)+$', '', name).lower() for name in names]
  kinds = [re.sub(r'\d+', '#', path) for path in paths]
  occurrences = Counter(kinds)
  known = set(paths)
  by_name = [_by_name(p, s, known) for p, s in zip(paths, shapes, strict=True)]
  tables = zip(shapes, by_name, strict=True)
  vocabulary = {shape[0] for shape, why in tables if why == _TABLE}
  found = []
  for kind, shape, why in zip(kinds, shapes, by_name, strict=True):
    single = len(shape) == 2 and occurrences[kind] == 1
    if why is None and single and vocabulary & set(shape):
      why = 'output layer (an axis as long as the vocabulary)'
    found.append((why is None, why or 'matrix'))
  return found


def _by_name(path: str, shape: tuple[int, ...], known: set[str]) -> str | None:
  """Why a leaf stays with the base optimizer, or None."""
  *modules, own = path.split('/')
  module = modules[-1] if modules else ''
  wide = sorted((n for n in shape if n > 1), reverse=True)  # a matrix has two such
  if len(wide) < 2:
    return 'vector'
  # A bias of an attention layer has two axes, heads and entries, and Haiku calls any
  # bias b: the name of the leaf itself comes first.
  if _VECTORS.search(own) or (own == 'b' and path[:-1] + 'w' in known):
    return 'bias or scale'
  if any(map(_NORMS.search, (*modules, own))):
    return 'norm'
  if any(map(_POSITIONS.search, (module, own))):
    return 'positions'
  anonymous = own in ('weight', 'w')  # tells no table from a projection
  table = module if anonymous else own
  if len(shape) == 2 and _TABLES.search(table) and not _PROJECTIONS.search(table):
    return _TABLE if not _HEADS.search(table) else 'output layer'
  if any(map(_HEADS.search, (*modules[:1], module, own))):
    return 'output layer'
  # A gate with as many entries as its input gates an MLP; with a few, it picks experts.
  lopsided = 4 * wide[1] < wide[0]
  if any(map(_ROUTERS.search, (module, own))) or (module == 'gate' and lopsided):
    return 'router'
  if len(shape) > 2 and 1 in shape and wide[1] <= _LONGEST_WINDOW:
    return 'convolution of single channels'
  return None


def are_tables(tree: Any) -> Any:
  """For each leaf whether `default_rule` takes it for a table of embeddings."""
  names, leaves, _ = flatten(unbox(tree))
  tables = [why == _TABLE for _, why in default_rule(names, [*map(np.shape, leaves)])]
  return jax.tree.unflatten(jax.tree.structure(tree), tables)


def choose(
  names: list[str], arrays: list[Any], batch: list[tuple[int, ...]], leaves: Predicate
) -> list[tuple[bool, str]]:
  """For each leaf whether it is filtered, and why."""
  if leaves is None:
    shapes = [
      tuple(n for axis, n in enumerate(np.shape(x)) if axis not in own)
      for x, own in zip(arrays, batch, strict=True)
    ]
    found = default_rule(names, shapes)
    if not any(filtered for filtered, _ in found):
      # Where the rule would take a leaf as a whole, the batch axes are to blame.
      whole = default_rule(names, [np.shape(x) for x in arrays])
      for i, (filtered, _) in enumerate(whole):
        if filtered:
          raise ValueError(
            f'batch_axes must leave a matrix to filter, got {batch[i]} for {names[i]!r}'
            f' of shape {np.shape(arrays[i])}, and no other leaf has one; batch axes'
            ' index layers or experts, and a single matrix needs none.'
          )
    return found
  _check.predicate(leaves=leaves)
  verdicts = [bool(leaves(n, x)) for n, x in zip(names, arrays, strict=True)]
  return [(v, 'leaves' if v else 'not in leaves') for v in verdicts]


# How a layout is made.


def layout(
  params: Any,
  *,
  leaves: Predicate = None,
  labels: Labels = None,
  batch_axes: Axes = None,
  axes: Axes = None,
  axis_name: str | Sequence[str] | None = None,
  stacked: bool = False,
) -> Layout:
  """Works out the layout of `params` from names and shapes alone.

  Args:
    params: parameters or updates; abstract and boxed (Flax) leaves are fine.
    leaves: see `bsfa_optax.scale_by_whitening`.
    labels: see `bsfa_optax.pca`.
    batch_axes: see `bsfa_optax.scale_by_whitening`.
    axes: see `bsfa_optax.scale_by_whitening`.
    axis_name: see `bsfa_optax.scale_by_whitening`.
    stacked: whether leaves that are alike are one part.

  Returns:
    The static `Layout`.

  Raises:
    ValueError: for a spec of another structure, an axis out of range, leaves of one
      block with different batch shapes, or leaves split over other mesh axes.
    TypeError: for parameters that are not real floating-point numbers, a predicate
      that is none, or labels that are no strings.
  """
  tree = unbox(params)
  names, arrays, _ = flatten(tree)
  specs = broadcast(batch_axes, tree, is_axes, 'batch_axes')
  batch = [
    _resolved(*each, 'batch_axes') or ()
    for each in zip(specs, names, arrays, strict=True)
  ]
  # Labels and predicates are two ways to choose: with labels, leaves go unasked.
  label_of = broadcast(labels, tree, lambda x: x is None, 'labels')
  if labels is None:
    chosen = choose(names, arrays, batch, leaves)
  else:
    chosen = [_labelled(*each) for each in zip(names, label_of, strict=True)]
  axis_names = _names(axis_name)
  named = broadcast(axes, tree, is_axes, 'axes')
  columns = zip(names, arrays, batch, named, chosen, strict=True)
  found = []
  for i, (name, x, indices, spec, (filtered, why)) in enumerate(columns):
    dtype = _dtype(name, x, filtered)
    split = _split_axes(name, x, axis_names) if filtered else ()
    # Only layouts that stack, those of filters with factors, are asked for axes.
    own = _factored(spec, name, x, indices, split if stacked else ())
    found.append(Leaf(name, i, np.shape(x), dtype, indices, why, filtered, own, split))

  members: dict[Any, list[Leaf]] = {}
  for leaf in found:
    if leaf.filtered:
      members.setdefault(_kind(leaf) if stacked else leaf.position, []).append(leaf)
  parts = tuple(_part(tuple(group), stacked) for group in members.values())
  return Layout(tuple(found), parts, _blocks(parts, label_of))


def layouts_with_factors(
  leaves: Predicate, axes: Axes, batch_axes: Axes, axis_name: str | Sequence[str] | None
) -> Callable[[Any], Layout]:
  """`layout` with these options, for filters with a factor for some axes of a leaf."""
  return functools.partial(
    layout,
    leaves=leaves,
    axes=axes,
    batch_axes=batch_axes,
    axis_name=axis_name,
    stacked=True,
  )


def _kind(leaf: Leaf) -> tuple[Any, ...]:
  """What leaves have in common that may be stacked."""
  path = re.sub(r'\d+', '#', leaf.name)
  return path, leaf.shape, leaf.batch_axes, leaf.axes, leaf.split


def _part(leaves: tuple[Leaf, ...], stacked: bool) -> Part:
  first, new = leaves[0], int(stacked)  # axes in front of the leaf's own
  shape = (len(leaves),) * new + first.shape
  batch_axes = (0,) * new + tuple(axis + new for axis in first.batch_axes)
  inner_axes = tuple(axis for axis in range(len(shape)) if axis not in batch_axes)
  own = [first.shape[axis] for axis in first.batch_axes]
  tails = [f'[{",".join(map(str, i))}]' if i else '' for i in np.ndindex(*own)]
  shards = math.prod(map(jax.lax.axis_size, first.split))
  return Part(
    leaves,
    stacked,
    shape,
    batch_axes,
    batch_shape=tuple(shape[axis] for axis in batch_axes),
    inner_axes=inner_axes,
    size=math.prod(shape[axis] for axis in inner_axes) * shards,
    axes=tuple(axis + new for axis in first.axes),
    names=tuple(leaf.name + tail for leaf in leaves for tail in tails),
    split=first.split,
  )


def _blocks(parts: tuple[Part, ...], label_of: list[str | None]) -> tuple[Block, ...]:
  groups: dict[Any, list[int]] = {}
  for i, part in enumerate(parts):
    label = label_of[part.leaves[0].position]
    groups.setdefault(i if label is None else label, []).append(i)
  blocks: list[Block] = []
  for label, members in groups.items():
    shapes = {parts[i].batch_shape for i in members}
    if len(shapes) > 1:
      raise ValueError(
        f'leaves of one block must have the same batch shape, got {sorted(shapes)}'
        f' in block {label!r}; give them different labels or other batch_axes.'
      )
    first = parts[members[0]]
    names = first.names
    if isinstance(label, str):
      names = tuple(label + name.removeprefix(first.leaves[0].name) for name in names)
    size = sum(parts[i].size for i in members)
    blocks.append(Block(names, tuple(members), size))
  return tuple(blocks)


def _labelled(name: str, label: Any) -> tuple[bool, str]:
  if label is not None and not isinstance(label, str):
    raise TypeError(
      f'labels must be strings, or None for leaves to leave alone, got {label!r}'
      f' for {name!r}; a choice of leaves goes into leaves=lambda name, leaf: ....'
    )
  return label is not None, 'no label' if label is None else 'labels'


def _resolved(spec: Any, name: str, x: Any, option: str) -> tuple[int, ...] | None:
  """The axes of a spec, ascending; None if there is no spec."""
  if spec is None:
    return None
  value = (spec,) if isinstance(spec, int) else spec
  ndim = np.ndim(x)
  if not is_axes(value) or any(not -ndim <= a < ndim for a in value):
    raise ValueError(
      f'{option} must lie within the axes of each leaf, got {spec} for {name!r} of'
      f' shape {np.shape(x)}; use None for leaves that need no choice.'
    )
  return tuple(sorted({a % ndim for a in value}))


def _factored(
  spec: Any, name: str, x: Any, batch: tuple[int, ...], split: tuple[str, ...]
) -> tuple[int, ...]:
  """The axes that may have a factor: those named, or all but the batch axes."""
  value = _resolved(spec, name, x, 'axes')
  if value is None:
    if split:
      raise ValueError(
        f'axes must be given for {name!r}, which is split over the manual mesh axes'
        f' {list(split)}, got None; name the axes that each device holds whole, () if'
        ' there are none.'
      )
    return tuple(axis for axis in range(np.ndim(x)) if axis not in batch)
  if set(value) & set(batch):
    raise ValueError(
      f'axes must not be batch axes, got axes={spec} for {name!r}, whose batch axes'
      f' are {batch}; name an axis in one of them only.'
    )
  return value


def check_arrays(params: Any) -> None:
  """Raises a TypeError with a remedy if a leaf is neither an array nor a number."""
  names, arrays, _ = flatten(unbox(params))
  for name, x in zip(names, arrays, strict=True):
    _dtype(name, x, filtered=False)


def _dtype(name: str, x: Any, filtered: bool) -> Any:
  if not (hasattr(x, 'dtype') or isinstance(x, (int, float, complex))):
    raise TypeError(
      f'parameters must be arrays or numbers, got {x!r} for {name!r}; leave it out of'
      ' the tree, as with equinox.filter(model, equinox.is_inexact_array).'
    )
  dtype = x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)
  if filtered and not jnp.issubdtype(dtype, jnp.floating):
    remedy = 'leave the leaf out with optax.masked or optax.partition'
    if jnp.issubdtype(dtype, jnp.complexfloating):
      remedy = 'wrap the transformation in optax.contrib.split_real_and_imaginary'
    raise TypeError(
      f'parameters must be floating-point, got {dtype} for {name!r}; {remedy}.'
    )
  return dtype


def _names(axis_name: Any) -> tuple[str, ...]:
  names = (axis_name,) if isinstance(axis_name, str) else axis_name
  names = () if names is None else names
  if not isinstance(names, (tuple, list)) or not all(isinstance(x, str) for x in names):
    raise TypeError(
      f'axis_name must be a name of a mesh axis or a tuple of names, got {axis_name!r}.'
    )
  return tuple(names)


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
  structure: Any = jax.tree.structure(tree)
  try:
    full = jax.tree.broadcast(spec, tree, is_leaf=is_leaf)
  except (ValueError, TypeError, KeyError) as e:
    raise ValueError(
      f'{option} must be a tree with the structure of the parameters (or a prefix'
      f' of it), got {jax.tree.structure(spec, is_leaf=is_leaf)} for parameters'
      f' {structure}; pass a function of the parameters to build it.'
    ) from e
  return structure.flatten_up_to(full)


def _split_axes(name: str, leaf: Any, axis_names: tuple[str, ...]) -> tuple[str, ...]:
  """Those of `axis_names` that split a leaf: it varies over no others."""
  varying = varying_axes(leaf)
  if rest := varying.difference(axis_names):
    raise ValueError(
      f'{name!r} varies over the manual mesh axes {sorted(rest)}: average gradients of'
      ' replicated parameters over them first (jax.lax.pmean); if they split the'
      ' parameters, name them in axis_name.'
    )
  mapped = jax.sharding.get_abstract_mesh().manual_axes  # those of jax.shard_map
  checked = lambda axis: varying_axes(lax.axis_index(axis))
  return tuple(
    axis
    for axis in axis_names
    if axis in mapped and (axis in varying or not checked(axis))
  )


# Trees of parameters, of Flax or not.


def flatten(tree: Any, is_leaf: Any = None) -> tuple[list[str], list[Any], Any]:
  """Paths of leaves, such as ``'layers/0/kernel'``, leaves, and a tree's structure."""
  flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in flat]
  return names, [leaf for _, leaf in flat], structure


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shapes of a tree's leaves by their paths, in boxes of Flax or not."""
  names, leaves, _ = flatten(unbox(tree))
  return dict(zip(names, map(jnp.shape, leaves), strict=True))


def check_shapes(
  tree: Any, wanted: dict[str, Any], must: str, where: str, remedy: str
) -> None:
  """Raises unless a tree's leaves have these shapes, naming the first that differ."""
  for name, old, new in differences(shapes(tree), wanted):
    at = where.format(name)
    raise ValueError(f'{must}, got {old} for {at}, expected {new}; {remedy}.')


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
  """The names for which two dictionaries do not have the same, with what they have."""
  pairs = [
    (name, old.get(name, 'nothing'), new.get(name, 'nothing'))
    for name in sorted(old.keys() | new.keys())
  ]
  return [(name, a, b) for name, a, b in pairs if a != b]


def is_box(node: Any) -> bool:
  """Whether `node` is Flax metadata around one leaf (Variable or Partitioned)."""
  return hasattr(node, 'add_axis') and len(jax.tree.leaves(node)) == 1


def unbox(tree: Any) -> Any:
  """Drops Flax metadata: every box becomes the leaf in it."""
  bare = lambda node: jax.tree.leaves(node)[0] if is_box(node) else node
  return jax.tree.map(bare, tree, is_leaf=is_box)


def zeros(params: Any, layout: Layout, rows: int, dtype: Any = None) -> Any:
  """A tree like `params` with a zero `Stack` for each leaf in a block.

  Leaves in no block become `optax.MaskedNode`. Flax metadata is kept, with a
  leading unsharded axis. For layouts whose parts are single leaves.
  """

  def stack(p):
    return jnp.broadcast_to(jnp.zeros_like(p, dtype), (rows, *jnp.shape(p)))

  make = lambda node: Stack(_add_row_axis(jax.tree.map(stack, node)))
  _, nodes, structure = flatten(params, is_box)
  return structure.unflatten(
    make(node) if leaf.filtered else optax.MaskedNode()
    for leaf, node in zip(layout.leaves, nodes, strict=True)
  )


def _add_row_axis(node: Any) -> Any:
  """Tells Flax metadata around a stack that its first axis is unsharded."""
  if not is_box(node):
    return node
  if hasattr(node, 'get_metadata'):  # nnx.Variable; it changes in place
    from flax import nnx  # a Variable exists, so Flax is there

    nnx.spmd.add_axis(node, 0, {nnx.PARTITION_NAME: None})
    return node
  return node.add_axis(0, {'partition_name': None})  # linen's AxisMetadata


# Precision and shardings.


def accumulator(*dtypes: Any) -> Any:
  """The dtype in which contractions over leaves of these dtypes accumulate."""
  # One by one: NumPy has no dtype for bfloat16 and float16 together.
  return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def sharding_of(x: jax.Array, spec: Any) -> NamedSharding | None:
  """`spec` on the explicit mesh of `x`; None where there is no explicit mesh."""
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty or AxisType.Explicit not in mesh.axis_types:
    return None
  return NamedSharding(mesh, PartitionSpec(*spec))


def spec_of(x: jax.Array) -> tuple[Any, ...]:
  """The partition of every axis of `x` on an explicit mesh (else None)."""
  return tuple(jax.typeof(x).sharding.spec)


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
  return jax.typeof(x).manual_axis_type.varying


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
  dtype = accumulator(x.dtype, y.dtype)
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
  dtype = accumulator(a.dtype, b.dtype)

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

  A matrix `(n, n)` is the same for the whole batch. The product has the shape and
  sharding of `x`, in the accumulators' dtype. The platform's own precision is None.
  """
  x = x.astype(accumulator(x.dtype))
  letters, batch = _letters(x.ndim, batch_axes if matrix.ndim > 2 else ())
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


# On vectors.


def spread(layout: Layout, values: jax.Array) -> Vector:
  """Numbers of blocks, `(blocks,)`, to broadcast to the arrays of a vector."""
  expand = lambda part, own: jnp.expand_dims(own, part.inner_axes)
  return layout.map(expand, layout.scatter(values))


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
      w = jnp.expand_dims(w, tuple(2 + axis for axis in part.inner_axes))
      rows = [row[None].astype(w.dtype) for row in x]
      return functools.reduce(jnp.add, map(jnp.multiply, w, rows))
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
  inverse: bool = False,
) -> Vector:
  """Coefficients of a vector in orthonormal bases of some axes of its parts.

  Args:
    layout: the layout.
    vector: the vector.
    bases: for each part a basis as columns, `(*batch, n, n)`, for each of its `axes`;
      or `(n, n)`, the same for the whole batch.
    axes: for each part the axes to rotate.
    inverse: back from coefficients.

  Returns:
    Arrays of the shapes and shardings of the vector's, in the accumulators' dtypes.
  """

  def rotated(part, x, own_bases, own_axes):
    for axis, basis in zip(own_axes, own_bases, strict=True):
      x = multiply(x, basis, axis, part.batch_axes, inverse=inverse)
    return x.astype(accumulator(x.dtype))

  return layout.map(rotated, vector, bases, axes)


def scale(layout: Layout, vector: Vector, factors: jax.Array) -> Vector:
  """Every block times its factor, `(blocks,)`."""
  times = lambda x, factor: x * factor.astype(x.dtype)
  return jax.tree.map(times, vector, spread(layout, factors))


def select(layout: Layout, which: jax.Array, new: Vector, old: Vector) -> Vector:
  """The blocks of `new` where `which`, `(blocks,)`, is true, else those of `old`."""
  return jax.tree.map(jnp.where, spread(layout, which), new, old)


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
    solve = functools.partial(_in_portions, function)
    if mesh_axis is not None:
      solve = functools.partial(_distributed, solve, mesh_axis)
    found = solve(batch)
    start = 0
    for i in members:
      shape = matrices[i].shape[:-2]
      rows = slice(start, start + math.prod(shape))
      own = lambda x, r=rows, s=shape: x[r].reshape(*s, *x.shape[1:])
      out[i] = jax.tree.map(own, found)
      start = rows.stop
  return out


def _in_portions(function: Callable, batch: jax.Array) -> Any:
  portion = max(LARGE // batch.shape[-1] ** 2, 1)
  if len(batch) <= portion:
    return function(batch)
  single = lambda x: jax.tree.map(lambda y: y[0], function(x[None]))
  return lax.map(single, batch, batch_size=portion)


def _distributed(function: Callable, mesh_axis: str, batch: jax.Array) -> Any:
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
