"""Aliases: whole optimizers with the filter in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from bsfa_optax._estimator import Estimator
from bsfa_optax._filter import bsfa


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
  alpha: optax.ScalarOrSchedule = 0.1,
  gamma: optax.ScalarOrSchedule = 4.0,
  exponent: optax.ScalarOrSchedule | None = 0.5,
  preserve_norm: bool = True,
  estimator: Estimator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with BSFA between Adam's direction and the decoupled weight decay.

  The defaults are what trained fastest in our benchmarks: Nesterov's momentum, and the
  graded filter that keeps the norm of each block's update. So the update has the length
  of Adam's at any alpha and gamma. For the filter as published, with two levels, set
  ``alpha=0.3, gamma=2.0, exponent=None, preserve_norm=False``, the defaults of
  `bsfa_optax.bsfa`.

  Args:
    learning_rate: a scalar or a schedule. That of AdamW will do; the best one was 2
      to 8 times as high in our benchmarks, and between 2 and 3 times in most.
    b1: as in `optax.adamw`, like all arguments up to `nesterov`.
    b2: decay of the second moment.
    eps: term added to the denominator outside the square root.
    eps_root: term added to the denominator inside the square root.
    mu_dtype: dtype of the first moment; the parameters' own by default.
    weight_decay: strength of the decoupled weight decay, which is not filtered.
    mask: which parameters decay; a tree or a function from parameters to one.
    nesterov: whether to use Nesterov momentum, as Muon does; `optax.adamw` does not
      unless told to.
    alpha: least multiplier, of the most dominant direction (graded), or multiplier of
      all dominant directions (two-level); see `bsfa_optax.bsfa`.
    gamma: greatest multiplier, of the flattest direction, or multiplier of the bulk.
    exponent: power of the graded filter, or None for the two-level one.
    preserve_norm: whether each block keeps the norm of its update.
    estimator: where the covariance comes from.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: for the same options as `bsfa_optax.bsfa`.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = bsfa_optax.bsfa_adamw(3e-4, weight_decay=0.1)
    >>> params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025

    Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019
  """
  return optax.chain(
    optax.scale_by_adam(
      b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
    ),
    bsfa(
      alpha,
      gamma,
      exponent=exponent,
      preserve_norm=preserve_norm,
      estimator=estimator,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
