"""Tasks x optimizers x seeds: trains what has no result yet, and reports.

A run is one contender on one task at one learning rate, seed and length. Its result is
a small JSON file in benchmarks/results/, written when the run is over; a run whose file
is there is not repeated, and Ctrl-C loses nothing that is finished. docs/benchmarks.md
says where the data sets come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import math
from pathlib import Path
import statistics
import sys

from tqdm import tqdm

from benchmarks import literature, report, runs
from benchmarks.contenders import CONTENDERS, UnknownPackage, VARIANTS
from benchmarks.progress import Progress
from benchmarks.tasks import MissingData, TASKS

DOCS = Path(__file__).parents[1] / 'docs'


def positive(text: str) -> float:
  value = float(text)
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f'must be a positive number, got {text}')
  return value


def positive_int(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
  return value


def seed(text: str) -> int:
  value = int(text)
  if value < 0:
    raise argparse.ArgumentTypeError(f'must be at least 0, got {text}')
  return value


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)

  def command(name: str, text: str) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=text, description=text)
    added.add_argument(
      '--results',
      type=Path,
      default=runs.RESULTS,
      metavar='DIR',
      help='folder of the results (benchmarks/results)',
    )
    return added

  def training(
    name: str, text: str, contenders: bool = True
  ) -> argparse.ArgumentParser:
    added = command(name, text)
    added.add_argument(
      '--task',
      nargs='+',
      choices=TASKS,
      required=True,
      metavar='TASK',
      help=', '.join(TASKS),
    )
    if contenders:
      added.add_argument(
        '--contender',
        nargs='+',
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar='NAME',
        help=f'{", ".join(CONTENDERS)} (all)',
      )
    added.add_argument(
      '--data',
      type=Path,
      default=Path('data'),
      metavar='DIR',
      help='folder of the data sets (data)',
    )
    return added

  def with_steps(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
    added.add_argument(
      '--steps',
      type=positive_int,
      metavar='N',
      help="length of a run, if not the task's own",
    )
    return added

  def with_seeds(added: argparse.ArgumentParser, default: list[int]) -> None:
    shown = ' '.join(map(str, default))
    added.add_argument(
      '--seed',
      nargs='+',
      type=seed,
      default=default,
      metavar='N',
      help=f'of the initial weights and the order of the data ({shown})',
    )

  run = with_steps(training('run', 'every combination of what is given'))
  run.add_argument(
    '--learning-rate', nargs='+', type=positive, required=True, metavar='RATE'
  )
  with_seeds(run, [0])

  tune = with_steps(
    training('tune', 'learning rate with seed 0: factors of 2, then of its root')
  )
  tune.add_argument(
    '--budget',
    type=positive_int,
    default=9,
    metavar='N',
    help='greatest number of rates to try for a contender (9)',
  )

  seeds = with_steps(
    training('seeds', 'the best learning rate so far with more seeds, and what follows')
  )
  with_seeds(seeds, [0, 1, 2])
  seeds.add_argument(
    '--horizons',
    nargs='*',
    type=positive,
    default=[0.35, 0.5, 0.75, 1.5, 2, 2.5, 3],
    metavar='X',
    help="other lengths of AdamW's and Muon's runs, and if below 1 of bsfa's, in units"
    ' of a run (0.35 0.5 0.75 1.5 2 2.5 3)',
  )

  training('sensitivity', "`bsfa` with one option changed, at bsfa's best rate", False)

  timing = training('time', 'time of a step, in turns; keep the machine quiet')
  timing.add_argument(
    '--rounds', type=positive_int, default=15, metavar='N', help='how many (15)'
  )
  timing.add_argument(
    '--steps-a-round',
    type=positive_int,
    metavar='N',
    help='how many (as many as make the rounds a whole run)',
  )

  reproducing = command('reproduce', 'the findings of docs/literature.md')
  reproducing.add_argument('name', nargs='+', choices=literature.REPRODUCTIONS)
  reproducing.add_argument(
    '--data', type=Path, default=Path('data'), help='folder of the data sets'
  )
  reproducing.add_argument('--seed', nargs='+', type=seed, default=[0, 1, 2])
  reproducing.add_argument(
    '--figures', type=Path, default=DOCS / 'figures', help='folder of the figures'
  )
  reproducing.set_defaults(results=runs.RESULTS / 'literature')

  reporting = command(
    'report',
    'tables and figures of docs/benchmarks.md, docs/literature.md and README.md',
  )
  reporting.add_argument(
    '--docs', type=Path, default=DOCS, metavar='DIR', help='folder of the pages (docs)'
  )
  return parser


def run(args: argparse.Namespace) -> None:
  laboratory = runs.Laboratory(args.results, args.data)
  for task in args.task:
    steps = args.steps or TASKS[task].steps
    for contender in args.contender:
      for rate in args.learning_rate:
        for number in args.seed:
          laboratory(runs.Run(task, contender, rate, steps, number))


def tune(args: argparse.Namespace) -> None:
  laboratory = runs.Laboratory(args.results, args.data)
  for name in args.task:
    task, steps = TASKS[name], args.steps or TASKS[name].steps
    for contender in args.contender:

      def score_at(rate, name=name, task=task, steps=steps, contender=contender):
        return runs.score(task, laboratory(runs.Run(name, contender, rate, steps, 0)))

      best = runs.search(CONTENDERS[contender].learning_rate, args.budget, score_at)
      tqdm.write(
        f'{name} {contender}: the best rate is {best:g}'
        if best
        else f'{name} {contender}: --budget {args.budget} is spent before the best rate'
        ' has worse neighbours on both sides; call again with a greater one'
      )


def ranked_rates(folder: Path, task: str, contender: str, steps: int) -> list[float]:
  own = [r for r in runs.load(folder, [task]) if r['contender'] == contender]
  return runs.ranked_rates(own, TASKS[task], steps)


def seeds(args: argparse.Namespace) -> None:
  """Also other lengths, everyone at AdamW's best rate, and AdamW at its second best."""
  laboratory = runs.Laboratory(args.results, args.data)
  for name in args.task:
    steps = args.steps or TASKS[name].steps
    for contender in args.contender:
      ranked = lambda of, n, name=name: ranked_rates(args.results, name, of, n)
      own, adamw = ranked(contender, steps), ranked('adamw', steps)
      if not own:
        tqdm.write(f'{name} {contender}: no run of {steps} steps yet; call tune first')
        continue
      for rate in own[:2] if contender == 'adamw' else [own[0], *adamw[:1]]:
        for number in args.seed:
          laboratory(runs.Run(name, contender, rate, steps, number))
      if contender not in runs.OF_OTHER_LENGTHS:
        continue
      own = ranked(contender, steps)  # with the seeds of now
      for horizon in args.horizons:
        if horizon < 1 or contender in runs.REFERENCES:
          length = max(1, round(horizon * steps))
          rate = (ranked(contender, length) or own)[0]
          for number in args.seed:
            laboratory(runs.Run(name, contender, rate, length, number))


