"""The filter: damp the dominant part of an update, amplify the bulk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _blocks, _check, _stack
from bsfa_optax._estimator import all_finite, check_estimator, Estimator, learn
from bsfa_optax.estimators import kronecker


class BSFAState(NamedTuple):
  """State of the `bsfa` transformation.

  Attributes:
    bsfa_step: finite updates filtered so far, int32 (). Schedules of alpha, gamma
      and exponent are evaluated at it.
    dominant_fraction: norm of the dominant part of the last update over the norm of
      the update, block by block, float32 (blocks,). `bsfa_optax.block_names` names
      the entries.
    estimator_state: the state of the estimator.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> state = bsfa_optax.bsfa().init({'kernel': jnp.ones((4, 4))})
    >>> optax.tree.get(state, 'dominant_fraction').shape
    (1,)
  """

  bsfa_step: jax.Array
  dominant_fraction: jax.Array
  estimator_state: Any


def bsfa(
  alpha: optax.ScalarOrSchedule = 0.3,
  gamma: optax.ScalarOrSchedule = 2.0,
  *,
  exponent: optax.ScalarOrSchedule | None = None,
  preserve_norm: bool = False,
  estimator: Estimator | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Damps the dominant part of each update and amplifies the bulk.

  For each block of parameters let :math:`C` be the covariance of past updates as the
  `estimator` holds it, with eigenvalues :math:`\lambda_i` of mean :math:`\bar\lambda`
  and eigenvectors :math:`u_i`. The update :math:`v` becomes

  .. math::
    f(C)\,v = \sum_i f(\lambda_i / \bar\lambda)\; u_i u_i^\top v .

  The filter has two levels, :math:`f = \alpha` on the dominant directions and
  :math:`f = \gamma` on the rest, which is BSFA as published:
  :math:`\alpha P v + \gamma (I - P) v`. With an `exponent` it is graded:
  :math:`f(x) = x^{-p}` clipped to :math:`[\alpha, \gamma]`, so that alpha is the floor
  for the most dominant direction and gamma the ceiling for the flattest one.

  Where to put it in a chain:

  * ``bsfa_adamw(lr)``: between Adam's direction and the decoupled weight decay.
    Neither the decay nor the learning rate is filtered. Take this one with AdamW. Its
    own default is the graded filter.
  * ``optax.chain(optax.adamw(lr), bsfa())``, the published placement: the whole update
    is filtered, weight decay included. The learning rate scales what the estimator
    sees, so with a schedule the early, larger updates weigh more in `pca`
    (`kronecker` normalises every update).
  * ``optax.chain(bsfa(), optax.adamw(lr))``: the gradient is filtered before the
    moments. Weight decay and learning rate are left alone, and Adam, which divides by
    the size of what it gets, undoes a part of the filter.

  The estimator learns from an update before it filters it. Until its first full refresh
  the filter is the identity. An update with
  a NaN or an infinity in it, or entries too large to be squared and summed (1e14 in
  float32), passes through as it is and leaves no trace in the state.

  All defaults are ours, found by measurement: the sources publish none.

  Args:
    alpha: multiplier of the dominant directions (two-level) or the least multiplier
      (graded); a scalar >= 0 or a schedule. May be traced.
    gamma: multiplier of the bulk (two-level) or the greatest multiplier (graded); a
      scalar >= 0 or a schedule. May be traced.
    exponent: the power p of the graded filter, a scalar >= 0 or a schedule, or None
      for the two-level filter.
    preserve_norm: rescale the filtered update of each block to the norm it had. Then
      only the direction changes, and the best learning rate is usually higher.
    estimator: where the covariance comes from; `bsfa_optax.kronecker` by default, see
      also `bsfa_optax.pca`.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `BSFAState`. Updates
    keep their shapes and dtypes.

  Raises:
    ValueError: if alpha, gamma or exponent is negative or not finite, or alpha exceeds
      gamma in the graded filter.
    TypeError: if `estimator` is none, and at ``init``, for parameters that are not
      real floating-point numbers.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.adamw(3e-4), bsfa_optax.bsfa())
    >>> params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> optax.tree.get(state, 'dominant_fraction')  # this update is all there was
    Array([1.], dtype=float32)

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025
  """
  init_fn, step_fn = _make_filter(alpha, gamma, exponent, preserve_norm, estimator)

  def update_fn(updates, state, params=None, **extra_args):
    return step_fn(updates, updates, state, params, extra_args)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AccelerateState(NamedTuple):
  """State of the `accelerate` wrapper.

  Attributes:
    base_state: the state of the base optimizer.
    history_state: the state of the transformation that makes the history; of
      `optax.identity` if the history is of updates.
    bsfa_state: the `BSFAState` of the filter.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.accelerate(optax.sgd(0.1, momentum=0.9))
    >>> state = tx.init({'kernel': jnp.ones((4, 4))})
    >>> state.bsfa_state.dominant_fraction.shape
    (1,)
  """

  base_state: Any
  history_state: Any
  bsfa_state: BSFAState


