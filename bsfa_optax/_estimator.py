"""The estimator protocol: what a source of dominant subspaces must provide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _blocks, _stack


class SpectralFunction(Protocol):
  """Maps eigenvalues of a block's covariance to multipliers."""

  def __call__(self, variance: jax.Array, dominant: jax.Array) -> jax.Array:
    """Multipliers of the principal directions.

    Args:
      variance: variances divided by the block's mean variance, real, any shape.
      dominant: booleans of the same shape, true for the dominant directions.

    Returns:
      Multipliers of the shape of `variance`.
    """
    ...


class Estimator(NamedTuple):
  r"""A covariance estimate :math:`C` of each block, as four pure functions.

  An estimator learns the covariance of what it is shown, block by block, and
  applies spectral functions :math:`f(C)` of it. Write your own by filling in the
  fields.

  Attributes:
    init: ``init(params) -> state``. Must accept abstract parameters.
    update: ``update(updates, state, params, **extra_args) -> state`` learns from
      one update and refreshes the basis when due. It is only called with finite
      updates.
    apply: ``apply(f, updates, state) -> (filtered, dominant_fraction)``, where
      ``filtered`` is :math:`f(C) v` in the structure, shapes and dtypes of the
      updates :math:`v`, and ``dominant_fraction`` is :math:`|Pv|/|v|` for each block,
      float ``(blocks,)``. The identity until the first full refresh.
    blocks: ``blocks(params) -> Blocks``, the blocks of a parameter tree.

  Examples:
    The projector on the dominant subspace is `apply` with f = 1 and 0:

    >>> import jax.numpy as jnp
    >>> from bsfa_optax import pca
    >>> estimator = pca(rank=1, history=2, decay=0.0)
    >>> params = jnp.zeros((2, 2))
    >>> state = estimator.init(params)
    >>> for scale in (1.0, -2.0):
    ...   state = estimator.update(scale * jnp.array([[3.0, 0], [0, 4]]), state, params)
    >>> project = lambda variance, dominant: dominant.astype(variance.dtype)
    >>> projected, _ = estimator.apply(project, jnp.ones((2, 2)), state)
    >>> print(projected.round(2))
    [[0.84 0.  ]
     [0.   1.12]]
  """

  init: Callable[[optax.Params], Any]
  update: Callable[..., Any]
  apply: Callable[
    [SpectralFunction, optax.Updates, Any], tuple[optax.Updates, jax.Array]
  ]
  blocks: Callable[[optax.Params], _blocks.Blocks]


def check_estimator(estimator: Any) -> None:
  """Raises unless `estimator` is an `Estimator`."""
  if not isinstance(estimator, Estimator):
    raise TypeError(
      f'estimator must be an Estimator, got {estimator!r}; call the factory, as in'
      ' estimator=pca().'
    )


def learn(
  estimator: Estimator,
  finite: jax.Array,
  updates: optax.Updates,
  state: Any,
  params: optax.Params | None,
  extra_args: dict[str, Any],
) -> Any:
  """The estimator's state after `updates`; as it was where they are not finite."""
  # Without extra arguments `cond` sees the same function every time, which is what
  # saves an eager call from compiling it again.
  update = estimator.update
  if extra_args:
    update = lambda u, s, p: estimator.update(u, s, p, **extra_args)
  learned = jax.lax.cond(finite, update, _keep, updates, state, params)
  return _stack.keep_replicated(learned)


def _keep(updates: Any, state: Any, params: Any) -> Any:
  del updates, params
  return state


def all_finite(updates: optax.Updates, parts: _blocks.Blocks) -> jax.Array:
  """Whether an estimator can learn from `updates`: finite, also when squared, ()."""
  leaves = jax.tree.leaves(updates)
  if not leaves:
    return jnp.array(True)

  def usable(u):  # False for NaN, and where sums of squares could overflow
    largest = jnp.finfo(_stack.accumulator(u.dtype)).max
    limit = jnp.sqrt(largest / (1024 * max(u.size, 1)))
    return (jnp.abs(u).astype(largest.dtype) < limit).all()

  finite = jnp.stack([usable(u) for u in leaves]).all()
  # Shards must agree, as learning from an update takes all of them.
  axes = _blocks.varying_axes(finite).union(*parts.split)
  return jax.lax.pmin(finite.astype(jnp.int32), tuple(axes)) > 0 if axes else finite
