"""Sharded runs are the unsharded run, and their state stays where it was put."""

import functools
import re

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import pytest

import bsfa_optax
from bsfa_optax import dct, kronecker, pca

# Every axis of leaves with 1, 2 and 3 axes in turn, and two at once.
SPECS = {
  'bias': P('fsdp'),
  'dense': {
    'rows': P('fsdp', None),
    'columns': P(None, 'tensor'),
    'both': P('tensor', 'fsdp'),
  },
  'heads': {
    'first': P('tensor', None, None),
    'second': P(None, 'fsdp', None),
    'third': P('fsdp', None, 'tensor'),
  },
  'layers': {'first': P('fsdp', None, 'tensor'), 'second': P('tensor', None, 'fsdp')},
}
SHAPES = {'bias': (8,), 'dense': (4, 8), 'heads': (4, 4, 6), 'layers': (4, 2, 8)}
BATCH_AXES = {
  'bias': None,
  'dense': None,
  'heads': None,
  'layers': {'first': 0, 'second': 1},
}
# Those that are whole, where there are any.
AXES = {
  'bias': None,
  'dense': {'rows': 1, 'columns': 0, 'both': 0},
  'heads': {'first': (1, -1), 'second': (0, 2), 'third': 1},
  'layers': {'first': 1, 'second': 0},
}
# Compiling is most of the time, and the little there is to run needs no tuning.
FAST = {'xla_backend_optimization_level': 0}
FAST_JIT = functools.partial(jax.jit, compiler_options=FAST)
STEPS = 13  # at least three refreshes


def joint(params):
  """One block for the leaves without batch axes, biases included."""
  group = lambda key: None if key == 'layers' else 'all'
  return {k: jax.tree.map(lambda _, k=k: group(k), v) for k, v in params.items()}


small = functools.partial(pca, rank=3, history=4, batch_axes=BATCH_AXES)
ESTIMATORS = {
  'gram': small(solver='gram'),
  'gram_centered_window': small(solver='gram', decay=0.0, centered=True),
  'randomized_window': small(solver='randomized', decay=0.0, refresh_every=3),
  'randomized_centered': small(solver='randomized', centered=True),
  'joint': pca(rank=3, history=4, blocks=joint),
  'kronecker': kronecker(refresh_every=4, batch_axes=BATCH_AXES, max_ratio=1e9),
  'kronecker_axes': kronecker(
    refresh_every=4, batch_axes=BATCH_AXES, max_ratio=1e9, axes=AXES
  ),
  'dct': dct(2, batch_axes=BATCH_AXES),
  'dct_axes': dct(1, batch_axes=BATCH_AXES, axes=AXES),
}
MESHES = {'explicit': AxisType.Explicit, 'auto': AxisType.Auto}


def make_mesh(kind):
  return jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(MESHES[kind],) * 2)


def make_updates(steps=STEPS):
  """Updates with three strong directions in each leaf: a gap behind the rank."""
  rng = np.random.default_rng(0)

  def leaf(path, _):
    shape = SHAPES[path[0].key]
    directions = rng.normal(size=(3, *shape))
    weights = rng.normal(size=(steps, 3)) * [9.0, 6.0, 4.0]
    noise = 0.1 * rng.normal(size=(steps, *shape))
    return np.asarray(np.tensordot(weights, directions, 1) + noise, np.float32)

  rows = jax.tree.map_with_path(leaf, SPECS)
  return [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(steps)]


def make_tx(name):
  return bsfa_optax.bsfa(
    0.1, 3.0, exponent=0.5, preserve_norm=True, estimator=ESTIMATORS[name]
  )


def train(tx, state, updates):
  """The filtered updates of every step, the last state, and the compilations."""
  step = FAST_JIT(tx.update)
  filtered = []
  for u in updates:
    out, state = step(u, state)
    filtered.append(jax.device_get(out))
  return filtered, state, step._cache_size()


def typeof(tree):
  return jax.tree.map(jax.typeof, tree)


