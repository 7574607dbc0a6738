"""The table of methods that save memory, in docs/low_rank.md, from the results alone.

A method's runs may differ in the learning rate and in the length of a round: the best
of both is in the table. `-bsfa` methods have runs of other lengths too, as ends of a
curve that says after how many steps they are as good as with Adam.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
import math
from pathlib import Path
import statistics
import textwrap
from typing import NamedTuple

from benchmarks import report, runs
from benchmarks.contenders import FAMILY, find
from benchmarks.store import Result, Store, write_text
from benchmarks.tasks import TASKS

PAGE = 'low_rank.md'
STUDIED = ('llama-wikitext2', 'llama-novels')
STEPS = 1500
FULL = ('adamw', 'muon', 'bsfa')
BASELINES = ('lora-6', 'relora-6', 'galore-6')  # the best of them counts
TRIED = 3  # at least, of rates and of rounds


class Setting(NamedTuple):
  """Runs that differ in nothing but the seed."""

  round: int | None
  rate: float
  scores: dict[int, float]  # by seed
  result: Result

  @property
  def loss(self) -> float:
    return statistics.fmean(self.scores.values())


def round_of(contender: str) -> int | None:
  parts = find(contender).parts
  return parts.round if parts else None


def method_of(contender: str) -> str:
  """The contender's name but for the length of its rounds."""
  return contender.removesuffix(f'-{round_of(contender)}')


METHODS = list(dict.fromkeys(map(method_of, (*FULL, *FAMILY))))


class Study(NamedTuple):
  """All settings of each method on a task, the best first: most seeds, least mean."""

  task: str
  settings: dict[str, list[Setting]]
  curves: dict[tuple[str, int], dict[int, float]]  # contender, seed; steps, loss

  def best(self, method: str) -> Setting | None:
    return next(iter(self.settings.get(method, ())), None)

  @property
  def baseline(self) -> float:
    losses = [best.loss for name in BASELINES if (best := self.best(name))]
    return min(losses, default=math.nan)

  def closed(self, method: str) -> str:
    """How much of the way from the best baseline to AdamW at full rank."""
    full, own = self.best('adamw'), self.best(method)
    if method in FULL or not own or not full or not full.loss < self.baseline:
      return '-'
    return f'{(self.baseline - own.loss) / (self.baseline - full.loss):.0%}'

  def over_adam(self, method: str) -> str:
    """Steps with Adam over those with BSFA in its place, to the loss with Adam."""
    plain, own = self.best(method.removesuffix('-bsfa')), self.best(method)
    if not method.endswith('-bsfa') or not plain or not own:
      return '-'
    found = []
    for seed, loss in plain.scores.items():
      curve = self.curves[own.result['contender'], seed]
      if len(curve) > 1:
        worth = report.steps_worth(loss, curve.items())
        found.append(report.SpeedUp(worth.relation, worth.steps / STEPS).inverse())
    return report.factor(found)


def study(store: Store, task: str) -> Study:
  groups = defaultdict(list)
  curves: dict = defaultdict(dict)
  for result in store.load(task).values():
    contender, steps = result['contender'], result['steps']
    if contender not in (*FULL, *FAMILY):
      continue
    if steps == STEPS:
      groups[contender, result['learning_rate']].append(result)
    curve, loss = curves[contender, result['seed']], runs.score(TASKS[task], result)
    curve[steps] = min(loss, curve.get(steps, loss))
  settings = defaultdict(list)
  for (contender, rate), results in groups.items():
    scores = {x['seed']: runs.score(TASKS[task], x) for x in results}
    setting = Setting(round_of(contender), rate, scores, results[0])
    settings[method_of(contender)].append(setting)
  for found in settings.values():
    found.sort(key=lambda one: (math.isinf(one.loss), -len(one.scores), one.loss))
  return Study(task, settings, curves)


def table(of: Study) -> str:
  head = ['method', 'learning rate', 'round', report.label(TASKS[of.task])]
  head += ['trained parameters', 'state, bytes', 'distance closed', 'over Adam']
  rows = []
  for method in METHODS:
    if best := of.best(method):
      sizes = [f'{best.result[key]:,}' for key in ('parameters', 'state_bytes')]
      row = [f'`{method}`', f'{best.rate:g}', str(best.round or '-')]
      row += [report.spread(best.scores.values()), *sizes]
      rows.append([*row, of.closed(method), of.over_adam(method)])
  return report.markdown(head, rows)


def missing(of: Study) -> Iterator[str]:
  """What the table lacks, in words."""
  absent = [name for name in METHODS if name not in of.settings]
  if absent:
    yield f'all runs of {", ".join(absent)}'
  for method, settings in of.settings.items():
    best = settings[0]
    if len(best.scores) < report.SEEDS:
      yield f'{report.SEEDS - len(best.scores)} of {report.SEEDS} seeds of {method}'
    rates = {one.rate for one in settings if one.round == best.round}
    rounds = {one.round for one in settings if one.round}
    for what, value, tried in ('rate', best.rate, rates), ('round', best.round, rounds):
      if value and (len(tried) < TRIED or value in (min(tried), max(tried))):
        yield f'a longer and a shorter {what} of {method} than {value:g}'


def part(store: Store) -> str:
  """What stands between the lines of the page."""
  texts = []
  for name in STUDIED:
    of = study(store, name)
    texts.append(f'**`{name}`**')
    if of.settings:
      texts.append(table(of))
    wrapped = [textwrap.fill(f'- {x}', 88, subsequent_indent='  ') for x in missing(of)]
    if wrapped:
      texts.append('\n'.join(['Not measured yet:\n', *wrapped]))
  return '\n\n'.join(texts)


def write(store: Store, docs: Path) -> None:
  """Brings the page up to date, if it is there."""
  page = docs / PAGE
  if page.exists():
    write_text(page, report.rewritten(page, 'benchmark', part(store)))
