"""Pages of docs/tables/, figures and README's table, from the results alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
import math
from pathlib import Path
import statistics
from typing import NamedTuple

from benchmarks import drawing, runs
from benchmarks.contenders import CONTENDERS, VARIANTS
from benchmarks.drawing import COLOURS, INK, plt
from benchmarks.store import BadResults, Result, Results, Store, write_text
from benchmarks.tasks import STUDIED_APART, Task, TASKS

TABLES = 'tables'
SEEDS = 3  # fewer are reported as missing
LANDING = 'llama-wikitext2'  # the task of the front page's figure
# Contenders that are compared on some tasks alone, and not missed on the others.
ONLY_ON = dict.fromkeys(('bsfa-gradients', 'bsfa-metric'), ('llama-stdlib',))
ONLY_ON |= dict.fromkeys(
  (
    'kl-shampoo',
    'kl-soap',
    'asgo',
    'soap-muon',
    'normuon',
    'cosmos',
    'ademamix',
    'schedule-free',
    'adamw-tuned',
    'muon-tuned',
    'soap-tuned',
    'soap-muon-tuned',
  ),
  ('llama-wikitext2', 'llama-novels'),
)


class Study(NamedTuple):
  """The results of a task, sorted."""

  name: str
  task: Task
  steps: int  # of a run
  runs: dict[str, dict[float, dict[int, Result]]]  # contender, rate, seed
  lengths: dict[str, dict[int, list[Result]]]  # contender, seed; each at its best rate
  times: Results

  @property
  def contenders(self) -> list[str]:
    """Those with results, in the order of the table of contenders."""
    return [name for name in CONTENDERS if name in self.runs]

  def scores(self, contender: str, rate: float | None) -> dict[int, float]:
    found = self.runs.get(contender, {}).get(rate, {}) if rate else {}
    return {seed: runs.score(self.task, result) for seed, result in found.items()}

  def best_rate(self, contender: str) -> float | None:
    rates = self.runs.get(contender, {}).values()
    results = [r for seeds in rates for r in seeds.values()]
    return runs.best_rate(results, self.task, self.steps)

  def step_time(self, contender: str) -> float | None:
    """In units of AdamW's."""
    return self.times.get(contender, {}).get('times_adamw')

  def spread_of_times(self, contenders: Iterable[str]) -> str:
    """Quartiles over the rounds, which lie far apart on a busy machine; a line each."""
    return '\n'.join(
      'a step of {} {:.2f}, quartiles {:.2f}-{:.2f}'.format(
        name, self.times[name]['times_adamw'], *self.times[name]['quartiles']
      )
      for name in contenders
      if name != 'adamw'
    )


class SpeedUp(NamedTuple):
  """Steps of one contender over steps of another to the same loss, for one seed.

  `relation` is '=', or '<' or '>' where the runs of other lengths are all too long or
  too short.
  """

  relation: str
  factor: float

  def inverse(self) -> SpeedUp:
    flipped = {'<': '>', '>': '<'}.get(self.relation, '=')
    return SpeedUp(flipped, 1 / self.factor)


class Worth(NamedTuple):
  """A number of steps; relation is '=', or '<' or '>' where it is only a bound."""

  relation: str
  steps: float


def steps_worth(loss: float, reference: Iterable[tuple[int, float]]) -> Worth:
  """How many steps a reference needs to end at this loss.

  Args:
    loss: of which the worth is asked.
    reference: steps and final loss of at least one run, each with its own complete
      schedule. Between them the loss counts as linear in log(steps).
  """
  (steps, before), *longer = sorted(reference)
  if not loss <= before:  # not-a-number included
    return Worth('<', steps)
  if loss == before:
    return Worth('=', steps)
  for more_steps, after in longer:
    if after <= loss:
      share = (before - loss) / (before - after)
      return Worth('=', steps * (more_steps / steps) ** share)
    steps, before = more_steps, after
  return Worth('>', steps)


