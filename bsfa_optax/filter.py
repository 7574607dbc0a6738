"""The filter of principal directions, alone and around other optimizers."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _check, _learned, _vectors
from bsfa_optax._learned import Estimator, FilterState
from bsfa_optax.estimators import kronecker
from bsfa_optax.whitening import scale_by_whitening


def bsfa(
  alpha: optax.ScalarOrSchedule = 0.3,
  gamma: optax.ScalarOrSchedule = 2.0,
  *,
  exponent: optax.ScalarOrSchedule | None = None,
  grafting: bool = False,
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

  * ``optax.chain(optax.adamw(lr), bsfa())``, the published placement: the whole update
    is filtered, weight decay included. The learning rate scales what the estimator
    sees, so with a schedule the early, larger updates weigh more in `pca`
    (`kronecker` normalises every update).
  * ``bsfa_adamw(lr, filter=bsfa())``: between Adam's direction and the decoupled weight
    decay. Neither the decay nor the learning rate is filtered.
  * ``optax.chain(bsfa(), optax.adamw(lr))``: the gradient is filtered before the
    moments. Weight decay and learning rate are left alone, and Adam, which divides by
    the size of what it gets, undoes a part of the filter.

  The estimator learns from an update before it filters it. A block whose dominant
  directions are not known yet, and a leaf in no block, is left alone. An update with a
  NaN or an infinity in a filtered leaf, or entries too large to be squared and summed
  (1e14 in float32), passes through as it is, leaves no trace in what was learnt and is
  counted in `FilterState.skipped_updates`.

  What a schedule or a traced option gives cannot be checked: the graded filter takes
  gamma where alpha exceeds it, and other numbers are used as they are.

  All defaults are ours, found by measurement: the sources publish none.

  Args:
    alpha: multiplier of the dominant directions (two-level) or the least multiplier
      (graded); a scalar >= 0 or a schedule. May be traced.
    gamma: multiplier of the bulk (two-level) or the greatest multiplier (graded); a
      scalar >= 0 or a schedule. May be traced.
    exponent: the power p of the graded filter, a scalar >= 0 or a schedule, or None
      for the two-level filter.
    grafting: whether each block keeps the norm of its update. Then only the direction
      changes, and the best learning rate is usually higher. Where no more than rounding
      is left of a block it is not blown up.
    estimator: where the covariance comes from; `bsfa_optax.kronecker` by default, see
      also `bsfa_optax.pca`.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `FilterState`. Updates
    keep their shapes and dtypes. With the extra argument ``history``, a tree like the
    updates, it learns from that, and filters the updates.

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
    >>> fraction = optax.tree.get(state, 'dominant_fraction')
    >>> print(fraction.round(3))  # this update is all there was
    [1.]

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025
  """
  _check.multiplier(alpha=alpha, gamma=gamma)
  _check.boolean(grafting=grafting)
  if exponent is not None:
    _check.multiplier(exponent=exponent)
    low, high = _check.concrete(alpha), _check.concrete(gamma)
    if low is not None and high is not None and low > high:
      raise ValueError(
        f'alpha must not exceed gamma in the graded filter, got alpha={alpha!r} and'
        f' gamma={gamma!r}; set exponent=None for the two-level filter.'
      )
  chosen = kronecker() if estimator is None else estimator
  _learned.check_estimator(chosen)

  def apply(layout, vector, memory, count):
    given = {'alpha': alpha, 'gamma': gamma, 'exponent': exponent}
    now = {name: _learned.value(name, x, count) for name, x in given.items()}
    f = functools.partial(_multiplier, **now)
    found = chosen.decompose(layout, vector, memory)
    filtered = _learned.filtered(f, layout, vector, found)
    if grafting:  # with alpha = 0, what is left of a block may be rounding alone
      filtered = _vectors.with_norm_of(layout, filtered, vector, rounding=1e3)
    return filtered, _learned.dominant_fraction(layout, vector, found)

  return _learned.learned(
    chosen.layout, chosen.init, chosen.learn, apply, 'dominant_fraction'
  )


