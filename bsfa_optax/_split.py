"""One transformation for the dominant part of an update, another for the bulk."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from bsfa_optax import _check
from bsfa_optax._estimator import all_finite, check_estimator, Estimator, learn


class SplitState(NamedTuple):
  """State of `split_by_subspace`.

  Attributes:
    split_estimator_state: the state of the estimator.
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

  split_estimator_state: Any
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
  :math:`B` the transformation `bulk`. `bsfa_optax.bsfa` is the case of two
  `optax.scale`. Both keep states in the shape of the whole parameters, and as
  neither need be linear, their outputs need not stay in their subspaces. Leaves in no
  block, and all leaves until the estimator's first full refresh, go to `dominant`.

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
    FRUGAL: an optimizer with state inside the subspace, sign descent outside. (Its
    authors project at random or by singular vectors of one gradient, and keep the
    state in coordinates of the subspace, which saves memory; this form does not.)

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
  check_estimator(estimator)
  _check.transformation('dominant', dominant)
  _check.transformation('bulk', bulk)
  inside, outside = map(optax.with_extra_args_support, (dominant, bulk))

  def init(params):
    return SplitState(estimator.init(params), inside.init(params), outside.init(params))

  def update(updates, state, params=None, **extra_args):
    finite = all_finite(updates, estimator.blocks(updates))
    learned = learn(
      estimator, finite, updates, state.split_estimator_state, params, extra_args
    )
    projected, _ = estimator.apply(_on_dominant, updates, learned)
    rest = jax.tree.map(lambda v, p: v - p, updates, projected)
    first, dominant_state = inside.update(
      projected, state.dominant_state, params, **extra_args
    )
    second, bulk_state = outside.update(rest, state.bulk_state, params, **extra_args)
    return (
      jax.tree.map(lambda a, b: a + b, first, second),
      SplitState(learned, dominant_state, bulk_state),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _on_dominant(variance: jax.Array, dominant: jax.Array) -> jax.Array:
  return dominant.astype(variance.dtype)
