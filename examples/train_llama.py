"""Trains a small LLaMA with AdamW, BSFA and Muon on the same bytes; compares them.

Ctrl-C saves and prints the command that goes on. Example, with your own text:
  python train_llama.py --optimizer adamw bsfa --data book.txt --output book
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
import shlex
import signal
import sys
import sysconfig
import time

from flax import nnx, serialization
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
from tqdm import tqdm

import bsfa_optax

HEAD, LAYERS, ROWS, CONTEXT = 24, 3, 32, 64
LOOK_EVERY, SAVE_EVERY = 10, 100  # steps
RATES = {'adamw': 8e-3, 'bsfa': 8e-3, 'muon': 2e-2}


def rotate(x):  # rotary positions of (row, position, head, feature)
  first, second = jnp.split(x, 2, axis=-1)
  frequency = 10_000.0 ** -jnp.linspace(0, 1, HEAD // 2, endpoint=False)
  angle = jnp.tile(jnp.arange(CONTEXT)[:, None] * frequency, 2)[None, :, None]
  return x * jnp.cos(angle) + jnp.concatenate([-second, first], -1) * jnp.sin(angle)


class Layer(nnx.Module):
  def __init__(self, width, rngs):
    linear = lambda *sizes: nnx.Linear(*sizes, use_bias=False, rngs=rngs)
    self.norm, self.mlp_norm = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
    self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
    self.gate, self.up = (linear(width, 8 * width // 3) for _ in range(2))
    self.down = linear(8 * width // 3, width)

  def __call__(self, x):
    h, split = self.norm(x), (*x.shape[:-1], -1, HEAD)
    q, k, v = (f(h).reshape(split) for f in (self.q, self.k, self.v))
    mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    x = x + self.out(mixed.reshape(x.shape))
    return x + self.down(jax.nn.silu(self.gate(h := self.mlp_norm(x))) * self.up(h))


def make_optimizer(name, rate, steps):
  """BSFA and Muon find the matrices of the layers; Adam takes the rest."""
  schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps, rate / 20)
  tx = optax.adamw(schedule, b2=0.95, weight_decay=0.1)
  if name == 'bsfa':
    tx = bsfa_optax.bsfa_adamw(schedule, b2=0.95, weight_decay=0.1)
  elif name == 'muon':
    options = {'weight_decay': 0.1, 'adam_weight_decay': 0.1, 'consistent_rms': 0.2}
    options['muon_weight_dimension_numbers'] = bsfa_optax.muon_dimension_numbers
    tx = optax.contrib.muon(schedule, adam_b2=0.95, **options)
  return optax.chain(optax.clip_by_global_norm(1.0), tx)


def load(folder, state, run):  # the last checkpoint, or what is given
  for path in sorted(folder.glob('*.ckpt'))[-1:]:
    digest, content = (data := path.read_bytes())[:32], data[32:]
    if hashlib.sha256(content).digest() != digest:
      sys.exit(f'{path} is damaged; to go on from the one before it: rm {path}')
    state, saved = serialization.from_bytes((state, ''), content)
    if run['options'] != (saved := json.loads(saved))['options']:
      sys.exit(f'--resume: {path} has other options: {saved["options"]}')
    run = saved
  return state, run


def train(name, rate, args, text, validation, stop):  # till `stop` is set
  def draw(text, count, *seed):
    starts = np.random.default_rng(seed).integers(0, len(text) - CONTEXT, (count, 1))
    return text[starts + np.arange(CONTEXT + 1)]

  width, rngs = HEAD * args.heads, nnx.Rngs(args.seed)
  layers = [Layer(width, rngs) for _ in range(LAYERS)]
  last = nnx.RMSNorm(width, rngs=rngs), nnx.Linear(width, 256, rngs=rngs)
  model = nnx.Sequential(nnx.Embed(256, width, rngs=rngs), *layers, *last)
  graph, params = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tx = make_optimizer(name, rate, args.steps)
  state = params, jax.jit(tx.init)(params)
  run = {'optimizer': name, 'learning_rate': rate, 'losses': [], 'seconds': [0]}
  run |= {'matrices': bsfa_optax.state.block_names(tx, params), 'directions': []}
  run['options'] = f'--learning-rate {rate} --heads {args.heads} --steps {args.steps}'
  run['options'] += f' --seed {args.seed}, text {hashlib.sha256(text).hexdigest()[:8]}'
  (folder := args.output / name).mkdir(parents=True, exist_ok=True)
  state, run = load(folder, state, run)

  def loss_fn(params, rows):
    logits = nnx.merge(graph, params)(rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

  def step(state, rows):
    loss, gradient = jax.value_and_grad(loss_fn)(state[0], rows)
    updates, opt_state = tx.update(gradient, state[1], state[0])
    return (optax.apply_updates(state[0], updates), opt_state), loss

  step = jax.jit(step, donate_argnums=0).lower(state, draw(text, ROWS, 0)).compile()
  ending, done = False, len(run['losses'])
  with tqdm(total=args.steps, initial=done, desc=name, unit='step') as bar:
    while bar.n < args.steps and not ending:
      begin, ending, losses = time.perf_counter(), bool(stop), []
      for number in range(bar.n, min(bar.n + LOOK_EVERY, args.steps)):
        state, loss = step(state, draw(text, ROWS, args.seed, number))
        losses.append(loss)
      run['losses'] += map(float, losses)
      run['seconds'] += [run['seconds'][-1] + time.perf_counter() - begin]
      directions = optax.tree.get(state[1], 'effective_directions', np.zeros(0))
      run['directions'] += [directions.tolist()]
      bar.set_postfix(loss=f'{run["losses"][-1]:.4f}', refresh=False)
      bar.update(len(losses))
      if bar.n % SAVE_EVERY == 0 or bar.n == args.steps or ending:
        content = serialization.to_bytes((state, json.dumps(run)))
        (new := folder / 'new').write_bytes(hashlib.sha256(content).digest() + content)
        new.replace(folder / f'{bar.n:08}.ckpt')  # there as a whole or not at all
        for old in sorted(folder.glob('*.ckpt'))[:-2]:
          old.unlink()
  run['validation_loss'] = float(jax.jit(loss_fn)(state[0], draw(validation, 1024, 0)))
  return run


def show(runs, output):  # the table, loss.png and results.json
  print('          rate      train loss   validation loss   ms a step (quartiles)')
  line = '{:10}{:<10}{:<13.4f}{:<18.4f}{:.1f} ({:.1f}-{:.1f})'.format
  one, two = (fig := Figure((10, 4))).subplots(1, 2, subplot_kw={'xlabel': 'step'})
  for run in runs:
    means = [x.mean() for x in np.array_split(run['losses'], len(run['seconds']) - 1)]
    losses = np.mean(run['losses'][-50:]), run['validation_loss']
    ms = np.percentile(np.diff(run['seconds']), [50, 25, 75]) * 1e3 / LOOK_EVERY
    print(line(run['optimizer'], run['learning_rate'], *losses, *ms))
    steps = LOOK_EVERY * np.arange(1, len(means) + 1)
    one.plot(steps, means, label=run['optimizer'])
    kinds = np.array([name.split('/')[2] for name in run['matrices']])
    for kind in dict.fromkeys(kinds):
      mean = np.mean(run['directions'], axis=1, where=kinds == kind)  # over layers
      two.semilogy(steps, mean, label=kind)
      two.legend(title='effective\ndirections', bbox_to_anchor=(1, 1), loc='upper left')
  one.set(ylim=(None, np.nan_to_num(means[len(means) // 10], nan=9)))
  one.legend(title='train loss')
  fig.savefig(output / 'loss.png')
  (output / 'results.json').write_text(json.dumps(runs, indent=1))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  add, several = parser.add_argument, {'nargs': '+', 'metavar': 'NAME'}
  add('--optimizer', **several, choices=RATES, default=[*RATES], help=', '.join(RATES))
  add('--learning-rate', nargs='+', type=float, metavar='RATE', help='for each of them')
  add('--data', **several, type=Path, help="text (Python's standard library)")
  add('--steps', type=int, default=300, help='of each optimizer (300)')
  add('--heads', type=int, default=4, help='size of the model (4)')
  add('--seed', type=int, default=0, help='of the weights and the batches (0)')
  add('--output', type=Path, default=Path('runs/llama'), help='folder (runs/llama)')
  add('--resume', action='store_true', help='go on with the run in --output')
  args = parser.parse_args()
  rates = args.learning_rate or [RATES[name] for name in args.optimizer]
  if len(rates) != len(args.optimizer) or not all(0 < x < np.inf for x in rates):
    parser.error('--learning-rate: give a positive number for each --optimizer')
  if min(args.steps, args.heads, args.seed + 1) < 1:
    parser.error('--steps and --heads begin at 1, --seed at 0')
  runs, stop = [], []
  try:
    files = args.data or sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    text = np.frombuffer(b'\n'.join(x.read_bytes() for x in files), np.uint8)
    training = np.arange(len(text)) * 100 // len(text) % 10 > 0  # nine parts in ten
    text, validation = (text[x].astype(np.int32) for x in (training, ~training))
    if len(validation) <= CONTEXT:
      parser.error(f'--data: give a text of at least {11 * CONTEXT} bytes')
    if any(args.output.glob('*/*.ckpt')) != args.resume:
      found = 'no run; begin one without' if args.resume else 'a run; give another or'
      parser.error(f'--output: {args.output} has {found} --resume')
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda number, _: stop.append(number))
    for name, rate in zip(args.optimizer, rates, strict=True):
      runs.append(train(name, rate, args, text, validation, stop))
      if stop:
        given = [*shlex.split(os.environ.get('WITH_ENV', '')), *sys.orig_argv]
        again = shlex.join([*(x for x in given if x != '--resume'), '--resume'])
        print(f'saved; go on with:\n{again}')
        sys.exit(128 + stop[0])
    show(runs, args.output)
  except OSError as error:
    what = f'{error.filename or args.output}: {error.strerror}'
    parser.exit(2, f'{what}; give another path, or mend it and --resume\n')


if __name__ == '__main__':
  main()