@functools.cache
def unsharded(name):
  tx, updates = make_tx(name), make_updates()
  filtered, state, _ = train(tx, tx.init(updates[0]), updates)
  explained = optax.tree.get(state, 'explained_variance')
  assert 'dct' in name or explained.min() > 0.2  # it has refreshed
  return filtered, state


@pytest.mark.parametrize('kind', MESHES)
@pytest.mark.parametrize('name', ESTIMATORS)
def test_sharded_run_is_the_unsharded_run(name, kind):
  mesh, tx = make_mesh(kind), make_tx(name)
  specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
  with jax.set_mesh(mesh):
    updates = [jax.device_put(u, specs) for u in make_updates()]
    shardings = bsfa_optax.state_shardings(tx, updates[0])
    state = jax.jit(tx.init, out_shardings=shardings)(updates[0])
    if kind == 'explicit':
      types = typeof(state)
      assert typeof(tx.init(updates[0])) == types
      assert typeof(jax.jit(tx.init)(updates[0])) == types
    filtered, final, compilations = train(tx, state, updates)

  assert compilations == 1
  assert typeof(state) == typeof(final)
  for want, *found in zip(
    *map(jax.tree.leaves, (shardings, state, final)), strict=True
  ):
    assert all(x.sharding.is_equivalent_to(want, x.ndim) for x in found)

  expected, expected_state = unsharded(name)
  assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
  jax.tree.map(assert_close, filtered, expected)
  for field in ('dominant_fraction', 'explained_variance')[: 1 if 'dct' in name else 2]:
    assert_close(optax.tree.get(final, field), optax.tree.get(expected_state, field))
  changed = jax.tree.map(
    lambda a, b: np.abs(a - b).max() > 0.1, filtered[-1], jax.device_get(updates[-1])
  )
  assert all(jax.tree.leaves([changed['dense'], changed['heads']]))


# Manual meshes: what `jax.shard_map` hands to the transformation are the shards.
MANUAL_SPECS = {
  'rows': P('fsdp', None),
  'columns': P(None, 'fsdp'),
  'whole': P(),
  'bias': P('fsdp'),
}
MANUAL_SHAPES = {'rows': (8, 6), 'columns': (6, 8), 'whole': (4, 5), 'bias': (8,)}


def manual_updates():
  rng = np.random.default_rng(1)
  return [
    {k: np.float32(rng.normal(size=s)) for k, s in MANUAL_SHAPES.items()}
    for _ in range(10)
  ]


def filtered_by(tx, updates, wrap=lambda update, *_: FAST_JIT(update)):
  """Filtered updates, the third one with a NaN, and the last state."""
  updates = [dict(u) for u in updates]
  updates[2]['rows'] = np.where(np.arange(8)[:, None] == 7, np.nan, updates[2]['rows'])
  state, out = tx.init(updates[0]), []
  step = wrap(tx.update, tx, updates[0])
  for u in updates:
    filtered, state = step(u, state)
    out.append(filtered)
  return jax.device_get((out, state))


