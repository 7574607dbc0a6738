"""The filter's other forms: `accelerate`, `interpolated`, `split_by_subspace`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bsfa_optax
from bsfa_optax import accelerate, bsfa, interpolated, kronecker, pca, split_by_subspace

# Compiling is most of the time, and the little there is to run needs no tuning.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

STEPS = 9
ADAM = optax.adam(0.1, b2=0.95)
HISTORIES = {
  'updates': None,
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


# accelerate


def test_history_of_updates_is_the_chain():
  gradients = make_gradients()
  options = {'exponent': 0.5, 'preserve_norm': True, 'estimator': small()}
  actual, state = run(accelerate(ADAM, 0.2, 3.0, **options), gradients)
  desired, chained = run(optax.chain(ADAM, bsfa(0.2, 3.0, **options)), gradients)
  chex.assert_trees_all_equal(actual, desired)
  chex.assert_trees_all_equal(state.bsfa_state, chained[1])


@pytest.mark.parametrize('name', ['gradients', 'metric'])
@pytest.mark.parametrize('estimator', [small(), kronecker()])
def test_history_is_what_the_estimator_learns(estimator, name):
  gradients = make_gradients()
  actual, _ = run(
    accelerate(ADAM, 0.2, 3.0, history=HISTORIES[name], estimator=estimator), gradients
  )
  updates, _ = run(ADAM, gradients)
  history, _ = run(HISTORIES[name], gradients)
  others = run(bsfa(0.2, 3.0, estimator=estimator), updates)[0]
  state, update = estimator.init(gradients[0]), jit(estimator.update)
  apply = jit(lambda u, state: estimator.apply(two_level(0.2, 3.0), u, state)[0])
  for h, u, out in zip(history, updates, actual, strict=True):
    state = update(h, state, u)
    desired = apply(u, state)
    chex.assert_trees_all_close(out, desired, rtol=1e-5, atol=1e-6)
  assert jnp.abs(out['first'] - others[-1]['first']).max() > 1e-3  # history matters


def test_accelerate_passes_extra_arguments_and_parameters_on():
  seen = []

  def update(updates, state, params=None, **extra_args):
    seen.append((params is not None, extra_args))
    return updates, state

  spy = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
  run(accelerate(spy, history=spy), make_gradients(1), value=4.0)
  assert seen == [(True, {'value': 4.0})] * 2


@pytest.mark.parametrize('bad', ['gradient', 'history'])
def test_accelerate_learns_nothing_from_what_is_not_finite(bad):
  spoil = optax.stateless(lambda u, _: jax.tree.map(lambda x: x * jnp.nan, u))
  history = spoil if bad == 'history' else None
  gradients = make_gradients(4, jnp.nan if bad == 'gradient' else 1.0)
  out, state = run(accelerate(optax.sgd(1.0), history=history), gradients)
  assert state.bsfa_state.bsfa_step == 0
  chex.assert_tree_all_finite(state.bsfa_state)
  chex.assert_trees_all_equal(out[-1], jax.tree.map(jnp.negative, gradients[-1]))


# interpolated


def fractions(gradients, estimator):
  """The dominant fraction at every step, (steps, blocks)."""
  step, out = jit(bsfa(0.0, 1.0, estimator=estimator).update), []
  state = bsfa(0.0, 1.0, estimator=estimator).init(gradients[0])
  for g in gradients:
    _, state = step(g, state)
    out.append(state.dominant_fraction)
  return np.array(out)


@pytest.mark.parametrize(
  ('make', 'alpha', 'gamma'),
  [
    (lambda base, **options: interpolated(base, 0.5, 2.0, **options), 0.5, 2.0),
    (bsfa_optax.bulk_only, 0.0, 1.0),
    (bsfa_optax.dominant_only, 1.0, 0.0),
  ],
  ids=['interpolated', 'bulk_only', 'dominant_only'],
)
def test_each_block_is_switched_on_for_good(make, alpha, gamma):
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
  actual, state = run(
    make(optax.sgd(1.0), estimator=estimator, threshold=threshold, decay=decay),
    gradients,
  )
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


@pytest.mark.parametrize('estimator', [small(), kronecker()])
def test_split_by_two_scales_is_the_filter(estimator):
  gradients = make_gradients()
  tx = split_by_subspace(estimator, optax.scale(0.2), optax.scale(3.0))
  actual, _ = run(tx, gradients)
  desired, _ = run(bsfa(0.2, 3.0, estimator=estimator), gradients)
  for key in ('first', 'second'):
    np.testing.assert_allclose(actual[-1][key], desired[-1][key], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(actual[-1]['bias'], 0.2 * gradients[-1]['bias'])


def test_split_runs_each_part_through_its_own_transformation():
  gradients, estimator = make_gradients(), small()
  tx = split_by_subspace(estimator, optax.scale_by_adam(), optax.scale_by_sign())
  actual, state = run(tx, gradients, value=1.0)
  learned, update = estimator.init(gradients[0]), jit(estimator.update)
  project = jit(lambda g, state: estimator.apply(two_level(1.0, 0.0), g, state)[0])
  parts = []
  for g in gradients:
    learned = update(g, learned, g)
    inside = project(g, learned)
    parts.append((inside, jax.tree.map(lambda v, p: v - p, g, inside)))
  first, adam = run(optax.scale_by_adam(), [a for a, _ in parts])
  chex.assert_trees_all_close(state.dominant_state, adam, rtol=1e-4, atol=1e-5)
  for key in ('first', 'second'):
    sign = jnp.sign(parts[-1][1][key])
    desired = first[-1][key] + sign
    np.testing.assert_allclose(actual[-1][key], desired, rtol=1e-4, atol=1e-4)


def test_split_learns_nothing_from_what_is_not_finite():
  _, state = run(
    split_by_subspace(small(), optax.identity(), optax.identity()),
    make_gradients(4, jnp.nan),
  )
  chex.assert_tree_all_finite(state)


# Errors


@pytest.mark.parametrize(
  ('call', 'error', 'match'),
  [
    (lambda: accelerate(optax.sgd), TypeError, 'base_optimizer must be an optax'),
    (lambda: accelerate(ADAM, history='gradients'), TypeError, "'gradients'; call"),
    (lambda: accelerate(ADAM, alpha=-1.0), ValueError, 'alpha must be .* got -1.0'),
    (lambda: accelerate(ADAM, estimator=pca), TypeError, 'estimator must be'),
    (lambda: interpolated(0.1, 0.0, 1.0), TypeError, 'base_optimizer must be'),
    (
      lambda: bsfa_optax.bulk_only(ADAM, threshold=1.0),
      ValueError,
      r'threshold must be in \[0.0, 1.0\), got 1.0',
    ),
    (lambda: bsfa_optax.bulk_only(ADAM, decay=2), ValueError, 'decay must be'),
    (lambda: split_by_subspace(ADAM, ADAM, ADAM), TypeError, 'estimator must be'),
    (lambda: split_by_subspace(small(), 1, ADAM), TypeError, 'dominant must be'),
    (lambda: split_by_subspace(small(), ADAM, None), TypeError, 'bulk must be'),
  ],
)
def test_errors_name_the_option_and_the_value(call, error, match):
  with pytest.raises(error, match=match):
    call()
