"""What an optimizer's state is: its bytes, shardings and layout in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, Sharding
import numpy as np
import optax

from bsfa_optax import _check, _learned, _vectors
from bsfa_optax._vectors import Leaf, Part

# To be raised when the state's leaves change their meaning under the same names.
VERSION = 1


class LeafSummary(NamedTuple):
  """A row of `summary`.

  Attributes:
    name: the leaf's path.
    shape: its shape.
    filtered: whether it is filtered.
    why: why it is, or is not.
    blocks: how many matrices it holds.
    memory: shapes of what is remembered of one matrix, but for single numbers.
    memory_bytes: bytes of that, for the whole leaf.
    operations: of a step in the products with these matrices, a fifth of a refresh
      included.
  """

  name: str
  shape: tuple[int, ...]
  filtered: bool
  why: str
  blocks: int
  memory: tuple[tuple[int, ...], ...]
  memory_bytes: int
  operations: int


class Summary(NamedTuple):
  """What `summary` returns; prints as a table.

  Attributes:
    leaves: a `LeafSummary` for each leaf, once for each filter.
    state_bytes: bytes of the whole state, that of other transformations included.
    parameters: number of parameters.
    warnings: where the options are probably not what is wanted.
  """

  leaves: tuple[LeafSummary, ...]
  state_bytes: int
  parameters: int
  warnings: tuple[str, ...]

  def __str__(self) -> str:
    head = ('leaf', 'shape', 'filtered', 'memory', 'bytes', 'share')
    operations = sum(leaf.operations for leaf in self.leaves)
    times = lambda shape: ' x '.join(map(str, shape)) or '-'
    rows = [
      (
        leaf.name,
        times(leaf.shape),
        'yes' if leaf.filtered else f'no: {leaf.why}',
        ', '.join(map(times, leaf.memory)) or '-',
        f'{leaf.memory_bytes:,}' if leaf.memory else '-',
        f'{leaf.operations / operations:.0%}' if leaf.operations else '-',
      )
      for leaf in self.leaves
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
    each = self.state_bytes / max(self.parameters, 1)
    lines.append(f'state: {self.state_bytes:,} bytes, {each:.1f} a parameter')
    lines += [f'warning: {warning}' for warning in self.warnings]
    return '\n'.join(lines)


def summary(tx: optax.GradientTransformation, params: optax.Params) -> Summary:
  """Which leaves an optimizer filters and why, and the bytes of its state.

  Args:
    tx: any Optax transformation: a filter of this package, or what holds one (chains,
      `optax.partition`, `optax.masked`, `optax.inject_hyperparams`, ...).
    params: the parameters, or anything with their structure, shapes and dtypes.

  Returns:
    A `Summary`, to be printed or read.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> params = {
    ...   'embed': {'embedding': jnp.ones((64, 8))},
    ...   'layers': [{'kernel': jnp.ones((8, 8)), 'bias': jnp.ones(8)}],
    ... }
    >>> print(bsfa_optax.summary(bsfa_optax.bsfa_adamw(1e-3), params))
    leaf             shape   filtered                 memory                bytes  share
    embed/embedding  64 x 8  no: table of embeddings  -                     -      -
    layers/0/bias    8       no: vector               -                     -      -
    layers/0/kernel  8 x 8   yes                      1 x 8 x 9, 1 x 8 x 9  580    100%
    state: 5,268 bytes, 9.0 a parameter
  """
  state, found = _observed(tx, params)
  rows = [row for observed in found for row in _rows(observed)]
  parameters = sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params))
  warnings = [w for observed in found for w in _warnings(observed)]
  if not any(row.filtered for row in rows):
    warnings.append(
      'no leaf is filtered; say which are by leaves=lambda name, leaf: ...'
    )
  return Summary(tuple(rows), _bytes(state), parameters, tuple(warnings))


def _rows(observed: _learned.Observed) -> Iterator[LeafSummary]:
  """A row for each leaf; what a memory has for a whole part is shared out."""
  memory, layout, _ = observed
  per_part = type(memory) is tuple  # of `for_each_part`, and no named one
  held: dict[Leaf, tuple[int, Any, int, int]] = {}
  for i, part in enumerate(layout.parts):
    arrays = jax.tree.leaves(memory[i]) if per_part else []
    shapes = tuple(filter(None, (x.shape[len(part.batch_axes) :] for x in arrays)))
    totals = len(part.names), _bytes(arrays), _operations(part, arrays)
    blocks, size, operations = (total // len(part.leaves) for total in totals)
    held |= dict.fromkeys(part.leaves, (blocks, shapes, size, operations))
  for leaf in layout.leaves:
    own = held.get(leaf, (0, (), 0, 0))
    yield LeafSummary(leaf.name, leaf.shape, leaf.filtered, leaf.why, *own)


def _operations(part: Part, arrays: list[Any]) -> int:
  """Of the products with the square ones of a part's arrays; a fifth of a refresh.

  A refresh takes a second moment and three products for each of them.
  """
  squares = _squares(part, arrays)
  applied = sum(2 * math.prod(part.shape) * shape[-2] for shape in squares)
  roots = sum(3 * 2 * math.prod(shape[:-1]) * shape[-2] ** 2 for shape in squares)
  return applied + (applied + roots) // 5


def _squares(part: Part, arrays: list[Any]) -> list[tuple[int, ...]]:
  """Shapes of those that hold square matrices; the whitening's have a column more."""
  matrices = [x.shape for x in arrays if len(x.shape) - len(part.batch_axes) > 1]
  return [shape for shape in matrices if shape[-1] - shape[-2] in (0, 1)]


