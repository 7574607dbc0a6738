"""Which leaves are filtered, and how they are laid out for the arithmetic.

From shapes and names alone a tree of parameters becomes a `Layout`: *parts*, each one
leaf or a stack of leaves that are alike (the same shape, the same path up to digits,
so the same matrix of every layer), and *blocks*, the sets of entries that share one
dominant subspace. A vector is then a list of arrays, one a part, and what is written
once for a part is traced and compiled once however many layers there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check

Predicate = Callable[[str, Any], bool] | None
Labels = Any | Callable[[optax.Params], Any] | None
Axes = Any | Callable[[optax.Params], Any] | None
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

  @property
  def kind(self) -> tuple[Any, ...]:
    """What leaves have in common that may be stacked."""
    path = re.sub(r'\d+', '#', self.name)
    return path, self.shape, self.batch_axes, self.axes, self.split


@dataclasses.dataclass(frozen=True)
class Part:
  """One array of a vector: a leaf, or leaves alike behind a new first axis."""

  leaves: tuple[Leaf, ...]
  stacked: bool

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.leaves),) * self.stacked + self.leaves[0].shape

  @property
  def batch_axes(self) -> tuple[int, ...]:
    own = tuple(axis + self.stacked for axis in self.leaves[0].batch_axes)
    return (0,) * self.stacked + own

  @property
  def batch_shape(self) -> tuple[int, ...]:
    return tuple(self.shape[axis] for axis in self.batch_axes)

  @property
  def inner_axes(self) -> tuple[int, ...]:
    """The axes within a block."""
    return tuple(a for a in range(len(self.shape)) if a not in self.batch_axes)

  @property
  def axes(self) -> tuple[int, ...]:
    """The axes that may have a factor."""
    return tuple(axis + self.stacked for axis in self.leaves[0].axes)

  @property
  def split(self) -> tuple[str, ...]:
    return self.leaves[0].split

  @property
  def names(self) -> list[str]:
    """A name for each index of the batch axes."""
    leaf = self.leaves[0]
    if not leaf.batch_axes:
      return [leaf.name for leaf in self.leaves]
    inner = itertools.product(*(range(leaf.shape[a]) for a in leaf.batch_axes))
    tails = ['[' + ','.join(map(str, index)) + ']' for index in inner]
    return [leaf.name + tail for leaf in self.leaves for tail in tails]


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

  def only(self, members: Sequence[int]) -> Layout:
    """The layout of some parts alone, without blocks."""
    parts = tuple(self.parts[i] for i in members)
    return dataclasses.replace(self, parts=parts, blocks=())

  def select(self, tree: Any) -> Vector:
    """The vector of a tree like the parameters: an array for each part."""
    leaves = [*map(jnp.asarray, jax.tree.leaves(tree))]  # may be Python numbers
    out = []
    for part in self.parts:
      values = [leaves[leaf.position] for leaf in part.leaves]
      out.append(stack(values) if part.stacked else values[0])
    return out

  def replace(self, tree: Any, vector: Sequence[Any]) -> Any:
    """`tree` with its filtered leaves taken from a vector, in their own dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    for part, value in zip(self.parts, vector, strict=True):
      rows = unstack(value, len(part.leaves)) if part.stacked else [value]
      for leaf, row in zip(part.leaves, rows, strict=True):
        old = jnp.asarray(leaves[leaf.position])
        leaves[leaf.position] = like(row.astype(old.dtype), old)
    return jax.tree.unflatten(structure, leaves)

  def gather(self, values: Sequence[jax.Array], trailing: int = 0) -> jax.Array:
    """Sums `(*batch, ...)` values within each block into `(count, ...)`.

    Args:
      values: an array for each part, its batch axes first.
      trailing: number of axes behind the batch axes.
    """
    dtype = functools.reduce(np.promote_types, [x.dtype for x in values])
    values = self.sum_over_shards([x.astype(dtype) for x in values])
    found = []
    for block in self.blocks:
      total = functools.reduce(jnp.add, [values[i] for i in block.parts])
      found.append(total.reshape((-1, *total.shape[total.ndim - trailing :])))
    return jnp.concatenate(found)

  def scatter(self, values: jax.Array) -> Vector:
    """Splits `(count, ...)` into a `(*batch, ...)` array for each part."""
    out: list[Any] = [None] * len(self.parts)
    for block in self.blocks:
      own = values[block.rows.start : block.rows.stop]
      own = own.reshape(block.batch_shape + values.shape[1:])
      for i in block.parts:
        out[i] = own
    return out

  def totals(self, values: Sequence[jax.Array]) -> Vector:
    """For each part `(*batch,)` the sums of values `(*batch,)` within its blocks."""
    out = self.sum_over_shards(values)
    for block in self.blocks:
      total = functools.reduce(jnp.add, [out[i] for i in block.parts])
      for i in block.parts:
        out[i] = total
    return out

  def sum_over_shards(self, values: Sequence[Any]) -> list[Any]:
    """Sums the values of each part over the mesh axes of `jax.shard_map` that split it.

    Args:
      values: for each part an array or a tree of arrays.

    Returns:
      The sums. The parts split in the same way share one all-reduce.
    """
    out = list(values)
    for axes in {part.split: None for part in self.parts if part.split}:
      members = [i for i, part in enumerate(self.parts) if part.split == axes]
      totals = jax.lax.psum([out[i] for i in members], axes)
      for i, total in zip(members, totals, strict=True):
        out[i] = total
    return out


