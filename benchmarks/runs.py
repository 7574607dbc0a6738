"""Runs of contenders on tasks, what they are judged by, and times of a step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
import functools
import itertools
import json
import math
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from benchmarks.contenders import Contender, find, is_hidden, make_optimizer
from benchmarks.progress import Progress
from benchmarks.store import environment, Result, Results, Store
from benchmarks.tasks import Batch, Params, Problem, Task, TASKS
from benchmarks.training import Carry, Options, share_of_peak, Trainer
from bsfa_optax import low_rank

READ_EVERY = 10  # steps between two looks at the losses: each waits for the device
CURVE_POINTS = 60  # at most
REFERENCES = ('adamw', 'adamw-tuned', 'muon', 'muon-tuned')  # speed-ups are over these
# Also trained shorter or longer.
OF_OTHER_LENGTHS = (*REFERENCES, 'bsfa', 'bsfa-kronecker')
LAST_STEPS = 50  # `train_loss` is the mean over so many steps


class Run(NamedTuple):
  """What a result is a result of."""

  task: str
  contender: str
  learning_rate: float
  steps: int
  seed: int

  @property
  def name(self) -> str:
    return f'{self.contender}-{self.steps}-{self.learning_rate:g}-{self.seed}'


class TaskTrainer(Trainer):
  """Trains one contender on one task, at any learning rate, length and seed."""

  def __init__(self, task: Task, problem: Problem, contender: Contender):
    self.task, self.contender = task, contender
    course = task._replace(floor=1.0) if contender.schedule_free else task

    def make(options):
      schedule = lambda count: (
        options['rate'] * share_of_peak(course, count, options['steps'])
      )
      return make_optimizer(contender, task, schedule)

    super().__init__(problem, make)

  def train(self, rate: float, steps: int, seed: int, bar: tqdm) -> Result:
    """One run from its start to its end, or to where it diverges."""
    options = {'rate': jnp.float32(rate), 'steps': jnp.float32(steps)}
    carry = self.start(seed, options)
    losses: list[float] = []
    block_ms: list[float] = []
    while len(losses) < steps:
      begin, count = time.perf_counter(), min(READ_EVERY, steps - len(losses))
      block = []
      for number in range(len(losses), len(losses) + count):
        carry, loss = self.step(carry, self.problem.batch(seed, number), options)
        block.append(loss)
      losses += map(float, jax.device_get(block))
      block_ms.append(1e3 * (time.perf_counter() - begin) / count)
      bar.set_postfix(loss=f'{losses[-1]:.4f}', refresh=False)
      bar.update(count)
      if not math.isfinite(losses[-1]):
        return _summary(losses, block_ms, {})
    return _summary(losses, block_ms, self.problem.evaluate(self.params(carry)))

  def params(self, carry: Carry) -> Params:
    params, state = carry
    if not self.contender.schedule_free:
      return params
    return optax.contrib.schedule_free_eval_params(state[-1], params)


class PartsTrainer(TaskTrainer):
  """Trains parts of the matrices, which are renewed at the end of each round.

  It carries what is trained, the optimizer's state, what is frozen, a random key and
  the number of steps.
  """

  def __init__(self, task: Task, problem: Problem, contender: Contender):
    super().__init__(task, problem, contender)
    method = contender.parts.method
    self._split = jax.jit(
      lambda params, key: low_rank.init(params, key, method, leaves=is_hidden)
    )
    self._merge = jax.jit(low_rank.merge)

  def start(self, seed: int, options: Options) -> Carry:
    split, draw = jax.random.split(jax.random.key(seed))
    trained, frozen = self._split(self.problem.init(seed), split)
    state = self._init(trained, options)
    return trained, state, frozen, draw, jnp.zeros((), jnp.int32)

  def traced_step(
    self, carry: Carry, batch: Batch, options: Options
  ) -> tuple[Carry, jax.Array]:
    trained, state, frozen, key, count = carry
    optimizer = self.make(options)
    loss, gradient = jax.value_and_grad(
      lambda trained: self.problem.loss(low_rank.join(trained, frozen), batch)
    )(trained)
    updates, state = optimizer.update(gradient, state, trained)
    trained = low_rank.retract(optax.apply_updates(trained, updates))
    count += 1
    if steps := self.contender.parts.round:
      trained, frozen, state = lax.cond(
        count % steps == 0,
        lambda *parts: low_rank.renew(
          optimizer, *parts, jax.random.fold_in(key, count)
        ),
        lambda *parts: parts,
        *(trained, frozen, state),
      )
    return (trained, state, frozen, key, count), loss

  def params(self, carry: Carry) -> Params:
    trained, _, frozen, *_ = carry
    return self._merge(trained, frozen)


def make_trainer(task: Task, problem: Problem, contender: Contender) -> TaskTrainer:
  kind = PartsTrainer if contender.parts else TaskTrainer
  return kind(task, problem, contender)


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
  """Does the runs that are asked for and have no result yet.

  Args:
    store: where results are.
    data: folder of the data sets.
    again: whether to do also those that have a result, which is replaced.
  """

  def __init__(self, store: Store, data: Path, again: bool = False):
    self.store, self.again = store, again
    self.problem = functools.cache(lambda task: TASKS[task].build(data))
    self.trainer = functools.cache(
      lambda task, contender: make_trainer(
        TASKS[task], self.problem(task), find(contender)
      )
    )

  def __call__(self, run: Run) -> Result:
    result = self.store.once(
      run.task, run.name, lambda: self._train(run), again=self.again
    )
    _check_settings(run, result)
    return result

  def _train(self, run: Run) -> Result:
    trainer = self.trainer(run.task, run.contender)
    label = f'{run.task} {run.name}'
    with Progress(label, run.steps, 'step') as bar:
      measured = trainer.train(run.learning_rate, run.steps, run.seed, bar)
    value = measured.get(trainer.task.measure)
    outcome = 'diverged' if value is None else f'{trainer.task.measure} {value:.4f}'
    tqdm.write(f'{label}: {outcome}, {measured["step_ms"]:.1f} ms a step')
    return (
      run._asdict()
      | measured
      | trainer.sizes(run.seed, {'rate': 0.0, 'steps': 1.0})
      | {
        'settings': trainer.contender.settings,
        'recipe': _recipe(trainer.task),
        'problem': trainer.problem.config,
      }
    )


def _recipe(task: Task) -> dict[str, Any]:
  """What the contenders share on a task, for the results."""
  kept = ('measure', 'warmup', 'floor', 'b2', 'weight_decay', 'clip')
  return {name: getattr(task, name) for name in kept}


def _check_settings(run: Run, result: Result) -> None:
  """Says so if a result is of a contender which has changed since."""
  then = result.get('settings')
  now = json.loads(json.dumps(find(run.contender).settings))
  if then is not None and then != now:
    tqdm.write(
      f'{run.task} {run.name}: the result is of other settings than those of now;'
      ' `run --again` replaces it'
    )


# What runs are judged by.


def score(task: Task, result: Result) -> float:
  """The less, the better."""
  value = result.get(task.measure)
  return math.inf if value is None else value


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
  trainers: dict[str, TaskTrainer], rounds: int, steps: int, bar: tqdm
) -> dict[str, list[float]]:
  """Milliseconds a step of each contender, one number a round.

  In a round each contender makes its steps, one after the other, so that what slows
  the machine for a while slows all of them.
  """
  options = {'rate': jnp.float32(1e-4), 'steps': jnp.float32(1000)}

  def advance(name: str, carry: Carry, first: int, count: int) -> Carry:
    trainer = trainers[name]
    for number in range(first, first + count):
      carry, _ = trainer.step(carry, trainer.problem.batch(0, number), options)
    return jax.block_until_ready(carry)

  carries = {}
  for name, trainer in trainers.items():
    advance(name, trainer.start(0, options), 0, 1)  # compiles
    carries[name] = trainer.start(0, options)
  times: dict[str, list[float]] = {name: [] for name in trainers}
  for number, name in itertools.product(range(rounds), trainers):
    begin = time.perf_counter()
    carries[name] = advance(name, carries[name], number * steps, steps)
    times[name].append(1e3 * (time.perf_counter() - begin) / steps)
    bar.update()
  return times


def in_units_of_adamw(times: dict[str, list[float]]) -> Results:
  """What `step_times` measured, for the results."""
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
    } | environment()
  return measured


# What a command is going to do.


class Clock:
  """Estimates how long runs take, from the times of a step that were recorded."""

  def __init__(self, store: Store):
    self._store = store
    self._results = functools.cache(store.load)

  def step_ms(self, task: str, contender: str) -> float | None:
    times = self._store.times(task).get(contender)
    if times:
      return times['step_ms']
    own = [r for r in self._results(task).values() if r['contender'] == contender]
    return statistics.median(r['step_ms'] for r in own) if own else None

  def estimate(self, work: Iterable[tuple[str, str, int]]) -> str:
    """How long steps of contenders on tasks take, in words."""
    seconds, unknown = 0.0, set()
    for task, contender, steps in work:
      step_ms = self.step_ms(task, contender)
      seconds += (step_ms or 0) * steps / 1e3
      if step_ms is None:
        unknown.add(f'{contender} on {task}')
    without = f'{len(unknown)} contenders' if len(unknown) > 3 else ', '.join(unknown)
    known, missing = f'about {duration(seconds)}', f'no time is recorded of {without}'
    if not unknown:
      return known
    return f'{known}, but {missing}' if seconds else missing

  def describe(self, runs: Iterable[Run], again: bool = False) -> str:
    """Which of the runs have no result yet, and how long they take."""
    runs = list(dict.fromkeys(runs))
    todo = [r for r in runs if again or r.name not in self._results(r.task)]
    counts = Counter((run.task, run.contender) for run in todo)
    others = ', the others have a result' if len(todo) < len(runs) else ''
    lines = [f'{len(todo)} of {len(runs)} runs to do{others}']
    lines += [f'  {task} {name}: {n}' for (task, name), n in counts.items()]
    if todo:
      steps = sum(run.steps for run in todo)
      work = [(run.task, run.contender, run.steps) for run in todo]
      lines.append(f'{steps:,} steps: {self.estimate(work)}')
    return '\n'.join(lines)


def duration(seconds: float) -> str:
  for unit, size in ('h', 3600), ('min', 60):
    if seconds >= 1.5 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.0f} s'
