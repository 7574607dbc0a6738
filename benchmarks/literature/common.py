"""The literature's network on 5,000 images of MNIST, trained in compiled chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
import itertools
import json
import math
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from benchmarks import runs, tasks
from benchmarks.progress import Progress

TASK = 'mlp-mnist5k'
ROWS = 50
IMAGES = 5000
SPIKE = 2.0  # a spike is a loss of more than so many times its running median
WINDOW = 50  # of the running median, steps
DIVERGED = 2.0  # loss over that of the first parameters
SMOOTHED = 5  # looks at the loss that are averaged
STAYS = 100  # steps for which the averaged loss has to stay at the target

Hyper = dict[str, float]
Traced = dict[str, jax.Array]
Make = Callable[[Traced], optax.GradientTransformation]
Result = dict[str, Any]


class Network:
  """The task's data on the device, its first parameters and its loss.

  Args:
    data: folder of the data sets.
  """

  def __init__(self, data: Path):
    self.problem = tasks.TASKS[TASK].build(data)
    train, _ = tasks.read_mnist(data)
    self.images = {name: jnp.asarray(x[:IMAGES]) for name, x in train.items()}

  def batch(self, seed: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.key(seed), step)
    chosen = jax.random.randint(key, (ROWS,), 0, IMAGES)
    return {name: x[chosen] for name, x in self.images.items()}

  def loss(self, params: Any, images: int = IMAGES) -> jax.Array:
    """On the first `images` images."""
    return self.problem.loss(params, {n: x[:images] for n, x in self.images.items()})


class Trainer:
  """Trains with one optimizer at any scalar options and seed: compiled once.

  Args:
    network: what is trained.
    make: scalar options, which are traced, to the optimizer.
    every: steps between two looks at the loss on all images.
    hessian_images: how many images the Hessian is of; 0 for none.
    watch: parameters and state to what is recorded with that loss, by name.
  """

  def __init__(
    self,
    network: Network,
    make: Make,
    *,
    every: int = 20,
    hessian_images: int = 0,
    watch: Callable[[Any, Any], dict[str, jax.Array]] = lambda params, state: {},
  ):
    self.network, self.make, self.every, self.watch = network, make, every, watch
    self.extra = {}
    if hessian_images:
      self.extra['value_fn'] = lambda params: network.loss(params, hessian_images)
    self._init = jax.jit(lambda params, hyper: make(hyper).init(params))
    self._chunk = jax.jit(self._traced_chunk, donate_argnums=(0, 1))
    self._loss = jax.jit(network.loss)

  def _traced_chunk(self, params, state, hyper, seed, first):
    optimizer = optax.with_extra_args_support(self.make(hyper))

    def step(carry, number):
      params, state = carry
      batch = self.network.batch(seed, number)
      loss, gradient = jax.value_and_grad(self.network.problem.loss)(params, batch)
      updates, state = optimizer.update(gradient, state, params, **self.extra)
      return (optax.apply_updates(params, updates), state), loss

    numbers = first + jnp.arange(self.every)
    (params, state), losses = jax.lax.scan(step, (params, state), numbers)
    seen = self.watch(params, state)
    return params, state, losses, self.network.loss(params), seen

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
    params = self.network.problem.init(seed)
    state = self._init(params, traced)
    full, batches, times = [float(self._loss(params))], [], []
    watched: dict[str, list] = defaultdict(list)
    with Progress(label, steps, 'step') as bar:
      for first in range(0, steps, self.every):
        begin = time.perf_counter()
        params, state, *seen = self._chunk(
          params, state, traced, jnp.int32(seed), jnp.int32(first)
        )
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


def file_name(name: str, hyper: Hyper, seed: int) -> str:
  return f'{name}-{"-".join(f"{x:g}" for x in hyper.values())}-{seed}.json'


def stored(path: Path, measure: Callable[[], Result]) -> Result:
  """The result in a file; measured and written if there is none."""
  if not path.exists():
    result = measure() | {'versions': runs.versions(), 'machine': runs.machine()}
    runs.write_json(path, result)
  return json.loads(path.read_text())


def load(folder: Path) -> dict[str, Result]:
  """All results in a folder, by name of file."""
  return {
    path.stem: json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))
  }
