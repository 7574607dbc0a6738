"""Blocks: labels, batch axes, and the layout of per-block numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsfa_optax import _blocks, block_names, bsfa, kronecker, pca

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

ESTIMATORS = {
  'gram': functools.partial(pca, 2, 3, solver='gram'),
  'randomized': functools.partial(pca, 2, 3, solver='randomized'),
  'kronecker': functools.partial(kronecker, refresh_every=3, max_ratio=1e9),
}
STEPS = 7
TOL = 2e-5

every_estimator = pytest.mark.parametrize('name', ESTIMATORS)


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


def diagnostics(state, names):
  """What is known of each block, by its name."""
  fields = ('dominant_fraction', 'explained_variance')
  rows = zip(*(np.asarray(optax.tree.get(state, f)) for f in fields), strict=True)
  return dict(zip(names, rows, strict=True))


def assert_close(actual, desired):
  def close(a, b):
    assert np.linalg.norm(a - b) <= TOL * np.linalg.norm(b)

  chex.assert_trees_all_equal_shapes_and_dtypes(actual, desired)
  jax.tree.map(close, actual, desired)


BATCHED = {  # shape and batch axes
  'first': ((3, 4, 5), 0),
  'middle': ((4, 3, 5), (1,)),
  'last': ((4, 5, 3), -1),
  'two': ((2, 4, 3, 5), (2, 0)),
  'none': ((4, 5), None),
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


@every_estimator
def test_slices_along_batch_axes_are_blocks(name):
  updates = make_updates({k: shape for k, (shape, _) in BATCHED.items()})
  axes = {k: axes for k, (_, axes) in BATCHED.items()}
  separate = [slices(u) for u in updates]
  batched = bsfa(0.2, 3.0, exponent=0.5, estimator=ESTIMATORS[name](batch_axes=axes))
  actual, state = train(batched, updates)
  alone = bsfa(0.2, 3.0, exponent=0.5, estimator=ESTIMATORS[name]())
  desired, desired_state = train(alone, separate)
  for a, b in zip(actual, desired, strict=True):
    assert_close(slices(a), b)
  assert all((desired[-1][k] != x).any() for k, x in separate[-1].items())

  names = block_names(updates[0], None, axes)
  assert sorted(names) == sorted(separate[0])
  assert _blocks.resolve(updates[0], None, axes).sizes == [20] * len(names)
  found = diagnostics(state, names)
  wanted = diagnostics(desired_state, block_names(separate[0]))
  for k in names:
    np.testing.assert_allclose(found[k], wanted[k], rtol=1e-4)


@pytest.mark.parametrize('form', ['prefix', 'tree', 'function'])
@pytest.mark.parametrize('solver', ['gram', 'randomized'])
def test_one_label_is_the_global_ppe(solver, form):
  updates = make_updates({'bias': (5,), 'matrix': (3, 4), 'scale': ()})
  tree = dict.fromkeys(updates[0], 'all')
  blocks = {'prefix': 'all', 'tree': tree, 'function': lambda params: tree}[form]
  ppe = pca(2, 6, decay=0.0, solver=solver, blocks=blocks)
  filtered, state = train(bsfa(0.0, 1.0, exponent=None, estimator=ppe), updates)
  flat = lambda u: np.concatenate([np.ravel(x) for x in jax.tree.leaves(u)])
  _, s, right = np.linalg.svd([flat(u) for u in updates[:6]], full_matrices=False)
  v, projector = flat(updates[6]), right[:2].T @ right[:2]
  np.testing.assert_allclose(flat(filtered[6]), v - projector @ v, atol=1e-4)
  np.testing.assert_allclose(state.estimator_state.variance, [s[:2] ** 2], rtol=1e-4)
  fraction = np.linalg.norm(projector @ v) / np.linalg.norm(v)
  np.testing.assert_allclose(state.dominant_fraction, [fraction], rtol=1e-4)
  assert block_names(updates[0], blocks) == ['all']


def test_joint_block_with_batch_axes_is_a_block_for_each_index():
  updates = make_updates({'a': (3, 4, 2), 'b': (5, 3), 'c': (2, 2)})
  axes = {'a': 0, 'b': -1, 'c': None}
  labels = {'a': 'layer', 'b': 'layer', 'c': 'rest'}
  joint = bsfa(
    0.2, 3.0, exponent=0.5, estimator=pca(2, 3, blocks=labels, batch_axes=axes)
  )
  actual, state = train(joint, updates)
  for i in range(3):
    layer = [{'a': u['a'][i], 'b': u['b'][:, i]} for u in updates]
    desired, desired_state = train(
      bsfa(0.2, 3.0, exponent=0.5, estimator=pca(2, 3, blocks='x')), layer
    )
    for a, b in zip(actual, desired, strict=True):
      assert_close({'a': a['a'][i], 'b': a['b'][:, i]}, b)
    np.testing.assert_allclose(
      state.dominant_fraction[i], desired_state.dominant_fraction[0], rtol=1e-4
    )
  names = ['layer[0]', 'layer[1]', 'layer[2]', 'rest']
  assert block_names(updates[0], labels, axes) == names


@every_estimator
def test_leaves_without_a_label_are_left_alone(name):
  updates = make_updates({'bias': (5,), 'matrix': (3, 4), 'other': (4, 3)})
  labels = {'bias': None, 'matrix': None, 'other': 'o'}
  tx = bsfa(0.2, 3.0, exponent=0.5, estimator=ESTIMATORS[name](blocks=labels))
  filtered, state = train(tx, updates)
  for out, u in zip(filtered, updates, strict=True):
    chex.assert_trees_all_equal(out | {'other': u['other']}, u)
  assert (filtered[-1]['other'] != updates[-1]['other']).all()
  fields = ['factors'] if name == 'kronecker' else ['basis', 'history']
  for field in fields:
    tree = getattr(state.estimator_state, field)
    assert tree['matrix'] == tree['bias'] == optax.MaskedNode()
  assert block_names(updates[0], labels) == ['o']


def test_default_blocks_and_names():
  layer = {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3)), 'scale': jnp.ones(())}
  params = {'dense': [layer, layer], 'scan': jnp.ones((2, 2, 3, 2)), 'none': None}
  assert block_names(params) == ['dense/0/kernel', 'dense/1/kernel', 'scan']
  axes = {'dense': None, 'scan': (0, -1), 'none': None}
  scanned = [f'scan[{i},{j}]' for i in range(2) for j in range(2)]
  assert block_names(params, None, axes)[2:] == scanned
  # A leaf with one axis beside its batch axes is no matrix.
  assert block_names({'w': jnp.ones((3, 4))}, None, 0) == []
  assert block_names({'w': jnp.ones((3, 4))}, {'w': 'w'}, 0) == ['w[0]', 'w[1]', 'w[2]']
  shapes = jax.eval_shape(lambda: params)
  assert _blocks.resolve(shapes, None, axes) == _blocks.resolve(params, None, axes)


def test_batch_axes_are_a_tree_a_prefix_or_a_function():
  params = {'a': {'x': jnp.ones((2, 3, 4)), 'y': jnp.ones((2, 5, 4))}}
  tree = {'a': {'x': 0, 'y': 0}}
  desired = _blocks.resolve(params, None, tree)
  assert desired.count == 4
  for spec in (0, (0,), -3, {'a': 0}, lambda params: tree, lambda params: 0):
    assert _blocks.resolve(params, None, spec) == desired


def test_scatter_undoes_gather():
  params = {'a': jnp.ones((2, 3, 4, 5)), 'b': jnp.ones((4, 5)), 'c': jnp.ones((7, 3))}
  parts = _blocks.resolve(
    params, {'a': 'a', 'b': None, 'c': 'c'}, {'a': (0, 1), 'b': 0, 'c': 1}
  )
  rng = np.random.default_rng(1)
  values = [jnp.float32(rng.normal(size=shape)) for shape in ((2, 3, 4), (3, 4))]
  gathered = parts.gather(values, trailing=1)
  assert gathered.shape == (parts.count, 4) == (9, 4)
  chex.assert_trees_all_equal(parts.scatter(gathered), values)
  # Leaves of one block are summed, and each gets the sum back.
  joint = _blocks.resolve(
    params, {'a': 'x', 'b': None, 'c': 'x'}, {'a': 1, 'b': 0, 'c': 1}
  )
  total = values[1] + 1
  gathered = joint.gather([values[1], jnp.ones((3, 4))], trailing=1)
  chex.assert_trees_all_equal(joint.scatter(gathered), [total, total])
  assert joint.sizes == [2 * 4 * 5 + 7] * 3


def test_select_and_replace_touch_only_blocks():
  params = {'a': jnp.ones((2, 3)), 'b': jnp.ones(3), 'c': None, 'd': jnp.zeros((3, 3))}
  parts = _blocks.resolve(params)
  chex.assert_trees_all_equal(parts.select(params), [params['a'], params['d']])
  replaced = parts.replace(params, ['x', 'y'])
  assert (replaced['a'], replaced['c'], replaced['d']) == ('x', None, 'y')
  assert replaced['b'] is params['b']
