"""Orbax checkpoints: saved on one mesh, restored on another, refused where due."""

import functools

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from bsfa_optax import (
  bsfa,
  bsfa_adamw,
  hessian_lanczos,
  kronecker,
  pca,
  scale_by_whitening,
)
from bsfa_optax.state import (
  abstract_state,
  check_state_format,
  state_format,
  state_shardings,
)

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

STEPS = 5  # before the checkpoint, and after it
FILTERS = {
  'pca': bsfa(
    estimator=pca(rank=3, history=3, solver='gram', storage_dtype=jnp.bfloat16)
  ),
  'kronecker': bsfa(estimator=kronecker(refresh_every=3)),
  'hessian': bsfa(estimator=hessian_lanczos(rank=2, refresh_every=3)),
}
OPTIMIZERS = {'bsfa_adamw': bsfa_adamw(1e-2)} | {
  name: optax.chain(optax.adam(1e-2), tx) for name, tx in FILTERS.items()
}
SHAPES = {'bias': (8,), 'kernel': (8, 8)}
# Of how many devices, and which axis of the parameters is split over which.
MESHES = {
  'same': ((4, 2), {'bias': P('tensor'), 'kernel': P('fsdp', 'tensor')}),
  'four': ((2, 2), {'bias': P('fsdp'), 'kernel': P('tensor', 'fsdp')}),
  'one': ((1, 1), {'bias': P(), 'kernel': P()}),
}


def shardings_on(mesh_name):
  shape, specs = MESHES[mesh_name]
  mesh = jax.make_mesh(
    shape,
    ('fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: np.prod(shape)],
  )
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def abstract_params():
  return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}


@functools.cache
def make_step(name, mesh_name):
  """A step with state kept in place, compiled once for each mesh."""
  tx, shardings = OPTIMIZERS[name], shardings_on(mesh_name)
  of_state = state_shardings(tx, abstract_params(), shardings)
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)

  @functools.partial(
    jax.jit,
    out_shardings=(shardings, of_state, None),
    compiler_options={'xla_backend_optimization_level': 0},  # quick to compile
  )
  def step(params, state):
    def loss_fn(params):
      outputs = jnp.tanh(inputs @ params['kernel']) + params['bias'][None]
      return jnp.mean((outputs - 1) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, value_fn=loss_fn)
    return optax.apply_updates(params, updates), state, loss

  return step


def train(step, params, state):
  losses = []
  for _ in range(STEPS):
    params, state, loss = step(params, state)
    losses.append(loss)
  return jax.device_get((params, state, losses))


@functools.cache
def uninterrupted(name, directory):
  """Saves half way, and returns how it went on."""
  tx, shardings = OPTIMIZERS[name], shardings_on('same')
  params = {k: jnp.full(s, 0.1) for k, s in SHAPES.items()}
  params = jax.device_put(params, shardings)
  params['kernel'] += jnp.eye(8)
  init = jax.jit(tx.init, out_shardings=state_shardings(tx, params))
  state, step = init(params), make_step(name, 'same')
  for _ in range(STEPS):
    params, state, _ = step(params, state)
  with ocp.CheckpointManager(directory / name) as manager:  # saves asynchronously
    manager.save(
      STEPS,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave((params, state)),
        format=ocp.args.JsonSave(state_format(state)),
      ),
    )
    return train(step, params, state)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('checkpoints')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'mesh_name'),
  [
    ('bsfa_adamw', 'same'),
    ('bsfa_adamw', 'four'),
    ('bsfa_adamw', 'one'),
    ('pca', 'same'),
    ('kronecker', 'four'),
    ('hessian', 'one'),
  ],
)
def test_restored_run_goes_on_as_if_never_stopped(name, mesh_name, directory):
  expected = uninterrupted(name, directory)
  tx, shardings = OPTIMIZERS[name], shardings_on(mesh_name)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract_params(),
    shardings,
  )
  target = params, abstract_state(tx, params)
  with ocp.CheckpointManager(directory / name) as manager:
    saved = manager.restore(
      STEPS, args=ocp.args.Composite(format=ocp.args.JsonRestore())
    )
    check_state_format(saved.format, target[1])
    restored = manager.restore(
      STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
    ).state
  for x, s in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
    assert (x.dtype, x.sharding) == (s.dtype, s.sharding)
  found = train(make_step(name, mesh_name), *restored)
  if mesh_name == 'same':
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  else:
    tol = 2e-5 if name == 'bsfa_adamw' else 1e-3
    np.testing.assert_allclose(found[2], expected[2], rtol=tol)
  assert found[2][-1] < found[2][0]


