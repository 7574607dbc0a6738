"""What `jax.shard_map` and `pmap` hand to a filter are shards, or replicas."""

import functools

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from bsfa_optax import bsfa, bsfa_adamw, dct, kronecker, pca, scale_by_whitening
from bsfa_optax.state import state_shardings

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

# Compiling is most of the time, and the little there is to run needs no tuning.
FAST = {'xla_backend_optimization_level': 0}
FAST_JIT = functools.partial(jax.jit, compiler_options=FAST)


def typeof(tree):
  return jax.tree.map(jax.typeof, tree)


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


@pytest.mark.slow
@pytest.mark.parametrize(
  ('solver', 'check_vma'), [('gram', False), ('randomized', True)]
)
def test_shard_map_with_axis_name(solver, check_vma):
  # Without the check, all leaves are taken to be split.
  keep = [k for k in MANUAL_SPECS if check_vma or k != 'whole']
  group = lambda params: {k: 'one' if k in ('rows', 'bias') else k for k in params}
  make = lambda **kwargs: bsfa(
    grafting=True,
    estimator=pca(rank=2, history=3, solver=solver, labels=group, **kwargs),
  )
  specs = {k: MANUAL_SPECS[k] for k in keep}
  updates = [{k: u[k] for k in keep} for u in manual_updates()]
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)

  def wrap(update, tx, params):
    state_specs = state_shardings(make(), params, specs)
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
  assert state.filter_count == len(updates) - 1
  assert state.skipped_updates == 1


# From the shapes of the shards alone, no axis would be within `max_ratio`.
WHOLE = {
  'whitening': scale_by_whitening,
  'whitening_blocks': lambda **kwargs: scale_by_whitening(block_size=5, **kwargs),
  'kronecker': lambda **kwargs: bsfa(
    0.1,
    3.0,
    grafting=True,
    estimator=kronecker(refresh_every=3, max_ratio=1.5, **kwargs),
  ),
  'dct': lambda **kwargs: bsfa(0.1, 3.0, grafting=True, estimator=dct(2, **kwargs)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'check_vma'),
  [
    ('whitening', True),
    ('whitening_blocks', False),
    ('kronecker', False),
    ('dct', True),
  ],
)
def test_shard_map_with_whole_axes(name, check_vma):
  specs = MANUAL_SPECS | {'stacked': P(None, 'fsdp'), 'alike_0': P('fsdp', None)}
  specs |= {'alike_1': P('fsdp', None)}
  axes = {'rows': 1, 'columns': 0, 'stacked': 2, 'alike_0': 1, 'alike_1': 1}
  keep = [k for k in specs if check_vma or k != 'whole']
  specs = {k: specs[k] for k in keep}
  rng = np.random.default_rng(2)
  more = {'stacked': (3, 8, 4), 'alike_0': (8, 6), 'alike_1': (8, 6)}
  updates = [
    {k: u[k] for k in keep if k in u}
    | {k: np.float32(rng.normal(size=shape)) for k, shape in more.items()}
    for u in manual_updates()
  ]

  def tx_of(**kwargs):
    return WHOLE[name](
      axes={k: axes.get(k) for k in keep},
      batch_axes={k: 0 if k == 'stacked' else None for k in keep},
      **kwargs,
    )

  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)

  def wrap(update, tx, params):
    state_specs = state_shardings(tx, params, specs)
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
  tol = 2e-5 if 'whitening' in name else 2e-3
  assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)
  jax.tree.map(assert_close, found, expected)
  # Eigenvectors have no sign.
  jax.tree.map(lambda a, b: assert_close(abs(a), abs(b)), state, expected_state)
  assert state.filter_count == len(updates) - 1
  assert state.skipped_updates == 1
  for key in set(keep) - {'bias'}:
    assert np.abs(found[-1][key] - updates[-1][key]).max() > 0.1


@pytest.mark.parametrize('name', ['whitening', 'kronecker', 'dct'])
def test_axes_must_be_named_for_shards(name):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  tx = WHOLE[name](axis_name='fsdp')
  step = jax.shard_map(
    lambda u: tx.update(u, tx.init(u))[0],
    mesh=mesh,
    in_specs=P('fsdp'),
    out_specs=P('fsdp'),
  )
  with pytest.raises(ValueError, match=r"axes must be given for 'w'.*\['fsdp'\].*name"):
    jax.eval_shape(step, {'w': jnp.ones((8, 3))})


@pytest.mark.parametrize('name', ['whitening', 'pca'])
def test_shard_map_init_is_typed_as_update(name):
  tx = {
    'whitening': scale_by_whitening(axis_name='fsdp', axes=1),
    'pca': bsfa(estimator=pca(rank=2, history=3, axis_name='fsdp')),
  }[name]
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))

  @jax.shard_map(mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp'))
  def run(params):
    init = tx.init(params)
    updates, state = tx.update(params, init)
    assert typeof(init) == typeof(state)
    assert typeof(updates) == typeof(params)
    return updates

  jax.eval_shape(run, jnp.ones((8, 3)))


PARAMS = {'rows': np.ones((8, 6), 'f4'), 'bias': np.ones(8, 'f4')}
REPLICATED = {
  'whitening': scale_by_whitening(),
  'bsfa_adamw': bsfa_adamw(0.1),
  'pca': bsfa(estimator=pca(rank=2, history=3)),
  'kronecker': bsfa(estimator=kronecker(refresh_every=3)),
  'dct': bsfa(estimator=dct(2)),
}


@pytest.mark.parametrize('name', ['whitening', 'pca', 'kronecker', 'dct'])
def test_unreduced_gradients_are_refused(name):
  tx = REPLICATED[name]
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  step = jax.shard_map(
    lambda u, s: tx.update(u, s)[0], mesh=mesh, in_specs=(P('data'), P()), out_specs=P()
  )
  with pytest.raises(ValueError, match=r"varies over .*\['data'\].*pmean.*axis_name"):
    jax.eval_shape(step, jnp.ones((8, 3)), tx.init(jnp.ones((2, 3))))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('how', 'name'),
  [('shard_map', name) for name in ('bsfa_adamw', 'pca', 'kronecker')]
  + [('pmap', 'whitening')],
)
def test_data_parallel(how, name):
  tx = REPLICATED[name]
  updates = [{k: u[k] for k in ('rows', 'bias')} for u in manual_updates()]
  reduced = lambda u, s: tx.update(jax.lax.pmean(u, 'data'), s, PARAMS)
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
    expected, reference = alone(u, reference, PARAMS)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(first(a), b, rtol=1e-3, atol=1e-4),
      jax.device_get(found),
      jax.device_get(expected),
    )
