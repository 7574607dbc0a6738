"""How much of the curvature lies in dominant spaces, along training.

The curvature energy (squared Frobenius norm) of the Hessian of the whole network, of
its Gauss-Newton part and of the rest, the functional Hessian, is split by the top space
of the Hessian and by the dominant spaces of estimators that only watch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import time
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from benchmarks import report, tasks
from benchmarks.literature import overlap
from benchmarks.literature.overlap import band, load, rounded, Setting
from benchmarks.tasks import Problem
from bsfa_optax import diagnostics, Estimator, hessian_lanczos, kronecker, pca

NAME = 'gauss-newton'
RANK = 10  # the number of classes, as in the literature
SAMPLES = 16
HESSIAN, MINI_BATCH = 'Hessian, top 10', 'mini-batch Hessian, top 10'
GLOBAL_PCA = 'pca, whole model, rank 10'
WATCHERS = {
  GLOBAL_PCA: pca(RANK, history=8, blocks='all'),
  'pca, rank 10 a matrix': pca(RANK, history=8),
  'kronecker': kronecker(refresh_every=2),
}
_mlp = {'blocks': 'all', 'rank': RANK, 'batches': 10}
SETTINGS = {
  'mlp-sgd': overlap.SETTINGS['mlp-sgd']._replace(**_mlp),
  'mlp-adam': overlap.SETTINGS['mlp-adam']._replace(**_mlp),
}
MATRICES = {
  'hessian': 'Hessian',
  'gauss_newton': 'Gauss-Newton matrix',
  'functional': 'functional Hessian',
}


def outputs(params: Any, batch: Any) -> jax.Array:
  """The network's outputs on the images of a batch."""
  _, module = tasks.functional(tasks.mlp)
  return module(params)(tasks.normalized(batch['images']))


class Meter:
  """What a setting needs for its measurements, compiled once for all seeds."""

  def __init__(self, setting: Setting, problem: Problem):
    self.setting = setting
    self.train = overlap.trainer(problem, setting)
    start = problem.init(0)
    self.blocks = diagnostics.partition(start, setting.blocks)
    self.batch = overlap.larger_batch(problem, setting.batches)
    self.learners = {name: overlap.learner(e) for name, e in WATCHERS.items()}
    lanczos = hessian_lanczos(
      RANK, iterations=4 * RANK, refresh_every=1, blocks=setting.blocks
    )
    self.mini_batch = jax.jit(
      lambda params, batch: (
        lanczos.update(
          params,
          lanczos.init(params),
          params,
          value_fn=lambda p: problem.loss(p, batch),
        ).basis
      )
    )
    self.top = jax.jit(
      lambda params, batch: diagnostics.hessian_top_k(
        lambda p: problem.loss(p, batch), params, RANK, self.blocks
      )
    )
    self.dominant = {name: self._dimensions(e) for name, e in WATCHERS.items()}
    self.by_basis = jax.jit(self._energy)
    self.by_projector = {
      name: self._projected(estimator)
      for name, estimator in WATCHERS.items()
      if name != GLOBAL_PCA
    }

  def _energy(self, params: Any, batch: Any, subspace: Any, key: jax.Array):
    return diagnostics.curvature_energy(
      lambda params: outputs(params, batch),
      lambda z: tasks.squared_error(z, batch['labels']),
      params,
      subspace,
      self.blocks,
      key=key,
      samples=SAMPLES,
    )

  def _dimensions(self, estimator: Estimator) -> Callable:
    @jax.jit
    def measure(state, update):
      masks = overlap.dominant_masks(estimator, state, update)
      return overlap.dominant_size(estimator, masks, state, update).sum()

    return measure

  def _projected(self, estimator: Estimator) -> Callable:
    @jax.jit
    def measure(params, batch, state, key):
      project = diagnostics.projector(estimator, state)
      return self._energy(params, batch, project, key)

    return measure

  def run(self, seed: int, bar: tqdm) -> dict[str, Any]:
    begin = time.monotonic()
    measured = []
    for chunk in self.train(seed):
      bar.update()
      if chunk.step not in self.setting.steps:
        continue
      params, batch = chunk.params, self.batch
      key = jax.random.fold_in(jax.random.key(seed), chunk.step)
      top = self.top(params, batch)
      size = sum(self.blocks.sizes)
      found = []

      def add(source, name, energy, dominant, found=found, size=size):
        shares = {
          measure: {
            matrix: {
              'share': rounded(split.share[0]),
              'error': rounded(split.share_error[0]),
              'total': rounded(split.inside[0] + split.outside[0]),
            }
            for matrix, split in getattr(energy, measure).items()
          }
          for measure in energy._fields
        }
        of_space = {'dominant': dominant, 'chance': rounded(dominant / size)}
        found.append({'source': source, 'estimator': name} | of_space | shares)

      add(None, HESSIAN, self.by_basis(params, batch, top.basis, key), RANK)
      basis = self.mini_batch(params, chunk.batch)
      add(None, MINI_BATCH, self.by_basis(params, batch, basis, key), RANK)
      for source in self.setting.sources:
        history = chunk.history[source]
        last = jax.tree.map(lambda x: x[-1], history)
        for name, estimator in WATCHERS.items():
          state = self.learners[name](estimator.init(params), history)
          if name == GLOBAL_PCA:
            energy = self.by_basis(params, batch, state.basis, key)
          else:
            energy = self.by_projector[name](params, batch, state, key)
          add(source, name, energy, int(self.dominant[name](state, last)))
      measured.append(
        {
          'step': chunk.step,
          'loss': rounded(chunk.loss),
          'eigenvalues': rounded(top.eigenvalues[0]),
          'residuals': rounded(top.residuals[0]),
          'subspaces': found,
        }
      )
    return {'seconds': round(time.monotonic() - begin), 'measured': measured}


