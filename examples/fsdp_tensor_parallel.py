"""FSDP and tensor parallel training of a Flax NNX model on the devices there are.

  python fsdp_tensor_parallel.py
  python fsdp_tensor_parallel.py --simulate=8  # on a laptop

The parameters carry their partition as metadata. The optimizer's state follows
it, on an explicit mesh as here or on an auto mesh, with nothing said about it.
"""

import argparse

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp

import bsfa_optax

WIDTH, HIDDEN, LAYERS, BATCH = 32, 64, 3, 64


class Layer(nnx.Module):
  """A residual layer, its hidden axis split over 'tensor', the other over 'fsdp'."""

  def __init__(self, rngs: nnx.Rngs):
    kernel = lambda names: nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    up, down = kernel(('fsdp', 'tensor')), kernel(('tensor', 'fsdp'))
    self.up = nnx.Param(up(rngs.params(), (WIDTH, HIDDEN)))
    self.down = nnx.Param(down(rngs.params(), (HIDDEN, WIDTH)))

  def __call__(self, x):
    # FSDP: gather what is split over 'fsdp' where it is used.
    up = jax.reshard(self.up[...], P(None, 'tensor'))
    down = jax.reshard(self.down[...], P('tensor', None))
    hidden = jax.nn.relu(x @ up)
    return x + jnp.matmul(hidden, down, out_sharding=P('fsdp', None))


class Model(nnx.Module):
  """Layers with their parameters stacked on a leading axis."""

  def __init__(self, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def stack(rngs):
      return Layer(rngs)

    self.layers = stack(rngs)

  def __call__(self, x):
    @nnx.scan(
      in_axes=(0, nnx.Carry),
      out_axes=nnx.Carry,
      transform_metadata={nnx.PARTITION_NAME: None},
    )
    def apply(layer, x):
      return layer(x)

    return apply(self.layers, x)


def make_mesh():
  tensor = 2 if jax.device_count() % 2 == 0 else 1
  return jax.make_mesh((jax.device_count() // tensor, tensor), ('fsdp', 'tensor'))


def train(steps: int) -> list[float]:
  # The leading axis of the stacked parameters counts blocks.
  estimator = bsfa_optax.pca(
    rank=3, history=5, batch_axes=lambda params: jax.tree.map(lambda _: 0, params)
  )
  filter = bsfa_optax.bsfa(estimator=estimator)
  tx = bsfa_optax.bsfa_adamw(3e-3, filter=filter, step_length=1.0)
  mesh = make_mesh()
  with jax.set_mesh(mesh):

    @nnx.jit
    def create():
      model = Model(nnx.Rngs(0))
      return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, inputs, targets):
      loss_fn = lambda model: jnp.mean((model(inputs) - targets) ** 2)
      loss, grads = nnx.value_and_grad(loss_fn)(model)
      optimizer.update(model, grads)
      return loss

    model, optimizer = create()
    losses = []
    for i in range(steps):
      inputs = jax.random.normal(jax.random.key(i), (BATCH, WIDTH))
      batch = jax.device_put((inputs, jnp.sin(3 * inputs)), P('fsdp', None))
      losses.append(float(step(model, optimizer, *batch)))
  print(f'{mesh.size} devices as {dict(mesh.shape)}')
  history = nnx.state(optimizer)['opt_state'][1]['memory']['history']
  print('the history of a parameter:', jax.typeof(history['layers']['up']['rows'][...]))
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f}')
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
