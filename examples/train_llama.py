"""Trains a small LLaMA-style model with AdamW, with BSFA + AdamW and with Muon.

All start from the same weights and see the same data in the same order. AdamW is also
trained longer, to say how many AdamW steps the final loss of each contender is worth.
"""

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import platform
import shlex
import sys
import time
from typing import Any, NamedTuple

from checkpoints import Checkpoints, fingerprint, StopSignals
from command_line import make_parser, Parser, prepare_output
from flax import nnx
import jax
import jax.numpy as jnp
from llama import Llama, LlamaConfig, next_token_loss
import numpy as np
import optax
import orbax.checkpoint as ocp
import report
from text import read_files, standard_library, Text, training_batch, validation_batches
from tqdm import tqdm

import bsfa_optax


class Preset(NamedTuple):
  """A model and how much it sees in a step."""

  model: LlamaConfig
  context: int
  rows: int  # sequences a step
  steps: int
  warmup: int
  validation_batches: int
  splits: int = 1  # parts in which a step's rows go through the model, to fit in memory


PRESETS = {
  'toy': Preset(
    LlamaConfig(vocabulary=256, width=16, layers=1, heads=2, feedforward=32),
    context=16,
    rows=4,
    steps=6,
    warmup=2,
    validation_batches=2,
  ),
  'small': Preset(
    LlamaConfig(vocabulary=256, width=96, layers=3, heads=4, feedforward=256),
    context=64,
    rows=32,
    steps=300,
    warmup=30,
    validation_batches=64,
  ),
  'llama-72m': Preset(
    LlamaConfig(
      50_304, width=410, layers=16, heads=10, feedforward=1036, dtype='bfloat16'
    ),
    context=150,
    rows=240,
    steps=50_000,
    warmup=500,
    validation_batches=64,
  ),
  'llama-134m': Preset(
    LlamaConfig(
      50_304, width=768, layers=6, heads=12, feedforward=3072, dtype='bfloat16'
    ),
    context=1024,
    rows=480,
    steps=50_000,
    warmup=500,
    validation_batches=64,
    splits=16,
  ),
}

# Peak learning rates. Those of `small` are the best of a sweep for each contender. For
# the larger presets AdamW's is the literature's; the others await a sweep of their own.
LEARNING_RATES = {
  'toy': {'adamw': 1e-2, 'bsfa': 1e-2, 'muon': 1e-2},
  'small': {'adamw': 8e-3, 'bsfa': 3.2e-2, 'muon': 2e-2},
  'llama-72m': {'adamw': 6e-4, 'bsfa': 6e-4, 'muon': 6e-4},
  'llama-134m': {'adamw': 6e-4, 'bsfa': 6e-4, 'muon': 6e-4},
}
CONTENDERS = tuple(LEARNING_RATES['small'])

READ_EVERY = 10  # steps between two looks at the losses: each look waits for the device


def in_layer(path: tuple, leaf: jax.Array) -> bool:
  """Whether Muon and BSFA take the leaf: the layers' matrices, as Muon's authors do."""
  return path[0].key == 'layers' and leaf.ndim == 2


def muon_matrices(params: Any) -> Any:
  """Tells Muon the matrices to orthogonalise; AdamW takes the rest."""
  matrix = optax.contrib.MuonDimensionNumbers()
  return jax.tree.map_with_path(
    lambda path, leaf: matrix if in_layer(path, leaf) else None, params
  )


def bsfa_blocks(params: Any) -> Any:
  """Tells BSFA the matrices to filter: their names, None for the rest."""
  return jax.tree.map_with_path(
    lambda path, leaf: (
      jax.tree_util.keystr(path, simple=True, separator='/')
      if in_layer(path, leaf)
      else None
    ),
    params,
  )


def make_optimizer(
  contender: str, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
  """The contenders, alike in everything but the method."""
  if contender == 'adamw':
    optimizer = optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1)
  elif contender == 'bsfa':
    optimizer = bsfa_optax.bsfa_adamw(
      learning_rate,
      b1=0.9,
      b2=0.95,
      weight_decay=0.1,
      estimator=bsfa_optax.kronecker(blocks=bsfa_blocks),
    )
  else:
    optimizer = optax.contrib.muon(
      learning_rate,
      weight_decay=0.1,
      adam_b1=0.9,
      adam_b2=0.95,
      adam_weight_decay=0.1,
      muon_weight_dimension_numbers=muon_matrices,
      consistent_rms=0.2,  # the size of AdamW's, so that one learning rate fits both
    )
  return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


class Run(NamedTuple):
  """One training run of the job."""

  contender: str
  horizon: float  # in units of the job's number of steps
  steps: int
  learning_rate: float

  @property
  def name(self) -> str:
    return f'{self.contender}-{self.steps}'


class Interrupted(Exception):
  """The user asked to stop, and what was trained so far is saved."""