def study(
  name: str, results: Iterable[Result], times: Results, steps: int | None = None
) -> Study:
  """Sorts the results of a task, for runs of its own length unless told otherwise."""
  task = TASKS[name]
  steps = steps or task.steps
  own: dict = defaultdict(lambda: defaultdict(dict))
  by_length = defaultdict(list)
  for result in results:
    if result['steps'] == steps:
      rate, seed = result['learning_rate'], result['seed']
      own[result['contender']][rate][seed] = result
    if result['contender'] in runs.OF_OTHER_LENGTHS:
      by_length[result['contender'], result['steps']].append(result)
  lengths: dict = {contender: defaultdict(list) for contender in runs.OF_OTHER_LENGTHS}
  for (contender, length), found in by_length.items():
    best = runs.best_rate(found, task, length)
    for result in found:
      if result['learning_rate'] == best:
        lengths[contender][result['seed']].append(result)
  return Study(name, task, steps, own, lengths, times)


def speed_ups(
  of: Study, contender: str, rate: float | None, reference: str = 'adamw'
) -> list[SpeedUp]:
  """Steps the reference needs for the contender's final loss over the contender's.

  One for each seed that has runs of several lengths of the reference.
  """
  found = []
  for seed, loss in of.scores(contender, rate).items():
    longer = of.lengths[reference].get(seed, ())
    curve = [(r['steps'], runs.score(of.task, r)) for r in longer]
    if len(curve) > 1:
      worth = steps_worth(loss, curve)
      found.append(SpeedUp(worth.relation, worth.steps / of.steps))
  return found


def speed_ups_to_target(of: Study, contender: str) -> list[SpeedUp]:
  """AdamW's steps over those the contender needs for AdamW's final loss."""
  if contender == 'adamw' or contender not in of.lengths:
    return []
  worth = speed_ups(of, 'adamw', of.best_rate('adamw'), contender)
  return [speed_up.inverse() for speed_up in worth]


# Cells of tables.


def spread(values: Iterable[float], digits: int = 4) -> str:
  values = list(values)
  if not values:
    return '-'
  if not all(map(math.isfinite, values)):
    return 'diverged'
  mean = f'{statistics.fmean(values):.{digits}f}'
  return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def factor(values: list[SpeedUp], ratio: float = 1.0) -> str:
  """Mean and spread of speed-ups over seeds; the mean alone if any is only a bound."""
  if not values:
    return '-'
  factors = [value.factor / ratio for value in values]
  bounds = {value.relation for value in values} - {'='}
  if not bounds:
    return spread(factors, 2) + 'x'
  sign = bounds.pop() if len(bounds) == 1 else '~'
  return f'{sign}{statistics.fmean(factors):.2f}x'


def gains(of: Study, contender: str, rate: float | None) -> tuple[str, str, str]:
  """Speed-ups over AdamW in steps, over Muon in steps, over AdamW in time."""
  ups, ratio = speed_ups(of, contender, rate), of.step_time(contender)
  over_muon = factor(speed_ups(of, contender, rate, 'muon'))
  return factor(ups), over_muon, factor(ups, ratio) if ratio else '-'


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
  rows = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


# Tables.


def tuned_table(of: Study) -> str:
  """Everyone at their own best learning rate."""
  accurate = any(
    'accuracy' in result
    for rates in of.runs.values()
    for seeds in rates.values()
    for result in seeds.values()
  )
  head = ['contender', 'learning rate', label(of.task)]
  head += ['accuracy'] if accurate else []
  head += ['speed-up in steps', "to AdamW's loss", "in Muon's steps", 'time of a step']
  head += ['speed-up in time', 'state, B/param']
  rows = []
  for contender in of.contenders:
    rate = of.best_rate(contender)
    if rate is None:
      rows.append([contender, '-', 'diverged', *['-'] * (len(head) - 3)])
      continue
    seeds = of.runs[contender][rate]
    steps, over_muon, time = gains(of, contender, rate)
    ratio = of.step_time(contender)
    one = next(iter(seeds.values()))
    row = [contender, f'{rate:g}', spread(of.scores(contender, rate).values())]
    if accurate:
      row.append(spread(r['accuracy'] for r in seeds.values() if 'accuracy' in r))
    row += [
      steps,
      factor(speed_ups_to_target(of, contender)),
      over_muon,
      f'{ratio:.2f}x' if ratio else '-',
      time,
      f'{one["state_bytes"] / one["parameters"]:.1f}',
    ]
    rows.append(row)
  return markdown(head, rows)


