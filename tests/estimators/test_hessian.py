"""`hessian_lanczos` against dense Hessians, `matfree` and the unsharded run."""

import functools
import itertools
import re

import chex
import jax
from jax import P
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from matfree import decomp
import numpy as np
import optax
import pytest

from bsfa_optax import _curvature, _learned, bsfa, diagnostics, hessian_lanczos
from bsfa_optax.estimators import layout
from bsfa_optax.state import abstract_state, state_shardings

FAST = {'xla_backend_optimization_level': 0}
jit = functools.partial(jax.jit, compiler_options=FAST)
SHAPES = {'bias': (3,), 'kernel': (4, 3), 'layers': (2, 3, 3)}
BATCH = {'bias': None, 'kernel': None, 'layers': 0}


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {k: jnp.asarray(0.6 * rng.normal(size=s), dtype) for k, s in SHAPES.items()}


INPUTS = np.random.default_rng(1).normal(size=(20, 4)).astype('float32')
LABELS = np.random.default_rng(2).integers(0, 3, size=20)


def output_fn(params):
  x = jnp.asarray(INPUTS, params['kernel'].dtype) @ params['kernel']
  x = jnp.tanh(x + params['bias'][None])
  for i in range(2):
    x = x + jnp.tanh(x @ params['layers'][i])
  return {'logits': x}


def loss_fn(outputs):
  logits = outputs['logits']
  return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


value_fn = lambda params: loss_fn(output_fn(params))


def dense_matrix(params, curvature):
  flat, unravel = ravel_pytree(params)
  if curvature == 'hessian':
    dense = jit(jax.hessian(lambda v: value_fn(unravel(v))))
    return np.asarray(dense(flat), np.float64)
  outputs = lambda v: output_fn(unravel(v))['logits']
  jacobian = jit(jax.jacobian(outputs))(flat).reshape(-1, flat.size)
  z = outputs(flat)
  inner = jit(jax.hessian(lambda z: loss_fn({'logits': z.reshape(-1, 3)})))(z.ravel())
  return np.asarray(jacobian.T @ inner @ jacobian, np.float64)


def learn(estimator, params, **extra):
  """The memory after one update."""
  tx = bsfa(estimator=estimator)
  extra = extra or {'value_fn': value_fn}
  update = jit(lambda p, s: tx.update(p, s, p, **extra)[1])
  return update(params, tx.init(params)).memory


def block_rows(memory, key, index=None):
  rows = np.asarray(memory.basis[key].rows, np.float64)
  rows = rows if index is None else rows[:, index]
  return rows.reshape(len(rows), -1)


def assert_eigenpairs(matrix, found, rows, tol):
  """Positive eigenvalues, descending, orthonormal rows, and small residuals."""
  values = np.linalg.eigvalsh(matrix)[::-1][: len(found)]
  values = np.where(values > 1e-5 * abs(values).max(), values, 0)
  values = np.pad(values, (0, len(found) - len(values)))
  scale = abs(values).max()
  np.testing.assert_allclose(found, values, rtol=0, atol=tol * scale)
  rows = rows[values > 0]
  np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), rtol=0, atol=tol)
  residual = rows @ matrix - values[values > 0, None] * rows
  np.testing.assert_allclose(residual, 0, atol=tol * scale)


