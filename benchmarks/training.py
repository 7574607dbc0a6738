"""One trainer for everything here: any optimizer, with options that are traced."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:  # tasks that start from a trained model train it here
  from benchmarks.tasks import Batch, Params, Problem, Task

Options = dict[str, Any]  # scalars
# What is trained and the state of its optimizer, and whatever else a trainer carries.
Carry = tuple[Any, ...]
Make = Callable[[Options], optax.GradientTransformation]


def share_of_peak(task: Task, count: jax.Array, steps: jax.Array) -> jax.Array:
  """The learning rate at a step in units of its peak: warm-up, then half a cosine.

  Optax's schedules want their lengths when they are made. Here `steps` may be traced,
  so that runs of other lengths and learning rates need no compilation of their own.
  """
  warmup = jnp.floor(task.warmup * steps)
  rising = (count + 0.0) / jnp.maximum(warmup, 1)
  falling = jnp.clip((count - warmup) / jnp.maximum(steps - warmup, 1), 0, 1)
  cosine = task.floor + (1 - task.floor) * (1 + jnp.cos(math.pi * falling)) / 2
  return jnp.where(count < warmup, rising, cosine)


class Trainer:
  """Trains with one optimizer at any scalar options and seed: compiled once.

  Args:
    problem: what is trained.
    make: options, which are traced, to the optimizer.
    curvature_loss: the loss whose Hessian an estimator may ask for; by default the
      training loss of the step.
  """

  def __init__(
    self,
    problem: Problem,
    make: Make,
    curvature_loss: Callable[[Params, Batch], jax.Array] | None = None,
  ):
    self.problem, self.make = problem, make
    self._curvature_loss = curvature_loss or problem.loss
    self._init = jax.jit(lambda params, options: make(options).init(params))
    self.step = jax.jit(self.traced_step, donate_argnums=0)

  def start(self, seed: int, options: Options) -> Carry:
    params = self.problem.init(seed)
    return params, self._init(params, options)

  def traced_step(
    self, carry: Carry, batch: Batch, options: Options
  ) -> tuple[Carry, jax.Array]:
    """After one more step, and its loss; `step` is the same, compiled."""
    params, state = carry
    optimizer = optax.with_extra_args_support(self.make(options))
    loss, gradient = jax.value_and_grad(self.problem.loss)(params, batch)
    updates, state = optimizer.update(
      gradient,
      state,
      params,
      value_fn=lambda params: self._curvature_loss(params, batch),
    )
    return (optax.apply_updates(params, updates), state), loss

  def params(self, carry: Carry) -> Params:
    """The parameters of the model as they are now."""
    return carry[0]

  def sizes(self, seed: int, options: Options) -> dict[str, int]:
    """Number of parameters that are trained, and bytes of the optimizer's state."""
    trained, state, *_ = jax.eval_shape(lambda: self.start(seed, options))
    return {
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(trained)),
      'state_bytes': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    }
