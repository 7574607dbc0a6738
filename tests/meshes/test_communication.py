"""What updates lower to, send over the network and take in memory."""

import functools
import math
import re

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import pytest

from bsfa_optax import (
  bsfa,
  bsfa_adamw,
  dct,
  diagnostics,
  estimators,
  kronecker,
  low_rank,
  pca,
  scale_by_whitening,
)
from bsfa_optax.projected import projected
from bsfa_optax.state import abstract_state

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

FAST = {'xla_backend_optimization_level': 0}
MESHES = {'explicit': AxisType.Explicit, 'auto': AxisType.Auto}
COLLECTIVE = re.compile(
  r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(?:-start)?\('
)


def collectives(tx, shapes, spec, kind='explicit'):
  """For each collective of a compiled update its kind and its entries in all."""
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(MESHES[kind],))
  with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, spec)
    updates = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes]
    state = abstract_state(tx, updates)
    text = jax.jit(tx.update).lower(updates, state, updates).compile(FAST).as_text()
  return sorted((name, sum(entries)) for name, entries in sent(text))


def sent(text):
  """For each collective of a compiled program its kind, and its arrays' entries."""
  for result, name in COLLECTIVE.findall(text):
    sizes = re.findall(r'\w+\[([\d,]*)\]', result)
    yield name, [math.prod(int(n) for n in s.split(',') if n) for s in sizes]


def arrays_sent(text):
  return {(name, entries) for name, sizes in sent(text) for entries in sizes}


SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize(
  ('solver', 'kind', 'count'),
  [('gram', 'auto', 5), ('randomized', 'explicit', 8)],
)
def test_pca_communicates_small_sums_only(solver, count, kind):
  tx = bsfa(estimator=pca(rank=2, history=4, solver=solver))
  found = collectives(tx, [(8, 8)], P('fsdp'), kind)
  assert {name for name, _ in found} == {'all-reduce'}
  assert len(found) == count
  # The size does not depend on the parameter count, nor the number on the leaves.
  assert found == collectives(tx, [(64, 32)], P('fsdp'), kind)
  assert len(collectives(tx, [(8, 8)] * 3, P('fsdp'), kind)) == count


@SLOW
@pytest.mark.parametrize(
  ('name', 'kind'),
  [('whitening', 'explicit'), ('bsfa_adamw', 'auto'), ('dct', 'explicit')],
)
def test_along_whole_axes_there_are_all_reduces_alone(name, kind):
  tx = {
    'whitening': scale_by_whitening(axes=1),
    'bsfa_adamw': bsfa_adamw(1e-3, filter=scale_by_whitening(axes=1)),
    'dct': bsfa(estimator=dct(2, axes=1)),
  }[name]
  few = collectives(tx, [(8, 6)] * 2, P('fsdp'), kind)
  many = collectives(tx, [(8, 6)] * 4, P('fsdp'), kind)
  longer = collectives(tx, [(64, 6)] * 2, P('fsdp'), kind)
  assert {name for name, _ in few + many} == {'all-reduce'}
  assert len(many) == len(few) <= 4  # finite; two norms, or energies; moments
  assert longer == few
  assert max(size for _, size in many) <= 4 * 36


@SLOW
@pytest.mark.parametrize('kind', MESHES)
def test_roots_shared_out_over_an_axis_are_gathered_once(kind):
  tx = scale_by_whitening(axes=1, distribute_over='fsdp')
  few, many = (collectives(tx, [(8, 6)] * n, P('fsdp'), kind) for n in (2, 8))
  whole = collectives(scale_by_whitening(axes=1), [(8, 6)] * 8, P('fsdp'), kind)
  gathers = [size for name, size in many if name != 'all-reduce']
  assert len(few) == len(many) == len(whole) + 1
  assert gathers == [8 * 36]
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(MESHES[kind],))
  rows = np.random.default_rng(0).normal(size=(3, 8, 6))
  updates = [jnp.asarray(x, jnp.float32) for x in rows]
  found = []
  for options in ({}, {'distribute_over': 'fsdp'}):
    tx = scale_by_whitening(axes=1, **options)
    with jax.set_mesh(mesh):
      sharded = jax.device_put(updates, NamedSharding(mesh, P('fsdp')))
      out, _ = jax.jit(tx.update)(sharded, tx.init(sharded))
    found.append(np.stack([np.asarray(x) for x in out]))
  np.testing.assert_allclose(*found, atol=1e-5)


