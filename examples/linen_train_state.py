"""A Flax linen model with partitioned parameters, trained through a TrainState.

python linen_train_state.py
python linen_train_state.py --simulate=8  # on a laptop
"""

import argparse
import functools

from flax import linen as nn
from flax.training.train_state import TrainState
import jax
from jax import P
import jax.numpy as jnp

import bsfa_optax

WIDTH, LAYERS, BATCH = 32, 3, 64


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ('fsdp', None))
    return x + nn.relu(nn.Dense(WIDTH, kernel_init=init)(x)), None


class Model(nn.Module):
  """Layers with their parameters stacked on a leading axis."""

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      Layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=LAYERS,
      metadata_params={nn.PARTITION_NAME: None},
    )
    return layers(name='layers')(x, None)[0]


def train(steps: int) -> list[float]:
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((jax.device_count(),), ('fsdp',), axis_types=(auto,))
  model = Model()
  # The leading axis of the stacked parameters counts layers.
  filter = bsfa_optax.scale_by_whitening(
    batch_axes=lambda params: jax.tree.map(lambda _: 0, params)
  )
  tx = bsfa_optax.bsfa_adamw(1e-3, filter=filter)

  def create():
    variables = model.init(jax.random.key(0), jnp.zeros((1, WIDTH)))
    return TrainState.create(apply_fn=model.apply, params=variables['params'], tx=tx)

  # Flax reads the partition of the whole state, the optimizer's included, from the
  # metadata.
  shardings = nn.get_sharding(jax.eval_shape(create), mesh)
  state = jax.jit(create, out_shardings=shardings)()

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
  def step(state, inputs, targets):
    def loss_fn(params):
      return jnp.mean((state.apply_fn({'params': params}, inputs) - targets) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss

  losses = []
  for i in range(steps):
    inputs = jax.random.normal(jax.random.key(i), (BATCH, WIDTH))
    batch = (inputs, jnp.sin(3 * inputs))
    state, loss = step(
      state, *jax.device_put(batch, jax.NamedSharding(mesh, P('fsdp')))
    )
    losses.append(float(loss))
  print(f'{mesh.size} devices, loss {losses[0]:.4f} -> {losses[-1]:.4f}')
  return losses


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--simulate', type=int, metavar='N', help='so many CPU devices')
  parser.add_argument(
    '--steps', type=int, metavar='N', default=30, help='to train (30)'
  )
  args = parser.parse_args()
  if args.simulate:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', args.simulate)
  train(args.steps)


if __name__ == '__main__':
  main()
