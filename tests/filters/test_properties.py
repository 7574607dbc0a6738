"""Properties of every transformation, whatever the numbers, trees and dtypes.

Examples are drawn the same way every time. Each case is compiled once.
"""

import functools
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bsfa_optax
from bsfa_optax import bsfa, pca, scale_by_whitening

pytestmark = pytest.mark.slow

profile = settings(derandomize=True, max_examples=6, deadline=None, database=None)

TREES = {
  'layers': {'bias': (3,), 'kernel': (4, 3), 'layers': [{'w': (5, 2)}, {'w': (5, 2)}]},
  'conv': {'conv': {'kernel': (3, 2, 2, 4), 'bias': (4,)}, 'scale': ()},
  'vectors': {'a': (1,), 'b': (7,), 'c': ()},
}
SPLIT = (pca(2, 2), optax.identity(), optax.scale(0.5))
FILTERS = {
  'whitening': (scale_by_whitening(refresh_every=2), 'layers', 'float32'),
  'whitening f16': (scale_by_whitening(), 'conv', 'float16'),
  'cut': (scale_by_whitening(0.02, block_size=2), 'layers', 'bfloat16'),
  'kronecker': (bsfa(), 'layers', 'float16'),
  'graded': (bsfa(0.1, 4.0, exponent=0.5, grafting=True), 'conv', 'float32'),
  'pca': (bsfa(estimator=pca()), 'conv', 'float32'),
  'pca bf16': (bsfa(estimator=pca(3, 1)), 'layers', 'bfloat16'),
  'window': (
    bsfa(estimator=pca(2, 3, decay=0.0, refresh_every=2, storage_dtype=None)),
    'layers',
    'float16',
  ),
  'one block': (
    bsfa(estimator=pca(3, 2, solver='randomized', storage_dtype=None, labels='all')),
    'vectors',
    'float32',
  ),
  'dct': (bsfa(estimator=bsfa_optax.dct(2)), 'layers', 'float32'),
  'no block': (bsfa(), 'vectors', 'bfloat16'),
  'interpolated': (
    bsfa_optax.interpolated(optax.identity(), 0.0, 1.0, threshold=0.3),
    'layers',
    'float32',
  ),
  'split': (bsfa_optax.split_by_subspace(*SPLIT), 'layers', 'float32'),
}
WRAPPED = FILTERS | {
  'bsfa_adamw': (bsfa_optax.bsfa_adamw(1e-2), 'layers', 'float32'),
  'accelerate': (
    bsfa_optax.accelerate(optax.adam(1e-2), history=optax.identity()),
    'conv',
    'float32',
  ),
}
ONES = {
  'kronecker': (bsfa(1.0, 1.0), 'layers', 'bfloat16'),
  'graded': (bsfa(1.0, 1.0, exponent=0.5), 'conv', 'float32'),
  'flat': (bsfa(0.5, 2.0, exponent=0.0), 'layers', 'float32'),
  'pca': (bsfa(1.0, 1.0, estimator=pca()), 'layers', 'float16'),
  'dct': (bsfa(1.0, 1.0, estimator=bsfa_optax.dct(2)), 'conv', 'bfloat16'),
}
CASES = WRAPPED | {f'ones, {name}': case for name, case in ONES.items()}

kinds = ['normal', 'zero', 'rank one', 'one entry', 'constant', 'in a leaf']
step = st.tuples(st.sampled_from(kinds), st.floats(-14, 14), st.integers(0, 2**16))
steps = st.lists(step, min_size=3, max_size=7)


@functools.cache
def compiled(name):
  """The update, and the first state."""
  tx, tree, dtype = CASES[name]
  params = jax.tree.map(lambda n: jnp.ones(n, dtype), TREES[tree], is_leaf=is_shape)
  return jax.jit(tx.update), tx.init(params)


def is_shape(x):
  return isinstance(x, tuple)


