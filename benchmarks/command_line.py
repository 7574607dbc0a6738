"""The options of `python -m benchmarks`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
import textwrap

from benchmarks import literature
from benchmarks.contenders import CONTENDERS, FAMILY
from benchmarks.store import COLLECTED, RAW, ROOT
from benchmarks.tasks import TASKS

DOCS = ROOT / 'docs'


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


class Formatter(argparse.RawDescriptionHelpFormatter):
  """Names are not broken at their hyphens, nor examples at the end of a line."""

  def __init__(self, prog: str):
    super().__init__(prog, max_help_position=22)

  def _split_lines(self, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


class Commands:
  """Adds commands with what they have in common."""

  def __init__(self, parser: argparse.ArgumentParser):
    self._commands = parser.add_subparsers(
      dest='command', required=True, metavar='COMMAND', title='commands'
    )

  def add(
    self, name: str, text: str, example: str, required: str = ''
  ) -> argparse.ArgumentParser:
    command = self._commands.add_parser(
      name,
      help=text,
      description=f'{text[0].upper()}{text[1:]}.',
      epilog=f'example:\n  python -m benchmarks {name} {example}'.rstrip(),
      formatter_class=Formatter,
      usage=f'python -m benchmarks {name} {required}[options]',
    )
    command.add_argument(
      '--results',
      type=Path,
      metavar='DIR',
      help=f'folder of single results ({RAW.relative_to(ROOT)})',
    )
    command.add_argument(
      '--collected',
      type=Path,
      metavar='DIR',
      help=f'folder of the compact files ({COLLECTED.relative_to(ROOT)})',
    )
    return command

  def add_training(
    self, name: str, text: str, example: str, contenders: bool = True
  ) -> argparse.ArgumentParser:
    rates = '\n  --learning-rate RATE ... ' if name == 'run' else ''
    command = self.add(name, text, example, f'--task TASK ... {rates}')
    command.add_argument(
      '--task',
      nargs='+',
      choices=TASKS,
      required=True,
      metavar='TASK',
      help=', '.join(TASKS),
    )
    if contenders:
      command.add_argument(
        '--contender',
        nargs='+',
        choices=[*CONTENDERS, *FAMILY],
        default=list(CONTENDERS),
        metavar='NAME',
        help='as adamw, muon, soap or bsfa: docs/measuring.md has all'
        ' (all but those that save memory, as lora-6)',
      )
    add_data(command)
    return command


def add_data(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    '--data',
    type=Path,
    default=Path('data'),
    metavar='DIR',
    help='folder of the data sets (data)',
  )


def add_steps(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    '--steps',
    type=positive_int,
    metavar='N',
    help="length of a run, if not the task's own",
  )


def add_seeds(command: argparse.ArgumentParser, default: list[int]) -> None:
  command.add_argument(
    '--seed',
    nargs='+',
    type=seed,
    default=default,
    metavar='N',
    help=f'of initial weights and order of the data ({" ".join(map(str, default))})',
  )


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks',
    usage='python -m benchmarks COMMAND [options]',
    description='Tasks x optimizers x seeds: trains what has no result yet, and reports'
    '\nwhat was found. Ctrl-C loses nothing that is finished.',
    epilog='example:\n  python -m benchmarks tune --task masked-chain --contender bsfa',
    formatter_class=Formatter,
  )
  commands = Commands(parser)
  add_run(commands)
  add_tune(commands)
  add_others(commands)
  return parser


def add_run(commands: Commands) -> None:
  run = commands.add_training(
    'run',
    'train every combination of what is given',
    '--task masked-chain --learning-rate 0.008 0.016',
  )
  run.add_argument(
    '--learning-rate',
    nargs='+',
    type=positive,
    required=True,
    metavar='RATE',
    help='peak of the schedule',
  )
  add_seeds(run, [0])
  add_steps(run)
  run.add_argument(
    '--again', action='store_true', help='replace results that are there'
  )


def add_tune(commands: Commands) -> None:
  tune = commands.add_training(
    'tune',
    'find the learning rate with seed 0: by factors of 2, then of its root',
    '--task masked-chain --contender adamw bsfa',
  )
  add_steps(tune)
  tune.add_argument(
    '--budget',
    type=positive_int,
    default=9,
    metavar='N',
    help='greatest number of rates to try for a contender (9)',
  )
  seeds = commands.add_training(
    'seeds',
    'train the best learning rate so far with more seeds, and other lengths',
    '--task masked-chain --seed 0 1 2',
  )
  add_seeds(seeds, [0, 1, 2])
  add_steps(seeds)
  seeds.add_argument(
    '--horizons',
    nargs='*',
    type=positive,
    default=[0.35, 0.5, 0.75, 1.5, 2, 2.5, 3],
    metavar='X',
    help="other lengths of adamw's and muon's runs, and if below 1 of bsfa's, in units"
    ' of a run (0.35 0.5 0.75 1.5 2 2.5 3)',
  )


def add_others(commands: Commands) -> None:
  commands.add_training(
    'sensitivity',
    "train bsfa with one option changed, at bsfa's best rate",
    '--task llama-wikitext2',
    contenders=False,
  )
  timing = commands.add_training(
    'time',
    'measure the time of a step, in turns; keep the machine quiet',
    '--task masked-chain --contender muon bsfa',
  )
  timing.add_argument(
    '--rounds', type=positive_int, default=15, metavar='N', help='how many (15)'
  )
  timing.add_argument(
    '--steps-a-round',
    type=positive_int,
    metavar='N',
    help='how many (as many as make the rounds a whole run)',
  )
  costing = commands.add(
    'cost',
    'count operations, bytes and compile time on large shapes, and time updates',
    '--minutes 9',
  )
  costing.add_argument(
    '--minutes',
    type=positive,
    default=9,
    metavar='N',
    help='begin nothing after so many; the next call goes on (9)',
  )
  reproducing = commands.add(
    'reproduce',
    'measure the findings of docs/literature.md and draw their figures',
    'bulk-sgd --data data',
    'NAME ... ',
  )
  reproducing.add_argument(
    'name',
    nargs='+',
    choices=literature.REPRODUCTIONS,
    metavar='NAME',
    help=', '.join(literature.REPRODUCTIONS),
  )
  add_data(reproducing)
  add_seeds(reproducing, [0, 1, 2])
  reproducing.add_argument(
    '--figures',
    type=Path,
    default=DOCS / 'figures',
    metavar='DIR',
    help='folder of the figures (docs/figures)',
  )
  commands.add('collect', 'fold the single results into the compact files', '')
  reporting = commands.add(
    'report', 'write the tables and figures of docs/ and of README.md', ''
  )
  reporting.add_argument(
    '--docs', type=Path, default=DOCS, metavar='DIR', help='folder of the pages (docs)'
  )
