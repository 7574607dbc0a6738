"""How much of the true Hessian's top space each estimator finds, along training.

One run trains a model by its base optimizer alone; nothing is filtered. All estimators
watch the same run. At some steps the top space of each block's Hessian is computed on a
larger batch, and the overlap of each estimator's dominant space with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import drawing, report, tasks
from benchmarks.drawing import INK
from benchmarks.literature import common
from benchmarks.literature.subspaces import (
  DECAYS,
  dominant,
  Estimator,
  hessian_top_k,
  HIDDEN,
  last_layer,
  layout,
  learner,
  overlap_watchers,
  RANKS,
  subspace_overlap,
  top_hessian,
  unlearnt,
  Watcher,
  WINDOWS,
)
from benchmarks.llama import Llama, next_token_loss, PRESETS
from benchmarks.progress import Progress
from benchmarks.store import Result, Store
from benchmarks.tasks import Problem
from benchmarks.text import training_batch
from benchmarks.training import Trainer

NAME = 'overlap'
HESSIAN_BATCHES = 1_000_000  # `step` of the batches for the Hessian: never trained on
MINI_BATCH_HESSIAN = 'mini-batch Hessian'
SOURCES = ('updates', 'gradients', 'gradients in the metric')


class Setting(NamedTuple):
  """A model and its base optimizer.

  Attributes:
    title: for the figure.
    build: folder of the data sets to the problem.
    optimizer: the base optimizer.
    b2: decay of its second moment; None for SGD, whose updates and gradients span the
      same space and whose metric is that of the parameters.
    steps: where to measure, multiples of `chunk`.
    batches: batches of the problem that the Hessian is taken over.
    blocks: options of estimators and of a layout that say what a block is.
    rank: top eigenvectors of each block's Hessian.
    chunk: steps between two looks, a multiple of every window and refresh interval.
    watchers: blocks to the estimators that watch, by name.
  """

  title: str
  build: Callable[[Path], Problem]
  optimizer: optax.GradientTransformation
  b2: float | None
  steps: tuple[int, ...]
  batches: int
  blocks: dict[str, Any] = HIDDEN
  rank: int = 8
  chunk: int = 64
  watchers: Callable[[Any], dict[str, Any]] = overlap_watchers

  @property
  def sources(self) -> tuple[str, ...]:
    return SOURCES if self.b2 else ('gradients',)


def small_llama(folder: Path) -> Problem:
  """A LLaMA of 2 layers and width 64 on bytes of the novels."""
  config = PRESETS['small'].model._replace(width=64, layers=2, feedforward=172)
  rows, context = 32, 32
  text = tasks.read_bytes('novels', folder)
  init, module = tasks.functional(lambda rngs: Llama(config, rngs=rngs))
  return Problem(
    init,
    lambda params, batch: next_token_loss(module(params), batch),
    lambda seed, step: training_batch(text.train, rows, context, seed, step),
    lambda params: {},
    {
      'model': config._asdict(),
      'rows': rows,
      'context': context,
      'text': text.fingerprint(),
    },
  )


mlp = tasks.TASKS['mlp-mnist5k'].build
SETTINGS = {
  'mlp-sgd': Setting(
    'MLP, SGD', mlp, optax.sgd(0.1), None, (64, 128, 256, 512, 1024), 20
  ),
  'mlp-adam': Setting(
    'MLP, Adam', mlp, optax.adam(1e-3), 0.999, (64, 128, 256, 512), 20
  ),
  'llama-adam': Setting(
    'LLaMA, Adam',
    small_llama,
    optax.adam(optax.schedules.warmup_constant_schedule(0.0, 3e-3, 50), b2=0.95),
    0.95,
    (64, 192, 448),
    4,
    {'leaves': last_layer},
  ),
}


class Chunk(NamedTuple):
  """The state of a run after `step` steps, and what it saw in the last chunk."""

  step: int
  params: Any
  history: dict[str, Any]  # of each source a stack (steps, *shape) for each leaf
  batch: Any  # the last one
  loss: float  # mean over the chunk


class Recorded(NamedTuple):
  """State of a base optimizer, and what it saw last by source."""

  base: Any
  metric: Any
  seen: dict[str, Any]


def recording(setting: Setting) -> optax.GradientTransformation:
  """The base optimizer, which keeps what estimators may learn from."""
  # As `bsfa_optax.accelerate` makes them.
  metric = optax.scale_by_adam(b1=0.0, b2=setting.b2 or 0.999)

  def init(params):
    seen = {name: jax.tree.map(jnp.zeros_like, params) for name in setting.sources}
    return Recorded(setting.optimizer.init(params), metric.init(params), seen)

  def update(gradients, state, params=None):
    updates, base = setting.optimizer.update(gradients, state.base, params)
    scaled, of_metric = metric.update(gradients, state.metric)
    seen = dict(zip(SOURCES, (updates, gradients, scaled), strict=True))
    kept = {name: seen[name] for name in setting.sources}
    return updates, Recorded(base, of_metric, kept)

  return optax.GradientTransformation(init, update)


def chunks(problem: Problem, setting: Setting) -> Callable[[int], Iterator[Chunk]]:
  """Seed to a run of the base optimizer, chunk by chunk."""
  optimizer = recording(setting)
  trainer = Trainer(problem, lambda options: optimizer)

  def step(carry, batch):
    carry, loss = trainer.traced_step(carry, batch, {})
    _, state = carry
    return carry, (loss, state.seen)

  chunk = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))

  def train(seed):
    carry = trainer.start(seed, {})
    for start in range(0, max(setting.steps), setting.chunk):
      drawn = [problem.batch(seed, start + i) for i in range(setting.chunk)]
      stacked = jax.tree.map(lambda *x: np.stack(x), *drawn)
      carry, (losses, history) = chunk(carry, stacked)
      end, loss = start + setting.chunk, float(losses.mean())
      yield Chunk(end, carry[0], history, drawn[-1], loss)

  return train


def larger_batch(problem: Problem, batches: int) -> Any:
  """A batch for the Hessian, the same for all seeds and steps."""
  drawn = [problem.batch(0, HESSIAN_BATCHES + i) for i in range(batches)]
  return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *drawn)


def rounded(x: Any, digits: int = 5) -> Any:
  """As nested lists of numbers with so many significant digits."""
  if np.ndim(x):
    return [rounded(y, digits) for y in np.asarray(x)]
  return float(f'{float(x):.{digits}g}')


class Meter:
  """What a setting needs for its measurements, compiled once for all seeds."""

  def __init__(self, setting: Setting, problem: Problem):
    self.setting, self.problem = setting, problem
    self.train = chunks(problem, setting)
    self.blocks = layout(problem.init(0), **setting.blocks)
    self.batch = larger_batch(problem, setting.batches)
    self.watchers: dict[str, Watcher] = setting.watchers(setting.blocks)
    self.learners = {name: learner(w.estimator) for name, w in self.watchers.items()}
    self.compare = {
      name: self._comparison(w.estimator) for name, w in self.watchers.items()
    }
    self.lanczos, self.refresh = top_hessian(problem.loss, setting.rank, setting.blocks)
    self.compare[MINI_BATCH_HESSIAN] = self._comparison(self.lanczos)
    self.top = jax.jit(
      lambda params, batch: hessian_top_k(
        lambda p: problem.loss(p, batch), params, setting.rank, self.blocks
      )
    )

  def _comparison(self, estimator: Estimator) -> Callable:
    """Jitted: overlap and dimensions of the dominant space of each block."""

    @jax.jit
    def compare(state, update, basis):
      project, sizes = dominant(estimator, state.memory, update)
      overlap = subspace_overlap(basis, project, self.blocks)
      return overlap, jnp.stack([sizes[name] for name in self.blocks.names])

    def entry(state, update, basis):
      overlap, size = compare(state, update, basis)
      return {'overlap': rounded(overlap), 'dominant': size.tolist()}

    return entry

  def run(self, seed: int, bar: tqdm) -> dict[str, Any]:
    begin, setting = time.monotonic(), self.setting
    params = self.problem.init(seed)
    states = {
      (source, name): unlearnt(w.estimator, params)
      for source in setting.sources
      for name, w in self.watchers.items()
      if not w.recent
    }
    curvature = unlearnt(self.lanczos, params)
    measured = []
    for chunk in self.train(seed):
      for source, name in states:
        states[source, name] = self.learners[name](
          states[source, name], chunk.history[source]
        )
      curvature = self.refresh(curvature, chunk.params, chunk.batch)
      bar.update()
      if chunk.step not in setting.steps:
        continue
      top = self.top(chunk.params, self.batch)
      entry = self.compare[MINI_BATCH_HESSIAN](curvature, params, top.basis)
      found = [{'source': None, 'estimator': MINI_BATCH_HESSIAN} | entry]
      for source in setting.sources:
        for name, w in self.watchers.items():
          history = chunk.history[source]
          if w.recent:
            state = self.learners[name](unlearnt(w.estimator, params), history)
          else:
            state = states[source, name]
          last = jax.tree.map(lambda x: x[-1], history)
          entry = self.compare[name](state, last, top.basis)
          found.append({'source': source, 'estimator': name} | entry)
      measured.append(
        {
          'step': chunk.step,
          'loss': rounded(chunk.loss),
          'eigenvalues': rounded(top.eigenvalues),
          'residuals': rounded(top.residuals),
          'overlaps': found,
        }
      )
    return {
      'blocks': self.blocks.names,
      'sizes': self.blocks.sizes,
      'seconds': round(time.monotonic() - begin),
      'measured': measured,
    }


def run(
  data: Path, seeds: list[int], store: Store, settings: dict | None = None
) -> None:
  """Trains and measures what has no result yet."""
  run_settings(NAME, settings or SETTINGS, Meter, data, seeds, store)


def run_settings(
  name: str,
  settings: dict[str, Setting],
  make_meter: Callable[[Setting, Problem], Any],
  data: Path,
  seeds: list[int],
  store: Store,
) -> None:
  """Each setting with each seed that has no result yet; saved one by one."""
  collection = common.collection(name)
  there = store.load(collection)
  for key, setting in settings.items():
    missing = [seed for seed in seeds if f'{key}-{seed}' not in there]
    if not missing:
      continue
    problem = setting.build(data)
    meter = make_meter(setting, problem)
    total = len(missing) * max(setting.steps) // setting.chunk
    with Progress(f'{name} {key}', total, 'chunk') as bar:
      for seed in missing:
        header = {'setting': key, 'seed': seed, 'problem': problem.config}
        store.once(
          collection,
          f'{key}-{seed}',
          lambda header=header, meter=meter, seed=seed: header | meter.run(seed, bar),
        )


# The table and the figure.

COLOURS = dict(zip(SOURCES, ('C0', 'C1', 'C2'), strict=True))
REST = ('kronecker', 'dct')
ALONG = {'window 64, rank 8': '-', 'kronecker': '-.'}
band = functools.partial(common.band, marker='o', markersize=4)


def load(
  store: Store, name: str, settings: dict[str, Setting]
) -> dict[str, list[Result]]:
  """The results of all seeds of the settings that have any."""
  results = store.load(common.collection(name)).values()
  found = {key: [r for r in results if r['setting'] == key] for key in settings}
  return {key: of for key, of in found.items() if of}


def picked(
  found: list[dict], source: str | None, estimator: str, index: int = -1
) -> tuple[np.ndarray, float]:
  """Overlap in each seed at a measurement, and the chance level: means over blocks."""
  overlaps, chances = [], []
  for result in found:
    (entry,) = (
      e
      for e in result['measured'][index]['overlaps']
      if (e['source'], e['estimator']) == (source, estimator)
    )
    overlaps.append(np.mean(entry['overlap']))
    chances.append(np.mean(np.array(entry['dominant']) / np.array(result['sizes'])))
  return np.array(overlaps), float(np.mean(chances))


def tabulate(
  settings: dict[str, Setting],
  found: dict[str, list[dict]],
  key: str,
  share: Callable[[dict], float],
) -> str:
  """The last measurements, with a column for each setting and source.

  What learns from no source, as a Hessian does, is in the column of gradients.

  Args:
    settings: by name.
    found: the results of all seeds by name of the setting.
    key: the spaces in a measurement, a row each.
    share: the number that is shown of a space.
  """
  head, columns = ['space'], []
  for name, results in found.items():
    setting = settings[name]
    for source in setting.sources:
      several = len(setting.sources) > 1
      head.append(f'{setting.title}: {source}' if several else setting.title)
      column: dict[str, list[float]] = {}
      for result in results:
        for space in result['measured'][-1][key]:
          if (space['source'] or 'gradients') == source:
            column.setdefault(space['estimator'], []).append(share(space))
      columns.append(column)
  names = dict.fromkeys(name for column in columns for name in column)
  cell = lambda values: report.spread(values, 2) if values else ''
  rows = [[name, *(cell(column.get(name)) for column in columns)] for name in names]
  return report.markdown(head, rows)


def table(store: Store) -> str:
  """The overlap at the last step, mean over blocks."""
  found = load(store, NAME, SETTINGS)
  overlap = lambda space: statistics.fmean(space['overlap'])
  return tabulate(SETTINGS, found, 'overlaps', overlap)


def plot(store: Store, figures: Path) -> None:
  """A column for each setting, a row for each question."""
  columns = load(store, NAME, SETTINGS)
  figure, axes = plt.subplots(
    5,
    len(columns),
    figsize=(3.3 * len(columns) + 0.6, 13.5),
    layout='constrained',
    sharey=True,
    squeeze=False,
  )
  for ax, (name, found) in zip(axes.T, columns.items(), strict=True):
    _plot_column(ax, SETTINGS[name], found)
  for ax in axes[:, 0]:
    ax.set_ylabel("overlap with Hessian's top 8")
  axes[0, 0].set_ylim(-0.02, 1.02)
  handles = {}
  for ax in axes.flat:
    lines, labels = ax.get_legend_handles_labels()
    handles |= dict(zip(labels, lines, strict=True))
  figure.legend(
    handles.values(),
    handles.keys(),
    loc='outside lower center',
    ncols=2,
    frameon=False,
    fontsize='small',
  )
  drawing.save(figure, figures / f'literature-{NAME}.svg')


def _plot_column(axes: Any, setting: Setting, found: list[dict]) -> None:
  by_window, by_decay, by_rank, others, along = axes
  last = found[0]['measured'][-1]['step']
  seeds = 'seed' if len(found) == 1 else 'seeds'
  by_window.set_title(
    f'{setting.title}, step {last}, {len(found)} {seeds}', fontsize=10
  )
  sweeps = (
    (by_window, 'window, rank 8', WINDOWS, 'window {}, rank 8'),
    (by_decay, 'decay, rank 16', DECAYS, 'decay {:g}, rank 16'),
    (by_rank, 'rank, decay 0.95', RANKS, 'decay 0.95, rank {}'),
  )
  bound, _ = picked(found, None, MINI_BATCH_HESSIAN)
  for ax, label, values, form in sweeps:
    x = range(len(values))
    for source in setting.sources:
      overlaps = [picked(found, source, form.format(v))[0] for v in values]
      band(ax, x, overlaps, color=COLOURS[source], label=_source_label(source))
    chances = [picked(found, source, form.format(v))[1] for v in values]
    ax.plot(x, chances, ':', color=INK, label='by chance')
    ax.axhline(bound.mean(), color=INK, linestyle='--', label='mini-batch Hessian')
    ax.set_xticks(x, [f'{v:g}' for v in values])
    ax.set_xlabel(label)
  for i, name in enumerate(REST):
    for j, source in enumerate(setting.sources):
      overlaps, chance = picked(found, source, name)
      place = i + 0.25 * (j - (len(setting.sources) - 1) / 2)
      others.bar(place, overlaps.mean(), 0.2, color=COLOURS[source], alpha=0.6)
      others.plot([place] * len(overlaps), overlaps, '.', color=INK, markersize=4)
      others.plot([place - 0.11, place + 0.11], [chance] * 2, ':', color=INK)
  others.axhline(bound.mean(), color=INK, linestyle='--')
  others.set_xticks(range(len(REST)), REST)
  steps = [m['step'] for m in found[0]['measured']]
  for source in setting.sources:
    for name, style in ALONG.items():
      overlaps = [picked(found, source, name, i)[0] for i in range(len(steps))]
      band(along, steps, overlaps, color=COLOURS[source], linestyle=style)
  overlaps = [picked(found, None, MINI_BATCH_HESSIAN, i)[0] for i in range(len(steps))]
  band(along, steps, overlaps, color=INK, linestyle='--')
  for name, style in ALONG.items():
    along.plot([], [], color=INK, linestyle=style, label=f'along training: {name}')
  along.set(xscale='log', xlabel='step')
  along.set_xticks(steps, [str(step) for step in steps])
  along.minorticks_off()


def _source_label(source: str) -> str:
  return {
    'updates': "the optimizer's updates",
    'gradients': 'gradients (of SGD also the updates)',
    'gradients in the metric': "gradients in Adam's metric",
  }[source]
