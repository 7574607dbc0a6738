"""How speed-ups fade with the length of training, in docs/scaling.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
import statistics

from benchmarks import drawing, report
from benchmarks.contenders import CONTENDERS
from benchmarks.drawing import COLOURS, INK, plt
from benchmarks.store import Store, write_text

PAGE = 'scaling.md'
STUDIED = ('llama-wikitext2', 'llama-novels')
LENGTHS = (300, 1000, 3000, 10_000)
COMPARED = ('adamw', 'muon', 'soap', 'bsfa')  # trained at every length, if any are


def studies(
  store: Store, tasks: Sequence[str] = STUDIED, lengths: Sequence[int] = LENGTHS
) -> list[list[report.Study]]:
  """For each task one for each length that the default was trained for, if any."""
  found = []
  for task in tasks:
    results, times = store.load(task).values(), store.times(task)
    every = [report.study(task, results, times, steps) for steps in lengths]
    found.append([of for of in every if of.best_rate('bsfa')])
  return [each for each in found if each]


def compared(of: report.Study) -> list[str]:
  return [name for name in COMPARED if of.best_rate(name)]


def rows(of: report.Study) -> Iterable[list[str]]:
  for name in compared(of):
    rate = of.best_rate(name)
    scores = of.scores(name, rate).values()
    row = [
      f'{of.steps:,}',
      name,
      f'{rate:g}',
      str(len(of.runs[name])),
      str(len(scores)),
    ]
    yield [*row, report.spread(scores), *report.gains(of, name, rate)]


def table(found: list[report.Study]) -> str:
  head = ['steps', 'contender', 'learning rate', 'rates tried', 'seeds']
  head += [report.label(found[0].task), 'speed-up in steps']
  head += ["in Muon's steps", 'in time']
  return report.markdown(head, [row for of in found for row in rows(of)])


def part(found: list[list[report.Study]]) -> str:
  """What stands between the lines of the page."""
  texts = [f'**`{each[0].name}`**\n\n{table(each)}' for each in found]
  return '\n\n'.join(texts) or 'Not measured yet.'


def plot(every: list[list[report.Study]], path: Path) -> None:
  """Speed-ups in steps over the length of a run; dots are seeds."""
  figure, axes = plt.subplots(
    1, len(every), figsize=(3.4 * len(every) + 1, 3.4), layout='constrained',
    sharey=True, squeeze=False,
  )  # fmt: skip
  for one, found in zip(axes[0], every, strict=True):
    for name in [name for name in CONTENDERS if name in COMPARED[1:]]:
      ups = {
        of.steps: [x.factor for x in report.speed_ups(of, name, of.best_rate(name))]
        for of in found
      }
      means = [(steps, statistics.fmean(each)) for steps, each in ups.items() if each]
      if not means:
        continue
      one.plot(*zip(*means, strict=True), '-', color=COLOURS[name], label=name)
      dots = [(steps, x) for steps, each in ups.items() for x in each]
      one.plot(*zip(*dots, strict=True), '.', color=COLOURS[name])
    one.axhline(1, color=INK, linewidth=0.8)
    one.set(xscale='log', xlabel='steps', title=found[0].name)
    lengths = [of.steps for of in found]
    one.set_xticks(lengths, [f'{n:,}' for n in lengths], minor=False)
    one.minorticks_off()
  axes[0, 0].set_ylabel("AdamW's steps over steps")
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right upper')
  drawing.save(figure, path)


def write(store: Store, docs: Path) -> None:
  """Brings the page and its figure up to date, if it is there."""
  page, found = docs / PAGE, studies(store)
  if page.exists():
    if found:
      plot(found, docs / 'figures' / 'lengths.svg')
    write_text(page, report.rewritten(page, 'lengths', part(found)))