@pytest.mark.parametrize(
  ('labels', 'curvature', 'dtype'),
  [
    (None, 'hessian', 'float32'),
    pytest.param('all', 'gauss_newton', 'float32', marks=pytest.mark.slow),
    pytest.param('all', 'hessian', 'float64', marks=pytest.mark.slow),
  ],
)
def test_against_the_dense_matrix(labels, curvature, dtype):
  batch_axes = None if labels else BATCH
  # As many iterations as entries: every eigenvalue, repeated or zero, is there.
  estimator = hessian_lanczos(
    4, iterations=33, curvature=curvature, labels=labels, batch_axes=batch_axes
  )
  with jax.enable_x64(dtype == 'float64'):
    params = make_params(dtype)
    matrix = dense_matrix(params, curvature)
    if curvature == 'hessian':
      memory = learn(estimator, params)
    else:
      memory = learn(estimator, params, output_fn=output_fn, loss_fn=loss_fn)
    assert memory.curvature.dtype == memory.basis['kernel'].rows.dtype == dtype
  chex.assert_tree_all_finite(memory)
  tol = {'float32': 2e-5, 'float64': 1e-9}[dtype]
  if labels:
    rows = np.concatenate([block_rows(memory, k) for k in SHAPES], 1)
    assert_eigenpairs(matrix, memory.curvature[0], rows, tol)
    return
  assert memory.basis['bias'] == optax.MaskedNode()
  slices = [slice(3, 15), slice(15, 24), slice(24, 33)]
  for i, (key, index) in enumerate([('kernel', None), ('layers', 0), ('layers', 1)]):
    block = matrix[slices[i], slices[i]]
    assert_eigenpairs(block, memory.curvature[i], block_rows(memory, key, index), tol)


def one_block(shape):
  return layout([jax.ShapeDtypeStruct(shape, jnp.float32)], labels='all')


def prescribed(values, seed=0):
  rng = np.random.default_rng(seed)
  q = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
  return np.float32(q.T @ (np.array(values)[:, None] * q))


@functools.cache
def solver(shape, iterations):
  def solve(matrix, warm):
    matvec = lambda v: [(matrix @ v[0].reshape(-1)).reshape(shape)]
    return _curvature.top_eigenpairs(
      one_block(shape), matvec, warm, iterations, jax.random.key(1), 1e-6
    )

  return jit(solve)


def pairs_of(matrix, shape, rank, iterations, warm=None):
  """Eigenvalues and flat eigenvectors of a matrix that acts on one leaf."""
  warm = np.zeros((rank, matrix.shape[0])) if warm is None else warm
  warm = [jnp.float32(warm.reshape(rank, *shape))]
  values, rows = solver(shape, iterations)(jnp.asarray(matrix), warm)
  return np.asarray(values[0]), np.asarray(rows[0], np.float64).reshape(rank, -1)


@pytest.mark.parametrize(
  'spectrum',
  [
    [5.0, 4, 3, 2, 1, 0.5, 0.1, -1],
    [3.0] * 8,  # the Krylov space ends after one vector
    [2.0, 2, 2, 1, 1, 0, 0, 0],
    [0.0] * 8,
    [-1.0] * 8,
    [1.0, 0, 0, 0, 0, 0, 0, -9],
  ],
  ids=str,
)
@pytest.mark.parametrize('iterations', [8, 12])
def test_prescribed_spectrum(spectrum, iterations):
  matrix = prescribed(spectrum)
  found, rows = pairs_of(matrix, (2, 4), 3, iterations)
  np.testing.assert_allclose(found, spectrum[:3], rtol=0, atol=2e-5)
  np.testing.assert_allclose(rows @ rows.T, np.eye(3), rtol=0, atol=2e-6)
  np.testing.assert_allclose(rows @ matrix, found[:, None] * rows, atol=2e-5)
  assert not found[np.array(spectrum[:3]) == 0].any()  # exactly


def test_directions_that_do_not_exist():
  found, rows = pairs_of(prescribed([-1.0, -2]), (2, 1), 4, 6)
  np.testing.assert_allclose(found, [-1, -2, 0, 0], atol=1e-6)
  np.testing.assert_allclose(rows @ rows.T, np.diag([1, 1, 0, 0]), atol=1e-6)


def test_products_that_are_not_finite():
  found, rows = pairs_of(np.diag(np.float32([1, np.nan, 2, 3])), (2, 2), 2, 3)
  assert np.isnan(found).all()
  assert np.isfinite(rows).all()


