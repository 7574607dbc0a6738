"""The options of train_llama.py and its output folder; every error takes one line."""

import argparse
from collections.abc import Callable, Iterable, Sequence
import json
from pathlib import Path
import shutil
import tempfile
from typing import Any, NoReturn

from report import write_json

OUTPUTS = (
  'config.json',
  'results.json',
  'loss.png',
  'dominant_fraction.png',
  'checkpoints',
)


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors take one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f'{self.prog}: error: {message}\n')


def positive(kind: type) -> Callable[[str], Any]:
  """A type for argparse: a positive finite number of that kind."""

  def parse(value: str):
    try:
      number = kind(value)
    except ValueError:
      number = 0
    if not 0 < number < float('inf'):
      noun = 'integer' if kind is int else 'number'
      raise argparse.ArgumentTypeError(f'{value!r} is not a positive {noun}; give one')
    return number

  return parse


def seed(value: str) -> int:
  """A type for argparse: a whole number from 0."""
  if not value.isdecimal():
    raise argparse.ArgumentTypeError(
      f'{value!r} is not a whole number from 0; give one'
    )
  return int(value)


def learning_rate_spec(contenders: Sequence[str]) -> Callable[[str], tuple[str, float]]:
  """A type for argparse: CONTENDER=VALUE."""

  def parse(value: str) -> tuple[str, float]:
    contender, _, rate = value.partition('=')
    try:
      if contender in contenders:
        return contender, positive(float)(rate)
    except argparse.ArgumentTypeError:
      pass
    raise argparse.ArgumentTypeError(
      f'{value!r} is not CONTENDER=VALUE with a contender among '
      f'{", ".join(contenders)} and a positive number, such as bsfa=0.01'
    )

  return parse


def make_parser(
  description: str, presets: Iterable[str], contenders: Sequence[str]
) -> Parser:
  """The options of train_llama.py."""
  parser = Parser(
    description=description,
    allow_abbrev=False,
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  task = parser.add_argument_group('what to train')
  task.add_argument(
    '--preset',
    choices=list(presets),
    default='small',
    help='size of model, batch and job: toy for tests, small for two CPU cores, the '
    'others for accelerators (bfloat16 compute). Tokens are always bytes, also where '
    'the vocabulary has 50,304 entries as in the literature',
  )
  task.add_argument(
    '--data',
    nargs='+',
    metavar='FILE',
    help='UTF-8 text to train on, its last tenth for validation (default: the sources '
    "of Python's standard library)",
    default=argparse.SUPPRESS,
  )
  task.add_argument(
    '--contenders',
    nargs='+',
    choices=contenders,
    default=contenders,
    help='optimizers to train',
  )
  task.add_argument(
    '--steps',
    type=positive(int),
    default=argparse.SUPPRESS,
    help='training steps of each contender (default: set by --preset)',
  )
  task.add_argument(
    '--horizons',
    nargs='*',
    type=positive(float),
    metavar='X',
    default=[1.0, 1.5, 2.0, 2.5],
    help='AdamW is trained for each X times --steps, to say how many AdamW steps a '
    'loss is worth; give none to leave that out, for example in a sweep',
  )
  task.add_argument(
    '--learning-rate',
    action='append',
    type=learning_rate_spec(contenders),
    metavar='CONTENDER=VALUE',
    default=argparse.SUPPRESS,
    help='peak learning rate of one contender; repeat for others (default: see '
    'LEARNING_RATES in train_llama.py)',
  )
  task.add_argument(
    '--seed', type=seed, default=0, help='of initial weights and data order'
  )
  files = parser.add_argument_group('files')
  files.add_argument(
    '--output',
    type=Path,
    default=Path('runs/llama'),
    metavar='DIR',
    help='folder for results.json, the figures and the checkpoints',
  )
  files.add_argument(
    '--checkpoint-every',
    type=positive(int),
    default=250,
    metavar='N',
    help='steps between two checkpoints; Ctrl-C saves one too',
  )
  existing = files.add_mutually_exclusive_group()
  existing.add_argument(
    '--resume', action='store_true', help='continue the run in --output, bit for bit'
  )
  existing.add_argument(
    '--overwrite', action='store_true', help='delete the run in --output and start anew'
  )
  return parser


def prepare_output(parser: Parser, args: argparse.Namespace, config: dict) -> None:
  """Makes the output folder ready for this job, or ends with an error message."""
  output, path = args.output, args.output / 'config.json'
  if args.resume and not path.exists():
    parser.error(
      f'argument --resume: {output}: no run in this folder; leave out --resume'
    )
  try:
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
      pass
  except OSError as error:
    parser.error(
      f'argument --output: {output}: cannot be written to ({error.strerror}); give a '
      'folder which can'
    )
  if args.overwrite:
    for name in OUTPUTS:
      if (output / name).is_dir():
        shutil.rmtree(output / name)
      else:
        (output / name).unlink(missing_ok=True)
  if not path.exists():
    write_json(path, config)
  elif not args.resume:
    parser.error(
      f'argument --output: {output}: holds a run already; continue it with --resume, '
      'replace it with --overwrite, or give another folder'
    )
  else:
    previous = json.loads(path.read_text(encoding='utf-8'))
    for key, value in json.loads(json.dumps(config)).items():
      if previous.get(key) != value:
        parser.error(
          f'argument --resume: {output}: {key} was {previous.get(key)!r} and is '
          f'{value!r} now; give the same options as then, or another --output'
        )