def stack(values: Sequence[jax.Array]) -> jax.Array:
  """Leaves alike behind a new first axis, sharded as the first of them."""
  dtypes = {x.dtype for x in values}
  if len(dtypes) > 1:  # NumPy has none for both halves
    dtypes = {np.promote_types(x, np.float32) for x in dtypes}
  dtype = functools.reduce(np.promote_types, dtypes)
  return jnp.stack([like(x.astype(dtype), values[0]) for x in values])


def unstack(value: jax.Array, count: int) -> list[jax.Array]:
  return [jax.lax.index_in_dim(value, i, 0, keepdims=False) for i in range(count)]


def like(x: jax.Array, other: Any) -> jax.Array:
  """`x` with the sharding that `other` has on an explicit mesh."""
  wanted = getattr(jax.typeof(other), 'sharding', None)
  if wanted is None or wanted.mesh.empty or jax.typeof(x).sharding == wanted:
    return x
  return jax.sharding.reshard(x, wanted)


# Which leaves.

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
  occurrences = Counter(re.sub(r'\d+', '#', path) for path in paths)
  known = set(paths)
  by_name = [_by_name(p, s, known) for p, s in zip(paths, shapes, strict=True)]
  vocabulary = {
    shape[0]
    for shape, why in zip(shapes, by_name, strict=True)
    if why == 'table of embeddings'
  }
  found = []
  for path, shape, why in zip(paths, shapes, by_name, strict=True):
    once = occurrences[re.sub(r'\d+', '#', path)] == 1
    if why is None and len(shape) == 2 and once and vocabulary & set(shape):
      why = 'output layer (an axis as long as the vocabulary)'
    found.append((why is None, why or 'matrix'))
  return found


def _by_name(path: str, shape: tuple[int, ...], known: set[str]) -> str | None:
  """Why a leaf stays with the base optimizer, or None."""
  *modules, own = path.split('/')
  module = modules[-1] if modules else ''
  wide = sorted((n for n in shape if n > 1), reverse=True)
  if len(wide) < 2:
    return 'vector'
  if _VECTORS.search(own) or (own == 'b' and path[:-1] + 'w' in known):
    return 'bias or scale'
  if any(map(_NORMS.search, (*modules, own))):
    return 'norm'
  if any(map(_POSITIONS.search, (module, own))):
    return 'positions'
  anonymous = own in ('weight', 'w')  # tells no table from a projection
  table = module if anonymous else own
  if len(shape) == 2 and _TABLES.search(table) and not _PROJECTIONS.search(table):
    return 'table of embeddings' if not _HEADS.search(table) else 'output layer'
  if any(map(_HEADS.search, (*modules[:1], module, own))):
    return 'output layer'
  lopsided = 4 * wide[1] < wide[0]
  if any(map(_ROUTERS.search, (module, own))) or (module == 'gate' and lopsided):
    return 'router'
  if len(shape) > 2 and 1 in shape and wide[1] <= _LONGEST_WINDOW:
    return 'convolution of single channels'
  return None


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
  flat = jax.tree_util.tree_leaves_with_path(tree)
  names = [jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in flat]
  arrays = [x for _, x in flat]
  batch = [
    _resolved(spec, name, x, 'batch_axes') or ()
    for name, x, spec in zip(
      names, arrays, broadcast(batch_axes, tree, is_axes, 'batch_axes'), strict=True
    )
  ]
  named = broadcast(axes, tree, is_axes, 'axes')
  chosen, label_of = _chosen(tree, names, arrays, batch, leaves, labels)
  axis_names = _check.names('axis_name', axis_name)
  found = []
  for i, (name, x) in enumerate(zip(names, arrays, strict=True)):
    filtered, why = chosen[i]
    if filtered:
      _check_real(name, x)
    split = _split_axes(name, x, axis_names) if filtered else ()
    own = _factored(named[i], name, x, batch[i], split if stacked else ())
    found.append(
      Leaf(name, i, np.shape(x), _dtype(name, x), batch[i], why, filtered, own, split)
    )

  members: dict[Any, list[Leaf]] = {}
  for leaf in found:
    if leaf.filtered:
      members.setdefault(leaf.kind if stacked else leaf.position, []).append(leaf)
  parts = tuple(Part(tuple(group), stacked) for group in members.values())
  return Layout(tuple(found), parts, _blocks(parts, label_of))


