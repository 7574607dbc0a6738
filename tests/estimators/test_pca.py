"""The `pca` estimator against `numpy.linalg.svd`."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsfa_optax
from bsfa_optax import _svd, bsfa
from bsfa_optax.state import state_bytes, temporary_bytes

pca = functools.partial(bsfa_optax.pca, storage_dtype=None)  # rows in full precision

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
  """The memory behind every update."""
  tx = bsfa(estimator=estimator)
  state, memories, update = tx.init(updates[0]), [], jit(tx.update)
  for u in updates:
    state = update(u, state)[1]
    memories.append(state.memory)
  return memories


def flat_basis(memory, key):
  rows = np.asarray(memory.basis[key].rows, np.float64)
  return rows.reshape(len(rows), -1)


def assert_principal(memory, key, index, variance, basis, dtype):
  """Variances, the projector and orthonormality of one block."""
  found, rows = np.asarray(memory.variance[index]), flat_basis(memory, key)
  present = found > 0
  assert present.sum() == len(variance)
  scale = max(variance, default=0)
  np.testing.assert_allclose(
    found[present], variance, rtol=0, atol=VARIANCE_TOL[dtype] * scale
  )
  tol = PROJECTOR_TOL[dtype]
  np.testing.assert_allclose(rows.T @ rows, basis.T @ basis, rtol=0, atol=tol)
  np.testing.assert_allclose(rows @ rows.T, np.diag(present), rtol=0, atol=tol)


def reference(rows, rank, history, decay):
  """The recursion of the docstring, refreshed when the buffer is full, on a block."""
  n = rows.shape[1]
  basis, s, total = np.zeros((rank, n)), np.zeros(rank), 0.0
  weight = decay ** np.arange(history)[::-1] if decay else np.ones(history)
  for i in range(history, len(rows) + 1, history):
    h = rows[i - history : i]
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
    memory = learn(estimator, updates)[-1]
    assert memory.variance.dtype == memory.basis['w'].rows.dtype == dtype
  assert_principal(memory, 'w', 0, s[:3] ** 2, right[:3], dtype)
  tol = VARIANCE_TOL[dtype]
  np.testing.assert_allclose(memory.total_variance, [(s**2).sum()], rtol=tol)


def recursion_updates(steps):
  """Leaves of full rank, of rank two, of zeros, and of fewer entries than the rank."""
  rng = np.random.default_rng(1)
  # Three directions far above the noise.
  left = rng.normal(size=(steps, 3)) * [9.0, 5.0, 3.0] + 1
  full = left @ orthonormal(rng, 3, 30) + 0.05 * rng.normal(size=(steps, 30))
  return {
    'full': (full, (6, 5)),
    'rank_two': (left[:, :2] @ orthonormal(rng, 2, 12), (2, 3, 2)),
    'small': (left[:, :2] * [[1.0, 0.5]], (1, 2)),
    'zeros': (np.zeros((steps, 8)), (2, 4)),
  }


@pytest.mark.parametrize(
  ('solver', 'decay', 'dtype'),
  [
    ('gram', 0.8, 'float32'),
    pytest.param('randomized', 0.0, 'float32', marks=pytest.mark.slow),
    pytest.param('gram', 0.0, 'float64', marks=pytest.mark.slow),
    pytest.param('randomized', 0.8, 'float64', marks=pytest.mark.slow),
  ],
)
def test_recursion(solver, decay, dtype):
  rank, history = 3, 4
  leaves = recursion_updates(4 * history)
  estimator = pca(
    rank, history, decay=decay, solver=solver, leaves=lambda name, leaf: True
  )
  with jax.enable_x64(dtype == 'float64'):
    stacked = {
      k: jnp.asarray(rows.reshape(-1, *shape), dtype)
      for k, (rows, shape) in leaves.items()
    }
    steps = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(4 * history)]
    memories = learn(estimator, steps)
    chex.assert_tree_all_finite(memories)
  for updates in (history, 2 * history, 4 * history):
    memory = memories[updates - 1]
    for index, (key, (rows, _)) in enumerate(leaves.items()):
      variance, basis, total = reference(
        np.asarray(stacked[key], np.float64)[:updates].reshape(rows[:updates].shape),
        rank,
        history,
        decay,
      )
      assert len(variance) == {'full': 3, 'zeros': 0}.get(key, 2)
      assert_principal(memory, key, index, variance, basis, dtype)
      scale = VARIANCE_TOL[dtype] * max(total, 1)
      np.testing.assert_allclose(memory.total_variance[index], total, atol=scale)


def test_sliding_window():
  rank, history, refresh_every, steps = 2, 4, 3, 14
  rng = np.random.default_rng(2)
  rows = rng.normal(size=(steps, 2)) * [8.0, 4.0] @ orthonormal(rng, 2, 6)
  rows = rows + 0.01 * rng.normal(size=(steps, 6))
  estimator = pca(rank, history, decay=0.0, refresh_every=refresh_every)
  memories = learn(estimator, [{'w': jnp.float32(row.reshape(2, 3))} for row in rows])
  first = 6  # the first refresh with four updates in
  for count, memory in enumerate(memories, 1):
    assert memory.is_complete == (count >= first)
    if count < first:
      assert not memory.variance.any()
      continue
    last = count - count % refresh_every  # the last refresh
    _, s, right = np.linalg.svd(rows[last - history : last], full_matrices=False)
    assert_principal(memory, 'w', 0, s[:2] ** 2, right[:2], 'float32')


@pytest.mark.parametrize(
  ('options', 'first'),
  [
    ({'rank': 2, 'history': 4}, 4),
    ({'rank': 6, 'history': 4}, 8),  # max(history, rank) updates, and a full buffer
    ({'rank': 2, 'history': 4, 'decay': 0.0}, 4),
    ({'rank': 2, 'history': 4, 'decay': 0.0, 'refresh_every': 1}, 4),
    ({'rank': 2, 'history': 4, 'decay': 0.0, 'refresh_every': 3}, 6),
  ],
  ids=str,
)
def test_identity_until_the_first_full_refresh(options, first):
  tx = bsfa(2.0, 2.0, estimator=pca(**options))
  update, state = jit(tx.update), tx.init(jnp.ones((3, 2)))
  rng = np.random.default_rng(3)
  for count in range(1, first + 3):
    v = jnp.float32(rng.normal(size=(3, 2)))
    out, state = update(v, state)
    expected = v if count < first else 2 * v
    np.testing.assert_allclose(out, expected, rtol=0 if count < first else 1e-6)


@pytest.mark.parametrize(
  ('rank', 'history', 'decay', 'solver'),
  [(16, 8, 0.95, 'gram'), (4, 16, 0.0, 'gram'), (4, 200, 0.0, 'randomized')],
)
def test_auto_takes_the_cheaper_solver(rank, history, decay, solver):
  v = jax.ShapeDtypeStruct((3, 2), jnp.float32)

  def program(solver):
    tx = bsfa(estimator=pca(rank, history, decay=decay, solver=solver))
    return jax.jit(tx.update).lower(v, jax.eval_shape(tx.init, v)).as_text()

  (other,) = set(SOLVERS) - {solver}
  assert program('auto') == program(solver) != program(other)


def test_cost_of_the_gram_matrix_grows_faster():
  chosen = [_svd.cheaper_solver(4, rows) for rows in range(4, 400)]
  switch = chosen.index('randomized')
  assert set(chosen[:switch]) == {'gram'}
  assert set(chosen[switch:]) == {'randomized'}


def test_rows_are_kept_in_the_storage_dtype():
  rows, right = prescribed([8.0, 4.0, 0.1, 0.1], 30)
  updates = [{'w': jnp.float32(row.reshape(6, 5))} for row in rows]
  memory = learn(pca(2, 4, decay=0.0, storage_dtype=jnp.bfloat16), updates)[-1]
  for stack in (memory.basis['w'], memory.history['w']):
    assert stack.rows.dtype == jnp.bfloat16
  found = flat_basis(memory, 'w')
  np.testing.assert_allclose(found.T @ found, right[:2].T @ right[:2], atol=2e-2)


def test_default_takes_at_most_16_bytes_a_parameter():
  """State and what an update needs beside it, also where one leaf is the model."""
  params = {'kernel': jax.ShapeDtypeStruct((256, 256), jnp.float32)}
  tx = bsfa(estimator=bsfa_optax.pca())
  total = state_bytes(tx, params) + temporary_bytes(tx, params)
  assert total <= 16 * 256**2


@pytest.mark.parametrize(
  'solver', ['gram', pytest.param('randomized', marks=pytest.mark.slow)]
)
def test_narrow_rows_are_those_of_wide_ones(solver):
  """To the rounding of the stored rows, of all estimates and of the update."""
  rng = np.random.default_rng(8)
  left = rng.normal(size=(8, 2, 1, 3)) * [4.0, 2.0, 1.0]
  rows = (left @ orthonormal(rng, 3, 30)).reshape(8, 2, 5, 6)
  outs = []
  for dtype in (jnp.float32, jnp.bfloat16):
    estimator = pca(
      3,
      4,
      solver=solver,
      storage_dtype=dtype,
      leaves=lambda name, leaf: True,
      batch_axes=0,
    )
    tx = bsfa(estimator=estimator)
    state, update = tx.init(jnp.float32(rows[0])), jit(tx.update)
    for u in jnp.float32(rows):
      filtered, state = update(u, state)
    outs.append((state.memory.variance / state.memory.variance.max(), filtered))
  for a, b in zip(*outs, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=0.04 * np.abs(a).max())


@pytest.mark.parametrize('size', [1e4, 1e8])
@pytest.mark.parametrize('step', [3, 21])
def test_huge_update_does_not_drown_the_others(size, step):
  rng = np.random.default_rng(7)
  basis = orthonormal(rng, 4, 30)
  rows = rng.normal(size=(36, 4)) @ basis
  rows[step] *= size
  updates = [{'w': jnp.float32(row.reshape(5, 6))} for row in rows]
  memories = learn(pca(4, 4), updates)
  for memory in memories[7::4]:  # from the refresh after the spike on
    found = flat_basis(memory, 'w')
    np.testing.assert_allclose(found.T @ found, basis.T @ basis, rtol=0, atol=1e-4)
    assert memory.variance.max() < 1e3 * memory.variance.min()


@pytest.mark.slow
def test_randomized_solver_survives_tiny_updates():
  """Their Gram matrix is far from the rounding of the later updates' one."""
  rng = np.random.default_rng(5)
  basis = orthonormal(rng, 4, 30)
  left = rng.normal(size=(8, 4)) * [4.0, 3, 2, 1]
  rows = np.concatenate([1e-18 * rng.normal(size=(8, 30)), left @ basis])
  updates = [{'w': jnp.float32(row.reshape(5, 6))} for row in rows]
  memories = learn(pca(4, 4, solver='randomized'), updates)
  chex.assert_tree_all_finite(memories)
  found = flat_basis(memories[-1], 'w')
  np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-4)
  np.testing.assert_allclose(found.T @ found, basis.T @ basis, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  ('decay', 'history', 'refresh_every'), [(0.9, 4, None), (0.0, 4, 1)]
)
def test_goes_on_at_the_end_of_int32(decay, history, refresh_every):
  estimator = pca(2, history, decay=decay, refresh_every=refresh_every)
  tx = bsfa(0.0, 0.0, estimator=estimator)
  rng = np.random.default_rng(6)
  rows = rng.normal(size=(20, 2)) @ orthonormal(rng, 2, 12)
  updates = jnp.float32(rows.reshape(-1, 3, 4))
  update, state = jit(tx.update), tx.init(updates[0])
  for u in updates[:8]:
    _, state = update(u, state)
  state = state._replace(filter_count=jnp.int32(2**31 - 1 - 4))
  variances = []
  for u in updates[8:]:
    filtered, state = update(u, state)
    assert not filtered.any()  # never the identity again
    assert state.filter_count > 0
    variances.append(np.asarray(state.memory.variance))
  # It refreshes as often as before, after the end too.
  changes = sum((a != b).any() for a, b in itertools.pairwise(variances[4:]))
  assert changes >= (7 if refresh_every else 1)