@pytest.mark.parametrize(
  ('solver', 'check_vma'), [('gram', True), ('gram', False), ('randomized', True)]
)
def test_shard_map_with_axis_name(solver, check_vma):
  # Without the check, all leaves are taken to be split.
  keep = [k for k in MANUAL_SPECS if check_vma or k != 'whole']
  group = lambda params: {k: 'one' if k in ('rows', 'bias') else k for k in params}
  make = lambda **kwargs: bsfa_optax.bsfa(
    preserve_norm=True,
    estimator=pca(rank=2, history=3, solver=solver, blocks=group, **kwargs),
  )
  specs = {k: MANUAL_SPECS[k] for k in keep}
  updates = [{k: u[k] for k in keep} for u in manual_updates()]
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)

  def wrap(update, tx, params):
    state_specs = bsfa_optax.state_shardings(make(), params, specs)
    return FAST_JIT(
      jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(specs, state_specs),
        out_specs=(specs, state_specs),
        check_vma=check_vma,
      )
    )

  found, state = filtered_by(make(axis_name='fsdp'), updates, wrap)
  expected, expected_state = filtered_by(make(), updates)
  assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
  jax.tree.map(assert_close, found, expected)
  # Singular vectors have no sign.
  jax.tree.map(lambda a, b: assert_close(abs(a), abs(b)), state, expected_state)
  assert state.bsfa_step == len(updates) - 1


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize(
  'make',
  # From the shapes of the shards alone, no axis would be within `max_ratio`.
  [functools.partial(kronecker, refresh_every=3, max_ratio=1.5), dct],
  ids=['kronecker', 'dct'],
)
def test_shard_map_with_whole_axes(make, check_vma):
  specs = MANUAL_SPECS | {'stacked': P(None, 'fsdp')}
  axes = {'rows': 1, 'columns': 0, 'stacked': 2}
  keep = [k for k in specs if check_vma or k != 'whole']
  specs = {k: specs[k] for k in keep}
  rng = np.random.default_rng(2)
  updates = [
    {k: u[k] for k in keep if k in u}
    | {'stacked': np.float32(rng.normal(size=(3, 8, 4)))}
    for u in manual_updates()
  ]
  if make is dct:
    make = functools.partial(dct, 2)

  def tx_of(**kwargs):
    estimator = make(
      axes={k: axes.get(k) for k in keep},
      batch_axes={k: 0 if k == 'stacked' else None for k in keep},
      **kwargs,
    )
    return bsfa_optax.bsfa(0.1, 3.0, preserve_norm=True, estimator=estimator)

  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)

  def wrap(update, tx, params):
    state_specs = bsfa_optax.state_shardings(tx, params, specs)
    return FAST_JIT(
      jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(specs, state_specs),
        out_specs=(specs, state_specs),
        check_vma=check_vma,
      )
    )

  found, state = filtered_by(tx_of(axis_name='fsdp'), updates, wrap)
  expected, expected_state = filtered_by(tx_of(), updates)
  assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
  jax.tree.map(assert_close, found, expected)
  # Eigenvectors have no sign.
  jax.tree.map(lambda a, b: assert_close(abs(a), abs(b)), state, expected_state)
  assert state.bsfa_step == len(updates) - 1
  for key in set(keep) - {'bias'}:
    assert np.abs(found[-1][key] - updates[-1][key]).max() > 0.1


@pytest.mark.parametrize('make', [kronecker, dct])
def test_axes_must_be_named_for_shards(make):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  tx = bsfa_optax.bsfa(estimator=make(axis_name='fsdp'))
  step = jax.shard_map(
    lambda u: tx.update(u, tx.init(u))[0],
    mesh=mesh,
    in_specs=P('fsdp'),
    out_specs=P('fsdp'),
  )
  with pytest.raises(ValueError, match=r"axes must be given for 'w'.*\['fsdp'\].*name"):
    jax.eval_shape(step, {'w': jnp.ones((8, 3))})