def equal_rate_table(of: Study) -> str:
  """Everyone at AdamW's best learning rate."""
  rate = of.best_rate('adamw')
  rows = []
  for contender in of.contenders:
    scores = of.scores(contender, rate)
    if scores:
      ups = factor(speed_ups(of, contender, rate))
      rows.append([contender, spread(scores.values()), ups, str(len(scores))])
  return markdown(
    [f'contender, at {rate:g}', label(of.task), 'speed-up in steps', 'seeds'], rows
  )


def rates_table(studies: list[Study]) -> str:
  """AdamW and the default at AdamW's best rate, and at a lower one, at best a third."""
  rows = []
  for of in studies:
    best, own = of.best_rate('adamw'), of.best_rate('bsfa')
    if best is None or own is None:
      continue
    common = of.runs['adamw'].keys() & of.runs['bsfa'].keys()
    lower = [rate for rate in common if rate < best / math.sqrt(2)]
    third = min(lower, key=lambda rate: abs(math.log(3 * rate / best)), default=None)
    row = [f'`{of.name}`']
    for rate in (best, third):
      row.append(f'{rate:g}' if rate else '-')
      row += [spread(of.scores(name, rate).values()) for name in ('adamw', 'bsfa')]
    rows.append([*row, f'{own:g}'])
  head = ['task', "AdamW's best rate", '`adamw`', '`bsfa`', 'a lower one']
  return markdown([*head, '`adamw`', '`bsfa`', "BSFA's best rate"], rows)


def headline_table(studies: list[Study]) -> str:
  """Muon and BSFA on the tasks where AdamW has other lengths."""
  head = ['task', "Muon, to AdamW's loss", "**BSFA, to AdamW's loss**"]
  head += ['Muon, whole run', '**BSFA, whole run**', "in Muon's steps", 'in time']
  rows, absent = [], defaultdict(list)
  bold = lambda cell: cell if cell == '-' else f'**{cell}**'
  for of in studies:
    rates = {name: of.best_rate(name) for name in ('muon', 'bsfa')}
    if not any(speed_ups(of, name, rate) for name, rate in rates.items()):
      continue
    steps, over_muon, time = gains(of, 'bsfa', rates['bsfa'])
    of_muon, _, _ = gains(of, 'muon', rates['muon'])
    muon, bsfa = (factor(speed_ups_to_target(of, name)) for name in rates)
    of_both = [muon, bold(bsfa), of_muon, bold(steps)]
    rows.append([f'`{of.name}`', *of_both, over_muon, time])
    for name, rate in rates.items():
      if rate is None:
        absent[name].append(f'`{of.name}`')
  lacks = [f'No run of `{n}` yet on {", ".join(found)}.' for n, found in absent.items()]
  return '\n\n'.join([markdown(head, rows), *lacks])


def lengths_table(of: Study) -> str:
  """Runs of all lengths, which the speed-ups are measured with."""
  rows = []
  for contender, by_seed in of.lengths.items():
    by_steps: dict[tuple, list[float]] = defaultdict(list)
    for results in by_seed.values():
      for result in results:
        length = result['steps'], result['learning_rate']
        by_steps[length].append(runs.score(of.task, result))
    for (steps, rate), scores in sorted(by_steps.items()):
      row = [contender, str(steps), f'{rate:g}', spread(scores), str(len(scores))]
      rows.append(row)
  head = ['contender', 'steps', 'learning rate', label(of.task), 'seeds']
  return markdown(head, rows)


def sweep_table(of: Study) -> str:
  """Every learning rate that was tried."""
  rows = []
  for contender in of.contenders:
    best = of.best_rate(contender)
    for rate in sorted(of.runs[contender]):
      scores = of.scores(contender, rate)
      cell = f'**{rate:g}**' if rate == best else f'{rate:g}'
      rows.append([contender, cell, spread(scores.values()), str(len(scores))])
  return markdown(['contender', 'learning rate', label(of.task), 'seeds'], rows)


