"""The `pca` estimator against `numpy.linalg.svd`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsfa_optax import _svd, pca

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

SOLVERS = ['gram', 'randomized']
DTYPES = ['float32', 'float64']
# Errors of squared singular values over the greatest one, and of the projector. The
# randomized solver shifts its Gram matrices by 8 n eps to decompose singular ones.
VARIANCE_TOL = {'float32': 5e-5, 'float64': 2e-13}
PROJECTOR_TOL = {'float32': 1e-4, 'float64': 1e-10}


def orthonormal(rng, rows, size):
  return np.linalg.qr(rng.normal(size=(size, rows)))[0].T


def prescribed(singular_values, size, seed=0):
  """A matrix of rows with the given singular values, and its right vectors."""
  rng = np.random.default_rng(seed)
  rows = len(singular_values)
  left, right = orthonormal(rng, rows, rows), orthonormal(rng, rows, size)
  return left @ (np.array(singular_values)[:, None] * right), right


def learn(estimator, updates):
  """The state behind every update."""
  state, states, update = estimator.init(updates[0]), [], jit(estimator.update)
  for u in updates:
    state = update(u, state)
    states.append(state)
  return states


def flat_basis(state, key):
  rows = np.asarray(state.basis[key].rows, np.float64)
  return rows.reshape(len(rows), -1)


def assert_principal(state, key, index, variance, basis, dtype):
  """Variances, the projector and orthonormality of one block."""
  found, rows = np.asarray(state.variance[index]), flat_basis(state, key)
  present = found > 0
  assert present.sum() == len(variance)
  scale = max(variance, default=0)
  np.testing.assert_allclose(
    found[present], variance, rtol=0, atol=VARIANCE_TOL[dtype] * scale
  )
  tol = PROJECTOR_TOL[dtype]
  np.testing.assert_allclose(rows.T @ rows, basis.T @ basis, rtol=0, atol=tol)
  np.testing.assert_allclose(rows @ rows.T, np.diag(present), rtol=0, atol=tol)


def reference(rows, rank, history, decay, centered):
  """The recursion of the docstring, refreshed when the buffer is full, on a block."""
  n = rows.shape[1]
  basis, s, total = np.zeros((rank, n)), np.zeros(rank), 0.0
  weight = decay ** np.arange(history)[::-1] if decay else np.ones(history)
  for i in range(history, len(rows) + 1, history):
    h = rows[i - history : i]
    if centered:
      h = h - weight @ h / weight.sum()
    h = np.sqrt(weight)[:, None] * h
    past = np.sqrt(decay**history) * s[:, None] * basis
    total = decay**history * total + (h**2).sum()
    _, s, basis = np.linalg.svd(np.concatenate([past, h]), full_matrices=False)
    s, basis = s[:rank], basis[:rank]
    s = np.pad(s, (0, rank - len(s)))
    basis = np.pad(basis, ((0, rank - len(basis)), (0, 0)))
  present = s > 3e-3 * s[0]
  return s[present] ** 2, basis[present], total


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('solver', SOLVERS)
def test_prescribed_singular_values(solver, dtype):
  history, rank = 20, 3  # more rows than the sketch of the randomized solver has
  s = np.concatenate([[10.0, 5.0, 2.0], 0.1 * 0.8 ** np.arange(history - 3)])
  rows, right = prescribed(s, 60)
  with jax.enable_x64(dtype == 'float64'):
    updates = [{'w': jnp.asarray(row.reshape(3, 4, 5), dtype)} for row in rows]
    estimator = pca(rank, history, decay=0.0, solver=solver)
    state = learn(estimator, updates)[-1]
    assert state.variance.dtype == state.basis['w'].rows.dtype == dtype
  assert_principal(state, 'w', 0, s[:3] ** 2, right[:3], dtype)
  share = (s[:3] ** 2).sum() / (s**2).sum()
  tol = VARIANCE_TOL[dtype]
  np.testing.assert_allclose(state.total_variance, [(s**2).sum()], rtol=tol)
  np.testing.assert_allclose(state.explained_variance, [share], rtol=tol)


def recursion_updates(steps):
  """Leaves of full rank, of rank two, of zeros, and of fewer entries than the rank."""
  rng = np.random.default_rng(1)
  # Three directions far above the noise; of alternating sign, so that most is left
  # when the mean is taken out.
  left = rng.normal(size=(steps, 3)) * [9.0, 5.0, 3.0] + 1
  full = left @ orthonormal(rng, 3, 30) + 0.05 * rng.normal(size=(steps, 30))
  return {
    'full': (full, (6, 5)),
    'rank_two': (left[:, :2] @ orthonormal(rng, 2, 12), (2, 3, 2)),
    'small': (left[:, :2] * [[1.0, 0.5]], (1, 2)),
    'zeros': (np.zeros((steps, 8)), (2, 4)),
  }


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('centered', [False, True], ids=['', 'centered'])
@pytest.mark.parametrize('decay', [0.0, 0.8], ids=['window', 'decayed'])
@pytest.mark.parametrize('solver', SOLVERS)
def test_recursion(solver, decay, centered, dtype):
  rank, history = 3, 4
  leaves = recursion_updates(4 * history)
  estimator = pca(rank, history, decay=decay, centered=centered, solver=solver)
  with jax.enable_x64(dtype == 'float64'):
    stacked = {
      k: jnp.asarray(rows.reshape(-1, *shape), dtype)
      for k, (rows, shape) in leaves.items()
    }
    steps = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(4 * history)]
    states = learn(estimator, steps)
    chex.assert_tree_all_finite(states)
  for updates in (history, 2 * history, 4 * history):
    state = states[updates - 1]
    for index, (key, (rows, _)) in enumerate(leaves.items()):
      variance, basis, total = reference(
        np.asarray(stacked[key], np.float64)[:updates].reshape(rows[:updates].shape),
        rank,
        history,
        decay,
        centered,
      )
      assert len(variance) == {'full': 3, 'zeros': 0}.get(key, 2)
      assert_principal(state, key, index, variance, basis, dtype)
      scale = VARIANCE_TOL[dtype] * max(total, 1)
      np.testing.assert_allclose(state.total_variance[index], total, atol=scale)
      share = variance.sum() / total if total else 0
      tol = VARIANCE_TOL[dtype]
      np.testing.assert_allclose(state.explained_variance[index], share, atol=tol)


def test_sliding_window_with_sparse_samples():
  rank, history, sample_every, refresh_every, steps = 2, 4, 2, 3, 20
  rng = np.random.default_rng(2)
  rows = rng.normal(size=(steps, 2)) * [8.0, 4.0] @ orthonormal(rng, 2, 6)
  rows = rows + 0.01 * rng.normal(size=(steps, 6))
  estimator = pca(
    rank, history, decay=0.0, sample_every=sample_every, refresh_every=refresh_every
  )
  states = learn(estimator, [{'w': jnp.float32(row.reshape(2, 3))} for row in rows])
  first = 9  # four samples are in after 7 updates
  for count, state in enumerate(states, 1):
    assert state.pca_step == count
    if count < first:
      assert not state.variance.any()
      continue
    last = count - count % refresh_every  # the last refresh
    window = rows[:last:sample_every][-history:]
    _, s, right = np.linalg.svd(window, full_matrices=False)
    assert_principal(state, 'w', 0, s[:2] ** 2, right[:2], 'float32')


@pytest.mark.parametrize(
  ('options', 'first'),
  [
    ({'rank': 2, 'history': 4}, 4),
    ({'rank': 6, 'history': 4}, 8),  # max(history, rank) samples, and a full buffer
    ({'rank': 2, 'history': 2, 'sample_every': 2}, 4),
    ({'rank': 2, 'history': 4, 'decay': 0.0}, 4),
    ({'rank': 2, 'history': 4, 'decay': 0.0, 'refresh_every': 1}, 4),
    ({'rank': 2, 'history': 4, 'decay': 0.0, 'refresh_every': 3}, 6),
    (
      {'rank': 2, 'history': 3, 'decay': 0.0, 'sample_every': 2, 'refresh_every': 1},
      5,
    ),
  ],
  ids=str,
)
def test_identity_until_the_first_full_refresh(options, first):
  estimator = pca(**options)
  double = lambda variance, dominant: jnp.full_like(variance, 2)

  @jit
  def step(v, state):
    return estimator.apply(double, v, state)[0], estimator.update(v, state)

  rng = np.random.default_rng(3)
  v = jnp.ones((3, 2))
  state, filtered = estimator.init(v), []
  for _ in range(first + 3):
    v = jnp.float32(rng.normal(size=(3, 2)))
    out, state = step(v, state)
    filtered.append(bool((out != v).any()))
  # `apply` of a step comes before its `update`.
  assert filtered == [i >= first for i in range(first + 3)]


@pytest.mark.parametrize(
  ('rank', 'history', 'decay', 'solver'),
  [(16, 8, 0.95, 'gram'), (4, 16, 0.0, 'gram'), (4, 200, 0.0, 'randomized')],
)
def test_auto_takes_the_cheaper_solver(monkeypatch, rank, history, decay, solver):
  used = []
  for name in SOLVERS:
    original = getattr(_svd, f'{name}_svd')

    def record(*args, name=name, original=original):
      used.append(name)
      return original(*args)

    monkeypatch.setattr(_svd, f'{name}_svd', record)
  estimator = pca(rank, history, decay=decay)
  v = jnp.ones((3, 2))
  jax.eval_shape(estimator.update, v, estimator.init(v))
  assert set(used) == {solver}
  assert _svd.cheaper_solver(rank, history + (rank if decay else 0)) == solver


def test_cost_of_the_gram_matrix_grows_faster():
  chosen = [_svd.cheaper_solver(4, rows) for rows in range(4, 400)]
  switch = chosen.index('randomized')
  assert set(chosen[:switch]) == {'gram'}
  assert set(chosen[switch:]) == {'randomized'}


def test_rows_are_kept_in_the_storage_dtype():
  rows, right = prescribed([8.0, 4.0, 0.1, 0.1], 30)
  updates = [{'w': jnp.float32(row.reshape(6, 5))} for row in rows]
  state = learn(pca(2, 4, decay=0.0, storage_dtype=jnp.bfloat16), updates)[-1]
  chex.assert_tree_shape_prefix((state.basis, state.history), ())
  for stack in (state.basis['w'], state.history['w']):
    assert stack.rows.dtype == jnp.bfloat16
  found = flat_basis(state, 'w')
  np.testing.assert_allclose(found.T @ found, right[:2].T @ right[:2], atol=2e-2)