@pytest.mark.slow
def test_against_matfree():
  size, iterations, rank = 60, 40, 5
  matrix = prescribed([50.0, 30, 20, 12, 8, *np.linspace(1, -1, size - 5)])
  found, rows = pairs_of(matrix, (6, 10), rank, iterations)
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    decompose = decomp.tridiag_sym(iterations)
    start = jnp.float32(np.random.default_rng(3).normal(size=size))
    result = decompose(lambda v: matrix @ v, start)
  q, t = (np.asarray(x, np.float64) for x in (result.Q_tall, result.J_small))
  values, vectors = np.linalg.eigh(t)
  expected = (vectors.T @ (q if q.shape == (iterations, size) else q.T))[::-1][:rank]
  np.testing.assert_allclose(found, values[::-1][:rank], rtol=1e-5)
  np.testing.assert_allclose(rows.T @ rows, expected.T @ expected, atol=1e-4)


@pytest.mark.slow
def test_warm_start_follows_a_slow_matrix():
  rank, size = 5, 60
  rng = np.random.default_rng(4)
  values = np.concatenate([np.linspace(10, 6, rank), np.linspace(4, -1, size - rank)])
  q = np.linalg.qr(rng.normal(size=(size, size)))[0]
  error = lambda rows, q: 1 - ((rows @ q[:, :rank]) ** 2).sum() / rank
  _, rows = pairs_of(np.float32((q * values) @ q.T), (6, 10), rank, 40)
  warm_errors, cold_errors = [], []
  for _ in range(3):
    q = np.linalg.qr(q + 0.003 * rng.normal(size=(size, size)))[0]
    matrix = np.float32((q * values) @ q.T)
    stale = error(rows, q)
    _, rows = pairs_of(matrix, (6, 10), rank, 8, rows)
    _, cold = pairs_of(matrix, (6, 10), rank, 10)
    warm_errors.append(error(rows, q))
    cold_errors.append(error(cold, q))
    assert warm_errors[-1] < 0.9 * stale
  assert max(warm_errors) < 1e-3 < 0.1 < min(cold_errors)


def quadratic(scale=1.0):
  """A loss whose Hessian is diagonal and the step's own: its products are local."""
  weights = {
    'a': jnp.arange(1.0, 65).reshape(8, 8) ** 2 / 100,
    'b': jnp.arange(64.0, 0, -1).reshape(4, 2, 8) ** 2 / 50,
  }
  return lambda params: (
    0.5
    * scale
    * sum((weights[k].astype(p.dtype) * p * p).sum() for k, p in params.items())
  )


@pytest.mark.slow
def test_refresh_schedule_and_warm_start_of_the_estimator():
  tx = bsfa(estimator=hessian_lanczos(2, iterations=6, refresh_every=3))
  params = {'a': jnp.ones((8, 8)), 'b': jnp.ones((4, 2, 8))}

  @jit
  def update(state, scale):
    return tx.update(params, state, params, value_fn=quadratic(scale))[1]

  state, values = tx.init(params), []
  assert not state.memory.is_known
  for i in range(7):
    state = update(state, 1.0 + i)
    assert state.filter_count == i + 1
    assert state.memory.is_known
    values.append(state.memory.curvature[0] / (1 + i - i % 3))
  exact = np.array([40.96, 39.69])
  errors = [abs(np.asarray(v) - exact).max() for v in values]
  assert errors[0] == errors[1] == errors[2]
  assert errors[6] < errors[3] < errors[0]


@pytest.mark.slow
def test_hessian_that_is_not_finite_changes_no_basis():
  tx = bsfa(estimator=hessian_lanczos(2, refresh_every=1))
  params = {'a': jnp.ones((8, 8)), 'b': jnp.ones((4, 2, 8))}
  update = jit(
    lambda s, scale: tx.update(params, s, params, value_fn=quadratic(scale))[1]
  )
  first = update(tx.init(params), 1.0)
  state = update(first, jnp.nan)
  assert state.filter_count == 2  # the gradient is finite: it is filtered
  chex.assert_trees_all_equal(state.memory, first.memory)
  top = lambda state: float(state.memory.curvature.max())
  assert top(update(state, 2.0)) > 1.9 * top(first)


