"""Flax models with partition metadata and stacked layers."""

import functools

from flax import linen, nnx
from flax.training.train_state import TrainState
import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import pytest

from bsfa_optax import bsfa, bsfa_adamw, kronecker, pca, scale_by_whitening
from bsfa_optax.state import state_shardings

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

pytestmark = pytest.mark.usefixtures('standard_promotion')

WIDTH, LAYERS, STEPS = 8, 3, 9
KERNEL, BIAS, OUT = ('fsdp', 'tensor'), ('tensor',), ('fsdp', None)


def stacked_axis(params):
  """The layer axis of the stacked leaves is a batch axis."""
  is_stacked = lambda path, _: 0 if 'layers' in jax.tree_util.keystr(path) else None
  return jax.tree.map_with_path(is_stacked, params)


graded = functools.partial(bsfa, 0.1, 4.0, exponent=0.5, grafting=True)
FILTERS = {
  'default': None,
  'whitening': scale_by_whitening(batch_axes=stacked_axis),
  # 3 and 5 rows divide neither axis of the mesh.
  'pca': graded(
    estimator=pca(
      rank=3, history=5, decay=0.0, refresh_every=3, batch_axes=stacked_axis
    )
  ),
  'kronecker': graded(estimator=kronecker(refresh_every=3, batch_axes=stacked_axis)),
}
# The default takes the stack of layers for one array; the others, for a matrix a layer.
BLOCKS = {name: 2 if name == 'default' else LAYERS + 1 for name in FILTERS}
# The roots of the whitening are products, with no signs to choose and no gap to lose.
TOLERANCES = {name: 2e-3 if name in ('pca', 'kronecker') else 2e-5 for name in FILTERS}


def make_tx(name):
  return bsfa_adamw(1e-2, filter=FILTERS[name])


def measured(state):
  """What the filter measures, wherever it is in the state."""
  (found,) = [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if 'measured' in str(path)
  ]
  return found


def make_mesh(kind, shape=(4, 2)):
  return jax.make_mesh(shape, ('fsdp', 'tensor'), axis_types=(kind,) * 2)


def data():
  rng = np.random.default_rng(0)
  return np.float32(rng.normal(size=(16, WIDTH))), np.float32(rng.normal(size=(16, 2)))


def whole(x):
  """Activations are replicated here, which an explicit mesh wants to be told."""
  mesh = jax.typeof(x).sharding.mesh
  return jax.reshard(x, P()) if AxisType.Explicit in mesh.axis_types else x


class Layer(nnx.Module):
  def __init__(self, rngs):
    init = functools.partial(nnx.with_partitioning, nnx.initializers.lecun_normal())
    zeros = nnx.with_partitioning(nnx.initializers.zeros, BIAS)
    self.dense = nnx.Linear(
      WIDTH, WIDTH, kernel_init=init(KERNEL), bias_init=zeros, rngs=rngs
    )

  def __call__(self, x):
    return whole(x + jnp.tanh(self.dense(x)))


class Model(nnx.Module):
  def __init__(self, rngs):
    metadata = {nnx.PARTITION_NAME: None}
    make = nnx.vmap(Layer, in_axes=0, out_axes=0, transform_metadata=metadata)
    self.layers = nnx.split_rngs(splits=LAYERS)(make)(rngs)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), OUT)
    self.out = nnx.Linear(WIDTH, 2, kernel_init=init, rngs=rngs)

  def __call__(self, x):
    scan = nnx.scan(
      in_axes=(0, nnx.Carry),
      out_axes=nnx.Carry,
      transform_metadata={nnx.PARTITION_NAME: None},
    )
    return self.out(scan(lambda layer, x: layer(x))(self.layers, x))


