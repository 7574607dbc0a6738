"""What the runs are worth: the table, results.json and the figures."""

import json
import math
import os
from pathlib import Path
import statistics
import tempfile
from typing import Any, NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

LAST_STEPS = 50  # the final train loss is the mean over so many steps

Result = dict[str, Any]  # one run, as it stands in results.json


class Worth(NamedTuple):
  """Number of AdamW steps; relation is '=', or '<' or '>' where it is only a bound."""

  relation: str
  steps: float


def adamw_steps_worth(loss: float, reference: list[tuple[int, float]]) -> Worth | None:
  """How many steps tuned AdamW needs to end at this loss.

  Args:
    loss: final validation loss.
    reference: steps and final validation loss of AdamW runs, each with its own
      complete schedule. Between them the loss counts as linear in log(steps).
  """
  if not reference:
    return None
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


def summarize(result: Result) -> Result:
  """Adds what is derived from the curves of a finished run."""
  losses = result['losses']
  return result | {
    'train_loss': statistics.fmean(losses[-LAST_STEPS:]),
    'train_loss_steps': min(LAST_STEPS, len(losses)),
    'step_ms': 1e3 * statistics.median(result['step_seconds']),
  }


def add_worth(results: list[Result]) -> list[Result]:
  """Adds to each run how many AdamW steps its validation loss is worth."""
  reference = [
    (result['steps'], result['validation_loss'])
    for result in results
    if result['contender'] == 'adamw'
  ]
  rated = []
  for result in results:
    worth = adamw_steps_worth(result['validation_loss'], reference)
    if worth:
      result = result | {
        'worth_steps': worth.steps,
        'worth_relation': worth.relation,
        'speed_up': worth.steps / result['steps'],
      }
    rated.append(result)
  return rated


def table(results: list[Result]) -> str:
  """The contenders side by side; below them AdamW's runs of other lengths."""
  head = [
    '',
    'learning rate',
    'train loss',
    'valid. loss',
    'worth AdamW steps',
    'speed-up',
  ]
  rows = [[*head, 'ms/step', 'state bytes', '(a parameter)']]
  contenders = [result for result in results if result['horizon'] == 1]
  for result in contenders:
    worth, speed_up = '-', '-'
    if 'worth_steps' in result:
      sign = result['worth_relation'].replace('=', '')
      worth = f'{sign}{result["worth_steps"]:.0f}'
      speed_up = f'{sign}{result["speed_up"]:.2f}x'
    rows.append([
            result['contender'],
            f'{result["learning_rate"]:g}',
            f'{result["train_loss"]:.4f}',
            f'{result["validation_loss"]:.4f}',
            worth,
            speed_up,
            f'{result["step_ms"]:.1f}',
            f'{result["state_bytes"]:,}',
            f'{result["state_bytes_per_parameter"]:.1f}',
        ])  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      cell.ljust(width) if column == 0 else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  lines.insert(1, '-' * len(lines[0]))
  notes = [
    f'Each trained {contenders[0]["steps"]} steps. Train loss: mean over the last '
    f'{contenders[0]["train_loss_steps"]}. ms/step: median, without compilation.'
  ]
  longer = [
    f'{result["validation_loss"]:.4f} at {result["steps"]}'
    for result in sorted(results, key=lambda result: result['steps'])
    if result['contender'] == 'adamw'
  ]
  if longer:
    notes.append(
      f"AdamW's validation loss by its number of steps: {', '.join(longer)}."
    )
  return '\n'.join([*lines, '', *notes])


def _replace(path: Path, write) -> None:
  """Calls write(temporary path), then moves the file to its place in one go."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
  os.close(handle)
  try:
    write(temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def write_json(path: Path, content: Any) -> None:
  """Writes strict JSON: a loss which is not finite becomes null."""

  def finite(value):
    if isinstance(value, dict):
      return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

  text = json.dumps(finite(content), indent=1, allow_nan=False) + '\n'
  _replace(path, lambda temporary: Path(temporary).write_text(text, encoding='utf-8'))


def _save(figure: plt.Figure, path: Path) -> None:
  _replace(path, lambda temporary: figure.savefig(temporary, dpi=120))
  plt.close(figure)


def plot_losses(path: Path, results: list[Result]) -> None:
  """Smoothed train loss over steps and wall time; dots: final validation losses."""
  figure, (by_step, by_time) = plt.subplots(
    1, 2, figsize=(11, 4.5), sharey=True, layout='constrained'
  )
  colours = {
    name: f'C{i}'
    for i, name in enumerate(dict.fromkeys(r['contender'] for r in results))
  }
  lowest, highest = [], []
  for result in results:
    losses = np.array(result['losses'])
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode='valid')
    steps = np.arange(window, len(losses) + 1)
    seconds = np.interp(steps, *zip((0, 0.0), *result['seconds'], strict=True))
    first = result['horizon'] == 1
    style = {
      'color': colours[result['contender']],
      'alpha': 1.0 if first else 0.5,
      'linestyle': '-' if first else '--',
    }
    label = f'{result["contender"]}, {result["steps"]} steps'
    for axes, x in ((by_step, steps), (by_time, seconds)):
      axes.plot(x, smooth, label=label, **style)
      axes.plot(x[-1], result['validation_loss'], 'o', **style)
    lowest.append(min(smooth.min(), result['validation_loss']))
    highest.append(
      smooth[len(smooth) // 10]
    )  # the plunge at the start may leave the figure
  margin = 0.05 * (max(highest) - min(lowest))
  if 0 < margin < np.inf:  # neither a run that diverged nor a single point
    by_step.set_ylim(min(lowest) - margin, max(highest) + margin)
  by_step.set(xlabel='step', ylabel='loss in nats per byte', title='over steps')
  by_time.set(xlabel='seconds, without compilation', title='over wall time')
  by_step.legend(title='train (line), validation (dot)')
  _save(figure, path)


def plot_dominant_fraction(path: Path, result: Result) -> None:
  """Dominant fraction of the update over steps: mean over the blocks of each layer."""
  layers: dict[str, list[int]] = {}
  for index, name in enumerate(result['block_names']):
    parts = name.split('/')
    layer = f'layer {parts[1]}' if parts[0] == 'layers' and len(parts) > 1 else parts[0]
    layers.setdefault(layer, []).append(index)
  steps = [step for step, _ in result['dominant_fraction']]
  values = np.array([fractions for _, fractions in result['dominant_fraction']])
  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  for number, (layer, blocks) in enumerate(layers.items()):
    colour = plt.get_cmap('viridis')(number / max(1, len(layers) - 1))
    axes.plot(steps, values[:, blocks].mean(axis=1), color=colour, label=layer)
  axes.set(xlabel='step', ylabel='dominant fraction of the update', ylim=(0, 1))
  axes.legend(ncols=1 + len(layers) // 8)
  _save(figure, path)