@pytest.mark.slow
def test_refreshes_go_on_at_the_end_of_int32():
  tx = bsfa(estimator=hessian_lanczos(2, refresh_every=3))
  params = {'a': jnp.ones((8, 8)), 'b': jnp.ones((4, 2, 8))}
  update = jit(
    lambda s, scale: tx.update(params, s, params, value_fn=quadratic(scale))[1]
  )
  state = update(tx.init(params), 1.0)._replace(filter_count=jnp.int32(2**31 - 1))
  values = []
  for i in range(8):
    state = update(state, 2.0 + i)
    assert state.filter_count > 2**29
    values.append(float(state.memory.curvature.max()))
  assert sum(a != b for a, b in itertools.pairwise(values)) >= 2


def counting(counter):
  """A loss of any matrices that counts the products with its Hessian.

  The gradient is a function with a derivative of its own, which calls the counter.
  """

  @jax.custom_jvp
  def gradient(params):
    return jax.tree.map(lambda p: p * p * p, params)

  @gradient.defjvp
  def _(primals, tangents):
    (params,), (v,) = primals, tangents
    jax.debug.callback(lambda _: counter.append(1), jax.tree.leaves(v)[0].sum())
    return gradient(params), jax.tree.map(lambda p, t: 3 * p * p * t, params, v)

  @jax.custom_vjp
  def value(params):
    return sum((p**4).sum() for p in jax.tree.leaves(params)) / 4

  value.defvjp(
    lambda params: (value(params), params),
    lambda params, scale: (jax.tree.map(lambda g: scale * g, gradient(params)),),
  )
  return value


def calls(counter, function, *args):
  """What a jitted function returns, and how often it called the counter."""
  counter.clear()
  out = jax.block_until_ready(jit(function)(*args))
  jax.effects_barrier()
  return out, len(counter)


