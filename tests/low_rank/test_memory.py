"""Peak bytes of a compiled step: scanned and rematerialised layers, AdamW inside.

python tests/low_rank/test_memory.py  # prints the table of docs/low_rank.md
"""

import functools
import importlib.util
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from bsfa_optax import low_rank, projected

EXAMPLE = Path(__file__).parents[2] / 'examples' / 'low_rank_llama.py'
LAYERS, WIDTH, HIDDEN, RANK, ROWS = 12, 256, 704, 16, 64
SHAPES = dict.fromkeys('qkvo', (LAYERS, WIDTH, WIDTH)) | {
  'up': (LAYERS, WIDTH, HIDDEN),
  'gate': (LAYERS, WIDTH, HIDDEN),
  'down': (LAYERS, HIDDEN, WIDTH),
}


def model(params, x, product):
  """The matrices of LLaMA's layers, without the attention between them."""

  def block(x, w):
    q, k, v = (product(x, w[name]) for name in 'qkv')
    x = x + product(q * k * v, w['o'])
    hidden = jax.nn.silu(product(x, w['gate'])) * product(x, w['up'])
    return x + product(hidden, w['down']), None

  return jax.lax.scan(jax.checkpoint(block), x, params)[0]


@functools.cache
def peak(method=None, product=jnp.matmul, join=low_rank.join, tx=None):
  """Bytes at the peak of one step, with what is updated donated."""
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
  tx = tx or optax.adamw(1e-3)
  frozen = optax.MaskedNode()
  if method is not None:
    tx = low_rank.renewable(tx)
    params, frozen = jax.eval_shape(
      lambda p: low_rank.init(p, jax.random.key(0), method, batch_axes=1), params
    )

  def step(trained, frozen, state, x):
    whole = lambda t: t if method is None else join(t, frozen)
    grads = jax.grad(lambda t: jnp.square(model(whole(t), x, product)).sum())(trained)
    updates, state = tx.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state

  x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
  memory = (
    jax.jit(step, donate_argnums=(0, 2))
    .lower(params, frozen, jax.eval_shape(tx.init, params), x)
    .compile()
    .memory_analysis()
  )
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


@pytest.mark.slow
def test_sst_takes_at_most_three_fifths_of_adamw():
  assert peak(low_rank.sst(RANK)) <= 0.6 * peak()


@pytest.mark.slow
def test_merging_in_the_block_is_as_good_as_interception():
  lora = low_rank.lora(RANK)
  assert peak(lora) <= 1.05 * peak(lora, low_rank.dot)


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')
def test_example(tmp_path, monkeypatch, capsys):
  spec = importlib.util.spec_from_file_location('low_rank_llama', EXAMPLE)
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  small = {'LAYERS': 2, 'WIDTH': 32, 'HIDDEN': 48, 'CONTEXT': 16, 'ROWS': 2}
  for name, size in small.items():
    monkeypatch.setattr(example, name, size)
  options = ['--output', str(tmp_path), '--methods', 'adamw', 'frugal', 'sst']
  options += ['--shares', '0.06', '--steps', '6', '--round', '3']
  monkeypatch.setattr(sys, 'argv', [str(EXAMPLE), *options])
  example.main()
  head, *rows, last = capsys.readouterr().out.splitlines()
  columns = ['method', 'trained', 'state', 'peak', 'loss']
  assert head.replace(' [MB]', '').split() == columns
  labels = ['adamw', 'frugal 6%', 'sst 6%']
  assert [row[:22].strip() for row in rows] == labels
  adamw, frugal, sst = (
    [float(x.replace(',', '')) for x in row[22:].split()] for row in rows
  )
  assert adamw[0] == frugal[0] > sst[0]  # trained
  assert adamw[1] > max(frugal[1], sst[1])  # state
  assert all(2 < row[-1] < 7 for row in (adamw, frugal, sst))  # log(256) is 5.5
  assert 'another text, exported and fine-tuned' in last
  stored = {'adamw', 'frugal-6%', 'sst-6%'}
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == stored
  assert (tmp_path / 'loss_against_bytes.png').exists()


def test_example_is_one_short_file():
  assert len(EXAMPLE.read_text().splitlines()) <= 200


def main():
  stacked = {'batch_axes': 1}
  print(f'AdamW {peak() / 1e6:.0f}; SGD {peak(tx=optax.sgd(1e-3)) / 1e6:.0f}')
  for name, method in {
    'SST': low_rank.sst(RANK),
    'LoRA': low_rank.lora(RANK),
    'LoRA, columns normed': low_rank.lora(RANK, column_norm=True),
  }.items():
    ways = (
      peak(method, join=low_rank.merge),
      peak(method),
      peak(method, low_rank.dot),
    )
    print(name, *(f'{x / 1e6:.0f}' for x in ways))
  for tx in (projected.galore, projected.fira, projected.dct_adamw):
    print(tx.__name__, f'{peak(tx=tx(1e-3, RANK, **stacked)) / 1e6:.0f}')
  print('frugal', f'{peak(tx=projected.frugal(1e-3, 0.25, **stacked)) / 1e6:.0f}')


if __name__ == '__main__':
  main()
