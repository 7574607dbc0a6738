"""SGD along the dominant directions alone, without them, and between: MLP on MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import drawing, report
from benchmarks.literature import common
from benchmarks.literature.subspaces import chi, filtered, hessian_lanczos, WHOLE
from benchmarks.store import Result, Store
from benchmarks.training import Options

NAME = 'bulk-sgd'
RANK = 10

# The share of the dominant and of the bulk part of the update, and a title.
METHODS = {
  'sgd': (1.0, 1.0, 'SGD'),
  'bulk': (0.0, 1.0, 'Bulk-SGD'),
  'interpolated-75': (0.25, 0.75, '1/4 Dom + 3/4 Bulk'),
  'interpolated-50': (0.5, 0.5, '1/2 Dom + 1/2 Bulk'),
  'interpolated-25': (0.75, 0.25, '3/4 Dom + 1/4 Bulk'),
  'dom': (1.0, 0.0, 'Dom-SGD'),
}


class Plan(NamedTuple):
  """What is run.

  Attributes:
    steps: length of a run.
    rate: of SGD.
    look_every: steps between two looks at loss and chi.
    refresh_every: steps between two refreshes of the subspace.
    hessian_images: how many images the Hessian is of.
    threshold: of chi, where the filter is switched on.
    methods: names of `METHODS`.
  """

  steps: int = 1200
  rate: float = 0.05
  look_every: int = 50
  refresh_every: int = 50
  hessian_images: int = 500
  threshold: float = 0.95
  methods: tuple[str, ...] = tuple(METHODS)


PLAN = Plan()


def make_trainer(network: common.Network, plan: Plan) -> common.Trainer:
  """SGD, filtered from the step `switch` on."""
  estimator = hessian_lanczos(
    RANK, iterations=RANK + 2, refresh_every=plan.refresh_every, **WHOLE
  )

  def make(hyper: Options) -> optax.GradientTransformation:
    def switched(value):
      return lambda step: jnp.where(
        step.astype(jnp.float32) >= hyper['switch'], value, jnp.ones_like(value)
      )

    alpha, gamma = switched(hyper['alpha']), switched(hyper['gamma'])
    return filtered(optax.sgd(plan.rate), alpha, gamma, estimator)

  def watch(params, state):
    gradient = jax.grad(network.loss)(params)
    return {'chi': chi(estimator, state, gradient)}

  return common.Trainer(
    network,
    make,
    every=plan.look_every,
    hessian_images=plan.hessian_images,
    watch=watch,
  )


def switch_of(result: Result, plan: Plan = PLAN) -> int | None:
  """The first step at which chi was above the threshold, or None."""
  values = enumerate(result['watched']['chi'], start=1)
  return next((i * result['every'] for i, x in values if x > plan.threshold), None)


def run(data: Path, seeds: list[int], store: Store, plan: Plan = PLAN) -> None:
  """Trains SGD, and from where its chi passes the threshold the others."""
  trainer = make_trainer(common.Network(data), plan)
  for seed in seeds:
    switch = None
    for method in plan.methods:
      alpha, gamma, _ = METHODS[method]
      hyper = {'alpha': alpha, 'gamma': gamma, 'switch': switch or 0}
      name = f'{method}-{seed}'
      result = store.once(
        common.collection(NAME),
        name,
        lambda name=name, hyper=hyper, seed=seed: trainer.train(
          hyper, seed, plan.steps, name
        ),
      )
      tqdm.write(f'{name}: final loss {result["full_set_losses"][-1]}')
      if method == 'sgd':
        switch = switch_of(result, plan)
        if switch is None:
          tqdm.write(f'seed {seed}: chi never passed {plan.threshold}')
          break


Curves = dict[int, np.ndarray]  # by seed


def since_switch(store: Store) -> dict[str, tuple[Curves, Curves]]:
  """Loss over that at the switch, and chi, of each method that has results.

  They begin where the filter is switched on, which differs between seeds.
  """
  found = store.load(common.collection(NAME))
  curves: dict[str, tuple[Curves, Curves]] = {}
  for name in METHODS:
    for stem, result in found.items():
      seed = result['seed']
      switch = switch_of(found.get(f'sgd-{seed}', result))
      if stem != f'{name}-{seed}' or switch is None:
        continue
      first = switch // result['every']
      loss = np.array(result['full_set_losses'][first:], float)
      losses, chis = curves.setdefault(name, ({}, {}))
      losses[seed] = loss / loss[0]
      chis[seed] = np.array(result['watched']['chi'][first - 1 :], float)
  return curves


def table(store: Store) -> str:
  """Where all methods are when the run with the latest switch ends."""
  curves = since_switch(store)
  lengths = [len(x) for losses, _ in curves.values() for x in losses.values()]
  last = min(lengths, default=1) - 1  # chi may never have passed the threshold
  rows, every = [], PLAN.look_every
  for name, (losses, chis) in curves.items():
    alpha, gamma, title = METHODS[name]
    sgd, _ = curves['sgd']
    decrease = [100 * (1 - x[last]) / (1 - sgd[s][last]) for s, x in losses.items()]
    rows.append(
      [
        title,
        f'{alpha:g}, {gamma:g}',
        report.spread((x[last] for x in losses.values()), 3),
        f'{report.spread(decrease, 0)} %',
        report.spread((x[last] for x in chis.values()), 2),
      ]
    )
  head = ['from the switch on', 'alpha, gamma']
  head += [f'loss, {last * every} steps later, over that at the switch']
  head += ["decrease, SGD's = 100 %", r'$\chi_{10}$ then']
  return report.markdown(head, rows)


def plot(store: Store, figures: Path) -> None:
  """Loss and chi from the switch on."""
  curves = since_switch(store)
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout='constrained')
  for position, (name, (_, _, title)) in enumerate(METHODS.items()):
    if name not in curves:
      continue
    style = {'color': f'C{position}', 'label': title}
    for axes, of_seeds in zip((left, right), curves[name], strict=True):
      rows = of_seeds.values()
      length = min(map(len, rows))
      steps = PLAN.look_every * np.arange(length)
      common.band(axes, steps, np.transpose([row[:length] for row in rows]), **style)
  left.set(
    xlabel='steps since the switch',
    ylabel='loss over that at the switch',
  )
  right.set(
    xlabel='steps since the switch',
    ylabel=r'$\chi_{10}$ = |P gradient| / |gradient|',
    ylim=(0.5, 1),
  )
  lines, labels = left.get_legend_handles_labels()
  title = 'mean and range over seeds'
  figure.legend(lines, labels, title=title, loc='outside lower center', ncols=4)
  drawing.save(figure, figures / 'literature-bulk-sgd.svg')
