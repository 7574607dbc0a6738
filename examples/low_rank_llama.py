"""Pre-trains a small LLaMA by methods that save memory; draws loss against bytes.

  python low_rank_llama.py
  python low_rank_llama.py --methods adamw sst lora --shares 0.06 --steps 600

Layers are scanned and rematerialised. Runs are stored in mid-round, and go on
from there. The last SST run is merged and tuned with AdamW on another text.
"""

import argparse
from pathlib import Path
import sysconfig

import jax
import jax.numpy as jnp
from matplotlib import pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from bsfa_optax import low_rank
from bsfa_optax import projected as p

LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY, CONTEXT, ROWS = 4, 96, 256, 4, 256, 64, 16
STACKED = lambda name, leaf: int(name.startswith('layers'))
REPARAMETRISED = {  # with peak learning rates
  'sst': (low_rank.sst, 1.2e-2),
  'lora': (low_rank.lora, 8e-3),
  'relora': (low_rank.relora, 8e-3),
  'lora-column-norm': (lambda rank: low_rank.lora(rank, column_norm=True), 8e-3),
}
RENEWED = ('sst', 'relora')
PROJECTED = {
  'galore': (p.galore, 1.6e-2),
  'fira': (p.fira, 8e-3),
  'frugal': (p.frugal, 2e-3),
  'dct-adamw': (p.dct_adamw, 4e-3),
}


def init_params(key):
  keys = iter(jax.random.split(key, 16))
  matrix = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5
  layers = {name: matrix(LAYERS, WIDTH, WIDTH) for name in ('q', 'k', 'v', 'o')}
  layers |= {name: matrix(LAYERS, WIDTH, HIDDEN) for name in ('gate', 'up')}
  layers |= {name: jnp.ones((LAYERS, WIDTH)) for name in ('norm1', 'norm2')}
  layers['down'] = matrix(LAYERS, HIDDEN, WIDTH)
  outer = {'embedding': 0.3 * matrix(WIDTH, VOCABULARY).T, 'norm': jnp.ones(WIDTH)}
  return outer | {'head': matrix(WIDTH, VOCABULARY), 'layers': layers}


def rotate(x):  # rotary positions of (rows, position, head, feature)
  a, b = jnp.split(x, 2, axis=-1)
  angle = jnp.arange(x.shape[1])[:, None] * 1e4 ** -jnp.linspace(0, 1, a.shape[-1])
  turned = (a + 1j * b) * jnp.exp(1j * angle)[:, None]
  return jnp.concatenate([turned.real, turned.imag], -1)


def norm(x, scale):
  return x * scale * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


@jax.checkpoint
def layer(x, w):
  """One layer; a low-rank `w` is dense within it, and nowhere else."""
  h = norm(x, w['norm1'])
  q, k, v = ((h @ w[name]).reshape(*x.shape[:2], HEADS, -1) for name in 'qkv')
  mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
  x = x + mixed.reshape(x.shape) @ w['o']
  h = norm(x, w['norm2'])
  return x + (jax.nn.silu(h @ w['gate']) * (h @ w['up'])) @ w['down'], None


def loss_fn(params, batch):
  x = params['embedding'][batch[:, :-1]]
  x, _ = jax.lax.scan(layer, x, params['layers'])
  logits = norm(x, params['norm']) @ params['head']
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def read(pattern):  # sources of the standard library as bytes
  files = sorted(Path(sysconfig.get_path('stdlib')).glob(pattern))
  return np.frombuffer(b'\n'.join(f.read_bytes() for f in files), np.uint8)


def batch_at(text, step):
  starts = np.random.default_rng(step).integers(0, len(text) - CONTEXT, ROWS)
  return text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)


def validation_loss(params, text):
  loss = jax.jit(lambda i: loss_fn(params, i))
  return np.mean([loss(batch_at(text, 10**6 + i)) for i in range(40)])


