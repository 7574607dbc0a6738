"""What alpha and gamma do, and the same for the whole update: MLP on MNIST."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import optax
from tqdm import tqdm

from benchmarks import drawing, report
from benchmarks.literature import common
from benchmarks.literature.speedup import rise, WARMUP
from benchmarks.literature.subspaces import (
  Estimator,
  filtered,
  kronecker,
  matrices,
  pca,
)
from benchmarks.store import Result, Results, Store
from benchmarks.training import Make

NAME = 'ablation'
STEPS = 300
WHOLE = (1.0, 2.0, 2.83, 4.0, 5.66, 8.0)


class Study(NamedTuple):
  """An estimator and where it is looked at.

  Attributes:
    title: for the figure.
    estimator: makes the estimator.
    alphas: multipliers of the dominant part, up to scaling the whole update.
    at_gamma: the gamma of these.
    gammas: multipliers of the bulk, with alpha 1.
  """

  title: str
  estimator: Callable[[], Estimator]
  alphas: tuple[float, ...]
  at_gamma: float
  gammas: tuple[float, ...]


STUDIES = {
  'kronecker': Study(
    'Kronecker',
    lambda: kronecker(refresh_every=20, leaves=matrices),
    (0.0, 0.25, 1.0, 2.0, 4.0, 8.0),
    8.0,
    (1.0, 2.0, 4.0, 8.0, 16.0),
  ),
  'pca': Study(
    'decayed PCA, k = 20',
    lambda: pca(20, 8, decay=0.97, leaves=matrices),
    (0.0, 0.5, 1.0, 2.0, 4.0),
    4.0,
    (1.0, 2.0, 4.0, 8.0),
  ),
}


class Plan(NamedTuple):
  """What is run.

  Attributes:
    steps: length of a run.
    rate: of SGD; by default the best of plain SGD, see speedup.py.
    whole: multipliers of the whole update.
    studies: by name.
  """

  steps: int = STEPS
  rate: float = 0.2
  whole: tuple[float, ...] = WHOLE
  studies: dict[str, Study] = STUDIES


def make(rate: float, estimator: Estimator) -> Make:
  """SGD and a filter whose multipliers rise (or fall) from 1 in the first steps."""
  return lambda hyper: filtered(
    optax.sgd(rate), rise(1.0, hyper['alpha']), rise(1.0, hyper['gamma']), estimator
  )


def points(study: Study) -> Iterator[common.Hyper]:
  for alpha in study.alphas:
    yield {'alpha': alpha, 'gamma': study.at_gamma}
  for gamma in study.gammas:
    if gamma != study.at_gamma or 1.0 not in study.alphas:
      yield {'alpha': 1.0, 'gamma': gamma}


def run(data: Path, seeds: list[int], store: Store, plan: Plan | None = None) -> None:
  """Trains at all points of the three panels."""
  plan = plan or Plan()
  network = common.Network(data)
  whole = lambda hyper: optax.sgd(rise(plan.rate, plan.rate * hyper['gamma']))
  work = {'whole': (whole, [{'gamma': gamma} for gamma in plan.whole])}
  for study_name, study in plan.studies.items():
    work[study_name] = make(plan.rate, study.estimator()), list(points(study))
  for study_name, (optimizer, hypers) in work.items():
    trainer = common.Trainer(network, optimizer)
    for seed in seeds:
      for hyper in hypers:
        name = common.run_name(study_name, hyper, seed)
        result = store.once(
          common.collection(NAME),
          name,
          lambda name=name, hyper=hyper, seed=seed, trainer=trainer: trainer.train(
            hyper, seed, plan.steps, name
          ),
        )
        outcome = 'diverged' if result['diverged'] else result['full_set_losses'][-1]
        tqdm.write(f'{name}: {outcome}, {result["spikes"]} spikes')


def at(found: Results, name: str, hyper: common.Hyper) -> list[Result]:
  """The results at one point, one a seed."""
  return [
    result
    for run_name, result in found.items()
    if result['hyper'] == hyper
    and run_name == common.run_name(name, hyper, result['seed'])
  ]


def setbacks(result: Result) -> float:
  """Percent of the looks, once alpha and gamma are there, that find a setback.

  That is a loss of 5 % more than the lowest before. It is a finer measure than spikes.
  """
  losses = result['full_set_losses']
  first = WARMUP // result['every']
  found = [x > 1.05 * min(losses[:i]) for i, x in enumerate(losses) if i >= first]
  return 100 * sum(found) / len(found)


def speed(result: Result, plain: Result) -> float:
  """Steps of plain SGD over the steps to its final loss; 0 if that is not reached."""
  if result['diverged']:
    return 0.0
  target = common.smoothed(plain['full_set_losses'])[-1]
  step = common.crossing(result['full_set_losses'], result['every'], target)
  return STEPS / step if step else 0.0


def last(result: Result) -> float:
  return common.smoothed(result['full_set_losses'])[-1]


def table(store: Store) -> str:
  """Loss at the end by gamma: of the whole update, and of the bulk with alpha 1."""
  found = store.load(common.collection(NAME))

  def cell(name: str, hyper: common.Hyper) -> str:
    here = at(found, name, hyper)
    gone = sum(result['diverged'] for result in here)
    if gone:
      return f'{gone} of {len(here)} diverged'
    return report.spread(map(last, here)) if here else ''

  gammas = sorted({*WHOLE, *(x for study in STUDIES.values() for x in study.gammas)})
  rows = []
  for gamma in gammas:
    filtered = [cell(name, {'alpha': 1.0, 'gamma': gamma}) for name in STUDIES]
    rows.append([f'{gamma:g}', cell('whole', {'gamma': gamma}), *filtered])
  head = ['gamma', f'the whole update: loss after {STEPS} steps']
  head += [f'bulk by {study.title}, alpha 1' for study in STUDIES.values()]
  return report.markdown(head, rows)


class Panel:
  """A panel of the figure: bands where no seed diverged, crosses at the others."""

  def __init__(self, axes: plt.Axes, found: Results):
    self.axes, self.found = axes, found

  def draw(self, name, hypers, x, measure, **style):
    rows, shown = [], []
    for position, hyper in zip(x, hypers, strict=True):
      here = at(self.found, name, hyper)
      if here and not any(result['diverged'] for result in here):
        shown.append(position)
        rows.append([measure(result) for result in here])
    common.band(self.axes, shown, rows, marker='o', **style)

  def cross(self, name, hypers, x, height, color):
    """With how many seeds diverged."""
    for position, hyper in zip(x, hypers, strict=True):
      here = at(self.found, name, hyper)
      gone = sum(result['diverged'] for result in here)
      if gone:
        place = {'transform': self.axes.get_xaxis_transform(), 'color': color}
        self.axes.plot(position, height, 'x', markersize=9, markeredgewidth=2, **place)
        text = f'{gone}/{len(here)}'
        self.axes.text(position, height - 0.03, text, ha='center', va='top', **place)


def plot(store: Store, figures: Path) -> None:
  """Three panels: alpha, gamma, and gamma of the filter against that of everything."""
  found = store.load(common.collection(NAME))
  plain = {result['seed']: result for result in at(found, 'whole', {'gamma': 1.0})}
  of_speed = lambda result: speed(result, plain[result['seed']])
  figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), layout='constrained')
  unsteady, fast, final = panels = [Panel(one, found) for one in axes]
  for number, (name, study) in enumerate(STUDIES.items()):
    color, height = f'C{number}', 0.95 - 0.12 * number
    hypers = [{'alpha': alpha, 'gamma': study.at_gamma} for alpha in study.alphas]
    x = [alpha / study.at_gamma for alpha in study.alphas]
    label = f'{study.title}, gamma {study.at_gamma:g}'
    unsteady.draw(name, hypers, x, setbacks, color=color, label=label)
    unsteady.cross(name, hypers, x, height, color)
    hypers = [{'alpha': 1.0, 'gamma': gamma} for gamma in study.gammas]
    for panel, measure in (fast, of_speed), (final, last):
      label = f'{study.title}, alpha 1'
      panel.draw(name, hypers, study.gammas, measure, color=color, label=label)
      panel.cross(name, hypers, study.gammas, height, color)
  hypers = [{'gamma': gamma} for gamma in WHOLE]
  final.draw('whole', hypers, WHOLE, last, color=drawing.INK, label='the whole update')
  final.cross('whole', hypers, WHOLE, 0.71, drawing.INK)
  _label(*(panel.axes for panel in panels))
  figure.supxlabel(
    'lines: mean and range over seeds; crosses: diverged, in how many of the seeds',
    fontsize='small',
  )
  drawing.save(figure, figures / 'literature-ablation.svg')


def _label(unsteady: plt.Axes, fast: plt.Axes, final: plt.Axes) -> None:
  unsteady.set(
    xlabel='alpha / gamma (at 1 the whole update is scaled)',
    ylabel='setbacks of over 5 %, % of looks at the loss',
    ylim=(-4, 104),
    title='alpha: steadiness',
  )
  fast.set(
    xscale='log',
    xlabel='gamma',
    ylabel="plain SGD's steps over steps to its loss",
    title='gamma: speed',
  )
  final.set(
    xscale='log',
    xlabel='gamma',
    ylabel=f'loss on all 5,000 images after {STEPS} steps',
    title='gamma of the bulk or of the whole update',
  )
  for axes in (fast, final):
    axes.set_xticks([1, 2, 4, 8, 16], ['1', '2', '4', '8', '16'], minor=False)
    axes.minorticks_off()
  for axes in (unsteady, fast, final):
    axes.legend(**drawing.BELOW)