def test_shard_map_init_is_typed_as_update():
  tx = bsfa_optax.bsfa(estimator=pca(rank=2, history=3, axis_name='fsdp'))
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))

  @jax.shard_map(mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp'))
  def run(params):
    init = tx.init(params)
    updates, state = tx.update(params, init)
    assert typeof(init) == typeof(state)
    assert typeof(updates) == typeof(params)
    return updates

  jax.eval_shape(run, jnp.ones((8, 3)))


@pytest.mark.parametrize('estimator', [pca(rank=2, history=3), kronecker(), dct()])
def test_unreduced_gradients_are_refused(estimator):
  tx = bsfa_optax.bsfa(estimator=estimator)
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  step = jax.shard_map(
    lambda u, s: tx.update(u, s)[0], mesh=mesh, in_specs=(P('data'), P()), out_specs=P()
  )
  with pytest.raises(ValueError, match=r"varies over .*\['data'\].*pmean.*axis_name"):
    jax.eval_shape(step, jnp.ones((8, 3)), tx.init(jnp.ones((2, 3))))


@pytest.mark.parametrize(
  ('how', 'name'),
  [
    ('shard_map', 'pca'),
    ('shard_map', 'kronecker'),
    ('shard_map', 'dct'),
    ('pmap', 'pca'),
  ],
)
def test_data_parallel(how, name):
  estimator = {
    'pca': pca(rank=2, history=3),
    'kronecker': kronecker(refresh_every=3),
    'dct': dct(2),
  }
  tx = bsfa_optax.bsfa(estimator=estimator[name])
  updates = [{k: u[k] for k in ('rows', 'bias')} for u in manual_updates()]
  reduced = lambda u, s: tx.update(jax.lax.pmean(u, 'data'), s)
  # The devices see different gradients, and their mean is the update.
  spread = lambda x: np.stack([x * (1 + d) for d in (-0.5, 0.5, -0.25, 0.25)])
  if how == 'shard_map':
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
    local = lambda u, s: reduced(jax.tree.map(lambda x: x[0], u), s)
    step = FAST_JIT(
      jax.shard_map(local, mesh=mesh, in_specs=(P('data'), P()), out_specs=P())
    )
    state, first = tx.init(updates[0]), lambda x: x
  else:
    devices = jax.devices()[:4]
    step = jax.pmap(reduced, axis_name='data', devices=devices)
    replicated = jax.tree.map(lambda x: jnp.stack([x] * 4), tx.init(updates[0]))
    state, first = replicated, lambda x: x[0]
  reference, alone = tx.init(updates[0]), FAST_JIT(tx.update)
  for u in updates:
    found, state = step(jax.tree.map(spread, u), state)
    expected, reference = alone(u, reference)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(first(a), b, rtol=1e-3, atol=1e-4),
      jax.device_get(found),
      jax.device_get(expected),
    )


# Shardings of the state, whatever is around the transformation.
WRAPPERS = {
  'chain': lambda tx: optax.chain(optax.adamw(1e-3), tx),
  'masked': lambda tx: optax.masked(tx, {'kernel': True, 'bias': False}),
  'partition': lambda tx: optax.partition(
    {'filtered': tx, 'plain': optax.adam(1e-3)}, {'kernel': 'filtered', 'bias': 'plain'}
  ),
  'multi_steps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'inject_hyperparams': lambda tx: optax.inject_hyperparams(
    bsfa_optax.bsfa_adamw, static_args='estimator'
  )(learning_rate=1e-3, estimator=pca(rank=3, history=4)),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('kind', MESHES)
def test_state_shardings(wrapper, kind, standard_promotion):
  tx = WRAPPERS[wrapper](bsfa_optax.bsfa(estimator=pca(rank=3, history=4)))
  mesh, specs = make_mesh(kind), {'kernel': P('fsdp', 'tensor'), 'bias': P('tensor')}
  named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  params = jax.device_put({'kernel': jnp.ones((8, 4)), 'bias': jnp.ones(4)}, named)
  shapes = jax.eval_shape(tx.init, params)
  shardings = bsfa_optax.state_shardings(tx, params)
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
    _, after = jax.jit(tx.update)(params, state, params)
    jax.tree.map(
      lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
      after,
      shardings,
    )
  assert shardings == bsfa_optax.state_shardings(tx, shapes_of(params), named)
  target = bsfa_optax.abstract_state(tx, shapes_of(params), named)
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), target) == jax.tree.map(
    lambda x, s: (x.shape, x.dtype, s), shapes, shardings
  )
  by_spec = bsfa_optax.state_shardings(tx, shapes_of(params), specs)
  assert jax.tree.map(lambda x, s: not x.spec or s == x.spec, shardings, by_spec)


def shapes_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_state_shardings_on_one_device_and_errors():
  tx = bsfa_optax.bsfa()
  params = jnp.ones((4, 4))
  shardings = bsfa_optax.state_shardings(tx, params)
  assert set(jax.tree.leaves(shardings)) == {params.sharding}
  with pytest.raises(ValueError, match='shardings must be all'):
    bsfa_optax.state_shardings(tx, shapes_of(params))
  mixed = [P('x'), NamedSharding(make_mesh('auto'), P())]
  with pytest.raises(ValueError, match='shardings must be all'):
    bsfa_optax.state_shardings(tx, [params, params], mixed)


