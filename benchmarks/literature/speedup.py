"""Speed-up of every estimator over SGD at its best learning rate, MLP on MNIST."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import drawing, report, search
from benchmarks.drawing import INK
from benchmarks.literature import common
from benchmarks.literature.common import Hyper
from benchmarks.literature.subspaces import (
  dct,
  Estimator,
  filtered,
  hessian_lanczos,
  kronecker,
  matrices,
  pca,
  WHOLE,
)
from benchmarks.store import Result, Store
from benchmarks.training import Make, Options

NAME = 'speedup'
STEPS = 2000  # of SGD; the others have no more
WARMUP = 100  # steps in which gamma rises from 1: the start is the steepest

CURVES = ('sgd', 'warmup', 'momentum-warmup', 'hessian', 'momentum-hessian')
KINDS = {'0.6': 'no filter', 'C0': 'BSFA over SGD', 'C1': 'BSFA over momentum 0.9'}


class Method(NamedTuple):
  """What is compared with SGD.

  Attributes:
    title: for the figure.
    estimator: makes the estimator; None for no filter.
    momentum: of the SGD that is filtered.
    warmed_up: whether the learning rate rises from 0, as gamma does from 1.
    rate: where the search begins, in units of SGD's best rate.
    graded: whether the filter is graded, with exponent 0.5.
    alpha: where the search begins.
    gamma: where the search begins.
    hessian_images: how many images the Hessian is of.
  """

  title: str
  estimator: Callable[[], Estimator] | None
  momentum: float = 0.0
  warmed_up: bool = False
  rate: float = 1.0
  graded: bool = False
  alpha: float = 0.5
  gamma: float = 4.0
  hessian_images: int = 0


METHODS = {
  'warmup': Method('no filter, warm-up', None, warmed_up=True, rate=2**0.5),
  'momentum': Method('no filter, momentum 0.9', None, momentum=0.9, rate=0.25),
  'momentum-warmup': Method(
    'no filter, momentum 0.9, warm-up',
    None,
    momentum=0.9,
    warmed_up=True,
    rate=2**0.5,
  ),
  'ppe': Method(
    'PPE: window 32, k = 10',
    lambda: pca(10, 32, decay=0.0, refresh_every=8, leaves=matrices),
  ),
  'pca-20': Method(
    'decayed PCA, k = 20', lambda: pca(20, 8, decay=0.97, leaves=matrices)
  ),
  'pca-40': Method(
    'decayed PCA, k = 40', lambda: pca(40, 8, decay=0.97, leaves=matrices)
  ),
  'dct': Method('DCT, k = 16', lambda: dct(16, leaves=matrices)),
  'kronecker': Method(
    'Kronecker, two levels', lambda: kronecker(refresh_every=20, leaves=matrices)
  ),
  'kronecker-graded': Method(
    'Kronecker, graded',
    lambda: kronecker(refresh_every=20, leaves=matrices),
    graded=True,
    alpha=0.1,
    gamma=8.0,
  ),
  'hessian': Method(
    'Hessian of the network, k = 10',
    lambda: hessian_lanczos(10, iterations=14, **WHOLE),
    hessian_images=500,
  ),
  'hessian-blocks': Method(
    'Hessian of each matrix, k = 10',
    lambda: hessian_lanczos(10, iterations=14, leaves=matrices),
    hessian_images=500,
  ),
  'momentum-hessian': Method(
    'Hessian of the network, momentum 0.9',
    lambda: hessian_lanczos(10, iterations=14, **WHOLE),
    momentum=0.9,
    rate=0.5,
    gamma=2.0,
    hessian_images=500,
  ),
  'momentum-kronecker-graded': Method(
    'Kronecker, graded, momentum 0.9',
    lambda: kronecker(refresh_every=20, leaves=matrices),
    momentum=0.9,
    rate=0.5,
    graded=True,
    alpha=0.2,
    gamma=4.0,
  ),
}


class Plan(NamedTuple):
  """What is run.

  Attributes:
    steps: of SGD; the others have no more.
    warmup: steps in which gamma rises from 1.
    rates: of SGD, tried on the first seed.
    trials: of every method on the first seed.
    trial_steps: length of a trial.
    methods: by name.
  """

  steps: int = STEPS
  warmup: int = WARMUP
  rates: tuple[float, ...] = (0.1, 0.141, 0.2, 0.238, 0.283, 0.4)
  trials: int = 6
  trial_steps: int = 400
  methods: dict[str, Method] = METHODS


def sgd(hyper: Options) -> optax.GradientTransformation:
  return optax.sgd(hyper['rate'])


def make(method: Method, warmup: int) -> Make:
  """Scalar options to the optimizer."""

  def base(hyper):
    rate = hyper['rate']
    rate = rise(0.0, rate, warmup) if method.warmed_up else rate
    return optax.sgd(rate, momentum=method.momentum or None)

  if method.estimator is None:
    return base
  estimator = method.estimator()
  return lambda hyper: filtered(
    base(hyper),
    hyper['alpha'],
    rise(1.0, hyper['gamma'], warmup),
    estimator,
    of_gradients=True,  # with momentum the updates oscillate less
    exponent=0.5 if method.graded else None,
  )


def rise(start: float, end: Any, steps: int = WARMUP) -> optax.Schedule:
  return optax.schedules.linear_schedule(start, end, steps)


def final(result: Result) -> float:
  """The loss that is to be reached; infinite if the run diverged."""
  if result['diverged'] or len(result['full_set_losses']) < common.SMOOTHED:
    return float('inf')
  return common.smoothed(result['full_set_losses'])[-1]


def moves(method: Method, hyper: Hyper) -> list[Hyper]:
  """Neighbours in the order in which they are tried."""
  if method.estimator is None:
    return [{'rate': hyper['rate'] * x} for x in (2, 0.5, 2**0.5, 0.5**0.5)]
  changes = [('gamma', 2), ('gamma', 0.5), ('alpha', 0.5), ('rate', 0.5**0.5)]
  changes += [('alpha', 2), ('gamma', 2**0.5), ('gamma', 0.5**0.5)]
  return [{**hyper, key: hyper[key] * x} for key, x in changes]


class Search:
  """Finds the options of a method on the first seed and runs them with all seeds."""

  def __init__(self, network: common.Network, seeds: list[int], store: Store, plan):
    self.network, self.seeds, self.store, self.plan = network, seeds, store, plan
    plain = common.Trainer(network, sgd)
    of_sgd = lambda rate, seed: self.once(plain, 'sgd', {'rate': rate}, seed)
    first, *_ = seeds
    self.rate = min(plan.rates, key=lambda rate: final(of_sgd(rate, first)))
    self.targets = {seed: final(of_sgd(self.rate, seed)) for seed in seeds}

  def once(self, trainer, name, hyper, seed, steps=None, target=None) -> Result:
    run_name = common.run_name(name, hyper, seed)
    train = lambda: trainer.train(
      hyper, seed, steps or self.plan.steps, run_name, target
    )
    return self.store.once(common.collection(NAME), run_name, train)

  def __call__(self, name: str, method: Method) -> None:
    first, plan = self.seeds[0], self.plan
    trainer = common.Trainer(
      self.network, make(method, plan.warmup), hessian_images=method.hessian_images
    )
    start = {'rate': self.rate * method.rate}
    if method.estimator is not None:
      start |= {'alpha': method.alpha, 'gamma': method.gamma}
    trial = lambda hyper: final(
      self.once(trainer, f'trial-{name}', hyper, first, plan.trial_steps)
    )
    neighbours = lambda hyper: moves(method, hyper)
    best = search.climb(start, neighbours, trial, plan.trials)
    while True:
      tried = []
      for seed, target in self.targets.items():
        result = self.once(trainer, name, best, seed, target=target)
        step = common.reached(result['full_set_losses'], result['every'], target)
        speed_up = f'{plan.steps / step:.2f}x' if step else 'not reached'
        tqdm.write(f'{common.run_name(name, best, seed)}: {speed_up}')
        tried.append(result)
      if 'gamma' not in best or not any(result['diverged'] for result in tried):
        break
      best = {**best, 'gamma': best['gamma'] / 2}


def run(data: Path, seeds: list[int], store: Store, plan: Plan | None = None) -> None:
  """Tunes SGD, then each method on the first seed, and runs the best with all seeds."""
  plan = plan or Plan()
  tune = Search(common.Network(data), seeds, store, plan)
  for name, method in plan.methods.items():
    tune(name, method)


def tuned(store: Store) -> dict[str, dict[int, Result]]:
  """The runs of SGD and of each method at the options chosen, by method and seed."""
  found = store.load(common.collection(NAME))
  of = {}
  for name in ('sgd', *METHODS):
    runs_ = [
      result
      for run_name, result in found.items()
      if run_name == common.run_name(name, result['hyper'], result['seed'])
    ]
    by_hyper: dict[tuple, dict[int, Result]] = {}
    for result in runs_:
      key = tuple(result['hyper'].values())
      by_hyper.setdefault(key, {})[result['seed']] = result
    # SGD's rates were tried on the first seed. A filter that diverged with any seed
    # was run again with half the gamma.
    first = min((result['seed'] for result in runs_), default=0)
    if name == 'sgd':
      chosen = min(by_hyper.values(), key=lambda seeds: final(seeds[first]), default={})
    else:
      diverged = lambda seeds: sum(result['diverged'] for result in seeds.values())
      chosen = min(by_hyper.values(), key=diverged, default={})
    of[name] = chosen
  return of


def speed_ups(of: dict[str, dict[int, Result]]) -> dict[str, dict[int, float | None]]:
  """SGD's steps over those of each method, by seed; None if the loss is not reached."""
  ups: dict[str, dict[int, float | None]] = {}
  for name in METHODS:
    ups[name] = {}
    for seed, result in of[name].items():
      step = common.reached(
        result['full_set_losses'], result['every'], final(of['sgd'][seed])
      )
      ups[name][seed] = STEPS / step if step else None
  return ups