def run(data: Path, seeds: list[int], results: Path) -> None:
  """Trains and measures what has no result yet."""
  overlap.run_settings(NAME, SETTINGS, Meter, data, seeds, results)


# The table and the figure.

COLOURS = {HESSIAN: 'k', MINI_BATCH: '0.55'} | {
  name: f'C{i}' for i, name in enumerate(WATCHERS)
}
STYLES = {'gradients': '-', 'updates': '--'}


def shares(
  found: list[dict], source: str | None, name: str, matrix: str, measure: str = 'energy'
) -> np.ndarray:
  """The share inside at each step in each seed, `(steps, seeds)`."""
  return np.array(
    [
      [
        e[measure][matrix]['share']
        for e in measured['subspaces']
        if (e['source'], e['estimator']) == (source, name)
      ]
      for result in found
      for measured in result['measured']
    ]
  ).reshape(len(found), -1).T  # fmt: skip


def table(results: Path) -> str:
  """The share of the Gauss-Newton matrix's energy at the last step."""
  found = load(results / NAME, SETTINGS)
  share = lambda space: space['energy']['gauss_newton']['share']
  return overlap.tabulate(SETTINGS, found, 'subspaces', share)


def plot(results: Path, figures: Path) -> None:
  """A row for each matrix, a column for each base optimizer."""
  columns = load(results / NAME, SETTINGS)
  figure, axes = plt.subplots(
    len(MATRICES),
    len(columns),
    figsize=(4.2 * len(columns) + 0.6, 10),
    layout='constrained',
    sharex='col',
    sharey=True,
    squeeze=False,
  )
  for column, (name, found) in zip(axes.T, columns.items(), strict=True):
    setting = SETTINGS[name]
    steps = [m['step'] for m in found[0]['measured']]
    column[0].set_title(f'{setting.title}, seeds: {len(found)}')
    for ax, (matrix, title) in zip(column, MATRICES.items(), strict=True):
      for watched in (HESSIAN, MINI_BATCH):
        style = {'color': COLOURS[watched], 'label': watched}
        band(ax, steps, shares(found, None, watched, matrix), **style)
      for source in (s for s in setting.sources if s in STYLES):
        for watched in WATCHERS:
          style = {'color': COLOURS[watched], 'linestyle': STYLES[source]}
          style['label'] = watched if source == 'gradients' else None
          band(ax, steps, shares(found, source, watched, matrix), **style)
      # The largest is that of `kronecker`.
      chances = [
        max(e['chance'] for e in m['subspaces'] if e['source'] == 'gradients')
        for m in found[0]['measured']
      ]
      label = 'kronecker, by chance'
      ax.plot(steps, chances, ':', color=COLOURS['kronecker'], label=label)
      ax.set(xscale='log', ylim=(-0.02, 1.02))
      ax.set_xticks(steps, [str(step) for step in steps])
      ax.minorticks_off()
      if ax in axes[:, 0]:
        ax.set_ylabel(f'share of energy of the\n{title}')
    column[-1].set_xlabel('step')
  for source, style in STYLES.items():
    axes[0, 0].plot([], [], color='0.4', linestyle=style, label=f'learns from {source}')
  lines, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    lines, labels, loc='outside lower center', ncols=2, frameon=False, fontsize='small'
  )
  report.save(figure, figures / f'literature-{NAME}.png')