@pytest.mark.slow
@pytest.mark.parametrize('blocks', [1, 4])
def test_products_are_iterations_times_blocks(blocks):
  rank, iterations, counter = 2, 5, []
  value = counting(counter)
  rng = np.random.default_rng(0)
  leaves = min(blocks, 2)
  shape = (blocks // leaves, 3, 2)  # the rest of the blocks along a batch axis
  params = {f'm{i}': jnp.float32(rng.normal(size=shape)) for i in range(leaves)}
  estimator = hessian_lanczos(
    rank, iterations=iterations, refresh_every=2, batch_axes=0
  )
  tx, parts = bsfa(estimator=estimator), estimator.layout(params)
  assert parts.count == blocks

  def update(params, state):
    return tx.update(params, state, params, value_fn=value)[1]

  state, count = calls(counter, update, params, tx.init(params))
  assert count == iterations * blocks
  assert (state.memory.curvature > 0).all()
  _, count = calls(counter, update, params, state)
  assert count == 0  # no refresh is due
  find = lambda params: diagnostics.hessian_top_k(
    value, params, rank, parts, iterations=iterations
  )
  found, count = calls(counter, find, params)
  assert count == (iterations + rank) * blocks  # rank for the residuals
  exact = [3 * np.square(p).max((1, 2)) for p in params.values()]
  np.testing.assert_allclose(found.eigenvalues[:, 0], np.concatenate(exact), rtol=0.05)


@pytest.mark.slow
def test_bulk_sgd_leaves_dominant_coordinates_alone():
  estimator = hessian_lanczos(2, iterations=64)
  tx = optax.chain(optax.sgd(0.1), bsfa(0.0, 1.0, estimator=estimator))
  params = {'a': jnp.ones((8, 8)), 'b': jnp.ones((4, 2, 8))}
  grads = jax.grad(quadratic())(params)
  step = jit(lambda s: tx.update(grads, s, params, value_fn=quadratic()))
  updates, state = step(tx.init(params))
  fraction = optax.tree.get(state, 'dominant_fraction')
  for i, (key, top) in enumerate([('a', slice(-2, None)), ('b', slice(0, 2))]):
    update, plain = updates[key].reshape(-1), -0.1 * grads[key].reshape(-1)
    np.testing.assert_allclose(update[top], 0, atol=1e-4)
    bulk = np.delete(np.arange(64), np.arange(64)[top])
    np.testing.assert_allclose(update[bulk], plain[bulk], rtol=1e-4, atol=1e-4)
    expected = np.linalg.norm(plain[top]) / np.linalg.norm(plain)
    np.testing.assert_allclose(fraction[i], expected, rtol=1e-4)


@pytest.mark.slow
def test_filter_gets_curvatures_relative_to_the_least_kept():
  # Three positive eigenvalues: the fourth direction is no dominant one.
  value = lambda p: 0.5 * (jnp.array([[8.0, 4], [2, -1]]) * p * p).sum()
  estimator, v = hessian_lanczos(4, iterations=5), jnp.ones((2, 2))
  tx, parts = bsfa(estimator=estimator), estimator.layout(v)
  memory = tx.update(v, tx.init(v), v, value_fn=value)[1].memory
  np.testing.assert_allclose(memory.curvature, [[8, 4, 2, 0]], rtol=1e-5)
  seen = []

  def f(variance, dominant):
    seen.append((np.asarray(variance), np.asarray(dominant)))
    return jnp.where(dominant, 1 / jnp.where(dominant, variance, 1), 3)

  def apply(f, v, memory):
    found = estimator.decompose(parts, [v], memory)
    (out,) = _learned.filtered(f, parts, [v], found)
    return out, _learned.dominant_fraction(parts, [v], found)

  out, fraction = apply(f, v, memory)
  np.testing.assert_allclose(out, [[0.25, 0.5], [1, 3]], rtol=1e-5)
  np.testing.assert_allclose(fraction, [np.sqrt(3 / 4)], rtol=1e-5)
  (rest, false), (variance, dominant) = seen
  assert rest.tolist() == [0]
  assert not false
  np.testing.assert_allclose(variance, [[4, 2, 1, 0]], rtol=1e-5)
  assert dominant.tolist() == [[True, True, True, False]]
  one = lambda variance, dominant: jnp.ones_like(variance)
  v = jnp.float32([[0.1, 0.7], [1e-9, 3e7]])
  np.testing.assert_array_equal(apply(one, v, memory)[0], v)
  np.testing.assert_array_equal(apply(f, v, estimator.init(parts, v))[0], v)


@pytest.mark.slow
def test_chain_under_jit():
  dtype = jnp.bfloat16
  estimator = hessian_lanczos(2, iterations=12, refresh_every=2, labels='all')
  tx = optax.chain(optax.sgd(0.3), bsfa(0.5, 1.5, estimator=estimator))
  params = make_params(dtype)
  loss = lambda params, scale: scale * value_fn(params)  # an extra argument by name
  state = tx.init(params)
  assert jax.eval_shape(tx.init, jax.eval_shape(lambda: params)) == jax.eval_shape(
    lambda: state
  )
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)

  @functools.partial(jit, donate_argnums=(0, 1))
  def step(params, state, scale):
    value, grads = jax.value_and_grad(loss)(params, scale)
    updates, state = tx.update(grads, state, params, value_fn=loss, scale=scale)
    return optax.apply_updates(params, updates), state, value

  before, values = jax.tree.map(jax.typeof, state), []
  top = np.linalg.eigvalsh(dense_matrix(make_params(), 'hessian'))[-1]
  for i in range(6):
    params, state, value = step(params, state, jnp.asarray(1, dtype))
    values.append(float(value))
    if i == 0:
      found = optax.tree.get(state, 'curvature')[0, 0]
      np.testing.assert_allclose(found, top, rtol=2e-2)
  assert step._cache_size() == 1
  assert jax.tree.map(jax.typeof, state) == before
  assert values[-1] < values[0]
  assert params['kernel'].dtype == dtype


V = {'w': jnp.ones((3, 2))}


