"""Tasks x optimizers x seeds; see `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import math
from pathlib import Path
import statistics
import sys

from tqdm import tqdm

from benchmarks import cost, family, literature, report, runs, scaling, search
from benchmarks.command_line import make_parser
from benchmarks.contenders import FAMILY, find, UnknownPackage, VARIANTS
from benchmarks.progress import Progress
from benchmarks.runs import Run
from benchmarks.store import BadResults, COLLECTED, RAW, Store
from benchmarks.tasks import MissingData, TASKS


def collections() -> list[str]:
  return [
    *TASKS,
    cost.COLLECTION,
    *map(literature.collection, literature.REPRODUCTIONS),
  ]


def make_store(args: argparse.Namespace) -> Store:
  return Store(args.results or RAW, args.collected or COLLECTED)


def do(args: argparse.Namespace, store: Store, planned: Iterator[Run]) -> None:
  """Does runs, which may depend on the results of those before."""
  laboratory = runs.Laboratory(store, args.data, getattr(args, 'again', False))
  for run in planned:
    laboratory(run)


def run(args: argparse.Namespace, store: Store) -> None:
  planned = [
    Run(task, contender, rate, args.steps or TASKS[task].steps, number)
    for task in args.task
    for contender in args.contender
    for rate in args.learning_rate
    for number in args.seed
  ]
  print(f'run: {runs.Clock(store).describe(planned, args.again)}', flush=True)
  do(args, store, planned)


def tune(args: argparse.Namespace, store: Store) -> None:
  laboratory = runs.Laboratory(store, args.data)
  lengths = {name: args.steps or TASKS[name].steps for name in args.task}
  work = [
    (name, contender, args.budget * steps)
    for name, steps in lengths.items()
    for contender in args.contender
  ]
  print(
    f'tune: at most {args.budget} rates for each of {len(work)} contenders on'
    f' {len(lengths)} tasks, {sum(n for *_, n in work):,} steps:'
    f' {runs.Clock(store).estimate(work)}, less what has a result',
    flush=True,
  )
  for name, contender, _ in work:
    task, steps = TASKS[name], lengths[name]

    def score_at(rate, name=name, task=task, steps=steps, contender=contender):
      return runs.score(task, laboratory(Run(name, contender, rate, steps, 0)))

    best = search.best_rate(find(contender).learning_rate, args.budget, score_at)
    tqdm.write(
      f'{name} {contender}: the best rate is {best:g}'
      if best
      else f'{name} {contender}: --budget {args.budget} is spent before the best rate'
      ' has worse neighbours on both sides; call again with a greater one'
    )


def ranked_rates(store: Store, task: str, contender: str, steps: int) -> list[float]:
  own = [r for r in store.load(task).values() if r['contender'] == contender]
  return runs.ranked_rates(own, TASKS[task], steps)


def seed_runs(args: argparse.Namespace, store: Store) -> Iterator[Run]:
  """Also other lengths, all at AdamW's best rate, and AdamW at its second best.

  The family that saves memory is trained at its own best rate alone.
  Ranks by the results that are there when a run is asked for.
  """
  for name in args.task:
    steps = args.steps or TASKS[name].steps
    for contender in args.contender:
      ranked = lambda of, n, name=name: ranked_rates(store, name, of, n)
      own, adamw = ranked(contender, steps), ranked('adamw', steps)
      if not own:
        continue
      if contender == 'adamw':
        rates = own[:2]
      else:
        rates = own[:1] if contender in FAMILY else [own[0], *adamw[:1]]
      for rate in rates:
        for number in args.seed:
          yield Run(name, contender, rate, steps, number)
      if contender not in runs.OF_OTHER_LENGTHS:
        continue
      own = ranked(contender, steps)  # with the seeds of now
      for horizon in args.horizons:
        if horizon < 1 or contender in runs.REFERENCES:
          length = max(1, round(horizon * steps))
          rate = (ranked(contender, length) or own)[0]
          for number in args.seed:
            yield Run(name, contender, rate, length, number)


def seeds(args: argparse.Namespace, store: Store) -> None:
  for name in args.task:
    steps = args.steps or TASKS[name].steps
    for contender in args.contender:
      if not ranked_rates(store, name, contender, steps):
        print(f'{name} {contender}: no run of {steps} steps yet; call tune first')
  # Which rate is the best may change on the way.
  print(f'seeds: {runs.Clock(store).describe(seed_runs(args, store))}', flush=True)
  do(args, store, seed_runs(args, store))


def sensitivity(args: argparse.Namespace, store: Store) -> None:
  planned = []
  for name in args.task:
    steps = TASKS[name].steps
    rates = ranked_rates(store, name, 'bsfa', steps)
    if not rates:
      print(f'{name}: no run of bsfa of {steps} steps yet; call tune first')
      continue
    planned += [Run(name, variant, rates[0], steps, 0) for variant in VARIANTS]
  print(f'sensitivity: {runs.Clock(store).describe(planned)}', flush=True)
  do(args, store, planned)


def time(args: argparse.Namespace, store: Store) -> None:
  """AdamW is always among the contenders: times are given in units of its."""
  contenders = list(dict.fromkeys(['adamw', *args.contender]))
  lengths = {
    task: args.steps_a_round or math.ceil(TASKS[task].steps / args.rounds)
    for task in args.task
  }
  work = [(t, c, args.rounds * n) for t, n in lengths.items() for c in contenders]
  print(
    f'time: {args.rounds} rounds of {len(contenders)} contenders on {len(lengths)}'
    f' tasks, {sum(n for *_, n in work):,} steps: {runs.Clock(store).estimate(work)}',
    flush=True,
  )
  laboratory = runs.Laboratory(store, args.data)
  for task, steps in lengths.items():
    trainers = {name: laboratory.trainer(task, name) for name in contenders}
    with Progress(f'{task} times', args.rounds * len(trainers), 'turn') as bar:
      times = runs.step_times(trainers, args.rounds, steps, bar)
    store.add_times(task, runs.in_units_of_adamw(times))
    medians = [f'{c} {statistics.median(ms):.1f} ms' for c, ms in times.items()]
    tqdm.write(f'{task}: {", ".join(medians)}')


def measure_cost(args: argparse.Namespace, store: Store) -> None:
  for line in cost.measure(store, 60 * args.minutes):
    print(line, flush=True)


def reproduce(args: argparse.Namespace, store: Store) -> None:
  for name in args.name:
    print(f'reproduce {name}: {literature.describe(name, store)}', flush=True)
  for name in args.name:
    module = literature.REPRODUCTIONS[name]
    module.run(args.data, args.seed, store)
    module.plot(store, args.figures)


def collect(args: argparse.Namespace, store: Store) -> None:
  check_results('--results', store.raw, store.holds_raw(collections()))
  changed = store.collect(collections())
  for path in changed:
    print(f'written: {path}')
  if not changed:
    print(f'{store.collected} is up to date')


def write_report(args: argparse.Namespace, store: Store) -> None:
  raw, kept = store.holds_raw(collections()), store.holds_collected(collections())
  check_results('--results', store.raw, raw or (kept and not args.results))
  given = args.collected and not args.collected.is_dir()
  check_results('--collected', store.collected, kept or (raw and not given))
  if not args.docs.is_dir():
    raise BadResults(
      f'argument --docs: {args.docs}: no such folder; give the folder of the pages'
    )
  report.write(store, args.docs)
  literature.write(store, args.docs)
  cost.write(store, args.docs)
  family.write(store, args.docs)
  scaling.write(store, args.docs)


def check_results(option: str, folder: Path, found: bool) -> None:
  if not found:
    what = 'holds no results' if folder.is_dir() else 'no such folder'
    raise BadResults(
      f'argument {option}: {folder}: {what}; give a folder that has some, or make some:'
      ' python -m benchmarks tune --task masked-chain'
    )


ACTIONS = {
  'run': run,
  'tune': tune,
  'seeds': seeds,
  'sensitivity': sensitivity,
  'time': time,
  'cost': measure_cost,
  'reproduce': reproduce,
  'collect': collect,
  'report': write_report,
}


def main(argv: Sequence[str] | None = None) -> int:
  parser = make_parser()
  args = parser.parse_args(argv)
  store = make_store(args)
  try:
    # Before hours of training, not after.
    for name in getattr(args, 'contender', ()):
      find(name).direction(next(iter(TASKS.values())))
    if args.command not in ('collect', 'report'):
      store.check_writable()
    ACTIONS[args.command](args, store)
  except (BadResults, MissingData, UnknownPackage) as error:
    parser.exit(2, f'python -m benchmarks {args.command}: error: {error}\n')
  except OSError as error:  # a folder of tables or figures
    parser.exit(1, f'python -m benchmarks {args.command}: error: {error}\n')
  except KeyboardInterrupt:
    print('interrupted; the same command goes on with what is missing', file=sys.stderr)
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