def _multiplier(
  variance: jax.Array, dominant: jax.Array, *, alpha: Any, gamma: Any, exponent: Any
) -> jax.Array:
  """The f of `bsfa`."""
  a, g = (jnp.asarray(x, variance.dtype) for x in (alpha, gamma))
  if exponent is None:
    return jnp.where(dominant, a, g)
  # What never varied is flatter than anything that did: it gets gamma.
  present = variance > 0
  power = jnp.asarray(exponent, variance.dtype)
  graded = jnp.where(present, variance, 1) ** -power
  limit = jnp.where(power > 0, g, 1)  # of x^(-p) as x -> 0
  return jnp.clip(jnp.where(present, graded, limit), a, g)


def bsfa_adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_root: float = 0.0,
  mu_dtype: Any | None = None,
  weight_decay: float = 1e-4,
  mask: Any | Callable[[optax.Params], Any] | None = None,
  *,
  nesterov: bool = True,
  filter: optax.GradientTransformation | None = None,
  step_length: float = 2.8,
  embedding_scale: float = 3.0,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with a filter between Adam's direction and the decoupled weight decay.

  The defaults are what trained fastest in our benchmarks: Nesterov's momentum, and the
  whitening, which keeps the norm of each matrix's update. A filtered optimizer bears,
  and wants, longer steps: `step_length` times as long as AdamW's at the same learning
  rate, weight decay included, so that the best rate of AdamW is about the best one
  here. Tables of embeddings want longer ones still: `embedding_scale` times those.

  Args:
    learning_rate: a scalar or a schedule, as for `optax.adamw`.
    b1: as in `optax.adamw`, like all arguments up to `nesterov`.
    b2: decay of the second moment.
    eps: term added to the denominator outside the square root.
    eps_root: term added to the denominator inside the square root.
    mu_dtype: dtype of the first moment; the parameters' own by default.
    weight_decay: strength of the decoupled weight decay, which is not filtered.
    mask: which parameters decay; a tree or a function from parameters to one.
    nesterov: whether to use Nesterov momentum, as Muon does; `optax.adamw` does not
      unless told to.
    filter: what filters Adam's direction; `bsfa_optax.scale_by_whitening` by default.
    step_length: what multiplies the learning rate, positive; 1.0 for a filter that does
      not keep the norm.
    embedding_scale: what multiplies the updates of tables of embeddings, which are told
      by name as in `bsfa_optax.scale_by_whitening`, but not their weight decay;
      positive.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy.
    TypeError: if `filter` is no transformation.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.bsfa_adamw(3e-4, weight_decay=0.1)
    >>> params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)

    The filter as published, with two levels:

    >>> tx = bsfa_optax.bsfa_adamw(
    ...   3e-4, filter=bsfa_optax.bsfa(), step_length=1.0, embedding_scale=1.0
    ... )

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025

    Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019
  """
  _check.fraction(b1=b1, b2=b2)
  _check.no_schedule(eps=eps, eps_root=eps_root)
  _check.multiplier(eps=eps, eps_root=eps_root)
  _check.floating(mu_dtype=mu_dtype)
  _check.boolean(nesterov=nesterov)
  direction = optax.scale_by_adam(
    b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
  )
  return _descent(
    direction,
    filter,
    weight_decay,
    mask,
    step_length,
    embedding_scale,
    learning_rate,
  )


def bsfa_adafactor(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  decay_rate: float = 0.8,
  clipping_threshold: float = 1.0,
  min_dim_size_to_factor: int = 32,
  mu_dtype: Any | None = None,
  weight_decay: float = 1e-4,
  mask: Any | Callable[[optax.Params], Any] | None = None,
  *,
  filter: optax.GradientTransformation | None = None,
  step_length: float = 2.8,
  embedding_scale: float = 3.0,
) -> optax.GradientTransformationExtraArgs:
  """`bsfa_adamw` with a factored second moment: less state than AdamW's.

  Of the second moment only the means of rows and columns are kept, as in Adafactor. The
  gradient over its root goes through Nesterov's momentum, and then through the filter.
  What is left are the momentum, 4 bytes a parameter in float32, and the memory of the
  filter, about 4 for a transformer of width 768 (`bsfa_optax.summary` tells).

  Args:
    learning_rate: a scalar or a schedule, as for `bsfa_adamw`.
    b1: decay of the momentum.
    decay_rate: the second moment decays by ``1 - t ** -decay_rate`` at step t.
    clipping_threshold: the greatest root mean square of a leaf's gradient over the
      root of its second moment.
    min_dim_size_to_factor: leaves of which the second longest axis is shorter have a
      second moment of their own shape.
    mu_dtype: dtype of the momentum; the parameters' own by default.
    weight_decay: strength of the decoupled weight decay, which is not filtered.
    mask: which parameters decay; a tree or a function from parameters to one.
    filter: as in `bsfa_adamw`.
    step_length: as in `bsfa_adamw`.
    embedding_scale: as in `bsfa_adamw`.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy.
    TypeError: if `filter` is no transformation.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp, optax
    >>> kernel = {'kernel': jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    >>> for tx in bsfa_optax.bsfa_adafactor(3e-4), bsfa_optax.bsfa_adamw(3e-4):
    ...   print(str(bsfa_optax.summary(tx, kernel)).splitlines()[-1])
    state: 790,552 bytes, 12.1 a parameter
    state: 1,050,644 bytes, 16.0 a parameter

  References:
    Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018
  """
  _check.fraction(b1=b1)
  _check.no_schedule(decay_rate=decay_rate, clipping_threshold=clipping_threshold)
  _check.multiplier(decay_rate=decay_rate)
  _check.positive_number(clipping_threshold=clipping_threshold)
  _check.positive_int(min_dim_size_to_factor=min_dim_size_to_factor)
  _check.floating(mu_dtype=mu_dtype)
  direction = optax.chain(
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
    ),
    optax.clip_by_block_rms(clipping_threshold),
    optax.trace(b1, nesterov=True, accumulator_dtype=mu_dtype),
    optax.scale(1 - b1),
  )
  return _descent(
    direction,
    filter,
    weight_decay,
    mask,
    step_length,
    embedding_scale,
    learning_rate,
  )


def _descent(
  direction: optax.GradientTransformation,
  filter: optax.GradientTransformation | None,
  weight_decay: float,
  mask: Any,
  step_length: float,
  embedding_scale: float,
  learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
  filter = scale_by_whitening() if filter is None else filter
  _check.transformation(filter=filter)
  _check.no_schedule(step_length=step_length, embedding_scale=embedding_scale)
  _check.positive_number(step_length=step_length, embedding_scale=embedding_scale)
  _check.multiplier(learning_rate=learning_rate, weight_decay=weight_decay)
  if isinstance(mask, (str, bytes, int, float)) and not isinstance(mask, bool):
    raise TypeError(
      f'mask must be a tree of booleans or a function to one, got {mask!r}; as in'
      ' optax.adamw.'
    )
  tx = optax.chain(
    direction,
    filter,
    optax.masked(optax.scale(embedding_scale), _vectors.are_tables),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale(step_length),
    optax.scale_by_learning_rate(learning_rate),
  )

  def init(params):
    _vectors.check_arrays(params)  # the direction's own error would not tell what to do
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init, tx.update)


class AccelerateState(NamedTuple):
  """State of the `accelerate` wrapper.

  Attributes:
    base_state: the state of the base optimizer.
    history_state: the state of the transformation that makes the history.
    filter_state: the state of the filter.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.accelerate(optax.sgd(0.1), history=optax.identity())
    >>> state = tx.init({'kernel': jnp.ones((4, 4))})
    >>> optax.tree.get(state, 'dominant_fraction').shape
    (1,)
  """

  base_state: Any
  history_state: Any
  filter_state: Any


def accelerate(
  base_optimizer: optax.GradientTransformation,
  filter: optax.GradientTransformation | None = None,
  *,
  history: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Filters an optimizer's updates by what the filter learns of gradients.

  As ``optax.chain(base_optimizer, filter)``, which sees updates alone, except that the
  `history`, which the filter learns from, is made of the gradients. A base optimizer
  with momentum averages out the oscillation in its updates that tells the steep
  directions.

  Args:
    base_optimizer: the optimizer whose updates are filtered.
    filter: `bsfa_optax.bsfa` by default, or `bsfa_optax.scale_by_whitening`.
    history: what maps the gradients to the history. `optax.identity()`: the gradients
      themselves. ``optax.scale_by_adam(b1=0.0, b2=b2)``: the gradients in Adam's
      metric, that is over their root mean square; give it the b2 of the base optimizer.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is an `AccelerateState`.

  Raises:
    TypeError: if an argument is no transformation.

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
  filter = bsfa() if filter is None else filter
  _check.transformation(base_optimizer=base_optimizer, filter=filter, history=history)
  base, source, last = map(
    optax.with_extra_args_support, (base_optimizer, history, filter)
  )

  def init(params):
    return AccelerateState(base.init(params), source.init(params), last.init(params))

  def update(updates, state, params=None, **extra):
    _learned.check_state(AccelerateState, state)
    base_state, source_state, last_state = state
    seen, source_state = source.update(updates, source_state, params, **extra)
    updates, base_state = base.update(updates, base_state, params, **extra)
    updates, last_state = last.update(
      updates, last_state, params, history=seen, **extra
    )
    return updates, AccelerateState(base_state, source_state, last_state)

  return optax.GradientTransformationExtraArgs(init, update)


class InterpolatedState(NamedTuple):
  """State of the filter in `interpolated`.

  Attributes:
    average_fraction: moving average of the dominant fraction of each block, float32
      (blocks,).
    switched_on: whether the block is filtered, bool (blocks,).
    filter_state: the `FilterState` of the filter.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.interpolated(optax.sgd(1.0), 0.5, 1.0)
    >>> optax.tree.get(tx.init(jnp.ones((4, 4))), 'switched_on')
    Array([False], dtype=bool)
  """

  average_fraction: jax.Array
  switched_on: jax.Array
  filter_state: FilterState


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
  threshold has to be lower too. Bulk-SGD is (alpha, gamma) = (0, 1), Dom-SGD is (1, 0),
  and (1, 1) is the base optimizer.

  Args:
    base_optimizer: the optimizer whose updates are filtered.
    alpha: multiplier of the dominant part, a scalar >= 0 or a schedule.
    gamma: multiplier of the bulk, a scalar >= 0 or a schedule.
    estimator: where the subspace comes from. The sources take the Hessian of the whole
      network: ``hessian_lanczos(rank, labels='all', refresh_every=1)``.
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
  _check.transformation(base_optimizer=base_optimizer)
  _check.fraction(threshold=threshold, decay=decay)
  chosen = kronecker() if estimator is None else estimator
  inner: Any = bsfa(alpha, gamma, estimator=chosen)

  def init(params):
    state = inner.init(params)
    none = jnp.zeros_like(state.measured['dominant_fraction'])
    return InterpolatedState(none, none.astype(bool), state)

  def update(updates, state, params=None, **extra_args):
    _learned.check_state(InterpolatedState, state)
    filtered, new = inner.update(updates, state.filter_state, params, **extra_args)
    fraction = new.measured['dominant_fraction']
    average = decay * state.average_fraction + (1 - decay) * fraction
    # An update that passed through, not finite, has told nothing.
    skipped = new.skipped_updates != state.filter_state.skipped_updates
    average = jnp.where(skipped, state.average_fraction, average)
    on = state.switched_on | (average > threshold)
    layout = chosen.layout(updates)
    if layout.count:
      both = layout.select(filtered), layout.select(updates)
      filtered = layout.replace(filtered, _vectors.select(layout, on, *both))
    return filtered, InterpolatedState(average, on, new)

  filter = optax.GradientTransformationExtraArgs(init, update)
  return optax.chain(base_optimizer, filter)


class SplitState(NamedTuple):
  """State of `split_by_subspace`.

  Attributes:
    projector_state: the `FilterState` of what the estimator learns.
    dominant_state: the state of the transformation of the dominant part.
    bulk_state: the state of the transformation of the bulk.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.split_by_subspace(
    ...   bsfa_optax.dct(rank=2), optax.trace(0.9), optax.identity()
    ... )
    >>> tx.init(jnp.ones((4, 4))).dominant_state.trace.shape
    (4, 4)
  """

  projector_state: Any
  dominant_state: Any
  bulk_state: Any


def split_by_subspace(
  estimator: Estimator,
  dominant: optax.GradientTransformation,
  bulk: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Transforms the dominant part of an update and the bulk each in its own way.

  The update :math:`v` becomes :math:`D(Pv) + B((I - P)v)`, with :math:`P` the projector
  on the dominant subspace of each block, :math:`D` the transformation `dominant` and
  :math:`B` the transformation `bulk`. With two `optax.scale` a block is treated as by
  `bsfa_optax.bsfa`. Both keep states in the shape of the whole parameters, and as
  neither need be linear, their outputs need not stay in their subspaces. On leaves in
  no block, on all until their directions are known, and for an update that is not
  finite, :math:`P` is 0: they go to `bulk`.

  Args:
    estimator: where the dominant subspace comes from; it learns from the update that it
      splits.
    dominant: transformation of :math:`Pv`.
    bulk: transformation of :math:`(I - P)v`.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `SplitState`. Put the
    learning rate behind it in a chain, or into both parts.

  Raises:
    TypeError: if an argument is no `Estimator` or no transformation.

  Examples:
    An optimizer with state inside the subspace, sign descent outside:

    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = optax.chain(
    ...   bsfa_optax.split_by_subspace(
    ...     bsfa_optax.pca(rank=8),
    ...     dominant=optax.scale_by_adam(),
    ...     bulk=optax.scale_by_sign(),
    ...   ),
    ...   optax.scale_by_learning_rate(3e-4),
    ... )
    >>> params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zmushko, Beznosikov, Takáč, Horváth, `FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training
    <https://arxiv.org/abs/2411.07837>`_, 2024
  """
  _learned.check_estimator(estimator)
  _check.transformation(dominant=dominant, bulk=bulk)
  inside, outside = map(optax.with_extra_args_support, (dominant, bulk))

  # Bulk-SGD's filter leaves the bulk; what it takes away is dominant.
  projector: Any = bsfa(0.0, 1.0, estimator=estimator)

  def init(params):
    return SplitState(projector.init(params), inside.init(params), outside.init(params))

  def update(updates, state, params=None, **extra):
    _learned.check_state(SplitState, state)
    old, dominant_state, bulk_state = state
    rest, new = projector.update(updates, old, params, **extra)
    # Of an update that is not finite, which passed through, the difference is NaN.
    skipped = new.skipped_updates != old.skipped_updates
    projected = jax.tree.map(lambda v, r: jnp.where(skipped, 0, v - r), updates, rest)
    first, dominant_state = inside.update(projected, dominant_state, params, **extra)
    second, bulk_state = outside.update(rest, bulk_state, params, **extra)
    state = SplitState(new, dominant_state, bulk_state)
    return jax.tree.map(jnp.add, first, second), state

  return optax.GradientTransformationExtraArgs(init, update)
