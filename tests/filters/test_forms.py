"""The filter's other forms: `accelerate`, `interpolated`, `split_by_subspace`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsfa_optax import (
  _learned,
  accelerate,
  bsfa,
  dct,
  interpolated,
  kronecker,
  pca,
  split_by_subspace,
)

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

# Compiling is most of the time, and the little there is to run needs no tuning.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

STEPS = 9
ADAM = optax.adam(0.1, b2=0.95)
HISTORIES = {
  'gradients': optax.identity(),
  'metric': optax.scale_by_adam(b1=0.0, b2=0.95),
}


def small():
  return pca(rank=2, history=2)


def make_gradients(steps=STEPS, scale=1.0):
  """Gradients that vary most along two directions of each leaf."""
  rng = np.random.default_rng(0)
  shapes = {'bias': (3,), 'first': (4, 3), 'second': (5, 2)}
  strong = {k: 5 * rng.normal(size=(2, *shape)) for k, shape in shapes.items()}

  def leaf(key):
    along = np.tensordot(rng.normal(size=2), strong[key], 1)
    return jnp.float32(scale * (along + rng.normal(size=shapes[key])))

  return [{key: leaf(key) for key in shapes} for _ in range(steps)]


def run(tx, gradients, **extra_args):
  """The updates of every step, and the last state."""
  step = jit(lambda g, s: tx.update(g, s, g, **extra_args))
  state, out = tx.init(gradients[0]), []
  for g in gradients:
    updates, state = step(g, state)
    out.append(updates)
  return out, state


def two_level(alpha, gamma):
  return lambda variance, dominant: jnp.where(
    dominant, *(jnp.asarray(x, variance.dtype) for x in (alpha, gamma))
  )


def learn(estimator, gradients):
  """The memory behind every update."""
  tx = bsfa(estimator=estimator)
  state, out, update = tx.init(gradients[0]), [], jit(tx.update)
  for g in gradients:
    state = update(g, state)[1]
    out.append(state.memory)
  return out


def applied(estimator, f):
  """A function of updates and memory to f(C) v."""

  def apply(updates, memory):
    layout = estimator.layout(updates)
    vector = layout.select(updates)
    found = estimator.decompose(layout, vector, memory)
    return layout.replace(updates, _learned.filtered(f, layout, vector, found))

  return jit(apply)


# accelerate


@pytest.mark.slow
def test_history_of_updates_is_the_chain():
  gradients = make_gradients()
  filter_ = bsfa(0.2, 3.0, exponent=0.5, grafting=True, estimator=small())
  actual, state = run(accelerate(ADAM, filter_, history=ADAM), gradients)
  desired, chained = run(optax.chain(ADAM, filter_), gradients)
  chex.assert_trees_all_close(actual, desired, rtol=1e-6)
  chex.assert_trees_all_close(state.filter_state, chained[1], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('estimator', 'name'),
  [
    (small(), 'metric'),
    (kronecker(), 'gradients'),
  ],
  ids=['pca-metric', 'kronecker-gradients'],
)
def test_history_is_what_the_estimator_learns(estimator, name):
  gradients = make_gradients()
  filter_ = bsfa(0.2, 3.0, estimator=estimator)
  actual, _ = run(accelerate(ADAM, filter_, history=HISTORIES[name]), gradients)
  updates, _ = run(ADAM, gradients)
  history, _ = run(HISTORIES[name], gradients)
  others = run(filter_, updates)[0]
  apply = applied(estimator, two_level(0.2, 3.0))
  memories = learn(estimator, history)
  for memory, u, out in zip(memories, updates, actual, strict=True):
    chex.assert_trees_all_close(out, apply(u, memory), rtol=1e-5, atol=1e-6)
  assert jnp.abs(out['first'] - others[-1]['first']).max() > 1e-3  # history matters


def test_accelerate_passes_extra_arguments_and_parameters_on():
  seen = []

  def update(updates, state, params=None, **extra_args):
    seen.append((params is not None, extra_args))
    return updates, state

  spy = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
  run(accelerate(spy, history=spy), make_gradients(1), value=4.0)
  assert seen == [(True, {'value': 4.0})] * 2


@pytest.mark.slow
@pytest.mark.parametrize('bad', ['gradient', 'history'])
def test_accelerate_learns_nothing_from_what_is_not_finite(bad):
  spoil = optax.stateless(lambda u, _: jax.tree.map(lambda x: x * jnp.nan, u))
  history = spoil if bad == 'history' else optax.identity()
  gradients = make_gradients(4, jnp.nan if bad == 'gradient' else 1.0)
  out, state = run(accelerate(optax.sgd(1.0), history=history), gradients)
  assert state.filter_state.filter_count == 0
  assert state.filter_state.skipped_updates == 4
  chex.assert_tree_all_finite(state.filter_state)
  chex.assert_trees_all_equal(out[-1], jax.tree.map(jnp.negative, gradients[-1]))


# interpolated


def fractions(gradients, estimator):
  """The dominant fraction at every step, (steps, blocks)."""
  step, out = jit(bsfa(0.0, 1.0, estimator=estimator).update), []
  state = bsfa(0.0, 1.0, estimator=estimator).init(gradients[0])
  for g in gradients:
    _, state = step(g, state)
    out.append(state.measured['dominant_fraction'])
  return np.array(out)


@pytest.mark.slow
def test_each_block_is_switched_on_for_good():
  alpha, gamma = 0.5, 2.0
  # Strong directions of `second` fade, so that its average falls again.
  gradients = make_gradients(14)
  fade = [1.0 if i < 9 else 0.0 for i in range(14)]
  orthogonal = jnp.zeros((5, 2)).at[0, 0].set(1e-3)
  gradients = [
    g | {'second': w * g['second'] + (1 - w) * orthogonal}
    for g, w in zip(gradients, fade, strict=True)
  ]
  estimator = pca(rank=2, history=4)
  average, on, threshold, decay = np.zeros(2), np.zeros(2, bool), 0.6, 0.7
  tx = interpolated(
    optax.sgd(1.0), alpha, gamma, estimator=estimator, threshold=threshold, decay=decay
  )
  actual, state = run(tx, gradients)
  filtered, _ = run(
    optax.chain(optax.sgd(1.0), bsfa(alpha, gamma, estimator=estimator)), gradients
  )
  switched = []
  for i, fraction in enumerate(fractions(gradients, estimator)):
    average = decay * average + (1 - decay) * fraction
    on |= average > threshold
    switched.append(on.copy())
    plain = jax.tree.map(jnp.negative, gradients[i])
    for j, key in enumerate(['first', 'second']):
      desired = (filtered[i] if on[j] else plain)[key]
      np.testing.assert_allclose(actual[i][key], desired, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actual[i]['bias'], plain['bias'])
  assert not switched[0].any()
  assert switched[-1].all()
  assert average[1] < threshold  # it stays on though the average has fallen
  np.testing.assert_array_equal(state[1].switched_on, on)
  np.testing.assert_allclose(state[1].average_fraction, average, rtol=1e-4)


# split_by_subspace


ESTIMATORS = {'pca': small(), 'kronecker': kronecker(refresh_every=2), 'dct': dct(2)}


@pytest.mark.parametrize(
  'name',
  [pytest.param(k, marks=[] if k == 'dct' else [pytest.mark.slow]) for k in ESTIMATORS],
)
def test_split_by_two_scales_is_the_filter(name):
  gradients, estimator = make_gradients(), ESTIMATORS[name]
  tx = split_by_subspace(estimator, optax.scale(0.2), optax.scale(3.0))
  actual, _ = run(tx, gradients)
  desired, _ = run(bsfa(0.2, 3.0, estimator=estimator), gradients)
  for i, (g, out, filtered) in enumerate(zip(gradients, actual, desired, strict=True)):
    ready = i > 0 or name == 'dct'
    for key in ('first', 'second'):
      # Before the first refresh nothing is dominant.
      expected = filtered[key] if ready else 3 * g[key]
      np.testing.assert_allclose(out[key], expected, rtol=1e-4, atol=1e-5)
    # Nor ever in a leaf in no block.
    np.testing.assert_allclose(out['bias'], 3 * g['bias'], rtol=1e-6)


@pytest.mark.slow
def test_split_runs_each_part_through_its_own_transformation():
  gradients, estimator = make_gradients(), small()
  tx = split_by_subspace(estimator, optax.scale_by_adam(), optax.scale_by_sign())
  actual, state = run(tx, gradients, value=1.0)
  project = applied(estimator, two_level(1.0, 0.0))
  parts = []
  for g, memory in zip(gradients, learn(estimator, gradients), strict=True):
    zero = jax.tree.map(jnp.zeros_like, g)
    inside = project(g, memory) if parts else zero  # not ready at the first
    inside['bias'] = zero['bias']
    parts.append((inside, jax.tree.map(lambda v, p: v - p, g, inside)))
  first, adam = run(optax.scale_by_adam(), [a for a, _ in parts])
  chex.assert_trees_all_close(state.dominant_state, adam, rtol=1e-4, atol=1e-5)
  for key in ('bias', 'first', 'second'):
    sign = jnp.sign(parts[-1][1][key])
    desired = first[-1][key] + sign
    np.testing.assert_allclose(actual[-1][key], desired, rtol=1e-4, atol=1e-4)


def test_split_learns_nothing_from_what_is_not_finite():
  _, state = run(
    split_by_subspace(small(), optax.identity(), optax.identity()),
    make_gradients(4, jnp.nan),
  )
  chex.assert_tree_all_finite(state)


# The ends of floating-point numbers.


@pytest.mark.slow
@pytest.mark.parametrize('name', ESTIMATORS)
def test_grafting_does_not_blow_up_rounding(name):
  """Nothing but rounding is left of rank-one updates without their dominant part."""
  estimator = dct(1) if name == 'dct' else ESTIMATORS[name]
  rng = np.random.default_rng(1)
  left, right = rng.normal(size=(6, 1)), rng.normal(size=(1, 5))
  if name == 'dct':
    right = np.ones((1, 5))  # one frequency
  direction = left * right
  gradients = [jnp.float32((1 + i) * direction) for i in range(6)]
  out, state = run(bsfa(0.0, 1.0, grafting=True, estimator=estimator), gradients)
  np.testing.assert_allclose(state.measured['dominant_fraction'], [1], rtol=1e-5)
  for g, filtered in zip(gradients[2:], out[2:], strict=True):
    assert jnp.linalg.norm(filtered) < 1e-4 * jnp.linalg.norm(g)
  # What is more than rounding has the norm that the update had.
  other = gradients[-1] + 1e-2 * jnp.float32(rng.normal(size=(6, 5)))
  tx = bsfa(0.0, 1.0, grafting=True, estimator=estimator)
  filtered, _ = jit(tx.update)(other, state)
  desired = jnp.linalg.norm(other)
  np.testing.assert_allclose(jnp.linalg.norm(filtered), desired, rtol=1e-4)
