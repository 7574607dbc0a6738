"""The estimators find what they should, and the filter speeds up training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsfa_optax import _learned, bsfa, kronecker, pca

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def orthonormal(rng, size, rank):
  return np.linalg.qr(rng.normal(size=(size, rank)))[0]


# A planted subspace: large noise within it, a small constant drift outside.

SHAPE, RANK = (8, 6), 3


def subspaces(rng):
  """Orthogonal projectors on planted subspaces of (8, 6) matrices, flattened."""
  n = SHAPE[0] * SHAPE[1]
  q, u = orthonormal(rng, n, RANK), orthonormal(rng, SHAPE[0], RANK)
  return {'any': q @ q.T, 'columns': np.kron(u @ u.T, np.eye(SHAPE[1]))}


PLANTED = {
  'gram': ('any', pca(RANK, 4, solver='gram')),
  'randomized': ('any', pca(RANK, 4, solver='randomized')),
  'window': ('any', pca(RANK, 12, decay=0.0, refresh_every=4)),
  'kronecker': ('columns', kronecker(decay=0.97, refresh_every=1)),
}


@pytest.mark.parametrize('name', PLANTED)
def test_planted_subspace(name):
  alpha, gamma, steps = 0.1, 3.0, 40
  rng = np.random.default_rng(0)
  kind, estimator = PLANTED[name]
  planted = subspaces(rng)[kind]
  rank, n = round(np.trace(planted)), len(planted)
  drift = (np.eye(n) - planted) @ rng.normal(size=n)
  noise = 30 * rng.normal(size=(steps, n)) @ planted
  updates = noise + drift / np.linalg.norm(drift)
  tx = bsfa(alpha, gamma, estimator=estimator)

  @jit
  def run(updates, probes):
    step = lambda state, u: (tx.update(u, state)[1], None)
    state, _ = jax.lax.scan(step, tx.init(updates[0]), updates)
    f = lambda variance, dominant: jnp.where(dominant, alpha, gamma)
    layout = estimator.layout(updates[0])

    def apply(v):
      vector = layout.select(v)
      found = estimator.decompose(layout, vector, state.memory)
      return layout.replace(v, _learned.filtered(f, layout, vector, found))

    return jax.vmap(apply)(probes), state.measured['dominant_fraction']

  as_leaves = lambda rows: jnp.float32(rows.reshape(len(rows), *SHAPE))
  probes = np.concatenate([np.eye(n), noise[-1:], drift[None]])
  filtered, fraction = run(as_leaves(updates), as_leaves(probes))
  filtered = np.asarray(filtered, np.float64).reshape(len(probes), n)
  found = (gamma * np.eye(n) - filtered[:n]) / (gamma - alpha)  # the projector
  np.testing.assert_allclose(np.trace(found), rank, atol=1e-3)
  assert np.trace(found @ planted) / rank > 0.99  # the overlap

  inside, outside = np.linalg.norm(filtered[n:], axis=1) / np.linalg.norm(
    probes[n:], axis=1
  )
  np.testing.assert_allclose(inside, alpha, rtol=0.1)
  np.testing.assert_allclose(outside, gamma, rtol=0.02)
  ratio = np.linalg.norm(noise[-1]) / np.linalg.norm(updates[-1])
  np.testing.assert_allclose(fraction, [ratio], rtol=0.02)


# A quadratic with three steep directions, on which the gradient is noisy.


@functools.cache
def quadratic(tx, learning_rate, steps=1000):
  """Loss along the flat and along the steep directions, step by step."""
  rng = np.random.default_rng(0)
  steep, flat = np.array([100.0, 90.0, 80.0]), np.linspace(1, 0.5, 27)
  q = orthonormal(rng, 30, 30)
  curvature = np.concatenate([steep, flat])
  hessian = jnp.float32(q * curvature @ q.T)
  parts = jnp.float32(q)
  noise = jnp.float32(0.3 * rng.normal(size=(steps, 3)) @ q[:, :3].T)

  def step(carry, noise):
    x, state = carry
    grad = hessian @ (x + noise)
    updates, state = tx.update(-learning_rate * grad.reshape(6, 5), state)
    x = x + updates.reshape(30)
    losses = 0.5 * jnp.asarray(curvature, x.dtype) * jnp.square(parts.T @ x)
    return (x, state), (losses[3:].sum(), losses[:3].sum())

  x = parts @ jnp.ones(30)
  state = tx.init(x.reshape(6, 5))
  return jit(lambda x, noise: jax.lax.scan(step, (x, state), noise)[1])(x, noise)


@pytest.mark.slow
@pytest.mark.parametrize(
  'options', [{'decay': 0.9}, {'decay': 0.0, 'refresh_every': 2}]
)
def test_ill_conditioned_quadratic(options):
  learning_rate, alpha, gamma, target = 0.01, 0.3, 8.0, 1e-3
  filtered = bsfa(alpha, gamma, estimator=pca(3, 6, **options))
  base = quadratic(optax.identity(), learning_rate)
  fast = quadratic(optax.identity(), gamma * learning_rate)
  ours = quadratic(filtered, learning_rate)
  assert not np.isfinite(fast[1][-1])
  steps = lambda losses: int(np.argmax(np.asarray(losses[0]) < target))
  assert steps(base) > 500
  assert 0.8 < steps(ours) * gamma / steps(base) < 1.25
  # And ends with less noise along the steep directions, as alpha is less than 1.
  assert ours[1][-200:].mean() < 0.3 * base[1][-200:].mean()


# A small network on synthetic classes, at the learning rate of the base optimizer.


def network_data():
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(512, 12)) * np.geomspace(3, 0.3, 12)
  teacher = rng.normal(size=(12, 8)), rng.normal(size=(8, 5))
  labels = np.argmax(np.tanh(inputs @ teacher[0]) @ teacher[1], 1)
  return jnp.float32(inputs), jnp.asarray(labels, jnp.int32)


def network_loss(params, inputs, labels):
  hidden = jnp.tanh(inputs @ params['in'] + params['bias'][None])
  logits = hidden @ params['out']
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
  return -chosen.mean()


@functools.cache
def train_network(tx, steps=200, seeds=(1, 2)):
  """Mean final loss on all data over seeds of weights and batches."""
  inputs, labels = network_data()

  @jit
  def run(params, batches):
    def step(carry, batch):
      params, state = carry
      grads = jax.grad(network_loss)(params, inputs[batch], labels[batch])
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return network_loss(params, inputs, labels)

  losses = []
  for seed in seeds:
    rng = np.random.default_rng(seed)
    params = {
      'in': jnp.float32(rng.normal(size=(12, 24)) / 12**0.5),
      'bias': jnp.zeros(24),
      'out': jnp.float32(rng.normal(size=(24, 5)) / 24**0.5),
    }
    batches = jnp.asarray(rng.integers(0, 512, (steps, 32)), jnp.int32)
    losses.append(run(params, batches))
  return float(np.mean(losses))


BASES = {'sgd': optax.sgd(0.4), 'adam': optax.adam(0.01)}
FILTERS = {
  'pca': bsfa(0.8, 4.0, estimator=pca(4, 4)),
  'kronecker': bsfa(0.5, 4.0, exponent=0.5, estimator=kronecker(refresh_every=5)),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', FILTERS)
@pytest.mark.parametrize('base', BASES)
def test_network_ends_at_a_lower_loss(base, name):
  plain = train_network(BASES[base])
  assert 0.2 < plain < 0.6  # of log(5) = 1.6 at the start
  assert train_network(optax.chain(BASES[base], FILTERS[name])) < 0.96 * plain
