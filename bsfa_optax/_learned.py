"""What learns from updates, and the filters that are made of it.

Top to bottom: the skeleton of every filter (count, learn what is finite, filter,
measure, replicate), the protocol of estimators, and what `bsfa` and others make of the
decomposition that an estimator gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _vectors
from bsfa_optax._vectors import Layout, Vector

Interval = int | Callable[[jax.Array], jax.Array]


class FilterState(NamedTuple):
  """State of `bsfa` and of `scale_by_whitening`.

  Attributes:
    filter_count: updates filtered so far, int32 (). Schedules are evaluated at it.
    skipped_updates: updates that were passed through as they were, because a filtered
      leaf was not finite, int32 ().
    measured: numbers of the last update by name, one a block, in the order of
      `bsfa_optax.state.block_names`: ``dominant_fraction`` of `bsfa`,
      ``effective_directions`` of `scale_by_whitening`.
    memory: what has been learnt of past updates, such as `PCAState` or
      the packed covariances of `scale_by_whitening`.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> state = bsfa_optax.bsfa().init({'kernel': jnp.ones((4, 4))})
    >>> optax.tree.get(state, 'dominant_fraction').shape
    (1,)
  """

  filter_count: jax.Array
  skipped_updates: jax.Array
  measured: dict[str, jax.Array]
  memory: Any


class Observed(NamedTuple):
  """What `init` of a filter leaves in the place of its memory for who asks."""

  memory: Any
  layout: Layout
  interval: Any  # see `learned`


jax.tree_util.register_pytree_node(
  Observed, lambda x: (x[:1], x[1:]), lambda static, memory: Observed(*memory, *static)
)
observing = jax.make_user_context(False)  # what was traced without is not reused


def learned(
  layout_of: Callable[[optax.Params], Layout],
  init_memory: Callable[[Layout, optax.Params], Any],
  learn: Callable[..., Any],
  apply: Callable[..., tuple[Vector, jax.Array]],
  measured: str,
  interval: Interval | None = None,
) -> optax.GradientTransformationExtraArgs:
  """The transformation that learns from each update and then filters it.

  With the extra argument `history`, a tree like the updates, it learns from that.

  Args:
    layout_of: ``layout_of(params) -> Layout``.
    init_memory: ``init_memory(layout, params) -> memory``.
    learn: ``learn(layout, vector, memory, count, params, **extra_args) -> memory``; it
      is only called with finite vectors, `count` of which came before.
    apply: ``apply(layout, vector, memory, count) -> (vector, numbers)``, of which the
      numbers, one a block, are kept in the state.
    measured: what these numbers are.
    interval: updates between two refreshes of what ages, if anything does.
  """

  # `cond` sees the same function every time, which is what saves an eager call from
  # compiling it again.
  learner_of = functools.lru_cache(lambda layout: functools.partial(learn, layout))
  shapes: dict[Layout, Any] = {}  # of the memory

  def init(params):
    layout = layout_of(params)
    memory = init_memory(layout, params)
    shapes[layout] = _vectors.shapes(memory)  # an update has to trace no second one
    if observing.value:
      memory = Observed(memory, layout, interval)
    return FilterState(
      filter_count=jnp.zeros((), jnp.int32),
      skipped_updates=jnp.zeros((), jnp.int32),
      measured={measured: _vectors.block_zeros(layout)},
      memory=memory,
    )

  def update(updates, state, params=None, *, history=None, **extra_args):
    check_state(FilterState, state)
    layout = layout_of(updates)
    if layout not in shapes:  # not made here, or of updates in another dtype
      memory = jax.eval_shape(functools.partial(init_memory, layout), updates)
      shapes[layout] = _vectors.shapes(memory)
    _vectors.check_shapes(
      state.memory,
      shapes[layout],
      'state must be of the same transformation and of parameters like the updates',
      'memory/{}',
      'build the transformation as the state was made, or make a new state with init',
    )
    if history is not None:
      must = 'history must be a tree like the updates'
      remedy = 'make it from the gradients'
      _vectors.check_shapes(history, _vectors.shapes(updates), must, "'{}'", remedy)
    count, skipped = state.filter_count, state.skipped_updates
    if not layout.parts:
      return updates, state._replace(filter_count=increment(count))
    vector = layout.select(updates)
    shown = vector if history is None else layout.select(history)
    finite = _vectors.all_finite(layout, vector)
    if history is not None:
      finite &= _vectors.all_finite(layout, shown)
    learner = learner_of(layout)
    if extra_args:  # a loss, for one: new in every call, so there is nothing to save
      learner = functools.partial(learner, **extra_args)
    # Learnt from before it is filtered, so that the filter knows this update too.
    memory = jax.lax.cond(finite, learner, keep, shown, state.memory, count, params)
    memory = _vectors.keep_replicated(memory)
    filtered, numbers = apply(layout, vector, memory, count)
    # What came of an update that is not finite is dropped, NaN and all: a state with a
    # NaN would never get rid of it.
    filtered, numbers, count, skipped = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old.astype(new.dtype)),
      (filtered, {measured: numbers.astype(jnp.float32)}, increment(count), skipped),
      (vector, state.measured, count, optax.safe_increment(skipped)),
    )
    state = FilterState(count, skipped, _vectors.keep_replicated(numbers), memory)
    return layout.replace(updates, filtered), state

  return optax.GradientTransformationExtraArgs(init, update)


def check_state(kind: type, state: Any) -> None:
  """Raises unless `state` is what `init` of this transformation gives."""
  if not isinstance(state, kind):
    name = kind.__name__
    article = 'an' if name[0] in 'AEIO' else 'a'
    raise TypeError(
      f'state must be {article} {name}, got {type(state).__name__}; use the state that'
      ' init of the same transformation returned.'
    )


def for_each_part(layout: Layout, make: Callable[..., Any], *vectors: Any) -> Any:
  """A memory with an entry for each part, as `Layout.map` gives them.

  Without parts it is a single leaf: `optax.tree.map_params` compares a state with that
  of a placeholder for parameters, where a leaf stands for a tree of any structure.
  """
  return tuple(layout.map(make, *vectors)) or jnp.zeros((), jnp.int32)


def keep(vector: Any, memory: Any, *_: Any) -> Any:
  """What `cond` calls where there is nothing to learn."""
  # Of the module, as each new function would be compiled anew by an eager call.
  return memory


def increment(count: jax.Array) -> jax.Array:
  """count + 1; at the end of int32 it goes on from the middle, as late as ever."""
  largest = np.iinfo(np.int32).max
  return jnp.where(count == largest, largest // 2 + 1, count + 1).astype(jnp.int32)


def is_due(count: jax.Array, interval: Interval, turn: float = 0.0) -> jax.Array:
  """Whether the update after `count` others is one with a refresh.

  With a `turn` in [0, 1) it comes that share of an interval earlier.
  """
  every = value('refresh_every', interval, count)
  every = jnp.maximum(jnp.asarray(every).astype(jnp.int32), 1)
  earlier = (turn * every.astype(jnp.float32)).astype(jnp.int32)
  return (count % every + 1 + earlier) % every == 0


def growing(period: int) -> Callable[[jax.Array], jax.Array]:
  """From every update to every fifth: subspaces turn fastest at the beginning."""
  return lambda count: jnp.minimum(1 + count // period, 5)


def value(name: str, option: Any, count: jax.Array) -> Any:
  """An option that may be a schedule, at `count`."""
  if not callable(option):
    return option
  now = option(count)
  # That it is one number is all that can be told: it may be traced.
  if isinstance(now, (str, bytes)) or now is None or np.ndim(now) != 0:
    shown = f'shape {np.shape(now)}' if np.ndim(now) else repr(now)
    raise ValueError(f'{name} must be one number, got {shown} from its schedule.')
  return now


# The protocol of estimators.


class Decomposition(NamedTuple):
  """A vector in the principal directions of the covariance, block by block.

  Coefficients may be laid out as the estimator likes, in any number of arrays; the
  three functions say how they belong together.

  Attributes:
    coefficients: of the vector along the principal directions, a list of arrays.
    variance: relative variances of these directions (over the block's mean), to
      broadcast to the coefficients; 0 where there is no direction.
    dominant: booleans, likewise.
    rest: relative variance that stands for all directions without a coefficient, float
      (blocks,); 1, the mean, where every direction has one.
    ready: whether the block's directions are known, bool (blocks,). Until then the
      projector on the dominant directions is 0, and the filter the identity.
    spread: numbers of blocks, (blocks,), to a list that broadcasts to the coefficients.
    collect: arrays like the coefficients to their sums within blocks, (blocks,).
    synthesize: arrays like the coefficients to the vector that has them.
  """

  coefficients: list[jax.Array]
  variance: list[jax.Array]
  dominant: list[jax.Array]
  rest: jax.Array
  ready: jax.Array
  spread: Callable[[jax.Array], list[jax.Array]]
  collect: Callable[[list[jax.Array]], jax.Array]
  synthesize: Callable[[list[jax.Array]], Vector]


class Estimator(NamedTuple):
  """Where the covariance of past updates comes from, as four pure functions.

  Vectors are lists of arrays, one for each part of the layout. Write your own by
  filling in the fields.

  Attributes:
    layout: ``layout(params) -> Layout``, which leaves are filtered and what makes up a
      block; `bsfa_optax.estimators.layout`. Must accept abstract parameters.
    init: ``init(layout, params) -> memory``.
    learn: ``learn(layout, vector, memory, count, params, **extra_args) -> memory``
      learns from one vector, which is finite; `count` others were before it, int32 ().
    decompose: ``decompose(layout, vector, memory) -> Decomposition``.

  Examples:
    The one dominant direction of a block is that of its average update:

    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> from bsfa_optax import estimators
    >>> def init(layout, params):
    ...   return [jnp.zeros_like(x) for x in layout.select(params)]
    >>> def learn(layout, vector, memory, count, params):
    ...   return [0.9 * m + 0.1 * v for m, v in zip(memory, vector)]
    >>> def decompose(layout, vector, memory):
    ...   rows = [m[None] for m in memory]
    ...   norm = jnp.sqrt(estimators.inner(layout, rows, rows)[:, :, 0])
    ...   rows = [r / norm[i, 0] for i, r in enumerate(rows)]  # a block a leaf
    ...   one = jnp.ones_like(norm)
    ...   return estimators.from_rows(layout, vector, rows, one, 0 * one[:, 0], True)
    >>> average = estimators.Estimator(estimators.layout, init, learn, decompose)
    >>> tx = bsfa_optax.bsfa(alpha=0.5, gamma=2.0, estimator=average)
    >>> updates = {'kernel': jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    >>> filtered, state = tx.update(updates, tx.init(updates))
    >>> print(filtered['kernel'])
    [[1.5 0. ]
     [0.  2. ]]
  """

  layout: Callable[[optax.Params], Layout]
  init: Callable[[Layout, optax.Params], Any]
  learn: Callable[..., Any]
  decompose: Callable[[Layout, Vector, Any], Decomposition]


def check_estimator(estimator: Any) -> None:
  """Raises unless `estimator` is an `Estimator`."""
  if not isinstance(estimator, Estimator):
    raise TypeError(
      f'estimator must be an Estimator, got {estimator!r}; call the factory, as in'
      ' estimator=pca().'
    )


# What filters make of a decomposition.


def filtered(
  f: Callable[..., jax.Array], layout: Layout, vector: Vector, found: Decomposition
) -> Vector:
  """f(C) v, in the accumulators' dtypes.

  Args:
    f: from relative variances of directions, and whether they are dominant, to
      multipliers of the same shape.
    layout: the layout.
    vector: the vector.
    found: its decomposition.
  """
  # Written as a change of what f makes of the rest, so that f = 1 gives back the
  # vector to the last bit.
  base = jnp.where(found.ready, f(found.rest, jnp.zeros_like(found.ready)), 1)

  def change(c, variance, dominant, ready, b):
    multiplier = f(variance, dominant)
    excess = jnp.where(ready, multiplier - b.astype(multiplier.dtype), 0)
    return excess.astype(c.dtype) * c

  ready, rest = found.spread(found.ready), found.spread(base)
  changes = jax.tree.map(
    change, found.coefficients, found.variance, found.dominant, ready, rest
  )
  # Filtered in the accumulators' dtype: half precision is rounded once, at the end.
  wide = [v.astype(_vectors.accumulator(v.dtype)) for v in vector]
  scaled = _vectors.scale(layout, wide, base)
  return jax.tree.map(
    lambda v, change: v + change.astype(v.dtype), scaled, found.synthesize(changes)
  )


def project(found: Decomposition) -> Vector:
  """The dominant part P v; 0 in blocks that are not ready."""
  return found.synthesize(_inside(found))


def dominant_fraction(
  layout: Layout, vector: Vector, found: Decomposition
) -> jax.Array:
  """|P v| / |v| of each block, (blocks,); 0 for a zero vector."""
  inside = found.collect([jnp.square(c) for c in _inside(found)])
  norm = _vectors.squared_norms(layout, vector).astype(inside.dtype)
  return jnp.sqrt(inside / jnp.where(norm > 0, norm, 1))


def _inside(found: Decomposition) -> list[jax.Array]:
  return jax.tree.map(
    lambda c, dominant, ready: jnp.where(dominant & ready, c, 0),
    found.coefficients,
    found.dominant,
    found.spread(found.ready),
  )


# The two kinds of decompositions of this package.


def from_rows(
  layout: Layout,
  vector: Vector,
  rows: Vector,
  variance: jax.Array,
  rest: jax.Array,
  ready: jax.Array | bool,
) -> Decomposition:
  """The decomposition along a few orthonormal directions, all of them dominant.

  Args:
    layout: the layout.
    vector: the vector.
    rows: orthonormal rows of each block, stacks ``(rank, *shape)``.
    variance: relative variance along each row, (blocks, rank); 0 for absent ones.
    rest: relative variance along all other directions, (blocks,).
    ready: whether the rows are known, bool (blocks,) or ().

  Returns:
    The `Decomposition`.
  """
  along = _vectors.inner(layout, rows, [v[None] for v in vector])[:, :, 0]

  def synthesize(coefficients):
    mixed = _vectors.mix(layout, coefficients[0][:, None, :], rows)
    return [x[0] for x in mixed]

  return Decomposition(
    [along],
    [variance.astype(along.dtype)],
    [variance > 0],
    rest,
    jnp.broadcast_to(ready, (layout.count,)),
    spread=lambda values: [values[:, None]],
    collect=lambda arrays: arrays[0].sum(1),
    synthesize=synthesize,
  )


def from_axes(
  layout: Layout,
  vector: Vector,
  bases: Sequence[Sequence[jax.Array]],
  axes: Sequence[tuple[int, ...]],
  variance: list[jax.Array],
  dominant: list[jax.Array],
) -> Decomposition:
  """The decomposition along products of basis vectors of some axes of each part.

  Args:
    layout: the layout; every part is one block for each batch index.
    vector: the vector.
    bases: for each part its bases as columns, (*batch, n, n), one for each axis; or
      (n, n), the same for the whole batch.
    axes: for each part the axes with a basis.
    variance: for each part relative variances, to broadcast to it.
    dominant: booleans, likewise.

  Returns:
    The `Decomposition`. A block is ready once any direction has variance; without an
    axis it has no directions, and is left alone for ever.
  """

  def known(part, x, own):
    some = bool(own) & (x > 0).any(part.inner_axes)
    return jnp.broadcast_to(some, part.batch_shape).reshape(-1)

  rotated = functools.partial(_vectors.rotate, layout, bases=bases, axes=axes)
  return Decomposition(
    rotated(vector),
    variance,
    dominant,
    # Every direction has a coefficient; the mean stands for the rest, which is empty.
    jnp.ones((layout.count,), np.result_type(*[x.dtype for x in variance])),
    jnp.concatenate(layout.map(known, variance, axes)),
    spread=functools.partial(_vectors.spread, layout),
    collect=functools.partial(_vectors.sums, layout),
    synthesize=functools.partial(rotated, inverse=True),
  )
