"""Layouts: leaves, labels, batch axes, parts, and arrays of per-block numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsfa_optax import bsfa, kronecker, pca, scale_by_whitening
from bsfa_optax.estimators import layout
from bsfa_optax.state import block_names

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

graded = functools.partial(bsfa, 0.2, 3.0, exponent=0.5)
FILTERS = {
  'gram': lambda **kw: graded(estimator=pca(2, 3, solver='gram', **kw)),
  'randomized': lambda **kw: graded(estimator=pca(2, 3, solver='randomized', **kw)),
  'kronecker': lambda **kw: graded(
    estimator=kronecker(refresh_every=3, max_ratio=1e9, **kw)
  ),
  'whitening': lambda **kw: scale_by_whitening(refresh_every=1, **kw),  # no turns
}
STEPS = 7
TOL = 2e-5

QUICK = ('kronecker', 'whitening')  # to compile
every_filter = pytest.mark.parametrize(
  'name',
  [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in FILTERS],
)


def make_updates(shapes, steps=STEPS):
  """Updates with two strong directions in each slice of each leaf."""
  rng = np.random.default_rng(0)

  def leaf(shape):
    noise = 0.3 * rng.normal(size=(steps, *shape))
    for strength in (7.0, 4.0):
      weights = strength * rng.normal(size=(steps,) + (1,) * len(shape))
      noise = noise + weights * rng.normal(size=shape)
    return noise

  rows = {name: leaf(shape) for name, shape in shapes.items()}
  return [{k: jnp.float32(x[i]) for k, x in rows.items()} for i in range(steps)]


def train(tx, updates):
  state, update, filtered = tx.init(updates[0]), jit(tx.update), []
  for u in updates:
    out, state = update(u, state)
    filtered.append(out)
  return filtered, state


def measured(state, names):
  """What is known of each block, by its name."""
  (values,) = state.measured.values()
  return dict(zip(names, np.asarray(values), strict=True))


def assert_close(actual, desired):
  def close(a, b):
    assert np.linalg.norm(a - b) <= TOL * np.linalg.norm(b)

  chex.assert_trees_all_equal_shapes_and_dtypes(actual, desired)
  jax.tree.map(close, actual, desired)


BATCHED = {  # shape and batch axes
  'middle': ((4, 2, 5), 1),
  'last': ((4, 5, 2), (-1,)),
  'two': ((2, 4, 2, 5), (2, 0)),
  'no_axes': ((5, 4), ()),
}


def slices(tree):
  """Every slice of every batched leaf as a leaf of its own, named as its block."""
  out = {}
  for key, (shape, axes) in BATCHED.items():
    axes = (axes,) if isinstance(axes, int) else axes or ()
    axes = sorted(a % len(shape) for a in axes)
    for index in np.ndindex(*(shape[a] for a in axes)):
      where = [slice(None)] * len(shape)
      for axis, i in zip(axes, index, strict=True):
        where[axis] = i
      name = f'{key}[{",".join(map(str, index))}]' if axes else key
      out[name] = tree[key][tuple(where)]
  return out


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in FILTERS if name != 'randomized'])
def test_slices_along_batch_axes_are_blocks(name):
  updates = make_updates({k: shape for k, (shape, _) in BATCHED.items()})
  axes = {k: axes for k, (_, axes) in BATCHED.items()}
  separate = [slices(u) for u in updates]
  batched, alone = FILTERS[name](batch_axes=axes), FILTERS[name]()
  actual, state = train(batched, updates)
  desired, desired_state = train(alone, separate)
  for a, b in zip(actual, desired, strict=True):
    assert_close(slices(a), b)
  assert all((desired[-1][k] != x).any() for k, x in separate[-1].items())

  names = block_names(batched, updates[0])
  assert sorted(names) == sorted(separate[0])
  assert layout(updates[0], batch_axes=axes).sizes == [20] * len(names)
  found = measured(state, names)
  wanted = measured(desired_state, block_names(alone, separate[0]))
  for k in names:
    np.testing.assert_allclose(found[k], wanted[k], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(  # those that stack
  'name', ['whitening', 'kronecker']
)
def test_leaves_alike_are_filtered_as_each_alone(name):
  shapes = {f'{layer}_{i}': (4, 5) for layer in 'ab' for i in range(2)}
  updates = make_updates(shapes | {'other': (5, 4)})
  tx = FILTERS[name]()
  together, state = train(tx, updates)
  rows = measured(state, block_names(tx, updates[0]))
  assert sorted(rows) == sorted(updates[0])
  update = jit(tx.update)
  for k in shapes:
    state = tx.init(updates[0][k])
    for u in updates:
      alone, state = update(u[k], state)
    assert_close(together[-1][k], alone)
    np.testing.assert_allclose(rows[k], measured(state, ['x'])['x'], rtol=1e-4)
    assert (alone != updates[-1][k]).any()


@pytest.mark.parametrize(
  ('solver', 'form'),
  [
    ('gram', 'prefix'),
    pytest.param('gram', 'tree', marks=pytest.mark.slow),
    pytest.param('randomized', 'function', marks=pytest.mark.slow),
  ],
)
def test_one_label_is_the_global_ppe(solver, form):
  updates = make_updates({'bias': (5,), 'matrix': (3, 4), 'scale': ()})
  tree = dict.fromkeys(updates[0], 'all')
  labels = {'prefix': 'all', 'tree': tree, 'function': lambda params: tree}[form]
  ppe = pca(2, 6, decay=0.0, solver=solver, labels=labels)
  tx = bsfa(0.0, 1.0, exponent=None, estimator=ppe)
  filtered, state = train(tx, updates)
  flat = lambda u: np.concatenate([np.ravel(x) for x in jax.tree.leaves(u)])
  _, s, right = np.linalg.svd([flat(u) for u in updates[:6]], full_matrices=False)
  v, projector = flat(updates[6]), right[:2].T @ right[:2]
  np.testing.assert_allclose(flat(filtered[6]), v - projector @ v, atol=1e-4)
  np.testing.assert_allclose(state.memory.variance, [s[:2] ** 2], rtol=1e-4)
  fraction = np.linalg.norm(projector @ v) / np.linalg.norm(v)
  np.testing.assert_allclose(state.measured['dominant_fraction'], [fraction], rtol=1e-4)
  assert block_names(tx, updates[0]) == ['all']


@pytest.mark.slow
def test_joint_block_with_batch_axes_is_a_block_for_each_index():
  updates = make_updates({'a': (3, 4, 2), 'b': (5, 3), 'c': (2, 2)})
  axes = {'a': 0, 'b': -1, 'c': None}
  labels = {'a': 'layer', 'b': 'layer', 'c': 'rest'}
  joint = graded(estimator=pca(2, 3, labels=labels, batch_axes=axes))
  actual, state = train(joint, updates)
  names = ['layer[0]', 'layer[1]', 'layer[2]', 'rest']
  for i in range(3):
    layer = [{'a': u['a'][i], 'b': u['b'][:, i]} for u in updates]
    desired, desired_state = train(graded(estimator=pca(2, 3, labels='x')), layer)
    for a, b in zip(actual, desired, strict=True):
      assert_close({'a': a['a'][i], 'b': a['b'][:, i]}, b)
    np.testing.assert_allclose(
      measured(state, names)[names[i]],
      measured(desired_state, 'x')['x'],
      rtol=1e-4,
    )
  assert block_names(joint, updates[0]) == names


@every_filter
def test_leaves_without_a_label_are_left_alone(name):
  updates = make_updates({'bias': (5,), 'matrix': (3, 4), 'other': (4, 3)})
  only = (
    {'leaves': lambda name, leaf: name == 'other' and leaf.shape == (4, 3)}
    if name in QUICK
    else {'labels': {'bias': None, 'matrix': None, 'other': 'other'}}
  )
  tx = FILTERS[name](**only)
  filtered, state = train(tx, updates)
  for out, u in zip(filtered, updates, strict=True):
    chex.assert_trees_all_equal(out | {'other': u['other']}, u)
  assert (filtered[-1]['other'] != updates[-1]['other']).all()
  if name in QUICK:
    assert len(state.memory) == 1
  else:
    for tree in (state.memory.basis, state.memory.history):
      assert tree['matrix'] == tree['bias'] == optax.MaskedNode()
  assert block_names(tx, updates[0]) == ['other']


def test_default_blocks_and_names():
  layer = {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3)), 'scale': jnp.ones(())}
  params = {'dense': [layer, layer], 'scan': jnp.ones((2, 2, 3, 2)), 'none': None}
  assert layout(params).names == ['dense/0/kernel', 'dense/1/kernel', 'scan']
  axes = {'dense': None, 'scan': (0, -1), 'none': None}
  scanned = [f'scan[{i},{j}]' for i in range(2) for j in range(2)]
  assert layout(params, batch_axes=axes).names[2:] == scanned
  assert layout(params, batch_axes=axes, stacked=True).names[2:] == scanned
  # A leaf with one axis beside its batch axes is no matrix.
  w = {'w': jnp.ones((3, 4))}
  with pytest.raises(ValueError, match='batch_axes must leave a matrix'):
    layout(w, batch_axes=0)
  names = ['w[0]', 'w[1]', 'w[2]']
  assert layout(w, labels={'w': 'w'}, batch_axes=0).names == names
  assert layout(w, leaves=lambda *_: True, batch_axes=0).names == names
  shapes = jax.eval_shape(lambda: params)
  assert layout(shapes, batch_axes=axes) == layout(params, batch_axes=axes)


def test_leaves_see_name_and_leaf():
  params = {'layers': [{'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}], 'x': jnp.ones(())}
  seen = {}
  leaves = lambda name, leaf: seen.update({name: leaf.shape}) or leaf.ndim == 1
  assert layout(params, leaves=leaves).names == ['layers/0/b']
  assert seen == {'layers/0/b': (3,), 'layers/0/w': (2, 3), 'x': ()}


@pytest.mark.slow
def test_leaves_alike_are_one_part():
  layer = {'in': np.ones((2, 3), 'f4'), 'out': np.ones((3, 2), 'f4')}
  params = {'layers': [layer] * 12, 'top': {'in': np.ones((2, 3), 'f4')}}
  alike = layout(params, stacked=True)
  assert [part.shape for part in alike.parts] == [(12, 2, 3), (12, 3, 2), (1, 2, 3)]
  assert [part.batch_axes for part in alike.parts] == [(0,)] * 3
  assert alike.count == 25
  assert sorted(alike.names) == sorted(layout(params).names)
  assert {'layers/11/out', 'layers/2/in', 'top/in'} <= {*alike.names}
  # Which row is which layer's.
  numbers = iter(range(25))
  tree = jax.tree.map(lambda x: np.full(x.shape, next(numbers), x.dtype), params)
  rows = dict(
    zip(
      [*alike.names],
      [float(x[0, 0]) for part in alike.select(tree) for x in part],
      strict=True,
    )
  )
  assert rows['layers/3/out'] == tree['layers'][3]['out'][0, 0]
  assert rows['layers/11/in'] == tree['layers'][11]['in'][0, 0]
  chex.assert_trees_all_equal(alike.replace(params, alike.select(tree)), tree)
  # Other shapes, other batch axes, other names are other parts.
  mixed = {'a': [jnp.ones((2, 3)), jnp.ones((2, 4))], 'b': [jnp.ones((2, 3))]}
  assert len(layout(mixed, stacked=True).parts) == 3
  axes = {'layers': [{'in': None, 'out': 0}] * 6 + [None] * 6, 'top': None}
  kept = layout(params, leaves=lambda *_: True, batch_axes=axes, stacked=True)
  assert len(kept.parts) == 4


def test_batch_axes_are_a_tree_a_prefix_or_a_function():
  params = {'a': {'x': jnp.ones((2, 3, 4)), 'y': jnp.ones((2, 5, 4))}}
  tree = {'a': {'x': 0, 'y': 0}}
  desired = layout(params, batch_axes=tree)
  assert desired.count == 4
  for spec in (0, (0,), -3, {'a': 0}, lambda params: tree, lambda params: 0):
    assert layout(params, batch_axes=spec) == desired


def test_scatter_undoes_gather():
  params = {'a': jnp.ones((2, 3, 4, 5)), 'b': jnp.ones((4, 5)), 'c': jnp.ones((7, 3))}
  parts = layout(
    params,
    labels={'a': 'a', 'b': None, 'c': 'c'},
    batch_axes={'a': (0, 1), 'b': 0, 'c': 1},
  )
  rng = np.random.default_rng(1)
  values = [jnp.float32(rng.normal(size=shape)) for shape in ((2, 3, 4), (3, 4))]
  gathered = parts.gather(values)
  assert gathered.shape == (parts.count, 4) == (9, 4)
  chex.assert_trees_all_equal(parts.scatter(gathered), values)
  # Leaves of one block are summed, and each gets the sum back.
  joint = layout(
    params,
    labels={'a': 'x', 'b': None, 'c': 'x'},
    batch_axes={'a': 1, 'b': 0, 'c': 1},
  )
  total = values[1] + 1
  gathered = joint.gather([values[1], jnp.ones((3, 4))])
  chex.assert_trees_all_equal(joint.scatter(gathered), [total, total])
  assert joint.sizes == [2 * 4 * 5 + 7] * 3


def test_select_and_replace_touch_only_blocks():
  params = {'a': jnp.ones((2, 3)), 'b': jnp.ones(3), 'c': None, 'd': jnp.zeros((3, 3))}
  parts = layout(params)
  chex.assert_trees_all_equal(parts.select(params), [params['a'], params['d']])
  replaced = parts.replace(params, [jnp.full((2, 3), 2.0), jnp.full((3, 3), 3.0)])
  assert (replaced['a'] == 2).all()
  assert replaced['c'] is None
  assert (replaced['d'] == 3).all()
  assert replaced['b'] is params['b']
