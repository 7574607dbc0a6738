"""How speed-ups change with length and size, in docs/scaling.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
import statistics
from typing import NamedTuple

from benchmarks import drawing, report
from benchmarks.drawing import COLOURS, INK, plt
from benchmarks.store import Store, write_text
from benchmarks.tasks import OTHER_ROWS, OTHER_WIDTHS, TASKS

PAGE = 'scaling.md'
TUNED = 'adamw-tuned'
COMPARED = (  # over all lengths and sizes
  'adamw',
  TUNED,
  'muon',
  'muon-tuned',
  'soap',
  'soap-tuned',
  'soap-muon',
  'soap-muon-tuned',
  'bsfa',
)
LENGTHS = {
  'llama-wikitext2': (300, 1000, 1500, 3000),
  'llama-novels': (300, 1000, 1500, 3000),
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


def rows(x: int, of: report.Study) -> Iterable[list[str]]:
  for name in COMPARED:
    if rate := of.best_rate(name):
      scores = of.scores(name, rate).values()
      row = [f'{x:,}', name, f'{rate:g}', str(len(of.runs[name])), str(len(scores))]
      ups, over_muon, _ = report.gains(of, name, rate)
      over_tuned = report.factor(report.speed_ups(of, name, rate, TUNED))
      yield [*row, report.spread(scores), ups, over_tuned, over_muon]


def table(scale: Scale) -> str:
  head = [scale.label, 'contender', 'learning rate', 'rates tried', 'seeds']
  head += ['validation loss', 'speed-up in steps', f"in {TUNED}'s steps"]
  head += ["in Muon's steps"]
  lines = [row for x, of in scale.studies.items() for row in rows(x, of)]
  return report.markdown(head, lines)


def part(store: Store) -> str:
  """What stands between the lines of the page."""
  found = [*drawn(store), *elsewhere(store)]
  tables = [f'**{scale.title}**\n\n{table(scale)}' for scale in found]
  return '\n\n'.join(tables) or 'Not measured yet.'


def plot(found: list[Scale], path: Path) -> None:
  """Speed-ups in steps: means are lines; marks are seeds, as in `plot_speed_ups`."""
  figure, axes = plt.subplots(
    1, len(found), figsize=(3 * len(found) + 1, 3.6), layout='constrained',
    sharey=True, squeeze=False,
  )  # fmt: skip
  for one, scale in zip(axes[0], found, strict=True):
    for name in COMPARED[1:]:
      means = []
      for x, of in scale.studies.items():
        ups = report.speed_ups(of, name, of.best_rate(name))
        if ups and all(up.relation == '=' for up in ups):
          means.append((x, statistics.fmean(up.factor for up in ups)))
        for up in ups:
          if up.relation == '>' and up.factor <= 1:
            continue  # the reference has no run as long as this one: nothing is known
          one.plot(x, up.factor, report.MARKS[up.relation], color=COLOURS[name])
      if means:
        style = ':' if f'{name}-tuned' in COMPARED else '-'
        one.plot(*zip(*means, strict=True), style, color=COLOURS[name], label=name)
    one.axhline(1, color=INK, linewidth=0.8)
    title = next(iter(scale.studies.values())).name
    one.set(xscale='log', xlabel=scale.label, title=title)
    one.set_xticks(list(scale.studies), [f'{x:,}' for x in scale.studies])
    one.minorticks_off()
  axes[0, 0].set_ylabel("AdamW's steps over steps")
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right upper')
  drawing.save(figure, path)


def write(store: Store, docs: Path) -> None:
  """Brings the page and its figure up to date, if it is there."""
  page, scales = docs / PAGE, drawn(store)
  if scales:
    plot(scales, docs / 'figures' / 'scaling.svg')
  if page.exists():
    write_text(page, report.rewritten(page, 'scaling', part(store)))