class Trainer:
  """Trains one run after the other on the same text, from the same initial weights."""

  def __init__(
    self, preset: Preset, text: Text, seed: int, output: Path, checkpoint_every: int
  ):
    self.preset = preset
    self.text = text
    self.seed = seed
    self.output = output
    self.checkpoint_every = checkpoint_every
    self.stop = StopSignals()
    self._graph = nnx.graphdef(nnx.eval_shape(self._model))
    self._validation = validation_batches(
      text.validation,
      preset.rows // preset.splits,
      preset.context,
      preset.validation_batches,
    )
    self._evaluate = jax.jit(
      lambda params, batches: jax.lax.map(
        lambda rows: self._loss(params, rows), batches
      )
    )

  def _model(self) -> Llama:
    return Llama(self.preset.model, rngs=nnx.Rngs(self.seed))

  def _loss(self, params: Any, batch: jax.Array) -> jax.Array:
    return next_token_loss(nnx.merge(self._graph, params), batch)

  def _make_step(self, optimizer: optax.GradientTransformation) -> Callable:
    def step(params, opt_state, batch):
      # batch: (splits, rows, context + 1); the gradient is the mean over the splits.
      def add(total, rows):
        part = jax.value_and_grad(self._loss)(params, rows)
        return jax.tree.map(jnp.add, total, part), None

      first = jax.value_and_grad(self._loss)(params, batch[0])
      total, _ = jax.lax.scan(add, first, batch[1:])
      loss, gradient = jax.tree.map(lambda x: x / len(batch), total)
      updates, opt_state = optimizer.update(gradient, opt_state, params)
      params = optax.apply_updates(params, updates)
      fraction = optax.tree.get(opt_state, 'dominant_fraction')  # None without BSFA
      return params, opt_state, (loss, fraction)

    return jax.jit(step, donate_argnums=(0, 1))

  def _batch(self, step: int) -> np.ndarray:
    preset = self.preset
    batch = training_batch(
      self.text.train, preset.rows, preset.context, self.seed, step
    )
    return batch.reshape(preset.splits, -1, preset.context + 1)

  def train(self, run: Run) -> report.Result:
    """Trains a run to its end, from its last checkpoint if it has one."""
    checkpoints = Checkpoints(self.output / 'checkpoints' / run.name)
    try:
      record = checkpoints.record()
      if record is None or record['step'] < run.steps:
        record = self._train(run, record, checkpoints)
    finally:
      checkpoints.close()
    return report.summarize(record | run._asdict())

  def _train(self, run: Run, record: dict | None, checkpoints: Checkpoints) -> dict:
    peak, warmup = run.learning_rate, min(self.preset.warmup, run.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, peak, warmup, run.steps, peak / 20
    )
    optimizer = make_optimizer(run.contender, schedule)
    params = nnx.to_pure_dict(nnx.state(self._model(), nnx.Param))
    opt_state = jax.jit(optimizer.init)(params)
    if record:
      restored = checkpoints.restore(params=params, opt_state=opt_state)
      params, opt_state = restored['params'], restored['opt_state']
    else:
      state_bytes = bsfa_optax.state_bytes(optimizer, params)
      parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
      record = {
        'step': 0,
        'losses': [],
        'seconds': [],  # (step, seconds of training so far)
        'step_seconds': [],  # means over READ_EVERY steps
        'dominant_fraction': [],  # (step, one value a block)
        'block_names': bsfa_optax.block_names(params, bsfa_blocks)
        if run.contender == 'bsfa'
        else [],
        'parameters': parameters,
        'state_bytes': state_bytes,
        'state_bytes_per_parameter': state_bytes / parameters,
      }
    start = time.perf_counter()
    step = self._make_step(optimizer).lower(params, opt_state, self._batch(0)).compile()
    record.setdefault('compile_seconds', time.perf_counter() - start)

    pending: list[tuple[jax.Array, jax.Array | None]] = []
    bar = tqdm(
      total=run.steps, initial=record['step'], desc=run.name, unit='step', disable=None
    )
    read_at = time.perf_counter()

    def read() -> None:
      """Fetches the losses since the last look and brings the record up to date."""
      nonlocal read_at
      values = jax.device_get(pending)
      seconds = time.perf_counter() - read_at
      record['step'] += len(values)
      record['losses'] += [float(loss) for loss, _ in values]
      before = record['seconds'][-1][1] if record['seconds'] else 0.0
      record['seconds'].append([record['step'], before + seconds])
      record['step_seconds'].append(seconds / len(values))
      fraction = values[-1][1]
      if fraction is not None:
        record['dominant_fraction'].append([record['step'], fraction.tolist()])
      bar.set_postfix(loss=f'{record["losses"][-1]:.4f}', refresh=False)
      bar.update(len(values))
      if bar.disable:
        self._print_progress(run, record, len(values))
      pending.clear()
      read_at = time.perf_counter()

    with bar:
      for number in range(record['step'], run.steps):
        params, opt_state, metrics = step(params, opt_state, self._batch(number))
        pending.append(metrics)
        done = number + 1
        stop = self.stop.received is not None  # asked once: it may change any time
        due = done % self.checkpoint_every == 0 or stop
        if done % READ_EVERY == 0 or due or done == run.steps:
          read()
        if due and done < run.steps:
          checkpoints.save(done, record, params=params, opt_state=opt_state)
          read_at = time.perf_counter()
        if stop and done < run.steps:
          raise Interrupted
    losses = self._evaluate(params, self._validation)
    record['validation_loss'] = float(np.mean(jax.device_get(losses), dtype=np.float64))
    record['weights_sha256'] = fingerprint(params)
    checkpoints.save(run.steps, record, params=params)
    if self.stop.received:
      raise Interrupted
    return record

  def _print_progress(self, run: Run, record: dict, new_steps: int) -> None:
    """Without a terminal: one line at about every tenth of the run."""
    done, tenth = record['step'], max(1, run.steps // 10)
    if done // tenth > (done - new_steps) // tenth:
      print(
        f'{run.name}: {done}/{run.steps} steps, loss {record["losses"][-1]:.4f}, '
        f'{1 / record["step_seconds"][-1]:.1f} steps/s',
        file=sys.stderr,
        flush=True,
      )


def read_text(parser: Parser, args: argparse.Namespace, preset: Preset) -> Text:
  """The text of --data, or an error message."""
  try:
    text = read_files(args.data) if 'data' in args else standard_library()
  except ValueError as error:
    parser.error(f'argument --data: {error}')
  shortest = min(len(text.train), len(text.validation))
  if shortest <= preset.context:
    parser.error(
      f'argument --preset: the context of {args.preset!r}, {preset.context} tokens, is '
      f'longer than the text: {len(text.train):,} bytes to train and '
      f'{len(text.validation):,} to validate; give a longer text with --data'
    )
  return text


def plan_runs(args: argparse.Namespace, steps: int) -> list[Run]:
  """The contenders, then AdamW at the other horizons."""
  rates = LEARNING_RATES[args.preset] | dict(getattr(args, 'learning_rate', ()))
  plan = [(contender, 1.0) for contender in args.contenders]
  plan += [('adamw', horizon) for horizon in args.horizons]
  return [
    Run(contender, horizon, max(1, round(horizon * steps)), rates[contender])
    for contender, horizon in dict.fromkeys(plan)
  ]


def machine() -> dict:
  """What the numbers were measured on."""
  device = jax.devices()[0]
  return {
    'platform': device.platform,
    'device_kind': device.device_kind,
    'devices': jax.device_count(),
    'cpu_cores': len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count(),
  }


def versions() -> dict:
  modules = {'jax': jax, 'optax': optax, 'orbax-checkpoint': ocp, 'numpy': np}
  return {'python': platform.python_version()} | {
    name: module.__version__ for name, module in modules.items()
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the job; returns the exit status."""
  parser = make_parser(__doc__, PRESETS, CONTENDERS)
  arguments = sys.argv[1:] if argv is None else list(argv)
  args = parser.parse_args(arguments)
  preset = PRESETS[args.preset]
  steps = getattr(args, 'steps', preset.steps)
  text = read_text(parser, args, preset)
  runs = plan_runs(args, steps)
  config = {
    'preset': args.preset,
    'sizes': preset._asdict() | {'model': preset.model._asdict()},
    'text': text.source,
    'text_bytes': [len(text.train), len(text.validation)],
    'text_fingerprint': text.fingerprint(),
    'steps': steps,
    'seed': args.seed,
    'runs': {run.name: run.learning_rate for run in runs},
  }
  prepare_output(parser, args, config)

  trainer = Trainer(preset, text, args.seed, args.output, args.checkpoint_every)
  try:
    results = [trainer.train(run) for run in runs]
  except Interrupted:
    again = [
      argument for argument in arguments if argument not in ('--resume', '--overwrite')
    ]
    command = shlex.join([sys.executable, sys.argv[0], *again, '--resume'])
    print(f'saved; continue with:\n{command}', file=sys.stderr)
    return 128 + trainer.stop.received
  finally:
    trainer.stop.restore()

  if args.horizons:
    results = report.add_worth(results)
  report.write_json(
    args.output / 'results.json',
    {'config': config, 'versions': versions(), 'machine': machine(), 'runs': results},
  )
  report.plot_losses(args.output / 'loss.png', results)
  for result in results:
    if result['dominant_fraction']:
      report.plot_dominant_fraction(args.output / 'dominant_fraction.png', result)
  print(report.table(results))
  print(f'Written to {args.output}: results.json and the figures.')
  return 0


if __name__ == '__main__':
  try:
    sys.exit(main())
  except KeyboardInterrupt:  # before training, or a second one: the first saves
    sys.exit('interrupted; --resume continues from the last checkpoint, if any')