def make(name, kind, exponent, seed):
  """An update of numbers up to about ten to the exponent."""
  _, tree, dtype = CASES[name]
  exponent = np.clip(exponent, -4, 3) if dtype == 'float16' else exponent
  rng = np.random.default_rng(seed)

  def leaf(shape):
    x = rng.normal(size=shape)
    if kind == 'zero' or (kind == 'in a leaf' and rng.random() < 0.5):
      x = 0 * x
    elif kind == 'rank one' and len(shape) > 1:
      x = functools.reduce(np.multiply.outer, [rng.normal(size=n) for n in shape])
    elif kind == 'one entry':
      x = np.where(np.arange(x.size).reshape(shape) == 0, x, 0)
    elif kind == 'constant':
      x = np.ones(shape)
    return np.asarray(10**exponent * x, dtype)

  return jax.tree.map(leaf, TREES[tree], is_leaf=is_shape)


def updates_of(name, steps):
  return [make(name, *step) for step in steps]


def run(name, updates, state=None):
  update, first = compiled(name)
  state, outs = first if state is None else state, []
  for u in updates:
    out, state = update(u, state, u)
    outs.append(out)
  return outs, state


def types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.float64(x), np.float64(y))


@pytest.mark.parametrize('name', WRAPPED)
@given(steps=steps)
@profile
def test_finite_in_finite_out_and_types_stay(name, steps):
  updates = updates_of(name, steps)
  first = compiled(name)[1]
  outs, state = run(name, updates)
  for out, u in zip(outs, updates, strict=True):
    assert types(out) == types(u)
  assert types(state) == types(first)
  for x in jax.tree.leaves((outs, state)):
    assert np.isfinite(np.float64(x)).all()


@pytest.mark.parametrize('name', [f'ones, {name}' for name in ONES])
@given(steps=steps)
@profile
def test_ones_are_the_identity(name, steps):
  updates = updates_of(name, steps)
  assert_equal(run(name, updates)[0], updates)


@pytest.mark.parametrize('name', [n for n, c in FILTERS.items() if c[2] != 'float16'])
@given(steps=steps, power=st.integers(-46, 46))
@profile
def test_scale_carries_over(name, steps, power):
  updates = updates_of(name, [(kind, 0.0, seed) for kind, _, seed in steps])
  scaled = jax.tree.map(
    lambda x: np.asarray(2.0**power * np.float64(x), x.dtype), updates
  )
  outs, others = run(name, updates)[0], run(name, scaled)[0]
  for a, b in zip(jax.tree.leaves(outs), jax.tree.leaves(others), strict=True):
    a, b = np.float64(a), np.float64(b) / 2.0**power
    tol = 1e-2 if CASES[name][2] == 'bfloat16' else 1e-4
    np.testing.assert_allclose(a, b, rtol=0, atol=tol * max(1, np.abs(a).max()))


@pytest.mark.parametrize('name', FILTERS)
@given(steps=steps, at=st.integers(0, 6), bad=st.sampled_from(['nan', 'inf', '-inf']))
@profile
def test_bad_update_leaves_no_trace(name, steps, at, bad):
  updates = updates_of(name, steps)
  at = min(at, len(updates) - 1)
  spoil = lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, float(bad), x)
  spoilt = jax.tree.map(lambda x: spoil(x).astype(x.dtype), updates[at])
  outs, state = run(name, updates)
  others, other = run(name, [*updates[:at], spoilt, *updates[at:]])
  if name not in ('no block', 'split'):
    assert_equal(others.pop(at), spoilt)
    assert_equal(outs, others)
  clear = lambda state: optax.tree.set(state, skipped_updates=jnp.int32(0))
  if name != 'no block':
    assert optax.tree.get(other, 'skipped_updates') == 1
    assert_equal(clear(state), clear(other))


@pytest.mark.parametrize('name', WRAPPED)
@given(steps=steps, at=st.integers(1, 6))
@profile
def test_saved_and_restored_goes_on(name, steps, at):
  updates = updates_of(name, steps)
  at = min(at, len(updates) - 1)
  outs, state = run(name, updates)
  _, half = run(name, updates[:at])
  leaves, structure = jax.tree.flatten(jax.device_get(half))
  restored = jax.tree.unflatten(structure, pickle.loads(pickle.dumps(leaves)))
  others, other = run(name, updates[at:], jax.tree.map(jnp.asarray, restored))
  assert_equal((outs[at:], state), (others, other))
