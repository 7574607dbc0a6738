"""Shardings of the state, whatever is around the filter."""

import functools

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import optax
import pytest

from bsfa_optax import bsfa, bsfa_adamw, kronecker, pca, scale_by_whitening
from bsfa_optax.state import abstract_state, state_shardings

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision
MESHES = {'explicit': AxisType.Explicit, 'auto': AxisType.Auto}


def make_mesh(kind):
  return jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(MESHES[kind],) * 2)


WRAPPERS = {
  'chain': lambda tx: optax.chain(optax.adamw(1e-3), tx),
  'masked': lambda tx: optax.masked(tx, {'kernel': True, 'bias': False}),
  'partition': lambda tx: optax.partition(
    {'filtered': tx, 'plain': optax.adam(1e-3)}, {'kernel': 'filtered', 'bias': 'plain'}
  ),
  'multi_steps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'inject_hyperparams': lambda tx: optax.inject_hyperparams(
    bsfa_adamw, static_args='filter'
  )(learning_rate=1e-3, filter=tx),
}


@pytest.mark.parametrize(
  ('wrapper', 'kind'), [('chain', 'auto'), *((x, 'explicit') for x in WRAPPERS)]
)
def test_state_shardings(wrapper, kind, standard_promotion):
  tx = WRAPPERS[wrapper](bsfa(estimator=pca(rank=3, history=4)))
  mesh, specs = make_mesh(kind), {'kernel': P('fsdp', 'tensor'), 'bias': P('tensor')}
  named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  params = jax.device_put({'kernel': jnp.ones((8, 4)), 'bias': jnp.ones(4)}, named)
  shapes = jax.eval_shape(tx.init, params)
  shardings = state_shardings(tx, params)
  found = {  # by shape, which says here what a leaf is
    x.shape: s.spec
    for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
  }
  assert found.pop((3, 8, 4)) == found.pop((4, 8, 4)) == P(None, 'fsdp', 'tensor')
  assert found.pop((8, 4), specs['kernel']) == specs['kernel']
  assert found.pop((4,), specs['bias']) == specs['bias']
  assert all(axis is None for spec in found.values() for axis in spec)

  with jax.set_mesh(mesh):
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
  assert shardings == state_shardings(tx, shapes_of(params), named)
  target = abstract_state(tx, shapes_of(params), named)
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), target) == jax.tree.map(
    lambda x, s: (x.shape, x.dtype, s), shapes, shardings
  )
  by_spec = state_shardings(tx, shapes_of(params), specs)
  assert jax.tree.map(lambda x, s: not x.spec or s == x.spec, shardings, by_spec)


def shapes_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_state_shardings_on_one_device_and_errors():
  tx = bsfa()
  params = jnp.ones((4, 4))
  shardings = state_shardings(tx, params)
  assert set(jax.tree.leaves(shardings)) == {params.sharding}
  with pytest.raises(ValueError, match='shardings must be all'):
    state_shardings(tx, shapes_of(params))
  mixed = [P('x'), NamedSharding(make_mesh('auto'), P())]
  with pytest.raises(ValueError, match='shardings must be all'):
    state_shardings(tx, [params, params], mixed)


@pytest.mark.parametrize('kind', MESHES)
@pytest.mark.parametrize('name', ['whitening', 'bsfa_adamw', 'bsfa'])
def test_what_is_learnt_per_matrix_is_replicated(name, kind):
  tx = {
    'whitening': scale_by_whitening(),
    'bsfa_adamw': bsfa_adamw(1e-3),
    'bsfa': bsfa(),
  }[name]
  mesh, spec = make_mesh(kind), P('fsdp', 'tensor')
  kernel = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  params = {'bias': jax.ShapeDtypeStruct((4,), jnp.float32), 'layers': [kernel] * 3}
  specs = {'bias': P('tensor'), 'layers': spec}
  named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  target = abstract_state(tx, params, named)
  memory = jax.tree.leaves(optax.tree.get(target, 'memory'))
  sides = {(3, 1, 8, 9), (3, 1, 4, 5), (3,)}
  assert {x.shape for x in memory} == (
    {(3, 8, 8), (3, 4, 4), (3, 8), (3, 4)} if name == 'bsfa' else sides
  )
  assert all(axis is None for x in memory for axis in x.sharding.spec)
  for x in jax.tree.leaves(target):
    wanted = {(8, 4): spec, (4,): P('tensor')}.get(x.shape, P())
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, wanted), x.ndim)


@pytest.mark.parametrize('name', ['gram', 'whitening', 'kronecker'])
def test_map_params_with_specs_is_right_or_a_clear_error(name):
  tx = {
    'gram': bsfa(estimator=pca(3, 4)),
    'whitening': scale_by_whitening(),
    'kronecker': bsfa(estimator=kronecker()),
  }[name]
  specs = {'bias': P('fsdp'), 'kernel': P('fsdp', 'tensor')}
  params = {'bias': jnp.ones(4), 'kernel': jnp.ones((4, 8))}
  state = tx.init(params)
  if name == 'gram':  # a stack has one axis more than its parameter
    with pytest.raises(ValueError, match=r'key path|named tuple'):
      optax.tree.map_params(tx, lambda _, spec: spec, state, specs)
  else:  # nothing here is shaped like a parameter
    mapped = optax.tree.map_params(
      tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    assert {*jax.tree.leaves(mapped)} == {P()}
