"""The `dct` estimator against `scipy.fft`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from bsfa_optax import bsfa, dct
from bsfa_optax.estimators import _dct

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

ALPHA, GAMMA, RANK = 0.3, 2.0, 3
TOL = {'float64': 1e-13, 'float32': 1e-6, 'float16': 1e-3, 'bfloat16': 5e-3}
SHAPES = {  # and, last, the axis to be taken
  'wide': (4, 9, 0),
  'tall': (9, 4, 1),
  'square': (5, 5, 1),
  'small_side': (3, 6, 1),  # no more than `rank` entries on the shorter side
  'small': (2, 3, 1),
  'heads': (6, 2, 5, 2),
}
FILTERS = {
  'two_level': (None, lambda x, dominant: np.where(dominant, ALPHA, GAMMA)),
  'graded': (0.5, lambda x, _: np.clip(np.maximum(x, 1e-30) ** -0.5, ALPHA, GAMMA)),
}


def reference(f, v, axis, rank=RANK):
  """f(C) v and |Pv| / |v|."""
  coefficients = np.moveaxis(scipy.fft.dct(v, axis=axis, norm='ortho'), axis, 0)
  n = len(coefficients)
  energy = np.square(coefficients).reshape(n, -1).sum(1)
  dominant = np.isin(np.arange(n), np.argsort(-energy)[:rank]) & (energy > 0)
  scale = f(energy / energy.mean(), dominant).reshape((n,) + (1,) * (v.ndim - 1))
  filtered = scipy.fft.idct(
    np.moveaxis(scale * coefficients, 0, axis), axis=axis, norm='ortho'
  )
  return filtered, np.sqrt(energy[dominant].sum() / energy.sum())


def assert_close(actual, desired, tol):
  error = np.linalg.norm(np.asarray(actual, np.float64) - desired)
  assert error <= tol * np.linalg.norm(desired)


def damp(v, rank, **options):
  """The update without its dominant part, and the fraction of that."""
  tx = bsfa(0.0, 1.0, estimator=dct(rank, **options))
  filtered, state = jit(tx.update)(v, tx.init(v))
  return filtered, state.measured['dominant_fraction']


def wave(n, frequency):
  """A column of the basis."""
  return scipy.fft.idct(np.eye(n)[frequency], norm='ortho')


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(
  'n', [1, 2, 7, 300, pytest.param(1500, marks=pytest.mark.slow)]
)
def test_basis_is_that_of_scipy(n, dtype):
  with jax.enable_x64(dtype == 'float64'):
    basis = _dct.cosines(n, dtype)
    assert basis.dtype == dtype
  desired = scipy.fft.dct(np.eye(n), axis=1, norm='ortho')
  tol = 1e-6 if dtype == 'float32' else 1e-14  # of the cosine, and of its argument
  np.testing.assert_allclose(basis, desired, rtol=0, atol=tol / np.sqrt(n))
  if n < 10:
    found = np.asarray(basis, np.float64)
    np.testing.assert_allclose(found.T @ found, np.eye(n), atol=tol)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('two_level', 'float32'),
    pytest.param('two_level', 'float16', marks=pytest.mark.slow),
    pytest.param('graded', 'float64', marks=pytest.mark.slow),
    pytest.param('graded', 'bfloat16', marks=pytest.mark.slow),
  ],
)
def test_filter_is_that_of_scipy(name, dtype):
  exponent, f = FILTERS[name]
  rng = np.random.default_rng(0)
  with jax.enable_x64(dtype == 'float64'):
    v = {
      k: jnp.asarray(rng.normal(size=shape) + np.arange(shape[-1]), dtype)
      for k, (*shape, _) in SHAPES.items()
    }
    tx = bsfa(ALPHA, GAMMA, exponent=exponent, estimator=dct(RANK))
    # The first update already: nothing is to be learned.
    filtered, state = jit(tx.update)(v, tx.init(v))
    chex.assert_trees_all_equal_shapes_and_dtypes(filtered, v)
  assert not jax.tree.leaves(state.memory)
  for i, key in enumerate(sorted(SHAPES)):
    axis = SHAPES[key][-1]
    out, fraction = reference(f, np.asarray(v[key], np.float64), axis)
    assert_close(filtered[key], out, TOL[dtype])
    found = state.measured['dominant_fraction'][i]
    np.testing.assert_allclose(found, fraction, rtol=1e-5)
    others = set(range(v[key].ndim)) - {axis}
    for other in others if key != 'small' else ():  # the axis does count
      wrong, _ = reference(f, np.asarray(v[key], np.float64), other)
      assert np.linalg.norm(wrong - out) > 0.05 * np.linalg.norm(out)


def test_leaves_of_different_dtypes():
  rng = np.random.default_rng(4)
  dense = {'double': rng.normal(size=(4, 9)), 'single': rng.normal(size=(4, 9))}
  with jax.enable_x64(True):
    v = {'double': jnp.asarray(dense['double']), 'single': jnp.float32(dense['single'])}
    tx = bsfa(ALPHA, GAMMA, estimator=dct(RANK))
    filtered, _ = jit(tx.update)(v, tx.init(v))
    chex.assert_trees_all_equal_shapes_and_dtypes(filtered, v)
  for key, dtype in (('double', 'float64'), ('single', 'float32')):
    out, _ = reference(FILTERS['two_level'][1], np.asarray(v[key], np.float64), 0)
    assert_close(filtered[key], out, TOL[dtype])


def test_known_frequencies_are_damped_and_no_others():
  strong, weak = (0, 5, 11), (2, 6)
  rng = np.random.default_rng(1)
  mix = lambda frequencies, size: sum(
    np.outer(size * rng.normal(size=20), wave(12, j)) for j in frequencies
  )
  dominant, bulk = mix(strong, 3.0), mix(weak, 0.5)
  filtered, fraction = damp(jnp.float32(dominant + bulk), 3)
  assert_close(filtered, bulk, 1e-5)
  desired = np.linalg.norm(dominant) / np.linalg.norm(dominant + bulk)
  np.testing.assert_allclose(fraction, [desired], rtol=1e-5)


def test_batch_axes_are_blocks_of_their_own():
  rng = np.random.default_rng(2)
  stacked = rng.normal(size=(4, 3, 7, 2))  # the batch axes are 1 and 3
  filtered, fraction = damp(jnp.float32(stacked), 2, batch_axes=(1, -1))
  f = lambda x, dominant: np.where(dominant, 0, 1)
  for i in range(3):
    for j in range(2):
      out, share = reference(f, stacked[:, i, :, j], 0, rank=2)
      assert_close(filtered[:, i, :, j], out, 1e-5)
      np.testing.assert_allclose(fraction[2 * i + j], share, rtol=1e-5)


@pytest.mark.parametrize('rank', [1, 2, 3, 4, 9])
def test_exactly_rank_frequencies_where_energies_are_equal(rank):
  energy = jnp.array([[1.0, 1, 1, 1], [0, 2, 1, 2], [0, 0, 0, 0]])
  found = _dct.strongest(energy, rank, axis=1)
  assert found.sum(1).tolist() == [min(rank, 4), min(rank, 3), 0]
  np.testing.assert_array_equal(_dct.strongest(energy.T, rank, axis=0).T, found)
  first = {1: [1], 2: [1, 3], 3: [1, 2, 3]}[min(rank, 3)]
  np.testing.assert_array_equal(np.flatnonzero(found[1]), first)


def test_named_axes():
  rng = np.random.default_rng(3)
  v = jnp.float32(rng.normal(size=(4, 6, 5)))
  f = lambda x, dominant: np.where(dominant, 0, 1)
  for axes, taken in [
    (None, 0),
    ((1, 2), 2),
    (1, 1),
    (-1, 2),
    (lambda params: {'w': (0, 1)}, 0),
  ]:
    filtered, _ = damp({'w': v}, 2, axes=axes)
    assert_close(filtered['w'], reference(f, np.float64(v), taken, rank=2)[0], 1e-5)
  filtered, fraction = damp(v, 2, axes=())
  np.testing.assert_array_equal(filtered, v)
  assert fraction.tolist() == [0]


def test_axis_too_long_for_exact_phases():
  leaf = jax.ShapeDtypeStruct((50_257, 8), jnp.float32)
  dct().layout(jax.ShapeDtypeStruct((50_257, 32), jnp.float32))
  with pytest.raises(ValueError, match=r'at most 46340 .* axis 0 .*\(50257, 8\); name'):
    dct().layout(leaf)
