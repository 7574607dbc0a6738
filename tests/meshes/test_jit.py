"""Sharded runs under jit are the unsharded run, and their state stays where it was."""

import functools

import jax
from jax import P
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import pytest

from bsfa_optax import bsfa, bsfa_adamw, dct, kronecker, pca, scale_by_whitening
from bsfa_optax.state import state_shardings

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

# Every axis of leaves with 1, 2 and 3 axes in turn, and two at once.
SPECS = {
  'bias': P('fsdp'),
  # Leaves alike are one array, whatever the sharding of each.
  'dense': {
    'rows': P('fsdp', None),
    'columns': P(None, 'tensor'),
    'both': P('tensor', 'fsdp'),
  },
  'heads': {'first': P(None, 'fsdp', None), 'second': P('fsdp', None, 'tensor')},
  'layers': {'first': P('fsdp', None, 'tensor'), 'second': P('tensor', None, 'fsdp')},
}
SHAPES = {
  'bias': (8,),
  'dense': (4, 8),
  'heads': (4, 4, 6),
  'layers': (4, 2, 8),
}
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
  'heads': {'first': (0, -1), 'second': 1},
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
graded = functools.partial(bsfa, 0.1, 3.0, exponent=0.5, grafting=True)
factored = functools.partial(
  kronecker, refresh_every=4, batch_axes=BATCH_AXES, max_ratio=1e9
)
FILTERS = {
  'whitening_axes': scale_by_whitening(batch_axes=BATCH_AXES, axes=AXES),
  'whitening_blocks': scale_by_whitening(batch_axes=BATCH_AXES, block_size=3),
  'bsfa_adamw': bsfa_adamw(1.0),
  'gram': graded(estimator=small(solver='gram')),
  'randomized_window': graded(
    estimator=small(solver='randomized', decay=0.0, refresh_every=3)
  ),
  'joint': graded(estimator=pca(rank=3, history=4, labels=joint)),
  'kronecker': graded(estimator=factored()),
  'dct': graded(estimator=dct(2, batch_axes=BATCH_AXES)),
}
# The roots of the whitening are products: they have no signs, and no gap.
DETERMINISTIC = ('whitening_axes', 'whitening_blocks', 'bsfa_adamw')
MESHES = {'explicit': AxisType.Explicit, 'auto': AxisType.Auto}


def make_mesh(kind):
  return jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(MESHES[kind],) * 2)


def measured(state):
  """The one number a block that a filter measures."""
  (values,) = optax.tree.get(state, 'measured').values()
  return values


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


def train(tx, state, updates, shardings=None):
  """The filtered updates of every step, the last state, and the compilations."""
  out = {} if shardings is None else {'out_shardings': (None, shardings)}
  step = FAST_JIT(lambda *args: tx.update(*args), **out)  # a new cache for each test
  filtered = []
  for u in updates:
    out, state = step(u, state, updates[0])
    filtered.append(jax.device_get(out))
  return filtered, state, step._cache_size()


def assert_close(actual, desired, tol):
  """Entry by entry, relative to the greatest of the leaf where that exceeds 1."""

  def close(a, b):
    a, b = jax.device_get((a, b))
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol * max(1, np.abs(b).max()))

  jax.tree.map(close, actual, desired)


def typeof(tree):
  return jax.tree.map(jax.typeof, tree)