def worth(ups: Iterable[float | None], show: Callable[[list[float]], str]) -> str:
  """A speed-up in words; `show` makes one of the seeds that reach SGD's loss."""
  ups = list(ups)
  reached = [x for x in ups if x is not None]
  if not reached:
    return 'not reached'
  some = f' ({len(reached)} of {len(ups)} seeds)' if len(reached) < len(ups) else ''
  return f'{show(reached)}x{some}'


def table(store: Store) -> str:
  """The options of each method and its speed-up."""
  of = tuned(store)
  rows = []
  for name, ups in speed_ups(of).items():
    if ups:
      hyper = next(iter(of[name].values()))['hyper']
      options = [
        f'{hyper[x]:g}' if x in hyper else '' for x in ('rate', 'alpha', 'gamma')
      ]
      speed_up = worth(ups.values(), lambda reached: report.spread(reached, 2))
      rows.append([METHODS[name].title, *options, speed_up])
  head = ['method', 'rate', 'alpha', 'gamma', 'speed-up in steps']
  return report.markdown(head, rows)


def plot(store: Store, figures: Path) -> None:
  """Bars of the speed-up with a dot a seed, and the curves of some."""
  of = tuned(store)
  ups = {name: values for name, values in speed_ups(of).items() if values}
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(12, 5), layout='constrained', width_ratios=(3, 2)
  )
  for position, (name, values) in enumerate(ups.items()):
    method = METHODS[name]
    plain, steady, moving = KINDS
    color = plain if method.estimator is None else moving if method.momentum else steady
    reached = [x for x in values.values() if x is not None]
    if reached:
      left.barh(position, np.mean(reached), color=color, alpha=0.6)
      left.plot(reached, [position] * len(reached), '.', color=INK, markersize=5)
    text = worth(values.values(), lambda reached: f'{np.mean(reached):.1f}')
    left.text(max(reached, default=0) + 0.1, position, text, va='center')
  left.set_yticks(range(len(ups)), [METHODS[name].title for name in ups])
  left.invert_yaxis()
  longest = max((x for values in ups.values() for x in values.values() if x), default=1)
  left.set_xlim(0, 1.25 * longest)
  left.axvline(1, color=INK, linewidth=0.8)
  for color, title in KINDS.items():
    left.barh(0, 0, color=color, alpha=0.6, label=title)
  left.legend(**drawing.BELOW)
  left.set_xlabel(f"SGD's {STEPS} steps over steps to its loss; a dot is a seed")
  for name in CURVES:
    runs_ = [r for r in of.get(name, {}).values() if not r['diverged']]
    if runs_:
      title = METHODS[name].title if name in METHODS else 'SGD, best constant rate'
      curves = [result['full_set_losses'] for result in runs_]
      length = min(map(len, curves))
      steps = runs_[0]['every'] * np.arange(length)
      common.band(right, steps, np.transpose([c[:length] for c in curves]), label=title)
  right.set(
    yscale='log',
    xlabel='step',
    ylabel='loss on all 5,000 images (line: mean, shade: range of seeds)',
    ylim=(None, 0.1),
  )
  right.legend(**drawing.BELOW, ncols=2)
  drawing.save(figure, figures / 'literature-speedup.svg')