def llama(layers):
  """A LLaMA's shapes with 64 experts in each layer, split over 8 devices, and specs."""
  kernel = lambda *shape: {'kernel': shape}
  layer = {
    'attention': {name: kernel(16, 16) for name in ('query', 'key', 'value', 'out')},
    'mlp': {'gate': kernel(16, 24), 'up': kernel(16, 24), 'down': kernel(24, 16)},
    'experts': {'up': (64, 8, 16), 'down': (64, 16, 8)},
    'norm': {'scale': (16,)},
  }
  tree = {'embed': {'embedding': (32, 16)}, 'layers': {str(i): layer for i in layers}}
  batch = jax.tree.map(
    lambda shape: 0 if len(shape) == 3 else None,
    tree,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  return tree, batch


@SLOW
@pytest.mark.parametrize('kind', MESHES)
def test_collectives_of_a_llama_with_64_experts_do_not_grow_with_its_layers(kind):
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(MESHES[kind],))
  split = NamedSharding(mesh, P('fsdp'))
  counts = []
  for layers in (range(1), range(3)):
    shapes, batch = llama(layers)
    tx = bsfa_adamw(1e-3, filter=scale_by_whitening(batch_axes=batch))
    updates = jax.tree.map(
      lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )
    with jax.set_mesh(mesh):
      state = abstract_state(tx, updates)
      step = jax.jit(tx.update).lower(updates, state, updates).compile(FAST)
    counts.append(len(COLLECTIVE.findall(step.as_text())))
  assert counts[1] <= counts[0]


@SLOW
def test_experts_split_over_an_auto_mesh_are_whitened_as_on_one_device():
  mesh = jax.make_mesh((8,), ('expert',), axis_types=(AxisType.Auto,))
  tx = scale_by_whitening(batch_axes=0, refresh_every=1)
  rows = np.random.default_rng(0).normal(size=(64, 6, 4))
  updates = {'experts': jnp.asarray(rows, jnp.float32)}
  expected, _ = jax.jit(tx.update)(updates, tx.init(updates))
  with jax.set_mesh(mesh):
    split = jax.device_put(updates, NamedSharding(mesh, P('expert')))
    found, _ = jax.jit(tx.update)(split, tx.init(split))
  np.testing.assert_allclose(found['experts'], expected['experts'], atol=1e-5)


def test_roots_are_shared_out_over_an_axis_of_the_mesh_in_use():
  tx = scale_by_whitening(distribute_over='rows')
  updates = jnp.ones((4, 4))
  with pytest.raises(ValueError, match=r"distribute_over .* got 'rows'.*set_mesh"):
    tx.update(updates, tx.init(updates))


@SLOW
@pytest.mark.parametrize(('n', 'rows'), [(1, 8), (3, 64)])
def test_kronecker_along_whole_axes_sends_small_sums_only(n, rows):
  tx = bsfa(estimator=kronecker(axes=1))
  # Is the update finite; norms; second moments at a refresh.
  expected = sorted([('all-reduce', s) for s in (1, 2 * n, 36 * n)])
  assert collectives(tx, [(rows, 6)] * n, P('fsdp')) == expected


@SLOW
@pytest.mark.parametrize('spec', [P('fsdp'), P(None, 'fsdp')])
def test_whitening_gathers_along_sharded_axes_only(spec):
  tx = scale_by_whitening(axes=1)
  found, larger = (collectives(tx, [(n, 4)] * 2, spec) for n in (8, 64))
  if spec == P('fsdp'):
    assert {name for name, _ in found} == {'all-reduce'}
    assert found == larger
  else:
    assert 'all-gather' in {name for name, _ in larger}
    assert max(size for name, size in larger if name == 'all-reduce') <= 2 * 4 * 4 + 1