def sensitivity(args: argparse.Namespace) -> None:
  laboratory = runs.Laboratory(args.results, args.data)
  for name in args.task:
    steps = TASKS[name].steps
    rates = ranked_rates(args.results, name, 'bsfa', steps)
    if not rates:
      tqdm.write(f'{name}: no run of bsfa of {steps} steps yet; call tune first')
      continue
    for variant in VARIANTS:
      laboratory(runs.Run(name, variant, rates[0], steps, 0))


def time(args: argparse.Namespace) -> None:
  """AdamW is always among the contenders: times are given in units of its."""
  laboratory = runs.Laboratory(args.results, args.data)
  for task in args.task:
    contenders = dict.fromkeys(['adamw', *args.contender])
    trainers = {name: laboratory.trainer(task, name) for name in contenders}
    steps = args.steps_a_round or math.ceil(TASKS[task].steps / args.rounds)
    with Progress(f'{task} times', args.rounds * len(trainers), 'turn') as bar:
      times = runs.step_times(trainers, args.rounds, steps, bar)
    runs.add_times(args.results, task, times)
    medians = [f'{c} {statistics.median(ms):.1f} ms' for c, ms in times.items()]
    tqdm.write(f'{task}: {", ".join(medians)}')


def reproduce(args: argparse.Namespace) -> None:
  for name in args.name:
    module = literature.REPRODUCTIONS[name]
    module.run(args.data, args.seed, args.results)
    module.plot(args.results, args.figures)


def main(argv: Sequence[str] | None = None) -> int:
  parser = make_parser()
  args = parser.parse_args(argv)
  actions = {
    'run': run,
    'tune': tune,
    'seeds': seeds,
    'sensitivity': sensitivity,
    'time': time,
    'reproduce': reproduce,
  }
  try:
    for name in getattr(args, 'contender', ()):  # before hours of training, not after
      CONTENDERS[name].direction(next(iter(TASKS.values())))
    if args.command == 'report':
      report.write(args.results, args.docs)
      literature.write(args.results / 'literature', args.docs)
    else:
      actions[args.command](args)
  except (MissingData, UnknownPackage) as error:
    parser.error(str(error))
  except KeyboardInterrupt:
    print('interrupted; the same command goes on with what is missing', file=sys.stderr)
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
