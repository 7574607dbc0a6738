"""`diagnostics.spectrum` for every estimator, others' included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsfa_optax import (
  _learned,
  bsfa,
  dct,
  diagnostics,
  estimators,
  hessian_lanczos,
  kronecker,
  pca,
)

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def make_params(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}


def learned(estimator, params, steps=8):
  """What has been learnt when it has refreshed."""
  rng = np.random.default_rng(3)
  tx = bsfa(estimator=estimator)
  value_fn = lambda params: sum((p**4).sum() for p in params.values())
  update = jit(lambda u, s, p: tx.update(u, s, p, value_fn=value_fn)[1])
  state = tx.init(params)
  scales = {k: np.exp(rng.normal(size=x.shape)) for k, x in params.items()}
  for _ in range(steps):
    updates = {
      k: jnp.float32(rng.normal(size=x.shape) * scales[k]) for k, x in params.items()
    }
    state = update(updates, state, params)
  return state.memory


def average():
  """The estimator in the docstring of `Estimator`."""

  def init(layout, params):
    return [jnp.zeros_like(x) for x in layout.select(params)]

  def learn(layout, vector, memory, count, params, **extra_args):
    return [0.9 * m + 0.1 * v for m, v in zip(memory, vector, strict=True)]

  def decompose(layout, vector, memory):
    rows = [m[None] for m in memory]
    norm = jnp.sqrt(estimators.inner(layout, rows, rows)[:, 0, 0])
    rows = [r / norm[i] for i, r in enumerate(rows)]
    variance = jnp.array([[2.5], [1.5]])
    return estimators.from_rows(layout, vector, rows, variance, norm, True)

  return estimators.Estimator(estimators.layout, init, learn, decompose)


ESTIMATORS = {  # and the number of directions in the two blocks
  'pca': (pca(3, 4), [3, 3]),
  'kronecker': (kronecker(refresh_every=4), [12, 6]),
  'unfactored axis': (kronecker(axes={'a': 0, 'c': (0, 1)}), [3, 6]),
  'dct': (dct(2), [3, 3]),
  'hessian': (hessian_lanczos(2), [2, 2]),
  'average': (average(), [1, 1]),
}


@pytest.mark.parametrize(
  'name',
  [pytest.param(k, marks=[] if k == 'dct' else [pytest.mark.slow]) for k in ESTIMATORS],
)
def test_spectrum_is_what_the_filter_sees(name):
  """The variances handed to f, once for every principal direction."""
  params = make_params({'a': (3, 4), 'c': (2, 3)})
  estimator, counts = ESTIMATORS[name]
  memory = learned(estimator, params)
  layout = estimator.layout(params)

  @jit
  def variances(params, memory):
    seen = []

    def f(variance, dominant):
      seen.append(variance)
      return jnp.ones_like(variance)

    vector = layout.select(params)
    _learned.filtered(f, layout, vector, estimator.decompose(layout, vector, memory))
    return seen

  seen = [np.asarray(x) for x in variances(params, memory)]
  # First that of the rest; then one array for each block, or one with a row for each.
  rows = seen[1] if len(seen) == 2 else seen[1:]
  found = diagnostics.spectrum(estimator, memory, params)
  assert [len(x) for x in found] == counts
  for values, expected in zip(found, rows, strict=True):
    assert isinstance(values, np.ndarray)
    np.testing.assert_allclose(values, np.sort(expected.ravel())[::-1], rtol=1e-6)
    assert values[0] > 1


def test_spectrum_before_a_refresh_is_zero():
  params = make_params({'a': (3, 4), 'bias': (4,)})
  for estimator, size in ((pca(3, 4), 3), (kronecker(), 12), (hessian_lanczos(2), 2)):
    memory = estimator.init(estimator.layout(params), params)
    (found,) = diagnostics.spectrum(estimator, memory, params)
    assert found.tolist() == [0.0] * size
    none = diagnostics.spectrum(estimator, memory, {'bias': params['bias']})
    assert none == []


@pytest.mark.slow
def test_spectrum_of_blocks_in_a_leaf_and_of_joined_leaves():
  params = make_params({'a': (3, 4), 'b': (5,), 'layers': (4, 2, 3)})
  batch_axes = {'a': None, 'b': None, 'layers': 1}
  estimator = hessian_lanczos(
    2, labels={'a': 'one', 'b': 'one', 'layers': 'layers'}, batch_axes=batch_axes
  )
  memory = learned(estimator, params, 1)
  found = np.stack(diagnostics.spectrum(estimator, memory, params))
  curvature = np.asarray(memory.curvature)
  assert curvature.shape == (3, 2)
  relative = curvature / curvature.min(1, keepdims=True)
  np.testing.assert_allclose(found, relative, rtol=1e-6)
  estimator = kronecker(batch_axes=batch_axes, refresh_every=4)
  memory, layout = learned(estimator, params), estimator.layout(params)
  found = diagnostics.spectrum(estimator, memory, params)
  assert len(found) == layout.count == len(layout.names) == 3
  for values in found:
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(values.mean(), 1, rtol=1e-5)


def test_spectrum_of_leaves_that_are_alike():
  params = make_params({f'layers/{i}': (3, 4) for i in range(3)})
  estimator = kronecker(refresh_every=4)
  memory = learned(estimator, params)
  assert len(memory) == 1  # part
  together = diagnostics.spectrum(estimator, memory, params)
  for i, key in enumerate(params):
    own = jax.tree.map(lambda x, i=i: x[i : i + 1], memory)
    (alone,) = diagnostics.spectrum(estimator, own, {key: params[key]})
    np.testing.assert_array_equal(together[i], alone)
  assert (together[0] != together[1]).any()