@pytest.mark.parametrize(
  ('curvature', 'params', 'extra', 'text'),
  [
    (
      'hessian',
      V,
      {'value': 1.0},
      'hessian_lanczos needs value_fn in every update, got None; call'
      ' tx.update(grads, state, params, value_fn=value_fn).',
    ),
    (
      'hessian',
      None,
      {'value_fn': len},
      'hessian_lanczos needs params in every update, got None; call'
      ' tx.update(grads, state, params, value_fn=value_fn).',
    ),
    (
      'gauss_newton',
      V,
      {'value_fn': len},
      'hessian_lanczos needs output_fn and loss_fn in every update, got None; call'
      ' tx.update(grads, state, params, output_fn=output_fn, loss_fn=loss_fn).',
    ),
    (
      'hessian',
      {'w': V['w'], 'masked': optax.MaskedNode()},
      {'value_fn': len},
      'hessian_lanczos needs all parameters to call value_fn, got some masked; instead'
      ' of optax.masked or optax.partition, name the leaves to be filtered with'
      ' leaves=lambda name, leaf: ....',
    ),
  ],
)
def test_missing_arguments(curvature, params, extra, text):
  tx = bsfa(estimator=hessian_lanczos(2, curvature=curvature))
  with pytest.raises(ValueError, match='hessian_lanczos needs') as error:
    tx.update(V, tx.init(V), params, **extra)
  assert str(error.value).splitlines()[0] == text


# On meshes.
SPECS = {'a': P('fsdp', 'tensor'), 'b': P('fsdp', None, 'tensor'), 'c': P('tensor')}
KINDS = {'explicit': AxisType.Explicit, 'auto': AxisType.Auto}


def mesh_params():
  rng = np.random.default_rng(5)
  shapes = {'a': (4, 6), 'b': (4, 3, 4), 'c': (6,)}
  return {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}


DATA = np.random.default_rng(6).normal(size=(8, 4)).astype('float32')


def mesh_loss(params, inputs):
  spec = lambda *axes: P(*axes) if not jax.typeof(inputs).sharding.mesh.empty else None
  explicit = jax.typeof(inputs).sharding.mesh.are_all_axes_explicit
  out = functools.partial(
    jnp.einsum, out_sharding=spec('fsdp', 'tensor') if explicit else None
  )
  x = jnp.tanh(out('ni,io->no', inputs, params['a']) + params['c'][None])
  weights = jnp.square(params['b']).sum((1, 2)) + jnp.square(params['b']).sum() ** 2
  return (x * x * x).mean() + weights.mean()


def run_on(mesh, labels):
  estimator = hessian_lanczos(
    3, refresh_every=2, labels=labels, batch_axes=None if labels else BATCH_B
  )
  tx = bsfa(0.1, 2.0, estimator=estimator)
  params, inputs = mesh_params(), DATA
  put = lambda x, spec: x
  if mesh is not None:
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  params = jax.tree.map(put, params, SPECS)
  inputs = put(inputs, P('fsdp'))

  @jit
  def step(params, state, inputs):
    value_fn = lambda p: mesh_loss(p, inputs)
    grads = jax.grad(value_fn)(params)
    updates, state = tx.update(grads, state, params, value_fn=value_fn)
    moved = jax.tree.map(lambda p, u: p - 0.02 * u, params, updates)
    return moved, updates, state

  if mesh is None:
    shardings, state = None, tx.init(params)
  else:
    shardings = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
  first, out = state, []
  for _ in range(5):  # three refreshes
    params, updates, state = step(params, state, inputs)
    out.append(jax.device_get(updates))
  if mesh is not None:
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, first)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
      assert x.sharding.is_equivalent_to(s, x.ndim)
    assert step._cache_size() <= 2  # the parameters' specs may be respelled once
  return out, jax.device_get(state)


BATCH_B = {'a': None, 'b': 0, 'c': None}


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'labels'), [('explicit', None), ('auto', 'all')])
def test_sharded_run_is_the_unsharded_run(kind, labels):
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(KINDS[kind],) * 2)
  with jax.set_mesh(mesh):
    found, state = run_on(mesh, labels)
  expected, expected_state = run_on(None, labels)
  close = functools.partial(np.testing.assert_allclose, rtol=5e-3, atol=5e-3)
  jax.tree.map(close, found, expected)
  close(optax.tree.get(state, 'curvature'), optax.tree.get(expected_state, 'curvature'))
  assert optax.tree.get(state, 'dominant_fraction').max() > 0.1