def filtered(**kwargs):
  return bsfa(estimator=pca(**{'rank': 2, 'history': 3, **kwargs}))


OTHERS = {
  'rank': (filtered(rank=3), 'basis/kernel/rows: saved float32.2,8,8., expected.*.3,8'),
  'history': (filtered(history=4), 'history/kernel/rows: saved float32.3,.*.4,8,8'),
  'storage': (filtered(storage_dtype=jnp.bfloat16), 'saved float32.*expected bfloat16'),
  'estimator': (bsfa(), 'memory/is_complete: saved bool.., expected nothing'),
  'filter': (
    scale_by_whitening(),
    'measured/effective_directions: saved nothing, expected float32.1.',
  ),
}


@pytest.mark.parametrize('name', [*OTHERS, 'chain order', 'version'])
def test_other_configuration_is_named(name):
  adam, params = optax.adam(1e-2), abstract_params()
  saved = state_format(jax.eval_shape(optax.chain(adam, filtered()).init, params))
  tx = optax.chain(adam, filtered())
  if name == 'chain order':
    tx, message = optax.chain(filtered(), adam), '0/filter_count: saved nothing'
  elif name == 'version':
    saved, message = {**saved, 'version': 0}, 'version 0 .* reads version 1; restore'
  else:
    tx, message = optax.chain(adam, OTHERS[name][0]), OTHERS[name][1]
  with pytest.raises(ValueError, match=message):
    check_state_format(saved, abstract_state(tx, params, P()))


def test_other_block_size_is_named():
  make = lambda size: scale_by_whitening(block_size=size)
  init = lambda tx: jax.eval_shape(tx.init, abstract_params())
  saved = state_format(init(make(1024)))
  check_state_format(saved, init(make(512)))  # which changes nothing here
  message = r'memory/0/packed/1: saved float32.1,1,8,9., expected float32.1,2,4,5.'
  with pytest.raises(ValueError, match=message):
    check_state_format(saved, init(make(4)))


def test_layout_is_that_of_the_format_version():
  # If this fails, states saved by a release cannot be read any more: raise VERSION in
  # bsfa_optax/state.py, and say in CHANGELOG.md what to do.
  leaves = lambda tx: state_format(jax.eval_shape(tx.init, jnp.ones((4, 8))))
  counts = {'filter_count': 'int32[]', 'skipped_updates': 'int32[]'}
  common = counts | {'measured/dominant_fraction': 'float32[1]'}
  assert leaves(filtered()) == {
    'version': 1,
    'leaves': common
    | {
      'memory/basis/rows': 'float32[2,4,8]',
      'memory/history/rows': 'float32[3,4,8]',
      'memory/squared_norms': 'float32[1,3]',
      'memory/variance': 'float32[1,2]',
      'memory/total_variance': 'float32[1]',
      'memory/is_complete': 'bool[]',
    },
  }
  assert leaves(bsfa(estimator=kronecker())) == {
    'version': 1,
    'leaves': common
    | {
      'memory/0/basis/0': 'float32[1,4,4]',
      'memory/0/basis/1': 'float32[1,8,8]',
      'memory/0/spectrum/0': 'float32[1,4]',
      'memory/0/spectrum/1': 'float32[1,8]',
    },
  }
  assert leaves(bsfa(estimator=hessian_lanczos(2))) == {
    'version': 1,
    'leaves': common
    | {
      'memory/basis/rows': 'float32[2,4,8]',
      'memory/curvature': 'float32[1,2]',
      'memory/is_known': 'bool[]',
    },
  }
  assert leaves(scale_by_whitening()) == {
    'version': 1,
    'leaves': counts
    | {
      'measured/effective_directions': 'float32[1]',
      'memory/0/packed/0': 'float32[1,1,4,5]',
      'memory/0/packed/1': 'float32[1,1,8,9]',
      'memory/0/directions': 'float32[1]',
    },
  }
