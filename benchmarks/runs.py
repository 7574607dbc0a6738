"""Training runs, their results on disk, and the search for learning rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
from pathlib import Path
import platform
import statistics
import time
import tomllib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from benchmarks.contenders import Contender, find, make_optimizer
from benchmarks.progress import Progress
from benchmarks.tasks import Problem, Task, TASKS
import bsfa_optax

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
READ_EVERY = 10  # steps between two looks at the losses: each waits for the device
CURVE_POINTS = 60  # at most
REFERENCES = ('adamw', 'muon')  # speed-ups are over these
OF_OTHER_LENGTHS = (*REFERENCES, 'bsfa')  # also trained shorter or longer
LAST_STEPS = 50  # `train_loss` is the mean over so many steps

Result = dict[str, Any]


class Run(NamedTuple):
  """What a result is a result of."""

  task: str
  contender: str
  learning_rate: float
  steps: int
  seed: int

  def path(self, results: Path) -> Path:
    name = f'{self.contender}-{self.steps}-{self.learning_rate:g}-{self.seed}.json'
    return results / self.task / name


def write_json(path: Path, content: Any) -> None:
  write_text(path, json.dumps(content, indent=1, allow_nan=False) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes a file as a whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_text(text)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def load(results: Path, tasks: Iterable[str] = TASKS) -> list[Result]:
  """All results of the tasks in a folder."""
  paths = [path for task in tasks for path in sorted(results.glob(f'{task}/*.json'))]
  return [json.loads(path.read_text()) for path in paths]


def versions() -> dict[str, str]:
  """Versions of what has an influence on a result."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  found = {'python': platform.python_version(), 'bsfa-optax': project['version']}
  for name in ('jax', 'optax', 'flax', 'numpy', 'psgdax'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # psgdax
      found[name] = importlib.metadata.version(name)
  return found


def machine() -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    'platform': device.platform,
    'device_kind': device.device_kind,
    'cpu_cores': len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count(),
  }


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
  """Trains one contender on one task, at any learning rate, length and seed."""

  def __init__(self, task: Task, problem: Problem, contender: Contender):
    self.task = task
    self.problem = problem
    self.contender = contender
    self._step = jax.jit(self._traced_step, donate_argnums=(0, 1))
    # The state's shapes do not depend on the learning rate.
    self._init = jax.jit(self._optimizer(0.0, 1.0).init)

  def _optimizer(self, rate: Any, steps: Any) -> optax.GradientTransformation:
    schedule = lambda count: rate * share_of_peak(self.task, count, steps)
    return make_optimizer(self.contender, self.task, schedule)

  def _traced_step(self, params, opt_state, batch, rate, steps):
    value_fn = lambda params: self.problem.loss(params, batch)
    loss, gradient = jax.value_and_grad(value_fn)(params)
    optimizer = optax.with_extra_args_support(self._optimizer(rate, steps))
    updates, opt_state = optimizer.update(
      gradient, opt_state, params, value_fn=value_fn
    )
    return optax.apply_updates(params, updates), opt_state, loss

  def start(self, seed: int) -> tuple[Any, Any]:
    """Parameters and optimizer state."""
    params = self.problem.init(seed)
    return params, self._init(params)

  def step(
    self, carry: tuple, number: int, rate: float, steps: int, seed: int
  ) -> tuple:
    """Parameters, optimizer state and loss after one more step."""
    batch = self.problem.batch(seed, number)
    return self._step(*carry[:2], batch, jnp.float32(rate), jnp.float32(steps))

  def state_size(self) -> dict[str, int]:
    params = jax.eval_shape(lambda: self.problem.init(0))
    return {
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
      'state_bytes': bsfa_optax.state_bytes(self._optimizer(0.0, 1.0), params),
    }

  def train(self, rate: float, steps: int, seed: int, bar: tqdm) -> Result:
    """One run from its start to its end, or to where it diverges."""
    carry = (*self.start(seed), None)
    losses: list[float] = []
    block_ms: list[float] = []
    while len(losses) < steps:
      begin, count = time.perf_counter(), min(READ_EVERY, steps - len(losses))
      block = []
      for number in range(len(losses), len(losses) + count):
        carry = self.step(carry, number, rate, steps, seed)
        block.append(carry[2])
      losses += map(float, jax.device_get(block))
      block_ms.append(1e3 * (time.perf_counter() - begin) / count)
      bar.set_postfix(loss=f'{losses[-1]:.4f}', refresh=False)
      bar.update(count)
      if not math.isfinite(losses[-1]):
        return _summary(losses, block_ms, {})
    return _summary(losses, block_ms, self.problem.evaluate(carry[0]))


def _summary(losses: list[float], block_ms: list[float], figures: dict) -> Result:
  """A result's measured part; a loss is None if it is not finite."""
  every = max(1, math.ceil(len(losses) / CURVE_POINTS))
  curve = [
    statistics.fmean(losses[i : i + every]) for i in range(0, len(losses), every)
  ]
  figures = {'train_loss': statistics.fmean(losses[-LAST_STEPS:])} | figures
  finite = lambda value: value if math.isfinite(value) else None
  return {
    **{name: finite(value) for name, value in figures.items()},
    'loss_curve': {'every': every, 'losses': [finite(round(x, 5)) for x in curve]},
    # The first block compiles.
    'step_ms': statistics.median(block_ms[1:] or block_ms),
  }