def _warnings(observed: _learned.Observed) -> Iterator[str]:
  """Where the layout of a filter is probably not what is wanted."""
  memory, layout, _ = observed
  groups: dict[str, list[Leaf]] = {}
  for leaf in layout.leaves:
    modules = leaf.name.split('/')[:-1]
    for prefix in itertools.accumulate(modules, '{}/{}'.format):
      groups.setdefault(prefix, []).append(leaf)
  stacks: list[str] = []
  for prefix, leaves in groups.items():
    deep = [leaf for leaf in leaves if leaf.filtered and len(leaf.shape) == 3]
    first = {leaf.shape[0] if len(leaf.shape) > 1 else 1 for leaf in leaves}
    within = any(prefix.startswith(f'{stack}/') for stack in stacks)
    named = any(leaf.batch_axes for leaf in leaves)
    alike = len(leaves) > 1 and len(first) == 1 and first != {1}
    if deep and alike and not named and not within:
      stacks.append(prefix)
      yield (
        f'{prefix}: all leaves have {first.pop()} in front, as stacked layers have;'
        ' if they are, name that axis in batch_axes'
      )
  if type(memory) is tuple:
    for part, own in zip(layout.parts, memory, strict=True):
      wide = sum(part.shape[axis] > 1 for axis in part.inner_axes)
      if len(_squares(part, jax.tree.leaves(own))) < min(wide, 2):
        leaf = part.leaves[0]
        yield (
          f'{leaf.name}: an axis of {leaf.shape} has no factor; raise max_size or'
          ' max_ratio, or leave it out'
        )


def block_names(tx: optax.GradientTransformation, params: optax.Params) -> list[str]:
  """Names for the entries of what a filter measures block by block.

  Args:
    tx: as in `summary`.
    params: as in `summary`.

  Returns:
    One name for each entry of, for example,
    ``optax.tree.get(state, 'effective_directions')``; those of the first filter in
    `tx`.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> from bsfa_optax.state import block_names
    >>> params = {'dense': {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3))}}
    >>> block_names(bsfa_optax.bsfa_adamw(1e-3), params)
    ['dense/kernel']
  """
  _, found = _observed(tx, params)
  return found[0].layout.names if found else []


