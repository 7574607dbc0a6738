"""Bulk-SGD, Dom-SGD and what lies between, over any base optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _check, _stack
from bsfa_optax._estimator import Estimator
from bsfa_optax._filter import bsfa, BSFAState
from bsfa_optax.estimators import kronecker


class InterpolatedState(NamedTuple):
  """State of the filter in `interpolated`.

  Attributes:
    average_fraction: moving average of the dominant fraction of each block, float32
      (blocks,).
    switched_on: whether the block is filtered, bool (blocks,).
    bsfa_state: the `BSFAState` of the filter.
  """

  average_fraction: jax.Array
  switched_on: jax.Array
  bsfa_state: BSFAState


def interpolated(
  base_optimizer: optax.GradientTransformation,
  alpha: optax.ScalarOrSchedule,
  gamma: optax.ScalarOrSchedule,
  *,
  estimator: Estimator | None = None,
  threshold: float = 0.95,
  decay: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""The base optimizer's update, :math:`\alpha P v + \gamma (I - P) v`, in time.

  The filter of `bsfa_optax.bsfa`, switched on block by block, and for good, once the
  moving average of :math:`\chi = |P v| / |v|` exceeds a threshold: when gradients have
  aligned with the dominant subspace, as in the sources. For plain SGD :math:`\chi` is
  that of the batch's gradient: with small batches, whose noise is not aligned, it stays
  well below that of the whole data (0.6 against 0.9 with 50 images of MNIST), and the
  threshold has to be lower too. `bulk_only` is (alpha, gamma) = (0, 1),
  `dominant_only` is (1, 0), and (1, 1) is the base optimizer.

  Args:
    base_optimizer: the optimizer whose updates are filtered.
    alpha: multiplier of the dominant part, a scalar >= 0 or a schedule.
    gamma: multiplier of the bulk, a scalar >= 0 or a schedule.
    estimator: where the subspace comes from. The sources take the Hessian of the whole
      network: ``hessian_lanczos(rank, blocks='all', refresh_every=1)``.
    threshold: what the average has to exceed, in [0, 1).
    decay: weight of the past in the average, in [0, 1).

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy.
    TypeError: if `base_optimizer` is no transformation or `estimator` none.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.interpolated(optax.sgd(1.0), 0.5, 1.0, threshold=0.1)
    >>> gradient = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> state = tx.init(gradient)
    >>> for _ in range(2):
    ...   updates, state = tx.update(gradient, state)
    ...   print(updates[0, 0], optax.tree.get(state, 'switched_on'))
    -3.0 [False]
    -1.5 [ True]

  References:
    Song, Ahn, Yun, `Does SGD Really Happen in Tiny Subspaces?
    <https://arxiv.org/abs/2405.16002>`_, 2025

    Zakarin, Singh, `Accelerating Neural Network Training Along Sharp and Flat
    Directions <https://arxiv.org/abs/2505.11972>`_, 2025
  """
  _check.transformation('base_optimizer', base_optimizer)
  _check.in_range('threshold', threshold, 0.0, 1.0)
  _check.in_range('decay', decay, 0.0, 1.0)
  chosen = kronecker() if estimator is None else estimator
  filter_ = bsfa(alpha, gamma, estimator=chosen)

  def init(params):
    state: Any = filter_.init(params)
    fraction = state.dominant_fraction
    return InterpolatedState(
      jnp.zeros_like(fraction), jnp.zeros_like(fraction, bool), state
    )

  def update(updates, state, params=None, **extra_args):
    inner: Any
    filtered, inner = filter_.update(updates, state.bsfa_state, params, **extra_args)
    average = decay * state.average_fraction + (1 - decay) * inner.dominant_fraction
    on = state.switched_on | (average > threshold)
    parts = chosen.blocks(updates)
    if parts.count:
      values = zip(
        parts.scatter(on),
        parts.select(filtered),
        parts.select(updates),
        parts.batch_axes,
        strict=True,
      )
      leaves = [
        jnp.where(_stack.expand(o, v, axes), new, v) for o, new, v, axes in values
      ]
      filtered = parts.replace(filtered, leaves)
    return filtered, InterpolatedState(average, on, inner)

  return optax.chain(
    base_optimizer, optax.GradientTransformationExtraArgs(init, update)
  )


def bulk_only(
  base_optimizer: optax.GradientTransformation,
  *,
  estimator: Estimator | None = None,
  threshold: float = 0.95,
  decay: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
  """Bulk-SGD over any base optimizer: `interpolated` with alpha 0 and gamma 1.

  Args:
    base_optimizer: as in `interpolated`, like all arguments.
    estimator: where the subspace comes from.
    threshold: what the average fraction has to exceed.
    decay: weight of the past in the average.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import bsfa_optax, optax
    >>> tx = bsfa_optax.bulk_only(optax.sgd(0.1), estimator=bsfa_optax.pca(rank=10))
  """
  return interpolated(
    base_optimizer, 0.0, 1.0, estimator=estimator, threshold=threshold, decay=decay
  )


def dominant_only(
  base_optimizer: optax.GradientTransformation,
  *,
  estimator: Estimator | None = None,
  threshold: float = 0.95,
  decay: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
  """Dom-SGD over any base optimizer: `interpolated` with alpha 1 and gamma 0.

  Args:
    base_optimizer: as in `interpolated`, like all arguments.
    estimator: where the subspace comes from.
    threshold: what the average fraction has to exceed.
    decay: weight of the past in the average.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import bsfa_optax, optax
    >>> tx = bsfa_optax.dominant_only(optax.sgd(0.1), estimator=bsfa_optax.pca(rank=10))
  """
  return interpolated(
    base_optimizer, 1.0, 0.0, estimator=estimator, threshold=threshold, decay=decay
  )