@SLOW
@pytest.mark.parametrize('spec', [P('fsdp'), P(None, 'fsdp')])
def test_kronecker_communicates_along_sharded_factors_only(spec):
  # The axis with a factor is the second one.
  tx = bsfa(estimator=kronecker(max_size=4))
  found, larger = (collectives(tx, [(n, 4)], spec) for n in (8, 64))
  if spec == P('fsdp'):
    assert {name for name, _ in found} == {'all-reduce'}
    assert found == larger
  else:  # a rotation along a sharded axis takes all of it: see the docstring
    gathered = [size for name, size in larger if name == 'all-gather']
    assert gathered == [64 * 4] * (2 + 3)
    assert {name for name, _ in larger} == {'all-gather', 'all-reduce'}
    assert max(size for name, size in larger if name == 'all-reduce') <= 4 * 4 + 1


@SLOW
@pytest.mark.parametrize(
  ('options', 'share'),
  [
    ({'rank': 3, 'history': 24, 'decay': 0.0, 'solver': 'gram'}, 0.5),
    ({'rank': 16, 'history': 8}, 0.9),
  ],
)
def test_donated_step_has_no_second_copy_of_the_stacks(options, share):
  leaves, shape = 12, (64, 48)
  tx = bsfa(estimator=pca(**options))
  params = [jax.ShapeDtypeStruct(shape, jnp.float32)] * leaves
  state = jax.eval_shape(tx.init, params)
  stacks = (options['rank'] + options['history']) * leaves * np.prod(shape) * 4

  def memory(donate):
    # As on accelerators; on CPU the default is to do all leaves at once.
    compiler = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
    step = jax.jit(tx.update, donate_argnums=donate).lower(params, state)
    return step.compile(compiler_options=compiler).memory_analysis()

  donated, kept = memory((0, 1)), memory(())
  # All of the updates and of the state is written in place.
  assert donated.alias_size_in_bytes == kept.output_size_in_bytes - _tuple_bytes(
    params, state
  )
  # The new basis, beside the old one until a refresh ends, and one leaf in the works.
  assert donated.temp_size_in_bytes < share * stacks
  # Without donation, a step has the stacks twice.
  assert kept.alias_size_in_bytes == 0
  assert kept.output_size_in_bytes > stacks


def _tuple_bytes(*trees):
  """Bytes of the pointers in a compiled function's tuple of results."""
  return 8 * len(jax.tree.leaves(trees))


@SLOW
def test_diagnostics_send_small_sums_only():
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Explicit,))

  def measure(params, a, b, key):
    layout = estimators.layout(params)
    outputs = lambda p: jnp.stack([jnp.sin(p).sum(), (p**3).sum()])
    loss = lambda z: jnp.sum(z**2)
    hessian = diagnostics.hessian_top_k(lambda p: loss(outputs(p)), params, 2, layout)
    curvature = diagnostics.curvature_energy(
      outputs, loss, params, a, layout, key=key, samples=3
    )
    overlap = diagnostics.subspace_overlap(a, b, layout)
    return overlap, diagnostics.principal_angles(a, b, layout), hessian, curvature

  def sent(rows):
    with jax.set_mesh(mesh):
      like = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, spec)
      )
      stack = like((3, rows, 6), P(None, 'x'))
      arguments = like((rows, 6), P('x')), stack, stack, jax.random.key(0)
      text = jax.jit(measure).lower(*arguments).compile(FAST).as_text()
    return sorted(COLLECTIVE.findall(text))

  found = sent(8)
  assert {name for _, name in found} == {'all-reduce'}
  assert found == sent(64)  # no more for a larger block