def scalars(
  tx: optax.GradientTransformation, params: optax.Params, prefix: str = 'bsfa'
) -> Callable[[optax.OptState], dict[str, float]]:
  """What there is to log of a filter's state: a function from it to named floats.

  Args:
    tx: as in `summary`.
    params: as in `summary`.
    prefix: what the names begin with.

  Returns:
    A function of ``tx``'s state. It gives for each block what the filter measured in
    the last update, such as ``'bsfa/layers/0/kernel/effective_directions'``, and for
    the filter ``'bsfa/updates'`` and ``'bsfa/skipped_updates'`` so far and, of the
    whitening, ``'bsfa/age'``, the updates since its roots were computed. A second
    filter in `tx` has names under ``'bsfa/1'``. It waits for the state to be computed:
    call it where the loss is looked at.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> params = {'dense': {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3))}}
    >>> tx = bsfa_optax.bsfa_adamw(1e-3)
    >>> log = bsfa_optax.state.scalars(tx, params)
    >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    >>> for name, value in log(state).items():
    ...   print(name, round(value, 2))
    bsfa/updates 1.0
    bsfa/skipped_updates 0.0
    bsfa/age 0.0
    bsfa/dense/kernel/effective_directions 1.0
  """
  _, filters = _observed(tx, params)

  def log(state: optax.OptState) -> dict[str, float]:
    out: dict[str, float] = {}
    states = [s._replace(memory=()) for s in _filter_states(state)]
    for i, (one, own) in enumerate(zip(jax.device_get(states), filters, strict=True)):
      start, count = f'{prefix}/{i}' if i else prefix, int(one.filter_count)
      out[f'{start}/updates'] = count
      out[f'{start}/skipped_updates'] = int(one.skipped_updates)
      if own.interval is not None:
        is_refresh = lambda n, own=own: _learned.is_due(jnp.int32(n - 1), own.interval)
        # Updates are numbered from 1.
        out[f'{start}/age'] = count - next(filter(is_refresh, range(count, 0, -1)), 0)
      for name, values in one.measured.items():
        for block, value in zip(own.layout.names, values, strict=False):
          out[f'{start}/{block}/{name}'] = value
    return {name: float(value) for name, value in out.items()}

  return log


def _filter_states(state: optax.OptState) -> list[_learned.FilterState]:
  """All in a state, wherever they are, with Flax's metadata taken off."""
  is_filter = lambda x: isinstance(x, _learned.FilterState)
  leaves = jax.tree.leaves(_vectors.unbox(state), is_leaf=is_filter)
  return [x for x in leaves if is_filter(x)]


