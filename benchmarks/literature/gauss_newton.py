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

from benchmarks import drawing, tasks
from benchmarks.drawing import INK
from benchmarks.literature import overlap
from benchmarks.literature.overlap import band, load, rounded, Setting
from benchmarks.literature.subspaces import (
  curvature_energy,
  curvature_watchers,
  dominant,
  Estimator,
  hessian_top_k,
  layout,
  learner,
  projector,
  top_hessian,
  unlearnt,
  WHOLE,
)
from benchmarks.store import Store
from benchmarks.tasks import Problem

NAME = 'gauss-newton'
RANK = 10  # the number of classes, as in the literature
SAMPLES = 16
HESSIAN, MINI_BATCH = 'Hessian, top 10', 'mini-batch Hessian, top 10'
GLOBAL_PCA = 'pca, whole model, rank 10'


def watchers(blocks: Any) -> dict[str, Estimator]:
  """Each has blocks of its own."""
  del blocks
  return curvature_watchers(GLOBAL_PCA, RANK)


_mlp = {'blocks': WHOLE, 'rank': RANK, 'batches': 10, 'watchers': watchers}
SETTINGS = {
  'mlp-sgd': overlap.SETTINGS['mlp-sgd']._replace(**_mlp),
  'mlp-adam': overlap.SETTINGS['mlp-adam']._replace(**_mlp),
}
MATRICES = {
  'hessian': 'Hessian',
  'gauss_newton': 'Gauss-Newton matrix',
  'functional': 'functional Hessian',
}


class Meter:
  """What a setting needs for its measurements, compiled once for all seeds."""

  def __init__(
    self,
    setting: Setting,
    problem: Problem,
    model: Callable[[Any], Any] = tasks.mlp,
  ):
    self.setting, self.model = setting, model
    self.train = overlap.chunks(problem, setting)
    self.blocks = layout(problem.init(0), **setting.blocks)
    self.batch = overlap.larger_batch(problem, setting.batches)
    self.watchers: dict[str, Estimator] = setting.watchers(setting.blocks)
    self.learners = {name: learner(e) for name, e in self.watchers.items()}
    lanczos, refresh = top_hessian(
      problem.loss, RANK, setting.blocks, iterations=4 * RANK
    )
    self.mini_batch = lambda params, batch: (
      refresh(unlearnt(lanczos, params), params, batch).memory.basis
    )
    self.top = jax.jit(
      lambda params, batch: hessian_top_k(
        lambda p: problem.loss(p, batch), params, RANK, self.blocks
      )
    )
    self.dominant = {name: self._dimensions(e) for name, e in self.watchers.items()}
    self.by_basis = jax.jit(self._energy)
    self.by_projector = {
      name: self._projected(estimator)
      for name, estimator in self.watchers.items()
      if name != GLOBAL_PCA
    }

  def _outputs(self, params: Any, batch: Any) -> jax.Array:
    """The network's outputs on the images of a batch."""
    _, module = tasks.functional(self.model)
    return module(params)(tasks.normalized(batch['images']))

  def _energy(self, params: Any, batch: Any, subspace: Any, key: jax.Array):
    return curvature_energy(
      lambda params: self._outputs(params, batch),
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
      _, sizes = dominant(estimator, state.memory, update)
      return sum(sizes.values())

    return measure

  def _projected(self, estimator: Estimator) -> Callable:
    @jax.jit
    def measure(params, batch, state, key):
      project = projector(estimator, state.memory)
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
        for name, estimator in self.watchers.items():
          state = self.learners[name](unlearnt(estimator, params), history)
          if name == GLOBAL_PCA:
            energy = self.by_basis(params, batch, state.memory.basis, key)
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


def run(
  data: Path,
  seeds: list[int],
  store: Store,
  settings: dict | None = None,
  make_meter: Callable[[Setting, Problem], Any] = Meter,
) -> None:
  """Trains and measures what has no result yet."""
  overlap.run_settings(NAME, settings or SETTINGS, make_meter, data, seeds, store)


# The table and the figure.

COLOURS = {HESSIAN: INK, MINI_BATCH: '#bbbbbb'} | {
  name: f'C{i}' for i, name in enumerate(watchers(None))
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


def table(store: Store) -> str:
  """The share of the Gauss-Newton matrix's energy at the last step."""
  found = load(store, NAME, SETTINGS)
  share = lambda space: space['energy']['gauss_newton']['share']
  return overlap.tabulate(SETTINGS, found, 'subspaces', share)


def plot(store: Store, figures: Path) -> None:
  """A row for each matrix, a column for each base optimizer."""
  columns = load(store, NAME, SETTINGS)
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
        for watched in watchers(None):
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
    axes[0, 0].plot([], [], color=INK, linestyle=style, label=f'learns from {source}')
  lines, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    lines, labels, loc='outside lower center', ncols=2, frameon=False, fontsize='small'
  )
  drawing.save(figure, figures / f'literature-{NAME}.svg')