def accelerate(
  base_optimizer: optax.GradientTransformation,
  alpha: optax.ScalarOrSchedule = 0.3,
  gamma: optax.ScalarOrSchedule = 2.0,
  *,
  history: optax.GradientTransformation | None = None,
  exponent: optax.ScalarOrSchedule | None = None,
  preserve_norm: bool = False,
  estimator: Estimator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer: filters its updates by what the estimator learns of gradients.

  As `optax.chain(base_optimizer, bsfa(...))`, which sees updates alone, except that
  the `history`, which the estimator learns from, may be made of the gradients. A base
  optimizer with momentum averages out the oscillation in its updates that tells the
  steep directions.

  Args:
    base_optimizer: the optimizer whose updates are filtered.
    alpha: as in `bsfa_optax.bsfa`.
    gamma: as in `bsfa_optax.bsfa`.
    history: what maps the gradients to the history. None: the base optimizer's
      updates, as published. `optax.identity()`: the gradients themselves.
      ``optax.scale_by_adam(b1=0.0, b2=b2)``: the gradients in Adam's metric, that is
      over their root mean square; give it the b2 of the base optimizer.
    exponent: as in `bsfa_optax.bsfa`.
    preserve_norm: as in `bsfa_optax.bsfa`.
    estimator: as in `bsfa_optax.bsfa`.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is an `AccelerateState`.

  Raises:
    ValueError: for the same options as `bsfa_optax.bsfa`.
    TypeError: as `bsfa_optax.bsfa`, and if `base_optimizer` or `history` is no
      transformation.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.accelerate(optax.adamw(3e-4), history=optax.identity())
    >>> params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025
  """
  _check.transformation('base_optimizer', base_optimizer)
  if history is not None:
    _check.transformation('history', history)
  init_fn, step_fn = _make_filter(alpha, gamma, exponent, preserve_norm, estimator)
  base = optax.with_extra_args_support(base_optimizer)
  source = optax.with_extra_args_support(history or optax.identity())

  def init(params):
    return AccelerateState(base.init(params), source.init(params), init_fn(params))

  def update(updates, state, params=None, **extra_args):
    gradients = updates
    updates, base_state = base.update(gradients, state.base_state, params, **extra_args)
    learned, source_state = source.update(
      updates if history is None else gradients,
      state.history_state,
      params,
      **extra_args,
    )
    filtered, bsfa_state = step_fn(
      updates, learned, state.bsfa_state, params, extra_args
    )
    return filtered, AccelerateState(base_state, source_state, bsfa_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _make_filter(
  alpha: optax.ScalarOrSchedule,
  gamma: optax.ScalarOrSchedule,
  exponent: optax.ScalarOrSchedule | None,
  preserve_norm: bool,
  estimator: Estimator | None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """``init(params)``, and a step in which the history may differ from the updates."""
  _check.multiplier('alpha', alpha)
  _check.multiplier('gamma', gamma)
  if exponent is not None:
    _check.multiplier('exponent', exponent)
    low, high = _check.concrete(alpha), _check.concrete(gamma)
    if low is not None and high is not None and low > high:
      raise ValueError(
        f'alpha must not exceed gamma in the graded filter, got alpha={alpha!r} and'
        f' gamma={gamma!r}; set exponent=None for the two-level filter.'
      )
  chosen = kronecker() if estimator is None else estimator
  check_estimator(chosen)

  def init_fn(params):
    count = max(chosen.blocks(params).count, 1)
    return BSFAState(
      bsfa_step=jnp.zeros((), jnp.int32),
      dominant_fraction=jnp.zeros((count,), jnp.float32),
      estimator_state=chosen.init(params),
    )

  def step_fn(updates, history, state, params, extra_args):
    step = state.bsfa_step
    low, high = _value(alpha, step), _value(gamma, step)
    power = None if exponent is None else _value(exponent, step)

    def f(variance, dominant):
      a, g = (jnp.asarray(x, variance.dtype) for x in (low, high))
      if power is None:
        return jnp.where(dominant, a, g)
      present = variance > 0
      graded = jnp.where(present, variance, 1) ** -jnp.asarray(power, variance.dtype)
      return jnp.where(present, jnp.clip(graded, a, g), g)

    parts = chosen.blocks(updates)
    finite = all_finite(updates, parts)
    if history is not updates:
      finite &= all_finite(history, parts)
    learned = learn(chosen, finite, history, state.estimator_state, params, extra_args)
    filtered, fraction = chosen.apply(f, updates, learned)
    if preserve_norm:
      filtered = _with_norm_of(updates, filtered, parts)
    filtered = jax.tree.map(lambda new, v: jnp.where(finite, new, v), filtered, updates)
    return filtered, BSFAState(
      bsfa_step=jnp.where(finite, optax.safe_increment(step), step),
      dominant_fraction=_stack.keep_replicated(
        jnp.where(finite, fraction.astype(jnp.float32), state.dominant_fraction)
      ),
      estimator_state=learned,
    )

  return init_fn, step_fn


def _value(parameter: Any, step: jax.Array) -> Any:
  return parameter(step) if callable(parameter) else parameter


def _with_norm_of(
  updates: optax.Updates, filtered: optax.Updates, parts: _blocks.Blocks
) -> optax.Updates:
  """`filtered` with the norm that each block has in `updates`."""
  if not parts.count:
    return filtered
  new = parts.select(filtered)
  norm = _stack.block_squared_norm(parts, new)
  target = _stack.block_squared_norm(parts, parts.select(updates))
  # 1 where the squares underflow: a tiny update is no zero one.
  ratio = jnp.where(target > 0, jnp.sqrt(target / jnp.where(norm > 0, norm, 1)), 1)
  scaled = [
    (v.astype(r.dtype) * _stack.expand(r, v, axes)).astype(v.dtype)
    for v, r, axes in zip(new, parts.scatter(ratio), parts.batch_axes, strict=True)
  ]
  return parts.replace(filtered, scaled)
