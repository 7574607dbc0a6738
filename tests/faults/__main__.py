"""Faults on purpose: kills, full disks, damaged files, bad updates, long runs.

Every result is saved at once; the same command goes on where it was stopped.
Example:
  python -m tests.faults --kills 1000 --flips 1000 --runs 10000 --soak 200000
"""

import argparse
import collections
import json
from pathlib import Path
import sys

from benchmarks.progress import Progress
from tests.faults import checkpoints, kills, soak, updates

LINES = 8  # of a long run
KINDS = {
  'kills': (kills.trials, 'kill a tiny training run so often, or fill its disk'),
  'flips': (checkpoints.trials, 'damage so many copies of a checkpoint'),
  'runs': (updates.trials, 'train so often with bad updates among the good ones'),
  'soak': (soak.trials, 'take so many steps with bsfa_adamw'),
}


def positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
  return value


def main():
  parser = argparse.ArgumentParser(
    prog='python -m tests.faults',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  for kind, (_, text) in KINDS.items():
    parser.add_argument(f'--{kind}', type=positive, metavar='N', help=text)
  parser.add_argument(
    '--results',
    type=Path,
    default=Path('runs/faults'),
    metavar='DIR',
    help='where results are saved (runs/faults)',
  )
  args = parser.parse_args()
  wanted = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
  if not wanted:
    parser.error('give at least one of ' + ', '.join(f'--{kind}' for kind in KINDS))
  failed = False
  try:
    args.results.mkdir(parents=True, exist_ok=True)
    for kind, count in wanted.items():
      failed |= attack(kind, count, args.results / f'{kind}-{count}.jsonl')
  except OSError as error:
    parser.error(f'{error.filename}: {error.strerror}; give another --results')
  except KeyboardInterrupt:
    print('stopped; the same command goes on', file=sys.stderr)
    sys.exit(130)
  sys.exit(failed)


def attack(kind: str, count: int, path: Path) -> bool:
  """Does what has no result yet, prints all results; whether anything was lost."""
  results = read(path)
  trials = KINDS[kind][0](count, results, path.parent / 'compiled')
  with Progress(kind, count, '') as bar, path.open('a') as file:
    bar.update(sum(result['count'] for result in results))
    for result in trials:
      file.write(json.dumps(result) + '\n')
      file.flush()
      results.append(result)
      bar.update(result['count'])
  lost = [result for result in results if result['lost']]
  tally = collections.Counter()
  for result in results:
    tally.update(result['tally'])
  total = sum(result['count'] for result in results)
  print(f'{kind}: {total}, lost: {sum(result["lost"] for result in lost)}')
  for name, number in sorted(tally.items()):
    print(f'  {number:8} {name}')
  lines = [result['line'] for result in results if 'line' in result]
  for line in lines[:: -max(1, len(lines) // LINES)][::-1]:
    print(f'  {line}')
  for result in lost:
    print(f'  LOST: {result["why"]}')
  return bool(lost)


def read(path: Path) -> list[dict]:
  """The results so far; a line that was cut by a kill is left out."""
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  whole = [line for line in lines if line.endswith('\n')]
  if whole != lines:
    path.write_text(''.join(whole))
  return [json.loads(line) for line in whole]


if __name__ == '__main__':
  main()
