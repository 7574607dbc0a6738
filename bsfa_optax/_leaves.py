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
import functools
from itertools import product
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check
from bsfa_optax._vectors import Block, Layout, Leaf, Part, Stack, varying_axes

Predicate = Callable[[str, Any], bool] | None
Labels = Any | Callable[[optax.Params], Any] | None
Axes = Any | Callable[[optax.Params], Any] | None


class Observed(NamedTuple):
  """What `init` of a filter tells."""

  layout: Layout
  memory: Any
  interval: Any  # see `bsfa_optax._learned.learned`


observers: list[list[Observed]] = []  # to the last of which `init` adds its own


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
  kinds = [re.sub(r'\d+', '#', path) for path in paths]
  occurrences = Counter(kinds)
  known = set(paths)
  by_name = [_by_name(p, s, known) for p, s in zip(paths, shapes, strict=True)]
  tables = zip(shapes, by_name, strict=True)
  vocabulary = {shape[0] for shape, why in tables if why == 'table of embeddings'}
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
    return 'table of embeddings' if not _HEADS.search(table) else 'output layer'
  if any(map(_HEADS.search, (*modules[:1], module, own))):
    return 'output layer'
  # A gate with as many entries as its input gates an MLP; with a few, it picks experts.
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
  names = [name for name, _ in named_leaves(tree)]
  arrays = jax.tree.leaves(tree)
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


def _kind(leaf: Leaf) -> tuple[Any, ...]:
  """What leaves have in common that may be stacked."""
  path = re.sub(r'\d+', '#', leaf.name)
  return path, leaf.shape, leaf.batch_axes, leaf.axes, leaf.split


def _part(leaves: tuple[Leaf, ...], stacked: bool) -> Part:
  first, new = leaves[0], int(stacked)  # axes in front of the leaf's own
  shape = (len(leaves),) * new + first.shape
  batch_axes = (0,) * new + tuple(axis + new for axis in first.batch_axes)
  inner_axes = tuple(axis for axis in range(len(shape)) if axis not in batch_axes)
  own = [range(first.shape[axis]) for axis in first.batch_axes]
  tails = ['[' + ','.join(map(str, i)) + ']' if i else '' for i in product(*own)]
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
    start = blocks[-1].rows.stop if blocks else 0
    rows = range(start, start + math.prod(first.batch_shape))
    size = sum(parts[i].size for i in members)
    blocks.append(Block(names, tuple(members), first.batch_shape, size, rows))
  return tuple(blocks)


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
  _check.predicate(leaves)
  verdicts = [bool(leaves(n, x)) for n, x in zip(names, arrays, strict=True)]
  return [(v, 'leaves' if v else 'not in leaves') for v in verdicts]


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
  for name, x in named_leaves(unbox(params)):
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


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """The leaves of a tree with their paths, such as ``'layers/0/kernel'``."""
  found = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return [(name(path), x) for path, x in found]


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shapes of a tree's leaves by their paths, in boxes of Flax or not."""
  return {name: jnp.shape(x) for name, x in named_leaves(unbox(tree))}


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

  return jax.tree.map(make, params, is_leaf=is_box)


def _add_row_axis(node: Any) -> Any:
  """Tells Flax metadata around a stack that its first axis is unsharded."""
  if not is_box(node):
    return node
  if hasattr(node, 'get_metadata'):  # nnx.Variable; it changes in place
    from flax import nnx  # a Variable exists, so Flax is there

    nnx.spmd.add_axis(node, 0, {nnx.PARTITION_NAME: None})
    return node
  return node.add_axis(0, {'partition_name': None})  # linen's AxisMetadata


def _split_axes(name: str, leaf: Any, axis_names: tuple[str, ...]) -> tuple[str, ...]:
  """Those of `axis_names` that split a leaf: it varies over no others."""
  if jax.sharding.get_abstract_mesh().empty:  # within jax.shard_map there is one
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
