"""Trains one model sharded over several processes, with checkpoints.

One for each host of a cluster that JAX knows (Slurm, Cloud TPU, ...); or two on
one machine, of two simulated devices each. The same commands resume a run:

  python multi_process.py --directory=/shared/run
  python multi_process.py --directory=/tmp/a --simulate=2 --processes=2 --id=0 &
  python multi_process.py --directory=/tmp/a --simulate=2 --processes=2 --id=1

A checkpoint is whole once it has its checksums, which `sha256sum --check
SHA256SUMS` reads too: without them it was not finished, and if they do not fit
it is refused.
"""

import argparse
import functools
import hashlib
from pathlib import Path
import sys

import jax
from jax import P
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import bsfa_optax
from bsfa_optax.state import state_shardings

WIDTH, BATCH = 16, 32
SUMS = 'SHA256SUMS'


def init_params():
  keys = jax.random.split(jax.random.key(0), 2)
  kernel = lambda key: jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
  return {'in': kernel(keys[0]), 'out': kernel(keys[1])}


def make_batch(step):
  """The same batch on all processes; a data loader gives each its own part."""
  inputs = jax.random.normal(
    jax.random.fold_in(jax.random.key(1), step), (BATCH, WIDTH)
  )
  return inputs, jnp.sin(3 * inputs)


def loss_fn(params, inputs, targets):
  outputs = jnp.tanh(inputs @ params['in']) @ params['out']
  return jnp.mean((outputs - targets) ** 2)


def checksums(folder):
  """A line for each file of a checkpoint."""
  files = [x for x in sorted(folder.rglob('*')) if x.is_file() and SUMS not in x.name]
  digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()
  return ''.join(f'{digest(x)}  {x.relative_to(folder)}\n' for x in files)


def finish(folder):
  """Adds the checksums to a checkpoint, as a whole or not at all."""
  (new := folder / f'{SUMS}.new').write_text(checksums(folder))
  new.replace(folder / SUMS)


def last_step(manager):
  """Of the last whole checkpoint; what was not finished after it is removed."""
  for step in sorted(manager.all_steps(), reverse=True):
    folder = Path(manager.directory) / str(step)
    if not (folder / SUMS).exists():
      manager.delete(step)
    elif (folder / SUMS).read_bytes() != checksums(folder).encode():
      sys.exit(f'{folder} is damaged; to go on from the one before it: rm -r {folder}')
    else:
      return step
  return None


def train(directory, steps, save_every):
  mesh = jax.make_mesh(
    (jax.device_count(),), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  tx = bsfa_optax.bsfa_adamw(3e-3)
  shapes = jax.eval_shape(init_params)
  shardings = jax.tree.map(lambda _: jax.NamedSharding(mesh, P('fsdp')), shapes)
  shardings = shardings, state_shardings(tx, shapes, shardings)
  rows = jax.NamedSharding(mesh, P('fsdp'))

  @functools.partial(
    jax.jit,
    donate_argnums=(0, 1),
    out_shardings=(*shardings, jax.NamedSharding(mesh, P())),
  )
  def step_fn(params, state, step):
    batch = jax.lax.with_sharding_constraint(make_batch(step), rows)
    loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  def init():
    params = init_params()
    return params, tx.init(params)

  options = ocp.CheckpointManagerOptions(save_interval_steps=save_every, max_to_keep=2)
  with ocp.CheckpointManager(directory, options=options) as manager:
    first = last_step(manager)
    if first is None:
      first = 0
      params, state = jax.jit(init, out_shardings=shardings)()
    else:
      target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(init),
        shardings,
      )
      params, state = manager.restore(first, args=ocp.args.StandardRestore(target))
    for step in range(first, steps):
      params, state, loss = step_fn(params, state, step)
      print(f'step {step} loss {float(loss):.6f}', flush=True)
      if manager.save(step + 1, args=ocp.args.StandardSave((params, state))):
        manager.wait_until_finished()
        if jax.process_index() == 0:
          finish(directory / str(step + 1))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add, number = parser.add_argument, {'type': int, 'metavar': 'N'}
  add(
    '--directory', type=Path, required=True, metavar='DIR', help='for the checkpoints'
  )
  add('--steps', **number, default=20, help='to train (20)')
  add('--save_every', **number, default=5, help='steps (5)')
  add('--simulate', **number, help='CPU devices for each process')
  add('--processes', **number, help='how many, if JAX cannot tell')
  add('--id', **number, help="this process's number, if JAX cannot tell")
  add('--coordinator', default='localhost:12321', metavar='HOST', help='of process 0')
  args = parser.parse_args()

  if args.simulate:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', args.simulate)
  if args.processes is None:
    jax.distributed.initialize()
  elif args.processes > 1:
    jax.distributed.initialize(args.coordinator, args.processes, args.id)
  train(args.directory.absolute(), args.steps, args.save_every)


if __name__ == '__main__':
  main()
