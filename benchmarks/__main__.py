"""Learning-rate sweeps of the language-model example, and their report.

Every run is `examples/train_llama.py` with one contender, one learning rate and one
seed, in a process of its own. Its result is a small JSON file in benchmarks/results/,
and a run whose file is there is not repeated.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
FIGURES = ROOT / 'docs' / 'figures'
EXAMPLE = ROOT / 'examples' / 'train_llama.py'
KEPT = (
  'contender',
  'learning_rate',
  'steps',
  'train_loss',
  'validation_loss',
  'step_ms',
  'parameters',
  'state_bytes',
)

Result = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  defaults = argparse.ArgumentDefaultsHelpFormatter
  sweep = commands.add_parser(
    'sweep', help='train every combination that has no result', formatter_class=defaults
  )
  sweep.add_argument('--contenders', nargs='+', default=['adamw', 'bsfa', 'muon'])
  sweep.add_argument('--learning-rates', nargs='+', type=float, required=True)
  sweep.add_argument('--seeds', nargs='+', type=int, default=[0])
  sweep.add_argument('--steps', type=int, default=300)
  sweep.add_argument(
    '--data', nargs='+', metavar='FILE', help='text to train on (default: the example)'
  )
  sweep.add_argument(
    '--data-name', default='stdlib', help='what the report calls the text'
  )
  report = commands.add_parser('report', help='tables (Markdown) and figures')
  report.add_argument(
    '--figures', type=Path, default=FIGURES, help='folder of the figures'
  )
  return parser.parse_args()


def run(contender: str, rate: float, seed: int, args: argparse.Namespace) -> Result:
  """One training run in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, str(EXAMPLE), '--contenders', contender, '--horizons']
    command += ['--learning-rate', f'{contender}={rate}', '--seed', str(seed)]
    command += ['--steps', str(args.steps), '--output', folder, '--overwrite']
    if args.data:
      command += ['--data', *args.data]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      raise SystemExit(f'{" ".join(command)}\n{done.stderr}')
    content = json.loads((Path(folder) / 'results.json').read_text())
  (result,) = content['runs']
  losses = result['losses']
  return {
    'task': args.data_name,
    'text': content['config']['text_fingerprint'],
    'preset': content['config']['preset'],
    'seed': seed,
    **{key: result[key] for key in KEPT},
    'loss_every_10_steps': [
      round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)
    ],
    'versions': content['versions'],
    'machine': content['machine'],
  }


def sweep(args: argparse.Namespace) -> None:
  """Trains what is missing; each result is saved as soon as it is there."""
  RESULTS.mkdir(exist_ok=True)
  plan = [
    (c, r, s) for s in args.seeds for c in args.contenders for r in args.learning_rates
  ]
  for contender, rate, seed in tqdm(plan, unit='run', disable=None):
    name = f'{args.data_name}-{args.steps}-{contender}-{rate:g}-{seed}'
    path = RESULTS / f'{name}.json'
    if path.exists():
      continue
    result = run(contender, rate, seed, args)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(result, indent=1) + '\n')
    temporary.replace(path)
    tqdm.write(f'{name}: {spread([result["validation_loss"]])}')


def load() -> dict[tuple[str, int, str], dict[float, list[Result]]]:
  """Results by (task, steps, contender), then by learning rate."""
  groups: dict = collections.defaultdict(lambda: collections.defaultdict(list))
  for path in sorted(RESULTS.glob('*.json')):
    result = json.loads(path.read_text())
    key = result['task'], result['steps'], result['contender']
    groups[key][result['learning_rate']].append(result)
  return groups


def spread(values: list[float | None]) -> str:
  if None in values:
    return 'diverged'
  mean = statistics.fmean(values)
  return (
    f'{mean:.4f} ± {statistics.stdev(values):.4f}' if len(values) > 1 else f'{mean:.4f}'
  )


def report(args: argparse.Namespace) -> None:
  """Prints the tables and draws validation loss against learning rate."""
  groups = load()
  args.figures.mkdir(parents=True, exist_ok=True)
  for task, steps in sorted({key[:2] for key in groups}):
    print(f'\n### {task}, {steps} steps\n')
    print('| contender | learning rate | train loss | validation loss | seeds |')
    print('|---|---|---|---|---|')
    figure, axes = plt.subplots(figsize=(6.5, 4), layout='constrained')
    contenders = sorted(key[2] for key in groups if key[:2] == (task, steps))
    for contender in contenders:
      rates = groups[task, steps, contender]
      points = []
      for rate, results in sorted(rates.items()):
        train, valid = (
          [r[key] for r in results] for key in ('train_loss', 'validation_loss')
        )
        cells = contender, f'{rate:g}', spread(train), spread(valid), str(len(valid))
        print(f'| {" | ".join(cells)} |')
        if None not in valid:
          points.append((rate, statistics.fmean(valid)))
      if points:  # none where every run diverged
        axes.plot(*zip(*points, strict=True), 'o-', label=contender)
    axes.set(xscale='log', xlabel='learning rate', ylabel='validation loss')
    axes.set_title(f'{task}, {steps} steps')
    axes.legend()
    figure.savefig(args.figures / f'sweep-{task}-{steps}.png', dpi=120)
    plt.close(figure)


def main() -> None:
  args = parse_arguments()
  {'sweep': sweep, 'report': report}[args.command](args)


if __name__ == '__main__':
  main()