@SLOW
@pytest.mark.parametrize(
  ('subspace', 'kind'), [('svd', 'explicit'), ('svd', 'auto'), ('dct', 'explicit')]
)
def test_matrices_split_within_are_not_gathered_for_singular_vectors(subspace, kind):
  tx = projected(optax.scale_by_adam(), 2, subspace=subspace)
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(MESHES[kind],) * 2)
  specs = {'both': P('fsdp', 'tensor'), 'shorter': P(None, 'fsdp')}
  with jax.set_mesh(mesh):
    put = lambda spec: jax.device_put(jnp.ones((256, 128)), NamedSharding(mesh, spec))
    arrays = arrays_sent(updated(tx, {k: put(spec) for k, spec in specs.items()}))
  largest = max(entries for _, entries in arrays)
  # Thin products alone, of fewer entries than a device's share; dct is the control.
  assert largest == 256 * 128 if subspace == 'dct' else largest < 256 * 128 // 8


def updated(tx, grads):
  """The compiled program of an update after a jitted init."""
  lowered = jax.jit(tx.update).lower(grads, jax.jit(tx.init)(grads), grads)
  return lowered.compile(FAST).as_text()


@SLOW
def test_layers_are_projected_where_they_lie():
  tx = projected(optax.scale_by_adam(), 2, residual='scaled', batch_axes=1)
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    g = jax.device_put(jnp.ones((8, 8, 4)), NamedSharding(mesh, P('fsdp')))
    # Bits say whether all gradients are finite, and moments have a sign.
    assert arrays_sent(updated(tx, g)) == {('all-reduce', 1)}


@SLOW
def test_low_rank_layers_are_made_stepped_and_renewed_where_they_lie():
  tx = low_rank.renewable(optax.scale_by_adam())
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Explicit,))

  def everything(params, key):
    trained, frozen = low_rank.init(params, key, low_rank.sst(2), batch_axes=1)
    grads = jax.grad(loss)(trained, frozen)
    updates, state = tx.update(grads, tx.init(trained), trained)
    trained = low_rank.retract(optax.apply_updates(trained, updates))
    return low_rank.renew(tx, trained, frozen, state, key)

  def loss(trained, frozen):
    return jnp.sin(low_rank.join(trained, frozen)['w'][...]).sum()

  with jax.set_mesh(mesh):
    params = {'w': jax.device_put(jnp.ones((8, 6, 4)), NamedSharding(mesh, P('fsdp')))}
    text = jax.jit(everything).lower(params, jax.random.key(0)).compile().as_text()
  # Numbers alone: whether it is time to decompose, and norms.
  arrays = arrays_sent(text)
  assert all(entries == 1 for _, entries in arrays), arrays
  assert 'collective-permute' not in text


LOWERED = {
  'whitening': scale_by_whitening(),
  'whitening_blocks': scale_by_whitening(block_size=5, axes=-1),
  'gram': bsfa(estimator=pca(rank=3, history=4, solver='gram')),
  'randomized': bsfa(estimator=pca(rank=3, history=4, solver='randomized')),
  'window': bsfa(
    estimator=pca(rank=3, history=4, decay=0.0, refresh_every=2), grafting=True
  ),
  'kronecker': bsfa(),
  'kronecker_axes': bsfa(0.1, 4.0, exponent=0.5, estimator=kronecker(axes=-1)),
  'dct': bsfa(estimator=dct(rank=3)),
}
CALLBACKS = ('callback', 'infeed', 'outfeed', 'SendToHost', 'RecvFromHost')


@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('name', LOWERED)
def test_update_lowers_for_accelerators(name, dtype):
  tx = LOWERED[name]
  params = {
    'kernel': jax.ShapeDtypeStruct((8, 12), dtype),
    'bias': jax.ShapeDtypeStruct((12,), dtype),
    'layers': [{'w': jax.ShapeDtypeStruct((8, 12), dtype)}] * 2,
  }
  state = jax.eval_shape(tx.init, params)
  exported = jax.export.export(jax.jit(tx.update), platforms=('cuda', 'tpu'))(
    params, state, params
  )
  assert exported.platforms == ('cuda', 'tpu')
  text = exported.mlir_module()
  assert 'stablehlo.case' in text or name == 'dct'  # the refresh is in it
  assert 'f64' not in text
  assert 'tensor<?' not in text
  assert not [name for name in CALLBACKS if name in text]
  for aval, x in zip(exported.out_avals, jax.tree.leaves((params, state)), strict=True):
    assert (aval.shape, aval.dtype) == (x.shape, x.dtype)
