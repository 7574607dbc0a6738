"""How speed-ups change with length and size, in docs/scaling.md and README.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
import statistics
from typing import NamedTuple

from benchmarks import drawing, report
from benchmarks.drawing import COLOURS, INK, plt
from benchmarks.runs import REFERENCES
from benchmarks.store import Store, write_text
from benchmarks.tasks import OTHER_ROWS, OTHER_WIDTHS, TASKS

PAGE = 'scaling.md'
COMPARED = (  # over all lengths and sizes
  'adamw',
  'adamw-tuned',
  'muon',
  'muon-tuned',
  'soap',
  'soap-tuned',
  'soap-muon',
  'soap-muon-tuned',
  'bsfa',
)
LENGTHS = {
  'llama-wikitext2': (300, 1000, 1500, 3000, 10_000),
  'llama-novels': (300, 1000, 1500, 3000, 10_000),
}
ELSEWHERE = {
  'finetune-novels': (100,),
  'vit-mnist': (1600,),
  'cnn-mnist': (1600,),
}


class Scale(NamedTuple):
  """Studies that differ in one number, by that number."""

  title: str
  label: str
  studies: dict[int, report.Study]


def over_lengths(store: Store, task: str, lengths: Sequence[int]) -> Scale:
  results, times = store.load(task).values(), store.times(task)
  found = {steps: report.study(task, results, times, steps) for steps in lengths}
  return Scale(f'`{task}`, over the length of a run', 'steps', found)


def over_tasks(store: Store, title: str, label: str, tasks: dict[str, int]) -> Scale:
  """Tasks that differ in a number, in its order."""
  ascending = sorted(tasks, key=tasks.__getitem__)
  found = {tasks[of.name]: of for of in report.load(store, ascending)}
  return Scale(f'{title}, 300 steps', label, found)


def drawn(store: Store) -> list[Scale]:
  """Language models: longer, larger, and with more tokens a step."""
  longer = [over_lengths(store, *each) for each in LENGTHS.items()]
  widths = {'llama-novels': 96} | OTHER_WIDTHS
  wider = '`llama-novels` over the width, depth in proportion', 'width', widths
  rows = {'llama-novels-64': 32} | OTHER_ROWS
  tokens = {name: 64 * number for name, number in rows.items()}
  more = '`llama-novels-64` over the size of a batch', 'tokens a step', tokens
  return _measured([*longer, over_tasks(store, *wider), over_tasks(store, *more)])


def elsewhere(store: Store) -> list[Scale]:
  found = [over_lengths(store, *each) for each in ELSEWHERE.items()]
  titles = [f'`{task}`: {TASKS[task].title}' for task in ELSEWHERE]
  named = [one._replace(title=to) for one, to in zip(found, titles, strict=True)]
  return _measured(named, least=1)


def _measured(scales: Iterable[Scale], least: int = 2) -> list[Scale]:
  """With what the default was trained at, if that is at least so many studies."""
  own = lambda studies: {x: of for x, of in studies.items() if of.best_rate('bsfa')}
  every = [scale._replace(studies=own(scale.studies)) for scale in scales]
  return [scale for scale in every if len(scale.studies) >= least]


def speed_ups(of: report.Study, name: str, reference: str) -> list[report.SpeedUp]:
  """Those of `report.speed_ups`, but for seeds of which nothing is known.

  The reference's longest run is no longer than the contender's then, and ends higher.
  """
  found = report.speed_ups(of, name, of.best_rate(name), reference)
  return [up for up in found if up.relation != '>' or up.factor > 1]


IN_STEPS = [f"in {name}'s steps" for name in REFERENCES]


def in_steps(of: report.Study, name: str) -> list[str]:
  """The cells below `IN_STEPS`."""
  return [report.factor(speed_ups(of, name, reference)) for reference in REFERENCES]


def rows(x: int, of: report.Study) -> Iterable[list[str]]:
  for name in COMPARED:
    if rate := of.best_rate(name):
      scores = of.scores(name, rate).values()
      row = [f'{x:,}', name, f'{rate:g}', str(len(of.runs[name])), str(len(scores))]
      yield [*row, report.spread(scores), *in_steps(of, name)]


def table(scale: Scale) -> str:
  head = [scale.label, 'contender', 'learning rate', 'rates tried', 'seeds']
  head += ['validation loss', *IN_STEPS]
  lines = [row for x, of in scale.studies.items() for row in rows(x, of)]
  return report.markdown(head, lines)


def summary(found: list[Scale]) -> str:
  """What stands in README: BSFA at each length and size."""
  head = ['task', 'steps', *IN_STEPS, 'seeds']
  lines = {}  # a study may be in two scales
  for scale in found:
    for of in scale.studies.values():
      seeds = len(of.scores('bsfa', of.best_rate('bsfa')))
      row = [f'`{of.name}`', f'{of.steps:,}', *in_steps(of, 'bsfa'), str(seeds)]
      lines[of.name, of.steps] = row
  return report.markdown(head, lines.values()) if lines else 'Not measured yet.'


def part(found: list[Scale]) -> str:
  """What stands between the lines of the page."""
  tables = [f'**{scale.title}**\n\n{table(scale)}' for scale in found]
  return '\n\n'.join(tables) or 'Not measured yet.'


def plot(found: list[Scale], path: Path) -> None:
  """Speed-ups in steps, and below them the learning rates they were reached at."""
  figure, axes = plt.subplots(
    2, len(found), figsize=(3 * len(found) + 1, 5.6), layout='constrained',
    sharex='col', sharey='row', squeeze=False, height_ratios=(3, 2),
  )  # fmt: skip
  best = [best_rates(scale) for scale in found]
  for above, below, scale, known in zip(*axes, found, best, strict=True):
    plot_speed_ups(above, scale)
    plot_rates(below, known)
    above.set_title(min((of.name for of in scale.studies.values()), key=len))
    below.set(xscale='log', xlabel=scale.label, yscale='log')
    names = [f'{x:,}' for x in scale.studies]
    below.set_xticks(list(scale.studies), names, rotation=45, ha='right')
    below.minorticks_off()
  pairs = [pair for known in best for rates in known.values() for pair in rates]
  ticks = sorted({rate for _, rate in pairs})
  axes[1, 0].set_yticks(ticks, [f'{rate:g}' for rate in ticks])
  axes[0, 0].set_ylabel("AdamW's steps over steps")
  axes[1, 0].set_ylabel('best learning rate')
  named = {
    name: line
    for one in axes.flat
    for line, name in zip(*one.get_legend_handles_labels(), strict=True)
  }
  shown = [name for name in COMPARED if name in named]
  figure.legend([named[name] for name in shown], shown, loc='outside right upper')
  drawing.save(figure, path)


def style(name: str) -> str:
  return ':' if f'{name}-tuned' in COMPARED else '-'


def plot_speed_ups(axes: plt.Axes, scale: Scale) -> None:
  """Means are lines; marks are seeds, as in `report.plot_speed_ups`."""
  for name in COMPARED[1:]:
    means = []
    for x, of in scale.studies.items():
      ups = speed_ups(of, name, 'adamw')
      if ups and all(up.relation == '=' for up in ups):
        means.append((x, statistics.fmean(up.factor for up in ups)))
      for up in ups:
        axes.plot(x, up.factor, report.MARKS[up.relation], color=COLOURS[name])
    if means:
      axes.plot(*zip(*means, strict=True), style(name), color=COLOURS[name], label=name)
  axes.axhline(1, color=INK, linewidth=0.8)


BestRates = dict[str, list[tuple[int, float]]]


def best_rates(scale: Scale) -> BestRates:
  """By contender: lengths or sizes, and the best rate of at least two there."""
  found = {}
  for name in COMPARED:
    tried = {x: of for x, of in scale.studies.items() if len(of.runs.get(name, ())) > 1}
    rates = [(x, of.best_rate(name)) for x, of in tried.items()]
    if known := [(x, rate) for x, rate in rates if rate is not None]:
      found[name] = known
  return found


def plot_rates(axes: plt.Axes, best: BestRates) -> None:
  for name, known in best.items():
    line = f'.{style(name)}'
    axes.plot(*zip(*known, strict=True), line, color=COLOURS[name], label=name)


def write(store: Store, docs: Path) -> None:
  """Brings the figure up to date, and README and the page if they are there."""
  scales = drawn(store)
  of_page = part([*scales, *elsewhere(store)])
  texts = {docs.parent / 'README.md': summary(scales), docs / PAGE: of_page}
  found = {
    path: report.rewritten(path, 'scaling', text)
    for path, text in texts.items()
    if path.exists()
  }
  if scales:
    plot(scales, docs / 'figures' / 'scaling.svg')
  for path, text in found.items():
    write_text(path, text)