@pytest.mark.parametrize('name', ['gram', 'kronecker'])
def test_map_params_with_specs_is_a_clear_error(name):
  tx = make_tx(name)
  state = tx.init(make_updates(1)[0])
  with pytest.raises(ValueError, match=r'key path|named tuple'):
    optax.tree.map_params(tx, lambda _, spec: spec, state, SPECS)


# What goes over the network.
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
    state = bsfa_optax.abstract_state(tx, updates)
    text = jax.jit(tx.update).lower(updates, state).compile(FAST).as_text()
  found = []
  for result, name in COLLECTIVE.findall(text):
    sizes = re.findall(r'\w+\[([\d,]*)\]', result)
    entries = sum(int(np.prod([int(n) for n in s.split(',') if n])) for s in sizes)
    found.append((name, entries))
  return sorted(found)


@pytest.mark.parametrize(
  ('solver', 'kind', 'count'),
  [('gram', 'explicit', 4), ('gram', 'auto', 4), ('randomized', 'explicit', 7)],
)
def test_pca_communicates_small_sums_only(solver, count, kind):
  tx = bsfa_optax.bsfa(estimator=pca(rank=2, history=4, solver=solver))
  found = collectives(tx, [(8, 8)], P('fsdp'), kind)
  assert {name for name, _ in found} == {'all-reduce'}
  assert len(found) == count
  # The size does not depend on the parameter count, nor the number on the leaves.
  assert found == collectives(tx, [(64, 32)], P('fsdp'), kind)
  assert len(collectives(tx, [(8, 8)] * 3, P('fsdp'), kind)) == count


@pytest.mark.parametrize('kind', MESHES)
@pytest.mark.parametrize(
  ('estimator', 'sizes'),
  # Is the update finite; norms or energies; second moments at a refresh.
  [(kronecker(axes=1), [1, 2, 36]), (dct(2, axes=1), [1, 6])],
  ids=['kronecker', 'dct'],
)
def test_along_whole_axes_only_small_sums_are_sent(estimator, sizes, kind):
  tx = bsfa_optax.bsfa(estimator=estimator)
  for shape in ((8, 6), (64, 6)):  # no more for a larger sharded axis
    for leaves in (1, 3, 6):  # and in no more messages for more leaves
      found = collectives(tx, [shape] * leaves, P('fsdp'), kind)
      assert found == [('all-reduce', leaves * size) for size in sizes]


@pytest.mark.parametrize('spec', [P('fsdp'), P(None, 'fsdp')])
def test_kronecker_communicates_along_sharded_factors_only(spec):
  # The axis with a factor is the second one.
  tx = bsfa_optax.bsfa(estimator=kronecker(max_size=4))
  found, larger = (collectives(tx, [(n, 4)], spec) for n in (8, 64))
  if spec == P('fsdp'):
    assert {name for name, _ in found} == {'all-reduce'}
    assert found == larger
  else:  # a rotation along a sharded axis takes all of it: see the docstring
    gathered = [size for name, size in larger if name == 'all-gather']
    assert gathered == [64 * 4] * (2 + 3)
    assert {name for name, _ in larger} == {'all-gather', 'all-reduce'}
    assert max(size for name, size in larger if name == 'all-reduce') <= 4 * 4 + 1


@pytest.mark.parametrize(
  ('options', 'share'),
  [
    ({'rank': 3, 'history': 24, 'decay': 0.0, 'solver': 'gram'}, 0.5),
    ({'rank': 4, 'history': 48, 'decay': 0.0, 'solver': 'randomized'}, 0.8),
    ({'rank': 16, 'history': 8}, 0.9),
  ],
)
def test_donated_step_has_no_second_copy_of_the_stacks(options, share):
  leaves, shape = 12, (64, 48)
  tx = bsfa_optax.bsfa(estimator=pca(**options))
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
