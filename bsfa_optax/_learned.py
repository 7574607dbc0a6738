"""The skeleton of a filter: count, learn what is finite, filter, measure, replicate."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check, _leaves, _vectors
from bsfa_optax._leaves import Layout, Part, Vector

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


class Family(NamedTuple):
  """What a filter adds to the skeleton.

  Attributes:
    layout: ``layout(params) -> Layout``.
    init: ``init(layout, params) -> memory``.
    learn: ``learn(layout, vector, memory, count, params, **extra_args) -> memory``; it
      is only called with finite vectors, `count` of which came before.
    apply: ``apply(layout, vector, memory, count) -> (vector, measured)``.
    measured: the names of the measured numbers.
  """

  layout: Callable[[optax.Params], Layout]
  init: Callable[[Layout, optax.Params], Any]
  learn: Callable[..., Any]
  apply: Callable[..., tuple[Vector, dict[str, jax.Array]]]
  measured: tuple[str, ...]


def learned(family: Family) -> optax.GradientTransformationExtraArgs:
  """The transformation that learns from each update and then filters it.

  With the extra argument `history`, a tree like the updates, it learns from that.
  """

  # `cond` sees the same function every time, which is what saves an eager call from
  # compiling it again.
  learner = functools.lru_cache(lambda layout: functools.partial(family.learn, layout))
  shapes: dict[Layout, Any] = {}  # of the memory

  def check(layout, updates, memory):
    if layout not in shapes:
      like = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
      init = functools.partial(family.init, layout)
      wanted = jax.eval_shape(init, jax.tree.map(like, updates))
      shapes[layout] = _check.shapes(wanted)
    _check.memory(memory, shapes[layout])

  def init(params):
    layout = family.layout(params)
    memory = family.init(layout, params)
    for observer in _leaves.observers[-1:]:
      observer.append((layout, memory))
    zeros = lambda: jnp.zeros((max(layout.count, 1),), jnp.float32)  # Orbax: none empty
    return FilterState(
      filter_count=jnp.zeros((), jnp.int32),
      skipped_updates=jnp.zeros((), jnp.int32),
      measured={name: zeros() for name in family.measured},
      memory=memory,
    )

  def update(updates, state, params=None, *, history=None, **extra_args):
    _check.is_state('FilterState', FilterState, state)
    layout = family.layout(updates)
    check(layout, updates, state.memory)
    if history is not None:
      _check.like_updates('history', history, updates)
    count = state.filter_count
    if not layout.parts:
      return updates, state._replace(filter_count=increment(count))
    vector = layout.select(updates)
    shown = vector if history is None else layout.select(history)
    finite = all_finite(layout, vector)
    if history is not None:
      finite &= all_finite(layout, shown)
    learn = learner(layout)
    if extra_args:
      learn = functools.partial(family.learn, layout, **extra_args)
    memory = jax.lax.cond(finite, learn, _keep, shown, state.memory, count, params)
    memory = _vectors.keep_replicated(memory)
    filtered, measured = family.apply(layout, vector, memory, count)
    filtered = [
      jnp.where(finite, new, old.astype(new.dtype))
      for new, old in zip(filtered, vector, strict=True)
    ]
    news = {
      name: jnp.where(finite, measured[name].astype(old.dtype), old)
      for name, old in state.measured.items()
    }
    return layout.replace(updates, filtered), FilterState(
      filter_count=jnp.where(finite, increment(count), count),
      skipped_updates=jnp.where(
        finite, state.skipped_updates, optax.safe_increment(state.skipped_updates)
      ),
      measured=_vectors.keep_replicated(news),
      memory=memory,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def for_each_part(layout: Layout, make: Callable[[Part], Any]) -> Any:
  """A memory with an entry for each part.

  Without parts it is a single leaf: `optax.tree.map_params` compares a state with that
  of a placeholder for parameters, where a leaf stands for a tree of any structure.
  """
  if not layout.parts:
    return jnp.zeros((), jnp.int32)
  return tuple(map(make, layout.parts))


def _keep(vector: Any, memory: Any, count: Any, params: Any) -> Any:
  del vector, count, params
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
  _check.number(name, now)
  return now


def all_finite(layout: Layout, vector: Vector) -> jax.Array:
  """Whether a vector can be learnt from: finite, also when squared and summed, ()."""

  def usable(x):  # False for NaN, and where sums of squares could overflow
    largest = jnp.finfo(_vectors.accumulator(x.dtype)).max
    limit = jnp.sqrt(largest / (1024 * max(x.size, 1)))
    return (jnp.abs(x).astype(largest.dtype) < limit).all()

  finite = jnp.stack([usable(x) for x in vector]).all()
  # Shards must agree, as learning from an update takes all of them.
  axes = _leaves.varying_axes(finite).union(*(p.split for p in layout.parts))
  return jax.lax.pmin(finite.astype(jnp.int32), tuple(axes)) > 0 if axes else finite