def label(task: Task) -> str:
  return task.measure.replace('_', ' ')


# Figures.


def draw_sweep(axes: plt.Axes, of: Study) -> None:
  """Final loss over the learning rate, mean over the seeds."""
  for contender in of.contenders:
    points = [
      (rate, statistics.fmean(scores))
      for rate in sorted(of.runs[contender])
      if all(map(math.isfinite, scores := list(of.scores(contender, rate).values())))
    ]
    if points:
      axes.plot(
        *zip(*points, strict=True), 'o-', color=COLOURS[contender], label=contender
      )
  axes.set(xscale='log', xlabel='learning rate', ylabel=label(of.task))
  low, high = axes.get_ylim()
  if high > 4 * max(low, 0):  # the differences are at the bottom
    axes.set_yscale('log')


def draw_curves(axes: plt.Axes, of: Study, contenders: list[str], timed: bool = False):
  """Training loss at the best rate, mean over the seeds, over steps or AdamW's time."""
  ends, starts = [], []
  for contender in contenders:
    rate = of.best_rate(contender)
    if rate is None:
      continue
    curves = [result['loss_curve'] for result in of.runs[contender][rate].values()]
    curves = [curve for curve in curves if None not in curve['losses']]
    if not curves:
      continue
    mean = [
      statistics.fmean(losses)
      for losses in zip(*(curve['losses'] for curve in curves), strict=False)
    ]
    each = curves[0]['every'] * (of.step_time(contender) or 1 if timed else 1)
    x = [each * (i + 0.5) for i in range(len(mean))]
    axes.plot(x, mean, color=COLOURS[contender], label=contender)
    ends.append(mean[-1])
    starts.append(mean[len(mean) // 10])
  if ends and max(starts) > min(ends):  # the plunge at the start may leave the figure
    margin = 0.05 * (max(starts) - min(ends))
    axes.set_ylim(min(ends) - margin, max(starts) + margin)
  axes.set_xlabel("time, in AdamW's steps" if timed else 'step')


def plot_task(of: Study, path: Path) -> None:
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout='constrained')
  draw_curves(left, of, of.contenders)
  left.set_ylabel('train loss')
  draw_sweep(right, of)
  figure.legend(*right.get_legend_handles_labels(), loc='outside right upper')
  figure.suptitle(of.task.title, fontsize='medium')
  drawing.save(figure, path)


def plot_landing(of: Study, path: Path) -> None:
  """Those that most people compare, over steps and, where measured, over time."""
  shown = [name for name in ('adamw', 'muon', 'soap', 'bsfa') if name in of.contenders]
  timed = all(of.step_time(name) for name in shown)
  figure, axes = plt.subplots(
    1, 1 + timed, figsize=(6.5, 3.2), layout='constrained', sharey=True, squeeze=False
  )
  for one, over_time in zip(axes[0], (False, True), strict=False):
    draw_curves(one, of, shown, over_time)
  if timed:
    note = of.spread_of_times(shown)
    axes[0, 1].set_xlabel(f"time, in AdamW's steps\n{note}", fontsize='small')
  axes[0, 0].set_ylabel('train loss')
  lines, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(lines, labels, loc='outside right upper')
  figure.suptitle(of.task.title, fontsize='medium')
  drawing.save(figure, path)


MARKS = {'=': '.', '<': 'v', '>': '^'}


def plot_speed_ups(studies: list[Study], path: Path) -> None:
  """Bars of the speed-up in steps; a dot is a seed, a triangle one with a bound."""
  rate = lambda of: of.best_rate('adamw')
  measured = [of for of in studies if rate(of) and speed_ups(of, 'adamw', rate(of))]
  studies = measured or studies
  columns = min(3, len(studies))
  rows = math.ceil(len(studies) / columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(2.8 * columns + 1, 3.8 * rows), layout='constrained',
    sharey=True, squeeze=False,
  )  # fmt: skip
  for one in axes.flat[len(studies) :]:
    one.remove()
  for one, of in zip(axes.flat, studies, strict=False):
    names = [name for name in of.contenders if of.best_rate(name) is not None]
    for position, name in enumerate(names):
      values = speed_ups(of, name, of.best_rate(name))
      if values:
        mean = statistics.fmean(value.factor for value in values)
        one.bar(position, mean, color=COLOURS[name], alpha=0.6)
      for value in values:
        one.plot(position, value.factor, MARKS[value.relation], color=INK, markersize=4)
    one.axhline(1, color=INK, linewidth=0.8)
    one.set_xticks(range(len(names)), names, rotation=90)
    one.set_title(of.name, fontsize='small')
  for one in axes[:, 0]:
    one.set_ylabel("AdamW's steps over steps")
  drawing.save(figure, path)


def plot_sensitivity(of: Study, path: Path) -> None:
  """Loss over one option of `bsfa` at a time; a ring marks the default.

  A default that is no number, such as a schedule, is on the right.
  """
  rate = of.best_rate('bsfa')
  default = of.runs['bsfa'][rate][0]
  settings = default['settings']['filter']
  curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
  for name, variant in VARIANTS.items():
    loss = of.scores(name, rate).get(0, math.inf)
    if math.isfinite(loss):
      curves[variant.option].append((variant.value, loss))
  figure, axes = plt.subplots(
    1, len(curves), figsize=(2.2 * len(curves) + 1, 3.2), layout='constrained',
    sharey=True, squeeze=False,
  )  # fmt: skip
  for one, (option, points) in zip(axes[0], curves.items(), strict=True):
    middle = (settings.get(option, math.inf), runs.score(of.task, default))
    points = sorted([*points, middle])
    named = [f'{value:g}' if value < math.inf else 'default' for value, _ in points]
    line = [loss for value, loss in points if value < math.inf]
    one.plot(line, '.-', color=COLOURS['bsfa'], label='bsfa')
    ring = {'color': COLOURS['bsfa'], 'ms': 10, 'fillstyle': 'none'}
    one.plot(points.index(middle), middle[1], 'o', **ring)
    for reference in runs.REFERENCES:
      best = of.best_rate(reference)
      if best is not None:
        loss = of.scores(reference, best)[0]
        one.axhline(loss, color=COLOURS[reference], linestyle='--', label=reference)
    one.set_xlabel(option)
    one.set_xticks(range(len(named)), named)
  axes[0, 0].set_ylabel(label(of.task))
  lines, labels = axes[0, -1].get_legend_handles_labels()
  figure.legend(lines, labels, loc='outside right upper')
  figure.suptitle(f'{of.task.title}, seed 0', fontsize='medium')
  drawing.save(figure, path)


# Pages.


def rewritten(page: Path, name: str, part: str) -> str:
  """A page's text with a part between its lines `<!-- name: begin -->` and `end`."""
  begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
  before, _, rest = page.read_text().partition(begin)
  _, found, after = rest.partition(end)
  if not found:
    raise BadResults(
      f'{page} has not the lines {begin} and {end}, between which a table belongs'
    )
  return f'{before}{begin}\n\n{part}\n\n{end}{after}'


def page(title: str, *parts: str) -> str:
  """The text of a generated page."""
  return '\n\n'.join([f'# {title}', *parts]) + '\n'


def write_pages(docs: Path, pages: dict[str, str]) -> None:
  for name, text in pages.items():
    write_text(docs / TABLES / f'{name}.md', text)


def missing(of: Study) -> list[str]:
  """What the tables lack, in words."""
  wanted = [name for name in CONTENDERS if of.name in ONLY_ON.get(name, TASKS)]
  absent = [name for name in wanted if name not in of.runs]
  lacks = [f'all runs of {", ".join(absent)}'] if absent else []
  for name in of.contenders:
    rate = of.best_rate(name)
    if rate is None:
      lacks.append(f'no run of {name} that did not diverge')
      continue
    count = len(of.runs[name][rate])
    if count < SEEDS:
      lacks.append(f'{SEEDS - count} of {SEEDS} seeds of {name} at {rate:g}')
    if rate in (min(of.runs[name]), max(of.runs[name])):
      lacks.append(f"{name}'s best rate, {rate:g}, is at the end of its grid")
    if name not in of.times:
      lacks.append(f'no time of {name}')
  for contender, by_seed in of.lengths.items():
    seeds = Counter(r['steps'] for results in by_seed.values() for r in results)
    del seeds[of.steps]
    if not seeds and contender in of.runs:
      lacks.append(f'runs of {contender} of other lengths, hence speed-ups')
    for steps, count in sorted(seeds.items()):
      if count < SEEDS:
        lacks.append(f'{SEEDS - count} of {SEEDS} seeds of {contender}, {steps} steps')
  return lacks


def has_variants(of: Study) -> bool:
  rate = of.best_rate('bsfa')
  tried = any(name in of.runs for name in VARIANTS)
  return tried and rate is not None and 0 in of.runs['bsfa'][rate]


def task_page(of: Study) -> str:
  parts = ['At the best learning rate of each:', tuned_table(of)]
  parts.append(f'![Loss over steps, and over learning rates](../figures/{of.name}.svg)')
  if of.best_rate('adamw') is not None:
    parts += [
      "At **equal** learning rate, AdamW's best, which says little about contenders\n"
      'that are best at another:',
      equal_rate_table(of),
      'Other lengths of training, which the speed-ups are measured with:',
      lengths_table(of),
    ]
  if has_variants(of):
    parts += [
      'BSFA with one option changed, at the rate that is best with the defaults\n'
      '(rings); dashed: the others at their best.',
      f'![Sensitivity](../figures/sensitivity-{of.name}.svg)',
    ]
  parts += ['All learning rates, that of the tables above in bold:', sweep_table(of)]
  return page(f'{of.name}: {of.task.title}, {of.steps} steps', *parts)


def reported() -> list[str]:
  """The tasks that have a page of their own."""
  return [name for name in TASKS if name not in STUDIED_APART]


def gaps(studies: list[Study]) -> list[str]:
  """What is not measured yet, task by task."""
  found = []
  for name in reported():
    lacks = next((missing(one) for one in studies if one.name == name), ['everything'])
    found += [f'{name}: {lack}' for lack in lacks]
  return found


def plot(studies: list[Study], figures: Path) -> None:
  for one in studies:
    plot_task(one, figures / f'{one.name}.svg')
    if has_variants(one):
      plot_sensitivity(one, figures / f'sensitivity-{one.name}.svg')
    if one.name == LANDING:
      plot_landing(one, figures / 'landing.svg')
  plot_speed_ups(studies, figures / 'speed-ups.svg')


def load(store: Store, names: Iterable[str] | None = None) -> list[Study]:
  """Of the tasks that have results, by default of those with a page of their own."""
  studies = [
    study(name, store.load(name).values(), store.times(name))
    for name in names or reported()
  ]
  return [one for one in studies if one.contenders]


def pages(studies: list[Study]) -> dict[str, str]:
  """The texts of the generated pages by name."""
  lacks = '\n'.join(f'- {gap}' for gap in gaps(studies))
  return {one.name: task_page(one) for one in studies} | {
    'headline': page('Speed-ups', headline_table(studies)),
    'rates': page(
      "At AdamW's learning rate",
      'Final loss at the rate that is best for AdamW, and at the one nearest to a\n'
      'third of it that both were trained with.',
      rates_table(studies),
    ),
    'missing': page('Not measured yet', lacks or 'Nothing.'),
  }


def write(store: Store, docs: Path) -> None:
  """Writes the pages of tasks, README's table and the figures.

  Says what is missing, there and on the screen. Writes nothing if there is no result.
  """
  studies = load(store)
  if not studies:
    return
  texts, readme = pages(studies), docs.parent / 'README.md'
  if readme.exists():
    of_readme = rewritten(readme, 'headline', headline_table(studies))
  for gap in gaps(studies):
    print(f'missing: {gap}')
  plot(studies, docs / 'figures')
  write_pages(docs, texts)
  if readme.exists():
    write_text(readme, of_readme)