class Laboratory:
  """Does the runs that are asked for and not yet in the folder of results."""

  def __init__(self, results: Path, data: Path):
    self.results = results
    self.data = data
    self.problem = functools.cache(lambda task: TASKS[task].build(data))
    self.trainer = functools.cache(
      lambda task, contender: Trainer(TASKS[task], self.problem(task), find(contender))
    )

  def __call__(self, run: Run) -> Result:
    """The result of a run; trains only if there is none."""
    path = run.path(self.results)
    if path.exists():
      result = json.loads(path.read_text())
      _check_settings(path, result, find(run.contender))
      return result
    trainer = self.trainer(run.task, run.contender)
    label = f'{run.task} {path.stem}'
    with Progress(label, run.steps, 'step') as bar:
      measured = trainer.train(run.learning_rate, run.steps, run.seed, bar)
    result = run._asdict() | measured | trainer.state_size()
    result |= {
      'settings': trainer.contender.settings,
      'recipe': _recipe(trainer.task),
      'problem': trainer.problem.config,
      'versions': versions(),
      'machine': machine(),
    }
    write_json(path, result)
    value = result.get(trainer.task.measure)
    outcome = 'diverged' if value is None else f'{trainer.task.measure} {value:.4f}'
    tqdm.write(f'{label}: {outcome}, {result["step_ms"]:.1f} ms a step')
    return result


def _recipe(task: Task) -> dict[str, Any]:
  """What the contenders share on a task, for the results."""
  kept = ('measure', 'warmup', 'floor', 'b2', 'weight_decay', 'clip')
  return {name: getattr(task, name) for name in kept}


def _check_settings(path: Path, result: Result, contender: Contender) -> None:
  """Says so if a result is of a contender which has changed since."""
  then, now = result.get('settings'), json.loads(json.dumps(contender.settings))
  if then is not None and then != now:
    tqdm.write(f'{path} is of other settings than those of now: delete it to run again')


def score(task: Task, result: Result) -> float:
  """What a run is judged by: the less, the better."""
  value = result.get(task.measure)
  return math.inf if value is None else value


# The search for a learning rate. All contenders share one grid, so that their runs at
# AdamW's best rate are points of it.


def grid(half_steps: int) -> float:
  """Learning rates at half a factor of two: 0.001 at 0, 0.00141 at 1, 0.002 at 2 ..."""
  return float(f'{1e-3 * 2 ** (half_steps / 2):.3g}')


def search(
  start: float, budget: int, score_at: Callable[[float], float]
) -> float | None:
  """Walks by factors of two until the best rate has worse ones on both sides.

  Then tries the half-steps beside it.

  Args:
    start: about where to begin.
    budget: greatest number of rates to try.
    score_at: what a rate is judged by; infinite if it diverges.

  Returns:
    The best rate, or None if its neighbours on both sides are not yet known.
  """
  middle = 2 * round(math.log2(start / 1e-3))
  scores: dict[int, float] = {}

  def known(points: Iterable[int]) -> bool:
    """Tries what is missing; whether the budget sufficed."""
    for point in points:
      if point not in scores:
        if len(scores) == budget:
          return False
        scores[point] = score_at(grid(point))
    return True

  best = middle
  for distance in (2, 1):
    while True:
      if not known((best, best - distance, best + distance)):
        return None
      # Of equals the least: where all diverge, the way is down.
      better = min(scores, key=lambda point: (scores[point], point))
      if better == best:
        break
      best = better
  return grid(best)


def ranked_rates(results: Iterable[Result], task: Task, steps: int) -> list[float]:
  """Rates of one task and contender: most seeds first, then the least mean."""
  scores = defaultdict(list)
  for result in results:
    if result['steps'] == steps:
      scores[result['learning_rate']].append(score(task, result))
  finite = {rate: s for rate, s in scores.items() if all(map(math.isfinite, s))}
  rank = lambda rate: (-len(finite[rate]), statistics.fmean(finite[rate]))
  return sorted(finite, key=rank)


def best_rate(results: Iterable[Result], task: Task, steps: int) -> float | None:
  """The first of the `ranked_rates`, if there is one."""
  return next(iter(ranked_rates(results, task, steps)), None)


# Times.


def step_times(
  trainers: dict[str, Trainer], rounds: int, steps: int, bar: tqdm
) -> dict[str, list[float]]:
  """Milliseconds a step of each contender, one number a round.

  In a round each contender makes its steps, one after the other, so that what slows
  the machine for a while slows all of them.
  """
  carries = {}
  for name, trainer in trainers.items():
    jax.block_until_ready(trainer.step((*trainer.start(0), None), 0, 1e-4, 1000, 0))
    carries[name] = (*trainer.start(0), None)  # compiled now
  times: dict[str, list[float]] = {name: [] for name in trainers}
  for number, name in itertools.product(range(rounds), trainers):
    begin = time.perf_counter()
    for i in range(steps):
      carries[name] = trainers[name].step(
        carries[name], number * steps + i, 1e-4, 1000, 0
      )
    jax.block_until_ready(carries[name])
    times[name].append(1e3 * (time.perf_counter() - begin) / steps)
    bar.update()
  return times


def times_path(results: Path, task: str) -> Path:
  return results / f'{task}.times.json'


def read_times(results: Path, task: str) -> dict[str, dict[str, Any]]:
  """Measured times of the contenders on a task, by name."""
  path = times_path(results, task)
  return json.loads(path.read_text()) if path.exists() else {}


def add_times(results: Path, task: str, times: dict[str, list[float]]) -> None:
  """Saves what `step_times` measured; contenders not measured now keep their times."""
  base = times['adamw']
  measured = {}
  for name, values in times.items():
    ratios = [ms / other for ms, other in zip(values, base, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    measured[name] = {
      'step_ms': statistics.median(values),
      'times_adamw': statistics.fmean(ratios),  # the filter's first steps are slower
      'quartiles': [quartiles[0], quartiles[2]],
      'rounds': len(values),
      'versions': versions(),
      'machine': machine(),
    }
  write_json(times_path(results, task), read_times(results, task) | measured)