COLLECTIVE = re.compile(
  r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(?:-start)?\('
)


@pytest.mark.slow
def test_communicates_small_sums_only():
  rank, iterations = 2, 5
  tx = bsfa(estimator=hessian_lanczos(rank, iterations=iterations))
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  # Its Hessian is diagonal, so its products need no communication.
  value = lambda params: sum((p**4).sum() for p in params)

  def collectives(shape, leaves):
    with jax.set_mesh(mesh):
      sharding = NamedSharding(mesh, P('fsdp'))
      params = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)] * leaves
      state = abstract_state(tx, params)
      update = jax.jit(lambda u, s: tx.update(u, s, u, value_fn=value))
      text = update.lower(params, state).compile(FAST).as_text()
    found = []
    for result, name in COLLECTIVE.findall(text):
      sizes = re.findall(r'\w+\[([\d,]*)\]', result)
      entries = sum(int(np.prod([int(n) for n in s.split(',') if n])) for s in sizes)
      found.append((name, entries))
    return sorted(found)

  found = collectives((8, 4), 2)
  assert {name for name, _ in found} == {'all-reduce'}
  assert max(entries for _, entries in found) <= 2 * (iterations + 2)
  # The size does not depend on the parameter count, nor the number on the leaves.
  assert found == collectives((64, 32), 2)
  assert len(collectives((8, 4), 3)) == len(found) <= 10


@pytest.mark.slow
def test_data_parallel_shard_map():
  estimator = hessian_lanczos(2, labels='all')
  tx = bsfa(0.0, 1.0, estimator=estimator)
  params = {'w': jnp.float32(np.random.default_rng(7).normal(size=(4, 2)))}
  loss = lambda p, x: jnp.mean(jnp.tanh(x @ p['w']) ** 2)
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))

  def step(params, state, inputs, reduce):
    value_fn = lambda p: reduce(loss(p, inputs))
    grads = jax.grad(value_fn)(params)
    return tx.update(grads, state, params, value_fn=value_fn)

  mean = functools.partial(jax.lax.pmean, axis_name='data')
  mapped = jax.shard_map(
    lambda *args: step(*args, mean),
    mesh=mesh,
    in_specs=(P(), P(), P('data')),
    out_specs=P(),
  )
  state = tx.init(params)
  found = jit(mapped)(params, state, DATA)
  expected = jit(lambda *args: step(*args, lambda x: x))(params, state, DATA)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, jax.device_get(found), jax.device_get(expected))


def test_shard_map_of_split_parameters_is_refused():
  tx = bsfa(estimator=hessian_lanczos(2))
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  step = jax.shard_map(
    lambda u, s: tx.update(u, s, u, value_fn=lambda p: (p**2).sum())[0],
    mesh=mesh,
    in_specs=(P('fsdp'), P()),
    out_specs=P('fsdp'),
  )
  with pytest.raises(ValueError, match=r"varies over the manual mesh axes \['fsdp'\]"):
    jax.eval_shape(step, jnp.ones((8, 3)), tx.init(jnp.ones((2, 3))))


@pytest.mark.slow
@pytest.mark.parametrize('curvature', ['hessian', 'gauss_newton'])
def test_update_lowers_for_accelerators(curvature):
  estimator = hessian_lanczos(2, curvature=curvature, batch_axes=BATCH)
  tx = bsfa(estimator=estimator)
  params = jax.eval_shape(lambda: make_params(jnp.bfloat16))
  state = jax.eval_shape(tx.init, params)
  extra = {'value_fn': value_fn, 'output_fn': output_fn, 'loss_fn': loss_fn}
  update = jax.jit(lambda u, s: tx.update(u, s, u, **extra))
  exported = jax.export.export(update, platforms=('cuda', 'tpu'))(params, state)
  text = exported.mlir_module()
  assert 'f64' not in text
  assert not [name for name in ('callback', 'infeed', 'outfeed') if name in text]