def _observed(
  tx: optax.GradientTransformation, params: optax.Params
) -> tuple[optax.OptState, list[_learned.Observed]]:
  """The abstract state, and what the filters in it tell, in its order."""
  _check.transformation(tx=tx)
  with _learned.observing(True):
    state = jax.eval_shape(tx.init, params)
  return state, [one.memory for one in _filter_states(state)]


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


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
    >>> import jax, jax.numpy as jnp, optax
    >>> from bsfa_optax.state import state_bytes
    >>> params = {'kernel': jax.ShapeDtypeStruct((128, 128), jnp.float32)}
    >>> state_bytes(optax.adam(1e-3), params)  # two moments, one count
    131076
  """
  _check.transformation(tx=tx)
  return _bytes(jax.eval_shape(tx.init, params))


def temporary_bytes(
  tx: optax.GradientTransformation, params: optax.Params, **extra_args: Any
) -> int:
  """Bytes that an update needs beside the state while it runs, a refresh included.

  Of a compiled update of the state in place, which takes as long as any compilation;
  nothing is allocated. With `state_bytes` that is the peak of an optimizer's memory,
  though in a jitted training step some of it shares the room of activations.

  Args:
    tx: any Optax transformation.
    params: the parameters, or anything with their structure, shapes and dtypes.
    **extra_args: those of ``tx.update``; functions are fine.

  Returns:
    The bytes, on each device where `params` have shardings.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bsfa_optax.state import state_bytes, temporary_bytes
    >>> params = {'kernel': jax.ShapeDtypeStruct((128, 128), jnp.float32)}
    >>> tx = optax.adam(1e-3)
    >>> temporary_bytes(tx, params) < state_bytes(tx, params)
    True
  """
  _check.transformation(tx=tx)
  state = jax.eval_shape(tx.init, params)
  update = jax.jit(functools.partial(tx.update, **extra_args), donate_argnums=1)
  analysis: Any = update.lower(params, state, params).compile().memory_analysis()
  return analysis.temp_size_in_bytes


def abstract_state(
  tx: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> optax.OptState:
  """Shapes, dtypes and shardings of an optimizer's state: a target for Orbax.

  Args:
    tx: any Optax transformation; see `state_shardings`.
    params: the parameters, or anything with their structure, shapes and dtypes.
    shardings: as in `state_shardings`.

  Returns:
    ``tx.init(params)`` with ``jax.ShapeDtypeStruct`` leaves.

  Raises:
    ValueError: as `state_shardings`.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> from bsfa_optax.state import abstract_state
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> sharding = jax.NamedSharding(mesh, jax.P('fsdp'))
    >>> kernel = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank=2, history=4))
    >>> target = abstract_state(tx, {'kernel': kernel})
    >>> target.memory.basis['kernel'].rows
    ShapeDtypeStruct(shape=(2, 8, 4), dtype=bfloat16, sharding=NamedSharding(...))
  """
  return jax.tree.map(
    lambda s, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state_shardings(tx, params, shardings),
    jax.eval_shape(tx.init, params),
  )


def state_shardings(
  tx: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> optax.OptState:
  """Shardings of an optimizer's state: those of the parameters it is made from.

  A state leaf shaped like a parameter gets the parameter's sharding, a stack of
  rows the same behind an unsharded axis of rows, and what belongs to no parameter is
  replicated. It is worked out by tracing ``tx.init``, so any chain, mask, partition
  or wrapper of transformations will do; nothing is allocated.

  Args:
    tx: any Optax transformation whose `init` keeps shardings, as Optax's own do
      (but for ``optax.lbfgs``, whose memory comes out replicated).
    params: the parameters, or anything with their structure, shapes and dtypes.
    shardings: a tree like the parameters (or a prefix of it) with leaves
      ``jax.sharding.Sharding`` or ``jax.P`` (None: replicated). By default what the
      leaves of `params` have as ``sharding``.

  Returns:
    A tree like ``tx.init(params)`` of shardings: of ``jax.P`` if `shardings` has
    these, else of ``NamedSharding``. It is fit for ``out_shardings`` of a jitted
    `init`, which an auto mesh needs (there a traced value does not know its sharding).
    For parameters on a single device, every leaf is that device's sharding.

  Raises:
    ValueError: if there is no sharding, or shardings of two meshes or kinds.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> from bsfa_optax.state import state_shardings
    >>> params = {'kernel': jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank=2, history=4))
    >>> specs = state_shardings(tx, params, {'kernel': jax.P('fsdp')})
    >>> specs.memory.basis['kernel'].rows
    P(None, 'fsdp')
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> with jax.set_mesh(mesh):
    ...   state = jax.jit(tx.init, out_shardings=specs)(
    ...     {'kernel': jnp.ones((8, 4), device=jax.NamedSharding(mesh, jax.P('fsdp')))}
    ...   )
  """
  _check.transformation(tx=tx)
  leaves, structure = jax.tree.flatten(params)
  if shardings is None:
    given = [getattr(x, 'sharding', None) for x in leaves]
  else:
    given = _vectors.broadcast(shardings, params, lambda x: x is None, 'shardings')
    for sharding in given:
      _check.sharding(shardings=sharding)
  # What they must share: a mesh, or to be of none, or the sharding on no mesh at all.
  places = {_place(s) for s in given if s is not None}
  if len(places) != 1:
    found = sorted({str(s) for s in given})
    raise ValueError(
      'shardings must be all PartitionSpecs or all NamedShardings of one mesh, got'
      f' {found or None}; put the parameters on a mesh or give `shardings`.'
    )
  (place,) = places
  if isinstance(place, Sharding):
    return jax.tree.map(lambda _: place, jax.eval_shape(tx.init, params))

  specs = [P() if s is None else getattr(s, 'spec', s) for s in given]
  for x, spec in zip(leaves, specs, strict=True):
    if len(spec) > len(x.shape):
      raise ValueError(
        f'shardings must not have more axes than the parameter, got {spec} for shape'
        f' {x.shape}; leave the last ones out.'
      )
  names = tuple(dict.fromkeys(jax.tree.leaves([tuple(spec) for spec in specs])))
  # On explicit axes the trace itself follows shardings. Their size is not needed: with
  # 1, every shape divides.
  explicit = (AxisType.Explicit,) * len(names)
  mesh = AbstractMesh((1,) * len(names), names, axis_types=explicit)
  abstract = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    for x, spec in zip(leaves, specs, strict=True)
  ]
  use, no_mesh = jax.sharding.use_abstract_mesh, AbstractMesh((), ())
  with use(no_mesh), use(mesh):  # one of another size can only be set after none
    state = jax.eval_shape(tx.init, jax.tree.unflatten(structure, abstract))
  on_explicit = place is not P and AxisType.Explicit in place.axis_types

  def sharding_of(x):
    spec = list(x.sharding.spec) if isinstance(x.sharding, NamedSharding) else []
    while spec and spec[-1] is None and not on_explicit:
      spec.pop()  # so does jit, and another spelling would compile a second time
    return P(*spec) if place is P else NamedSharding(place, P(*spec))

  return jax.tree.map(sharding_of, state)


def _place(sharding: Sharding | P) -> Any:
  """The mesh of a sharding, `P` for a spec, or the sharding that has no mesh."""
  if isinstance(sharding, P):
    return P
  return sharding.mesh if isinstance(sharding, NamedSharding) else sharding


def state_format(state: optax.OptState) -> dict[str, Any]:
  """The layout of an optimizer's state, to be saved beside it.

  Args:
    state: the state, concrete or abstract (as of `abstract_state`); any tree will do.

  Returns:
    A dictionary fit for JSON: the version of the format of this package's states, and
    dtype and shape of each leaf by its path.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> from bsfa_optax.state import state_format
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank=2, history=4))
    >>> saved = state_format(tx.init(jnp.ones((3, 5))))
    >>> saved['leaves']['memory/basis/rows']
    'bfloat16[2,3,5]'
  """
  leaves = {}
  names, arrays, _ = _vectors.flatten(state)
  for name, x in zip(names, arrays, strict=True):
    if not hasattr(x, 'dtype'):
      raise TypeError(
        f'state must be a tree of arrays, got {x!r} for {name!r}; give what tx.init or'
        ' abstract_state returned.'
      )
    leaves[name] = f'{np.dtype(x.dtype)}[{",".join(map(str, x.shape))}]'
  return {'version': VERSION, 'leaves': leaves}


def check_state_format(saved: dict[str, Any], state: optax.OptState) -> None:
  """Raises unless a checkpoint's state has the layout of `state`.

  To be called before a checkpoint is read: Orbax casts to the dtype that it is asked
  for without a word, and its error for another shape does not name the leaf.

  Args:
    saved: what `state_format` gave for the saved state.
    state: the state to restore, concrete or abstract (as of `abstract_state`).

  Raises:
    ValueError: naming each leaf that differs, or the version.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> from bsfa_optax.state import check_state_format, state_format
    >>> make = lambda rank: bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank, history=4))
    >>> saved = state_format(make(2).init(jnp.ones((3, 5))))
    >>> state = jax.eval_shape(make(3).init, jnp.ones((3, 5)))
    >>> check_state_format(saved, state)
    Traceback (most recent call last):
    ValueError: the checkpoint is of an optimizer with other options ...
      memory/basis/rows: saved bfloat16[2,3,5], expected bfloat16[3,3,5]
      memory/variance: saved float32[1,2], expected float32[1,3]
  """
  if not isinstance(saved, dict) or not isinstance(saved.get('leaves'), dict):
    raise ValueError(
      f'saved must be the dictionary that state_format gave, got {saved!r:.80}; if the'
      ' checkpoint has none, restore the parameters alone.'
    )
  if saved.get('version') != VERSION:
    raise ValueError(
      f'the checkpoint has version {saved.get("version")!r} of the state format, and'
      f' this bsfa_optax reads version {VERSION}; restore it with the release that'
      ' wrote it, or restore the parameters alone and initialise the optimizer anew.'
    )
  found = _vectors.differences(saved['leaves'], state_format(state)['leaves'])
  differences = [f'  {name}: saved {a}, expected {b}' for name, a, b in found]
  if differences:
    raise ValueError(
      'the checkpoint is of an optimizer with other options (rank, history, dtypes,'
      ' estimator, blocks, order of the chain); build it as it was saved. What'
      ' differs:\n' + '\n'.join(differences)
    )