def specs_of(tree):
  """The partition of every array axis, by name."""
  return {
    jax.tree_util.keystr(path): tuple(x.sharding.spec)
    + (None,) * (x.ndim - len(x.sharding.spec))
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def expected_spec(name, ndim):
  """The spec of a state leaf by its name: a parameter's, or behind more axes."""
  if 'kernel' in name:
    spec = KERNEL if 'layers' in name else OUT
  elif 'bias' in name and 'layers' in name:
    spec = BIAS
  else:
    spec = ()
  return (None,) * (ndim - len(spec)) + spec


def train_nnx(name, mesh):
  with jax.set_mesh(mesh):

    @jax.jit
    def create():
      model = Model(nnx.Rngs(0))
      return nnx.split((model, nnx.Optimizer(model, make_tx(name), wrt=nnx.Param)))

    model, optimizer = nnx.merge(*create())
    first = specs_of(nnx.state(optimizer))

    @nnx.jit
    def step(model, optimizer, x, y):
      loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
      loss, grads = nnx.value_and_grad(loss_fn)(model)
      optimizer.update(model, grads)
      return loss

    x, y = jax.device_put(data(), NamedSharding(mesh, P()))
    losses = [step(model, optimizer, x, y) for _ in range(STEPS)]
    return optimizer, first, jax.device_get(losses)


@functools.cache
def reference(name):
  return train_nnx(name, make_mesh(AxisType.Auto, (1, 1)))


def test_default_on_an_nnx_model():
  optimizer, _, losses = reference('default')
  assert losses[-1] < losses[0]
  assert measured(nnx.state(optimizer)).shape == (BLOCKS['default'],)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'kind'),
  [('default', 'Auto'), ('whitening', 'Explicit'), ('pca', 'Explicit')],
)
def test_nnx_on_a_mesh(name, kind):
  optimizer, first, losses = train_nnx(name, make_mesh(AxisType[kind]))
  state = nnx.state(optimizer)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  shapes = {jax.tree_util.keystr(path): x.shape for path, x in leaves}
  for specs in (first, specs_of(state)):
    assert specs == {k: expected_spec(k, len(shape)) for k, shape in shapes.items()}
  by_metadata = jax.tree_util.tree_leaves_with_path(nnx.get_partition_spec(state))
  for path, spec in by_metadata:
    k = jax.tree_util.keystr(path)
    assert tuple(spec) in (expected_spec(k, len(shapes[k])), ())
    assert spec or not any(expected_spec(k, len(shapes[k])))
  # A block for each layer, and one for the layer on top.
  numbers = measured(state)
  assert numbers.shape == (BLOCKS[name],)
  assert len(set(np.asarray(numbers).tolist())) == BLOCKS[name]
  np.testing.assert_allclose(losses, reference(name)[2], rtol=TOLERANCES[name])
  assert losses[-1] < losses[0]


class LinenLayer(linen.Module):
  @linen.compact
  def __call__(self, x, _):
    init = linen.with_partitioning(linen.initializers.lecun_normal(), KERNEL)
    zeros = linen.with_partitioning(linen.initializers.zeros, BIAS)
    return x + jnp.tanh(linen.Dense(WIDTH, kernel_init=init, bias_init=zeros)(x)), None


class LinenModel(linen.Module):
  @linen.compact
  def __call__(self, x):
    layers = linen.scan(
      LinenLayer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=LAYERS,
      metadata_params={linen.PARTITION_NAME: None},
    )
    x, _ = layers(name='layers')(x, None)
    init = linen.with_partitioning(linen.initializers.lecun_normal(), OUT)
    return linen.Dense(2, kernel_init=init)(x)


def train_linen(name, mesh):
  model, (x, y) = LinenModel(), data()

  def create():
    params = model.init(jax.random.key(0), x)['params']
    return TrainState.create(apply_fn=model.apply, params=params, tx=make_tx(name))

  shapes = jax.eval_shape(create)
  shardings = linen.get_sharding(shapes, mesh)
  # Flax's rule for boxes and the helper's for shardings agree.
  helper = state_shardings(
    shapes.tx, shapes.params, linen.get_sharding(shapes.params, mesh)
  )
  same = jax.tree.map(
    lambda s, h, x: s.is_equivalent_to(h, x.ndim),
    jax.tree.leaves(shardings.opt_state),
    jax.tree.leaves(helper),
    jax.tree.leaves(shapes.opt_state),
  )
  assert all(same)
  state = jax.jit(create, out_shardings=shardings)()

  @functools.partial(
    jax.jit,
    donate_argnums=0,
    out_shardings=(shardings, None),
    compiler_options={'xla_backend_optimization_level': 0},  # quick to compile
  )
  def step(state):
    loss_fn = lambda params: jnp.mean((state.apply_fn({'params': params}, x) - y) ** 2)
    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss

  losses = []
  for _ in range(STEPS):
    state, loss = step(state)
    losses.append(jax.device_get(loss))
  return state, losses


@pytest.mark.slow
@pytest.mark.parametrize('name', ['default', 'kronecker'])
def test_linen_train_state(name):
  state, losses = train_linen(name, make_mesh(AxisType.Auto))
  shapes = {
    jax.tree_util.keystr(k): x.ndim
    for k, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
  }
  assert specs_of(state.opt_state) == {
    k: expected_spec(k, ndim) for k, ndim in shapes.items()
  }
  assert measured(state.opt_state).shape == (BLOCKS[name],)
  _, expected = train_linen(name, make_mesh(AxisType.Auto, (1, 1)))
  np.testing.assert_allclose(losses, expected, rtol=TOLERANCES[name])
  assert losses[-1] < losses[0]
