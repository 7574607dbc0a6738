"""The literature's network on 5,000 images of MNIST, trained in compiled chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
import itertools
import math
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import tasks, training
from benchmarks.progress import Progress
from benchmarks.store import Result

TASK = 'mlp-mnist5k'
SPIKE = 2.0  # a spike is a loss of more than so many times its running median
WINDOW = 50  # of the running median, steps
DIVERGED = 2.0  # loss over that of the first parameters
SMOOTHED = 5  # looks at the loss that are averaged
STAYS = 100  # steps for which the averaged loss has to stay at the target

Hyper = dict[str, float]


def collection(name: str) -> str:
  """Under which the results of a reproduction are stored."""
  return f'literature/{name}'


class Network:
  """The task's data on the device, its first parameters and its loss.

  Args:
    data: folder of the data sets.
    task: what is trained.
  """

  def __init__(self, data: Path, task: tasks.Task | None = None):
    self.problem = (task or tasks.TASKS[TASK]).build(data)
    self.count, self.rows = self.problem.config['images'], self.problem.config['rows']
    train, _ = tasks.read_mnist(data)
    self.images = {name: jnp.asarray(x[: self.count]) for name, x in train.items()}

  def batch(self, seed: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.key(seed), step)
    chosen = jax.random.randint(key, (self.rows,), 0, self.count)
    return {name: x[chosen] for name, x in self.images.items()}

  def loss(self, params: Any, images: int | None = None) -> jax.Array:
    """On the first `images` images, or on all."""
    return self.problem.loss(params, {n: x[:images] for n, x in self.images.items()})


class Trainer(training.Trainer):
  """Trains in compiled chunks and looks at the loss on all images after each.

  Args:
    network: what is trained.
    make: scalar options, which are traced, to the optimizer.
    every: steps between two looks.
    hessian_images: how many images the Hessian is of; 0 for those of the step.
    watch: parameters and state to what is recorded with that loss, by name.
  """

  def __init__(
    self,
    network: Network,
    make: training.Make,
    *,
    every: int = 20,
    hessian_images: int = 0,
    watch: Callable[[Any, Any], dict[str, jax.Array]] = lambda params, state: {},
  ):
    self.network, self.every, self.watch = network, every, watch
    on_first = lambda params, batch: network.loss(params, hessian_images)
    super().__init__(network.problem, make, on_first if hessian_images else None)
    self._chunk = jax.jit(self._traced_chunk, donate_argnums=0)
    self._loss = jax.jit(network.loss)

  def _traced_chunk(self, carry, options, seed, first):
    def step(carry, number):
      return self.traced_step(carry, self.network.batch(seed, number), options)

    carry, losses = jax.lax.scan(step, carry, first + jnp.arange(self.every))
    return carry, (losses, self.network.loss(carry[0]), self.watch(*carry))

  def train(
    self,
    hyper: Hyper,
    seed: int,
    steps: int,
    label: str,
    target: float | None = None,
  ) -> Result:
    """One run; it ends early where the loss has diverged or `reached` the target."""
    traced = {name: jnp.float32(value) for name, value in hyper.items()}
    carry = self.start(seed, traced)
    full, batches, times = [float(self._loss(carry[0]))], [], []
    watched: dict[str, list] = defaultdict(list)
    with Progress(label, steps, 'step') as bar:
      for first in range(0, steps, self.every):
        begin = time.perf_counter()
        carry, seen = self._chunk(carry, traced, jnp.int32(seed), jnp.int32(first))
        losses, loss, values = jax.device_get(seen)
        times.append(1e3 * (time.perf_counter() - begin) / self.every)
        batches += losses.tolist()
        full.append(float(loss))
        for name, value in values.items():
          watched[name].append(number(float(value)))
        bar.update(self.every)
        if not full[-1] < DIVERGED * full[0]:
          break
        if target and reached(full, self.every, target):
          break
    return {
      'seed': seed,
      'steps': steps,
      'hyper': hyper,
      'every': self.every,
      'full_set_losses': [number(x) for x in full],  # at 0, every, 2 * every ...
      'diverged': not full[-1] < DIVERGED * full[0],
      'spikes': spikes(batches),
      'watched': watched,
      'step_ms': statistics.median(times[1:] or times),  # the first one compiles
    }


def number(value: float) -> float | None:
  """For JSON: five digits, or None for what is no number."""
  return float(f'{value:.5g}') if math.isfinite(value) else None


def smoothed(losses: list[float]) -> list[float]:
  """Means over the last `SMOOTHED` looks at the loss, from the first full one."""
  last = range(SMOOTHED, len(losses) + 1)
  return [statistics.fmean(losses[i - SMOOTHED : i]) for i in last]


def reached(losses: list[float], every: int, target: float) -> int | None:
  """The step at which the averaged loss first is at the target, and stays there.

  Args:
    losses: at steps 0, every, 2 * every ...
    every: steps between two losses.
    target: what the average has to be under for `STAYS` steps on end.
  """
  since = 0
  for i, loss in enumerate(smoothed(losses)):
    since = since + 1 if loss <= target else 0
    if since * every > STAYS:
      return (i + SMOOTHED - since) * every
  return None


def crossing(losses: list[float], every: int, target: float) -> float | None:
  """The step at which the averaged loss first is at the target, interpolated."""
  averaged = smoothed(losses)
  for i, (before, after) in enumerate(itertools.pairwise(averaged)):
    if after <= target:
      share = (before - target) / (before - after) if before > target else 0.0
      return (i + SMOOTHED - 1 + share) * every
  return None


def band(axes: plt.Axes, x: Any, points: Any, **style: Any) -> None:
  """The mean over seeds as a line, their range as a shade; seeds of each point."""
  (line,) = axes.plot(x, [statistics.fmean(seeds) for seeds in points], **style)
  low, high = ([f(seeds) for seeds in points] for f in (min, max))
  axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def spikes(losses: Iterable[float]) -> int:
  """Steps with more than twice the median loss of the 50 steps before."""
  losses = np.asarray(list(losses))
  found = 0
  for i in range(WINDOW, len(losses)):
    found += not losses[i] <= SPIKE * np.median(losses[i - WINDOW : i])
  return int(found)


def run_name(name: str, hyper: Hyper, seed: int) -> str:
  return f'{name}-{"-".join(f"{x:g}" for x in hyper.values())}-{seed}'


def seconds(result: Result) -> float:
  """How long a run took, without compilation."""
  if 'seconds' in result:
    return result['seconds']
  steps = result['every'] * (len(result['full_set_losses']) - 1)
  return steps * result['step_ms'] / 1e3
