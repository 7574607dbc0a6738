"""SGD along the dominant directions alone, without them, and between: MLP on MNIST."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import report
from benchmarks.literature import common
from bsfa_optax import bsfa, diagnostics, hessian_lanczos

NAME = 'bulk-sgd'
STEPS = 1200
RATE = 0.05
RANK = 10
REFRESH_EVERY = 50
HESSIAN_IMAGES = 500
LOOK_EVERY = 50
THRESHOLD = 0.95  # of chi, where the filter is switched on

# The share of the dominant and of the bulk part of the update, and a title.
METHODS = {
  'sgd': (1.0, 1.0, 'SGD'),
  'bulk': (0.0, 1.0, 'Bulk-SGD'),
  'interpolated-75': (0.25, 0.75, '1/4 Dom + 3/4 Bulk'),
  'interpolated-50': (0.5, 0.5, '1/2 Dom + 1/2 Bulk'),
  'interpolated-25': (0.75, 0.25, '3/4 Dom + 1/4 Bulk'),
  'dom': (1.0, 0.0, 'Dom-SGD'),
}

estimator = hessian_lanczos(
  RANK, iterations=RANK + 2, refresh_every=REFRESH_EVERY, blocks='all'
)


def make(hyper: common.Traced) -> optax.GradientTransformation:
  """SGD, filtered from the step `switch` on."""

  def switched(value):
    return lambda step: jnp.where(
      step.astype(jnp.float32) >= hyper['switch'], value, jnp.ones_like(value)
    )

  alpha, gamma = switched(hyper['alpha']), switched(hyper['gamma'])
  return optax.chain(optax.sgd(RATE), bsfa(alpha, gamma, estimator=estimator))


def chi(network: common.Network):
  """Share of the gradient on all images that is in the dominant subspace."""

  def measure(params, state):
    gradient = jax.grad(network.loss)(params)
    learned = optax.tree.get(state, 'estimator_state')
    fraction, _ = diagnostics.dominant_fraction(estimator, learned, gradient)
    return {'chi': fraction[0]}

  return measure


def switch_of(result: common.Result) -> int | None:
  """The first step at which chi was above the threshold, or None."""
  values = enumerate(result['watched']['chi'], start=1)
  return next((i * result['every'] for i, x in values if x > THRESHOLD), None)


def run(data: Path, seeds: list[int], results: Path) -> None:
  """Trains SGD, and from where its chi passes the threshold the others."""
  network = common.Network(data)
  trainer = common.Trainer(
    network,
    make,
    every=LOOK_EVERY,
    hessian_images=HESSIAN_IMAGES,
    watch=chi(network),
  )
  for seed in seeds:
    switch = None
    for name, (alpha, gamma, _) in METHODS.items():
      hyper = {'alpha': alpha, 'gamma': gamma, 'switch': switch or 0}
      path = results / NAME / f'{name}-{seed}.json'
      result = common.stored(
        path,
        lambda path=path, hyper=hyper, seed=seed: trainer.train(
          hyper, seed, STEPS, path.stem
        ),
      )
      tqdm.write(f'{path.stem}: final loss {result["full_set_losses"][-1]}')
      if name == 'sgd':
        switch = switch_of(result)
        if switch is None:
          tqdm.write(f'seed {seed}: chi never passed {THRESHOLD}')
          break


Curves = dict[int, np.ndarray]  # by seed


def since_switch(results: Path) -> dict[str, tuple[Curves, Curves]]:
  """Loss over that at the switch, and chi, of each method that has results.

  They begin where the filter is switched on, which differs between seeds.
  """
  found = common.load(results / NAME)
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


def table(results: Path) -> str:
  """Where all methods are when the run with the latest switch ends."""
  curves = since_switch(results)
  lengths = [len(x) for losses, _ in curves.values() for x in losses.values()]
  last = min(lengths, default=1) - 1  # chi may never have passed the threshold
  rows = []
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
  head += [f'loss, {last * LOOK_EVERY} steps later, over that at the switch']
  head += ["decrease, SGD's = 100 %", r'$\chi_{10}$ then']
  return report.markdown(head, rows)


def plot(results: Path, figures: Path) -> None:
  """Loss and chi from the switch on."""
  curves = since_switch(results)
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout='constrained')
  for position, (name, (_, _, title)) in enumerate(METHODS.items()):
    if name not in curves:
      continue
    style = {'color': f'C{position}', 'label': title}
    for axes, of_seeds in zip((left, right), curves[name], strict=True):
      rows = of_seeds.values()
      length = min(map(len, rows))
      steps = LOOK_EVERY * np.arange(length)
      common.band(axes, steps, np.transpose([row[:length] for row in rows]), **style)
  left.set(
    xlabel='steps since the filter was switched on',
    ylabel='loss on all 5,000 images over that at the switch',
  )
  left.legend(fontsize='small', title='mean and range over seeds', loc='lower left')
  right.set(
    xlabel='steps since the filter was switched on',
    ylabel=r'$\chi_{10}$ = |P gradient| / |gradient|, all images',
    ylim=(0.5, 1),
  )
  report.save(figure, figures / 'literature-bulk-sgd.png')