def make_run(name, share, params, args):
  """What is trained, what is frozen, and the optimizer."""
  schedule = lambda rate: optax.cosine_onecycle_schedule(args.steps, rate, 0.1, 25, 10)
  if name in REPARAMETRISED:
    method, rate = REPARAMETRISED[name]
    init = lambda p, key: low_rank.init(p, key, method(share), batch_axes=STACKED)
    parts = jax.jit(init)(params, jax.random.key(1))
    rate = schedule(rate)
    if name in RENEWED:
      rate = low_rank.rewarmed(rate, args.round, max(1, args.round // 10))
    return *parts, low_rank.renewable(optax.adamw(rate, weight_decay=0.0))
  tx = optax.adamw(schedule(4e-3), weight_decay=0.0)
  if name in PROJECTED:
    method, rate = PROJECTED[name]
    every = {} if name == 'dct-adamw' else {'refresh_every': args.round}
    tx = method(schedule(rate), share, weight_decay=0.0, batch_axes=STACKED, **every)
  return params, optax.MaskedNode(), tx


def train(name, share, args, text, held_out):
  """Trains by one method: the record of the run, and plain parameters."""
  trained, frozen, tx = make_run(name, share, init_params(jax.random.key(0)), args)
  dense = name not in REPARAMETRISED
  state = jax.jit(tx.init)(trained)

  def step(trained, frozen, state, batch):
    join = lambda t: t if dense else low_rank.join(t, frozen)
    grads = jax.grad(lambda t: loss_fn(join(t), batch))(trained)
    updates, state = tx.update(grads, state, trained)
    return low_rank.retract(optax.apply_updates(trained, updates)), state

  step = jax.jit(step, donate_argnums=(0, 2))
  step = step.lower(trained, frozen, state, batch_at(text, 0)).compile()
  memory = step.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
  renew = jax.jit(lambda *parts: low_rank.renew(tx, *parts))
  label = name if name == 'adamw' else f'{name} {share:.0%}'
  path = args.output.absolute() / 'checkpoints' / label.replace(' ', '-')
  for i in tqdm(range(args.steps), desc=f'{label:20}', leave=False):
    trained, state = step(trained, frozen, state, batch_at(text, i))
    if name in RENEWED and (i + 1) % args.round == 0:
      trained, frozen, state = renew(trained, frozen, state, jax.random.key(i))
    if i == args.round * 3 // 2:  # stored in the second round, continued from there
      trained, frozen, state = store(path, (trained, frozen, state))
  merged = trained if dense else low_rank.merge(trained, frozen)
  total = lambda tree, what: sum(getattr(x, what) for x in jax.tree.leaves(tree))
  sizes = total(trained, 'size'), total(state, 'nbytes') / 1e6, peak / 1e6
  return (label, *sizes, validation_loss(merged, held_out)), merged


def store(path, tree):
  """Writes a tree to a checkpoint and reads it back."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree, force=True)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path, jax.eval_shape(lambda: tree))


def fine_tune(params, text, steps):
  tx, grad = optax.adamw(1e-3), jax.jit(jax.grad(loss_fn))
  state = tx.init(params)
  for i in tqdm(range(steps), desc='fine-tuning', leave=False):
    updates, state = tx.update(grad(params, batch_at(text, i)), state, params)
    params = optax.apply_updates(params, updates)
  return params


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  names = ['adamw', *REPARAMETRISED, *PROJECTED]
  add, several = parser.add_argument, {'nargs': '+', 'metavar': 'X'}
  add('--methods', **several, choices=names, default=names, help=', '.join(names))
  add('--shares', **several, type=float, default=[0.06, 0.25], help='(0.06 0.25)')
  add('--steps', type=int, default=100, help='of each run (100)')
  add('--round', type=int, default=25, help='updates of a round (25)')
  add('--output', type=Path, default=Path('runs/low_rank'), help='(runs/low_rank)')
  args = parser.parse_args()
  args.output.mkdir(parents=True, exist_ok=True)
  text, other = read('*.py'), read('pydoc_data/topics.py')
  text, held_out = np.split(text, [len(text) * 19 // 20])
  print(f'{"method":22}{"trained":>9}{"state [MB]":>12}{"peak [MB]":>12}{"loss":>8}')
  records, export = [], None
  for name in args.methods:
    for share in args.shares[: 1 if name == 'adamw' else None]:
      record, merged = train(name, share, args, text, held_out)
      records.append(record)
      export = merged if name == 'sst' or export is None else export
      print('{:22}{:9,}{:12.2f}{:12.2f}{:8.3f}'.format(*record), flush=True)
  figure, axes = plt.subplots(figsize=(7, 5), layout='constrained')
  for label, _, _, peak, loss in records:
    axes.plot(peak, loss, 'o')
    axes.annotate(label, (peak, loss), fontsize=8)
  axes.set(xlabel='peak of the compiled step [MB]', ylabel='validation loss [nats]')
  figure.savefig(args.output / 'loss_against_bytes.png')
  plain = store(args.output.absolute() / 'export', export)
  tuned = fine_tune(plain, other, args.steps // 2)
  losses = [validation_loss(params, other) for params in (plain, tuned)]
  print('another text, exported and fine-tuned: {:.3f}, {:.3f}'.format(*losses))


if __name__ == '__main__':
  main()