@functools.cache
def unsharded(name):
  tx, updates = FILTERS[name], make_updates()
  filtered, state, _ = train(tx, tx.init(updates[0]), updates)
  assert measured(state).min() > 0.1  # it has refreshed
  return filtered, state


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'kind'),
  # An auto mesh leaves to the compiler what is of the same value wherever it is done.
  [(name, 'explicit') for name in FILTERS]
  + [('bsfa_adamw', 'auto'), ('randomized_window', 'auto')],
)
def test_sharded_run_is_the_unsharded_run(name, kind):
  mesh, tx = make_mesh(kind), FILTERS[name]
  specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
  with jax.set_mesh(mesh):
    updates = [jax.device_put(u, specs) for u in make_updates()]
    shardings = state_shardings(tx, updates[0])
    state = jax.jit(tx.init, out_shardings=shardings)(updates[0])
    if kind == 'explicit':  # without being told
      traced = jax.jit(tx.init).trace(updates[0]).jaxpr.out_avals
      assert [*map(str, traced)] == [*map(str, jax.tree.leaves(typeof(state)))]
    # Adam's moments on an auto mesh are where the compiler likes them, if not told.
    told = shardings if (name, kind) == ('bsfa_adamw', 'auto') else None
    filtered, final, compilations = train(tx, state, updates, told)

  assert compilations == 1
  assert typeof(state) == typeof(final)
  for want, *found in zip(
    *map(jax.tree.leaves, (shardings, state, final)), strict=True
  ):
    assert all(x.sharding.is_equivalent_to(want, x.ndim) for x in found)

  expected, expected_state = unsharded(name)
  tol = 2e-5 if name in DETERMINISTIC else 2e-3
  assert_close(filtered, expected, tol)
  assert_close(measured(final), measured(expected_state), tol)
  changed = jax.tree.map(
    lambda a, b: np.abs(a - b).max() > 0.1, filtered[-1], jax.device_get(updates[-1])
  )
  assert all(jax.tree.leaves([changed[k] for k in ('dense', 'heads')]))


# Experts: the batch axis itself is split.
EXPERTS = {
  'whitening': scale_by_whitening(batch_axes=lambda params: experts_axis(params)),
  'bsfa': graded(
    estimator=kronecker(refresh_every=2, batch_axes=lambda params: experts_axis(params))
  ),
  'pca': graded(estimator=pca(2, 2, batch_axes=lambda params: experts_axis(params))),
}


def experts_axis(params):
  return {'dense': None, 'layers': [{'up': 0, 'down': 1}] * len(params['layers'])}


@pytest.mark.slow
@pytest.mark.parametrize('name', EXPERTS)
def test_experts_split_over_the_mesh(name):
  tx, mesh = EXPERTS[name], make_mesh('explicit')
  layer = {'up': P('fsdp', None, 'tensor'), 'down': P('tensor', 'fsdp', None)}
  shapes = {'up': (4, 5, 6), 'down': (6, 4, 5)}
  specs = {'dense': P('fsdp', None), 'layers': [layer] * 2}
  rng = np.random.default_rng(3)
  rows = [
    {
      'dense': rng.normal(size=(4, 5)).astype('f4'),
      'layers': [
        {k: rng.normal(size=s).astype('f4') for k, s in shapes.items()}
        for _ in range(2)
      ],
    }
    for _ in range(5)
  ]
  expected, expected_state, _ = train(tx, tx.init(rows[0]), rows)
  assert measured(expected_state).shape == (17,)
  assert measured(expected_state).min() > 0.01
  named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  with jax.set_mesh(mesh):
    updates = [jax.device_put(u, named) for u in rows]
    shardings = state_shardings(tx, updates[0])
    state = jax.jit(tx.init, out_shardings=shardings)(updates[0])
    found, final, compilations = train(tx, state, updates)
  assert compilations == 1
  assert typeof(state) == typeof(final)
  tol = 2e-5 if name == 'whitening' else 2e-3
  assert_close(found, expected, tol)
  assert_close(measured(final), measured(expected_state), tol)


@pytest.mark.parametrize(
  'size',  # Of 8 entries, in blocks that are not full, as they are split, or larger.
  [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))],
)
def test_axes_cut_in_blocks_and_split_over_the_mesh(size):
  mesh, spec = make_mesh('explicit'), P('fsdp', 'tensor')
  rng = np.random.default_rng(4)
  rows = [np.float32(rng.normal(size=(8, 4))) for _ in range(2)]
  tx = scale_by_whitening(block_size=size)
  expected, _, _ = train(tx, tx.init(rows[0]), rows)
  with jax.set_mesh(mesh):
    updates = jax.device_put(rows, NamedSharding(mesh, spec))
    init = jax.jit(tx.init, out_shardings=state_shardings(tx, updates[0]))
    found, _, compilations = train(tx, init(updates[0]), updates)
  assert compilations == 1
  assert_close(found, expected, 2e-5)
  assert np.abs(expected[-1] - rows[-1]).max() > 0.1
