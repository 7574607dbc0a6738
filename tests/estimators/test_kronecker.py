"""The `kronecker` estimator against a dense reference."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsfa_optax import _learned, bsfa, dct, kronecker

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

TOL = 1e-5  # of the filtered update; eigenvalues are float32 for every dtype
ALPHA, GAMMA = 0.3, 2.0
FILTERS = {
  'two_level': (None, lambda x: np.where(x > 1, ALPHA, GAMMA)),
  'graded': (0.5, lambda x: np.clip(np.maximum(x, 1e-30) ** -0.5, ALPHA, GAMMA)),
}


def unfold(g, axis):
  return np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)


def rotate(g, matrix, axis):
  return np.moveaxis(np.tensordot(matrix, g, (1, axis)), 0, axis)


def reference(f, updates, v, axes, decay):
  """f(C) v for dense moving averages of the covariance of each of `axes`.

  Returns:
    The filtered update, and |Pv| / |v|.
  """
  variance, bases = np.ones((1,) * v.ndim), {}
  for axis in axes:
    covariance = np.zeros((v.shape[axis],) * 2)
    for g in updates:
      moment = unfold(g, axis) @ unfold(g, axis).T / np.square(g).sum()
      covariance = decay * covariance + (1 - decay) * moment
    values, bases[axis] = np.linalg.eigh(covariance)
    values = np.maximum(values / values.mean(), 0)
    shape = [-1 if i == axis else 1 for i in range(v.ndim)]
    variance = variance * values.reshape(shape)
  coefficients = v
  for axis, basis in bases.items():
    coefficients = rotate(coefficients, basis.T, axis)
  out = f(variance) * coefficients
  for axis, basis in bases.items():
    out = rotate(out, basis, axis)
  inside = np.linalg.norm(np.where(variance > 1, coefficients, 0))
  return out, inside / np.linalg.norm(v)


def make_updates(shapes, steps, dtype='float32'):
  """Updates with a spread of variances along each axis."""
  rng = np.random.default_rng(0)
  trees = []
  for _ in range(steps):
    tree = {}
    for key, shape in shapes.items():
      g = rng.normal(size=shape)
      for axis, n in enumerate(shape):
        g = rotate(g, np.vander(np.linspace(0.5, 1.5, n), n) + np.eye(n), axis)
      tree[key] = jnp.asarray(g / np.linalg.norm(g), dtype)
    trees.append(tree)
  return trees


@functools.cache
def step_fn(exponent, options):
  estimator = kronecker(**dict(options))
  return jit(bsfa(ALPHA, GAMMA, exponent=exponent, estimator=estimator).update)


def run(exponent, updates, **options):
  """The last filtered update and the state."""
  state = bsfa(estimator=kronecker(**options)).init(updates[0])
  for u in updates:
    filtered, state = step_fn(exponent, tuple(options.items()))(u, state)
  return filtered, state


def assert_close(actual, desired, tol=TOL):
  error = np.linalg.norm(np.asarray(actual, np.float64) - desired)
  assert error <= tol * np.linalg.norm(desired)


every = lambda name, leaf: True


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('two_level', 'float32'),
    pytest.param('graded', 'float64', marks=pytest.mark.slow),
    pytest.param('graded', 'bfloat16', marks=pytest.mark.slow),
  ],
)
def test_filter_is_that_of_the_dense_covariance(name, dtype):
  exponent, f = FILTERS[name]
  shapes = {
    'four': (2, 3, 2, 4),
    'matrix': (4, 6),
    'one': (1, 5),
    'three': (3, 4, 2),
    'wide': (3, 40),  # more than max_ratio times the rest of its axes
    'large': (14, 4),  # more than max_size
  }
  axes = {k: tuple(range(len(shape))) for k, shape in shapes.items()}
  axes |= {'one': (), 'wide': (0,), 'large': (1,), 'three': (0, 1), 'four': (1, 3)}
  with jax.enable_x64(dtype == 'float64'):
    updates = make_updates(shapes, 8, dtype)
    filtered, state = run(
      exponent,
      updates,
      decay=0.6,
      refresh_every=2,
      max_size=12,
      max_ratio=4.0,
      leaves=every,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(filtered, updates[0])
  dense = [jax.tree.map(lambda x: np.asarray(x, np.float64), u) for u in updates]
  for i, key in enumerate(sorted(shapes)):
    sizes = [shapes[key][axis] for axis in axes[key]]
    chex.assert_trees_all_equal_shapes(
      state.memory[i].basis, tuple(np.ones((1, n, n)) for n in sizes)
    )
    if not axes[key]:  # no directions: left alone
      chex.assert_trees_all_equal(filtered[key], updates[-1][key])
      continue
    # Every second update is learned, the last one before it is filtered.
    learned = [u[key] for u in dense[1::2]]
    out, fraction = reference(f, learned, dense[-1][key], axes[key], 0.6)
    assert_close(filtered[key], out, 4e-3 if dtype == 'bfloat16' else TOL)
    found = state.measured['dominant_fraction'][i]
    np.testing.assert_allclose(found, fraction, rtol=1e-4)
    assert 0.05 < fraction < 1


@pytest.mark.slow
def test_leaves_alike_have_factors_of_their_own():
  shapes = {'layers/0/w': (4, 6), 'layers/1/w': (4, 6), 'other': (4, 6)}
  updates = make_updates(shapes, 4)
  filtered, state = run(0.5, updates, refresh_every=1)
  assert [len(factors.spectrum[0]) for factors in state.memory] == [2, 1]
  for i, key in enumerate(shapes):
    alone, own = run(0.5, [{key: u[key]} for u in updates], refresh_every=1)
    np.testing.assert_allclose(filtered[key], alone[key], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      state.measured['dominant_fraction'][i],
      own.measured['dominant_fraction'][0],
      rtol=1e-5,
    )


@pytest.mark.parametrize('refresh_every', [1, 3])
def test_identity_until_the_first_refresh(refresh_every):
  updates = make_updates({'matrix': (4, 6)}, refresh_every + 2)
  options = {'refresh_every': refresh_every}
  state = bsfa(estimator=kronecker(**options)).init(updates[0])
  for i, u in enumerate(updates):
    filtered, state = step_fn(0.5, tuple(options.items()))(u, state)
    changed = bool((filtered['matrix'] != u['matrix']).any())
    learned = bool(state.memory[0].spectrum[0].any())
    assert changed == learned == (i + 1 >= refresh_every)  # learns before it filters


@pytest.mark.parametrize(
  ('refresh_every', 'due'),
  [
    (3, {3, 6, 9}),
    (lambda step: 1 + step / 3, {1, 2, 3, 4, 6, 9}),  # rounded down
    (lambda step: 0 * step, set(range(1, 10))),  # at least 1
  ],
)
def test_factors_are_refreshed_only_when_due(refresh_every, due):
  updates = make_updates({'matrix': (4, 6)}, 9)
  options = {'refresh_every': refresh_every}
  state, states = bsfa(estimator=kronecker(**options)).init(updates[0]), []
  for u in updates:
    _, state = step_fn(0.5, tuple(options.items()))(u, state)
    states.append(state)
  for i in range(1, 9):
    old, new = (jax.tree.leaves(s.memory) for s in states[i - 1 : i + 1])
    same = all((a == b).all() for a, b in zip(old, new, strict=True))
    assert same == (i + 1 not in due)
    assert states[i].filter_count == i + 1


@pytest.mark.parametrize(
  'refresh_every', [1, 3, None, lambda count: 1 + jnp.minimum(count, 2)]
)
def test_goes_on_at_the_end_of_int32(refresh_every):
  updates = make_updates({'matrix': (4, 6)}, 24)
  options = {'refresh_every': refresh_every}
  state, memories = bsfa(estimator=kronecker(**options)).init(updates[0]), []
  state = state._replace(filter_count=jnp.int32(2**31 - 1))
  for u in updates:
    _, state = step_fn(0.5, tuple(options.items()))(u, state)
    assert state.filter_count > 2**29  # as late as ever
    memories.append(np.asarray(state.memory[0].spectrum[0]))
  refreshes = sum((a != b).any() for a, b in itertools.pairwise(memories))
  every = {1: 1, 3: 3, None: 5}.get(refresh_every, 3)
  assert refreshes in (23 // every, 23 // every + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('axes', 'factored'),
  [
    # The other is above `max_size`; of three, the two longest.
    (None, {'matrix': (0,), 'three': (0, 1)}),
    ({'matrix': None, 'three': (0, 1, 2)}, {'matrix': (0,), 'three': (0, 1)}),
    (-1, {'matrix': (), 'three': (2,)}),
    ({'matrix': (1, 0), 'three': ()}, {'matrix': (0,), 'three': ()}),
    ({'matrix': 0, 'three': (2, 0)}, {'matrix': (0,), 'three': (0, 2)}),
    (
      lambda params: {k: x.ndim - 2 for k, x in params.items()},
      {'matrix': (0,), 'three': (1,)},
    ),
  ],
  ids=['default', 'all', 'int', 'none', 'tree', 'function'],
)
def test_named_axes(axes, factored):
  updates = make_updates({'matrix': (4, 6), 'three': (3, 4, 2)}, 4)
  estimator = kronecker(axes=axes, decay=0.6, refresh_every=1, max_size=5)
  tx = bsfa(ALPHA, GAMMA, estimator=estimator)
  state, update = tx.init(updates[0]), jit(tx.update)
  for u in updates:
    filtered, state = update(u, state)
  fraction = state.measured['dominant_fraction']
  dense = [jax.tree.map(lambda x: np.asarray(x, np.float64), u) for u in updates]
  for i, (key, axes_of_leaf) in enumerate(factored.items()):
    if not axes_of_leaf:
      chex.assert_trees_all_equal(filtered[key], updates[3][key])
      assert fraction[i] == 0
      continue
    out, inside = reference(
      FILTERS['two_level'][1],
      [u[key] for u in dense],
      dense[3][key],
      axes_of_leaf,
      0.6,
    )
    assert_close(filtered[key], out)
    np.testing.assert_allclose(fraction[i], inside, rtol=1e-4)


@pytest.mark.parametrize('make', [kronecker, dct])
def test_batch_without_a_named_axis_is_left_alone(make):
  (v,) = make_updates({'layers': (3, 4, 6)}, 1)
  tx = bsfa(2.0, 2.0, estimator=make(axes=(), batch_axes=0))
  state, update = tx.init(v), jit(tx.update)
  for _ in range(2):
    filtered, state = update(v, state)
  chex.assert_trees_all_equal(filtered, v)
  assert state.measured['dominant_fraction'].tolist() == [0, 0, 0]


@pytest.mark.parametrize('make', [kronecker, dct])
@pytest.mark.parametrize(
  ('options', 'parts'),
  [
    ({'axes': 2}, ['axes must lie within the axes', 'got 2', "'w'", '(4, 6)', 'None']),
    ({'axes': (0, -3)}, ['axes must lie within the axes', 'got (0, -3)']),
    ({'axes': {'w': 'x'}}, ['axes must lie within the axes', 'got x', "'w'"]),
    (
      {'axes': (0, 1), 'batch_axes': -1, 'leaves': lambda *_: True},
      ['axes must not be batch axes', 'axes=(0, 1)', "'w'", '(1,)', 'one of them'],
    ),
    ({'axes': {'x': 0}}, ['axes must be a tree', "'x'", 'a function']),
  ],
)
def test_bad_axes(make, options, parts):
  params = {'w': jnp.ones((4, 6))}
  tx = bsfa(estimator=make(**options))
  with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
    tx.init(params)
  assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_bases_are_orthonormal_in_the_storage_dtype(dtype):
  updates = make_updates({'matrix': (4, 6)}, 60)
  _, state = run(0.5, updates, refresh_every=1, storage_dtype=dtype)
  tol = 1e-5 if dtype == jnp.float32 else 0.1  # 60 rotations, each rounded
  (factors,) = state.memory
  for basis in factors.basis:
    assert basis.dtype == dtype
    (q,) = np.asarray(basis, np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=tol)
  for spectrum in factors.spectrum:
    assert (np.diff(spectrum) <= 0).all()
    assert (spectrum >= 0).all()


def test_variances_of_a_matrix_normal():
  """Updates with covariance R (x) L get the relative variances l_i r_j."""
  rng = np.random.default_rng(4)
  steps, shape = 3000, (6, 8)
  bases = [np.linalg.qr(rng.normal(size=(n, n)))[0] for n in shape]
  spectra = [np.linspace(0.5, 2, n) for n in shape]
  u, v = bases
  left, right = (np.sqrt(s) for s in spectra)
  noise = rng.normal(size=(steps, *shape)) * left[:, None] * right
  updates = jnp.float32(u @ noise @ v.T)
  estimator = kronecker(decay=0.998, refresh_every=1)
  tx, layout = bsfa(estimator=estimator), estimator.layout(updates[0])

  @jit
  def learn(updates):
    step = lambda state, g: (tx.update(g, state)[1], None)
    return jax.lax.scan(step, tx.init(updates[0]), updates)[0].memory

  # f(x) = x shows the variances themselves: f(C) u_i v_j^T = l_i r_j u_i v_j^T.
  memory = learn(updates)
  relative = [s / s.mean() for s in spectra]

  @jit
  def multiply(g):
    vector = layout.select(g)
    found = estimator.decompose(layout, vector, memory)
    filtered = _learned.filtered(lambda variance, _: variance, layout, vector, found)
    return layout.replace(g, filtered)

  for i, j in [(0, 0), (5, 7), (0, 7), (3, 4)]:
    direction = np.outer(u[:, i], v[:, j])
    found = np.vdot(direction, multiply(jnp.float32(direction)))
    np.testing.assert_allclose(found, relative[0][i] * relative[1][j], rtol=0.15)
