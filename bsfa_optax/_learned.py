"""The skeleton of a filter: count, learn what is finite, filter, measure, replicate."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _leaves, _vectors
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
    shapes[layout] = _leaves.shapes(memory)  # an update has to trace no second one
    for observer in _leaves.observers[-1:]:
      observer.append(_leaves.Observed(layout, memory, interval))
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
      memory = jax.eval_shape(lambda params: init_memory(layout, params), updates)
      shapes[layout] = _leaves.shapes(memory)
    _leaves.check_shapes(
      state.memory,
      shapes[layout],
      'state must be of the same transformation and of parameters like the updates',
      'memory/{}',
      'build the transformation as the state was made, or make a new state with init',
    )
    if history is not None:
      must = 'history must be a tree like the updates'
      remedy = 'make it from the gradients'
      _leaves.check_shapes(history, _leaves.shapes(updates), must, "'{}'", remedy)
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
      learner = functools.partial(learn, layout, **extra_args)
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
    numbers = _vectors.keep_replicated(numbers)
    return layout.replace(updates, filtered), FilterState(
      count, skipped, numbers, memory
    )

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