# Lists of (layout, memory), to which `init` of a filter adds its own.
observers: list[list[tuple[Layout, Any]]] = []


def _blocks(parts: tuple[Part, ...], label_of: dict[int, str]) -> tuple[Block, ...]:
  groups: dict[Any, list[int]] = {}
  for i, part in enumerate(parts):
    groups.setdefault(label_of.get(part.leaves[0].position, i), []).append(i)
  blocks, start = [], 0
  for label, members in groups.items():
    shapes = {parts[i].batch_shape for i in members}
    if len(shapes) > 1:
      raise ValueError(
        f'leaves of one block must have the same batch shape, got {sorted(shapes)}'
        f' in block {label!r}; give them different labels or other batch_axes.'
      )
    first = parts[members[0]]
    count = math.prod(first.batch_shape)
    size = sum(
      math.prod(parts[i].shape) * math.prod(map(jax.lax.axis_size, parts[i].split))
      for i in members
    )
    names = first.names
    if isinstance(label, str):
      names = [label + name[len(first.leaves[0].name) :] for name in names]
    rows = range(start, start + count)
    per_block = size // max(count, 1)
    blocks.append(
      Block(tuple(names), tuple(members), first.batch_shape, per_block, rows)
    )
    start += count
  return tuple(blocks)


def _chosen(
  tree: Any,
  names: list[str],
  arrays: list[Any],
  batch: list[tuple[int, ...]],
  leaves: Predicate,
  labels: Labels,
) -> tuple[list[tuple[bool, str]], dict[int, str]]:
  """For each leaf whether it is filtered and why, and the labels of those joined."""
  if labels is not None:
    specs = broadcast(labels, tree, lambda x: x is None, 'labels')
    for name, label in zip(names, specs, strict=True):
      if label is not None and not isinstance(label, str):
        raise TypeError(
          f'labels must be strings, or None for leaves to leave alone, got {label!r}'
          f' for {name!r}; a choice of leaves goes into leaves=lambda name, leaf: ....'
        )
    why = [(x is not None, 'labels' if x is not None else 'no label') for x in specs]
    return why, {i: x for i, x in enumerate(specs) if x is not None}
  if leaves is None:
    shapes = [
      tuple(n for axis, n in enumerate(np.shape(x)) if axis not in own)
      for x, own in zip(arrays, batch, strict=True)
    ]
    found = default_rule(names, shapes)
    whole = default_rule(names, [np.shape(x) for x in arrays])
    if not any(yes for yes, _ in found) and any(yes for yes, _ in whole):
      name = next(n for n, (yes, _) in zip(names, whole, strict=True) if yes)
      at = names.index(name)
      raise ValueError(
        f'batch_axes must leave a matrix to filter, got {batch[at]} for {name!r} of'
        f' shape {np.shape(arrays[at])}, and no other leaf has one; batch axes index'
        ' layers or experts, and a single matrix needs none.'
      )
    return found, {}
  if not callable(leaves):
    raise TypeError(
      f'leaves must be a function of a name and a leaf, got {leaves!r}; for instance'
      " leaves=lambda name, leaf: name.endswith('kernel')."
    )
  verdicts = [bool(leaves(n, x)) for n, x in zip(names, arrays, strict=True)]
  return [(v, 'leaves' if v else 'not in leaves') for v in verdicts], {}


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


def _check_real(name: str, x: Any) -> None:
  dtype = _dtype(name, x)
  if not jnp.issubdtype(dtype, jnp.floating):
    remedy = (
      'wrap the transformation in optax.contrib.split_real_and_imaginary'
      if jnp.issubdtype(dtype, jnp.complexfloating)
      else 'leave the leaf out with optax.masked or optax.partition'
    )
    raise TypeError(
      f'parameters must be floating-point, got {dtype} for {name!r}; {remedy}.'
    )


def _dtype(name: str, x: Any) -> Any:
  if not (hasattr(x, 'dtype') or isinstance(x, (int, float, complex))):
    raise TypeError(
      f'parameters must be arrays or numbers, got {x!r} for {name!r}; leave it out of'
      ' the tree, as with equinox.filter(model, equinox.is_inexact_array).'
    )
  return x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)


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
    boxes = jax.tree.map(
      lambda s, sub: jax.tree.map(lambda _: _Leaf(s), sub),
      spec,
      tree,
      is_leaf=is_leaf,
    )
  except (ValueError, TypeError, KeyError) as e:
    raise ValueError(
      f'{option} must be a tree with the structure of the parameters (or a prefix'
      f' of it), got {jax.tree.structure(spec, is_leaf=is_leaf)} for parameters'
      f' {jax.tree.structure(tree)}; pass a function of the parameters to build it.'
    ) from e
  found = jax.tree.leaves(boxes, is_leaf=lambda x: isinstance(x, _Leaf))
  return [x.value for x in found]


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
      ' parameters, name them in axis_name.'
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
