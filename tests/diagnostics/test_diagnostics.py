"""Diagnostics against dense matrices and scipy."""

import functools

import jax
from jax import P
import jax.flatten_util
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import pytest
import scipy.linalg

from bsfa_optax import bsfa, diagnostics, estimators, kronecker, pca

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def orthonormal(rng, rows, size):
  return np.linalg.qr(rng.normal(size=(size, rows)))[0].T


# Two leaves in one block, a leaf of two blocks, and one in none.
SHAPES = {'a': (3, 4), 'b': (5,), 'layers': (4, 2, 3), 'none': (2,)}
LABELS = {'a': 'one', 'b': 'one', 'layers': 'layers', 'none': None}
BATCH_AXES = {'a': None, 'b': None, 'layers': 1, 'none': None}
SIZES = [17, 12, 12]
SPECS = {
  'a': P(None, 'x'),
  'b': P(None),
  'layers': P('x', 'y', None),
  'none': P('y'),
}


def make_params(seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {k: np.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def make_layout(params):
  return estimators.layout(params, labels=LABELS, batch_axes=BATCH_AXES)


def flatten(tree):
  """The vectors of the three blocks (or rows of them, with a leading axis)."""
  tree = jax.tree.map(np.asarray, tree)
  lead = tree['a'].shape[:-2]
  flat = lambda x: x.reshape(*lead, -1)
  layers = np.moveaxis(tree['layers'], -2, 0)
  one = np.concatenate([flat(tree['a']), flat(tree['b'])], -1)
  return [one, flat(layers[0]), flat(layers[1])]


def rows_of(basis):
  return {k: getattr(x, 'rows', x) for k, x in basis.items()}


def unflatten(vectors):
  """Stacks with the given rows in the three blocks."""
  one, first, second = (np.asarray(v, np.float32) for v in vectors)
  n = len(one)
  layers = np.stack([first.reshape(n, 4, 3), second.reshape(n, 4, 3)], axis=2)
  return {
    'a': one[:, :12].reshape(n, 3, 4),
    'b': one[:, 12:],
    'layers': layers,
    'none': optax.MaskedNode(),
  }


def bases(ranks=(3, 3), seed=0):
  """Two bases, flat and as stacks."""
  rng = np.random.default_rng(seed)
  flat = [[orthonormal(rng, k, n) for n in SIZES] for k in ranks]
  return flat, [unflatten(x) for x in flat]


overlap = jit(diagnostics.subspace_overlap, static_argnums=2)
principal_angles = jit(diagnostics.principal_angles, static_argnums=2)


def top_k(*args, **kwargs):
  return jit(lambda: diagnostics.hessian_top_k(value_fn, *args, **kwargs))()


def test_overlap_is_the_mean_squared_cosine():
  (v, w), (a, b) = bases((3, 2))
  layout = make_layout(make_params())
  expected = [np.sum((x @ y.T) ** 2) / 3 for x, y in zip(v, w, strict=True)]
  found = overlap(a, b, layout)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  itself = overlap(a, a, layout)
  np.testing.assert_allclose(itself, np.ones(3), atol=1e-6)


def test_overlap_ignores_absent_directions():
  (v, w), (a, b) = bases((3, 2))
  first_two = lambda x: np.concatenate([x[:2], np.zeros_like(x[2:])])
  a = jax.tree.map(first_two, a)
  layout = make_layout(make_params())
  expected = [np.sum((x[:2] @ y.T) ** 2) / 2 for x, y in zip(v, w, strict=True)]
  np.testing.assert_allclose(overlap(a, b, layout), expected, atol=1e-6)
  nothing = jax.tree.map(np.zeros_like, a)
  assert not overlap(nothing, b, layout).any()


@functools.cache
def learned(name, steps=12):
  """What an estimator has learnt when it has refreshed."""
  rng, params = np.random.default_rng(3), make_params()
  tx = bsfa(estimator=ESTIMATORS[name])
  state, update = tx.init(params), jit(tx.update)
  scales = {k: np.exp(rng.normal(size=x.shape)) for k, x in params.items()}
  for _ in range(steps):
    updates = {
      k: jnp.asarray(rng.normal(size=x.shape) * scales[k], jnp.float32)
      for k, x in params.items()
    }
    _, state = update(updates, state, params)
  return state.memory


ESTIMATORS = {
  'pca': pca(3, 4, labels=LABELS, batch_axes=BATCH_AXES),
  'kronecker': kronecker(
    leaves=lambda name, leaf: name != 'none', batch_axes=BATCH_AXES
  ),
}


@pytest.mark.slow
def test_overlap_with_an_estimator_is_that_with_its_basis():
  params, estimator = make_params(), ESTIMATORS['pca']
  memory, layout = learned('pca'), estimator.layout(params)
  _, (a, _) = bases()
  project = diagnostics.projector(estimator, memory)
  found = jit(lambda a: diagnostics.subspace_overlap(a, project, layout))(a)
  expected = overlap(a, memory.basis, layout)
  assert (expected > 0.02).all()
  np.testing.assert_allclose(found, expected, atol=1e-5)
  itself = jit(lambda a: diagnostics.subspace_overlap(a, project, layout))(memory.basis)
  np.testing.assert_allclose(itself, np.ones(3), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ESTIMATORS)
def test_projector_is_a_projector(name):
  params, estimator = make_params(), ESTIMATORS[name]
  v = make_params(5)
  nothing = estimator.init(estimator.layout(params), params)
  fresh = jit(diagnostics.projector(estimator, nothing))(v)
  assert not any(x.any() for x in jax.tree.leaves(fresh))
  project = jit(diagnostics.projector(estimator, learned(name)))
  once = project(v)
  assert not once['none'].any()
  for x, y, z in zip(*map(flatten, (once, project(once), v)), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-6)
    assert 0.01 < np.sum(x * z) < 0.99 * np.sum(z * z)
    np.testing.assert_allclose(np.sum(x * z), np.sum(x * x), rtol=1e-4)
  half = project(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), v))
  for x, y in zip(*map(jax.tree.leaves, (half, once)), strict=True):
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.03)


ANGLES = {
  'spread': [0.1, 0.7, 1.2],
  'equal': [0.0, 0.0, 0.0],
  'small': [1e-5, 1e-4, 3e-3],
  'small and large': [2e-5, 4e-4, 1.57],
  'orthogonal': [np.pi / 2] * 3,
  'near the limit': [5.4e-3, 5.5e-3, 5.6e-3],
}


def with_angles(angles, size, rng):
  """Two bases with the given principal angles, in random order and rotation."""
  k = len(angles)
  v = orthonormal(rng, 2 * k, size)
  other = np.cos(angles)[:, None] * v[:k] + np.sin(angles)[:, None] * v[k:]
  return orthonormal(rng, k, k) @ v[:k], orthonormal(rng, k, k) @ other


@pytest.mark.parametrize('name', ANGLES)
def test_principal_angles_are_the_prescribed_ones(name):
  rng = np.random.default_rng(1)
  pairs = [with_angles(np.array(ANGLES[name]), n, rng) for n in SIZES]
  a, b = (unflatten([pair[i] for pair in pairs]) for i in range(2))
  layout = make_layout(make_params())
  found = principal_angles(a, b, layout)
  np.testing.assert_allclose(found, [ANGLES[name]] * 3, atol=3e-6)


@pytest.mark.parametrize('ranks', [(3, 3), (4, 2), (1, 3)])
def test_principal_angles_agree_with_scipy(ranks):
  (v, w), (a, b) = bases(ranks)
  layout = make_layout(make_params())
  found = principal_angles(a, b, layout)
  for angles, x, y in zip(found, v, w, strict=True):
    expected = scipy.linalg.subspace_angles(x.T, y.T)[::-1]
    np.testing.assert_allclose(angles, expected, atol=3e-6)


@pytest.mark.slow
def test_principal_angles_of_absent_directions_are_nan():
  rng = np.random.default_rng(0)
  v, w = orthonormal(rng, 3, 12), orthonormal(rng, 4, 12)
  layout = estimators.layout(jnp.zeros((3, 4)))
  stack = lambda x: jnp.asarray(x.reshape(-1, 3, 4), jnp.float32)
  expected = scipy.linalg.subspace_angles(v[[0, 2]].T, w.T)[::-1]
  gap = stack(v * np.array([[1], [0], [1]]))
  for pair in ((gap, stack(w)), (stack(w), gap)):
    found = principal_angles(*pair, layout)[0]
    np.testing.assert_allclose(found[:2], expected, atol=3e-6)
    assert np.isnan(found[2])
  # Absent rows are not mixed with directions orthogonal to the other space.
  a, b = with_angles(np.array([0.5, np.pi / 2]), 12, rng)
  wide, narrow = stack(np.pad(a, ((0, 1), (0, 0)))), stack(np.insert(b, 1, 0, axis=0))
  found = principal_angles(wide, narrow, layout)[0]
  np.testing.assert_allclose(found, [0.5, np.pi / 2, np.nan], atol=3e-6)
  # Of three directions, one is beyond the two that are there.
  found = principal_angles(stack(v), gap, layout)[0]
  np.testing.assert_allclose(found, [0, 0, np.nan], atol=3e-6)


def test_principal_angles_of_absent_directions_agree_with_scipy():
  rng = np.random.default_rng(23)
  layout = estimators.layout(jnp.zeros((3, 4)))
  stack = lambda x: jnp.asarray(x.reshape(-1, 3, 4), jnp.float32)
  for _ in range(40):
    v, w = orthonormal(rng, 3, 12), orthonormal(rng, 4, 12)
    expected = scipy.linalg.subspace_angles(v[[0, 2]].T, w.T)[::-1]
    v[1] = 0
    for pair in ((stack(v), stack(w)), (stack(w), stack(v))):
      found = principal_angles(*pair, layout)[0]
      np.testing.assert_allclose(found, [*expected, np.nan], atol=3e-6)


def test_principal_angles_in_float64():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    angles = np.array([1e-9, 1e-7, 1e-3])
    a, b = (jnp.asarray(x.reshape(3, 4, 4)) for x in with_angles(angles, 16, rng))
    layout = estimators.layout(jnp.zeros((4, 4)))
    found = principal_angles(a, b, layout)
    np.testing.assert_allclose(found, [angles], rtol=1e-5, atol=1e-14)


@pytest.mark.slow
def test_dominant_fraction_of_a_gradient():
  estimator = ESTIMATORS['pca']
  memory, g = learned('pca'), make_params(7)
  basis = flatten(rows_of(memory.basis))
  inside = [np.sum((v @ x) ** 2) for v, x in zip(basis, flatten(g), strict=True)]
  norms = [np.sum(x**2) for x in flatten(g)]
  blocks, overall = jit(functools.partial(diagnostics.dominant_fraction, estimator))(
    memory, g
  )
  np.testing.assert_allclose(blocks, np.sqrt(np.divide(inside, norms)), rtol=1e-5)
  total = sum(norms) + np.sum(g['none'] ** 2)
  np.testing.assert_allclose(overall, np.sqrt(sum(inside) / total), rtol=1e-5)
  zero = jax.tree.map(np.zeros_like, g)
  assert all(
    not x.any() for x in diagnostics.dominant_fraction(estimator, memory, zero)
  )


DATA = np.random.default_rng(9).normal(size=(6, 3)).astype(np.float32)


def output_fn(params):
  """Nonlinear in every leaf, so that no part of the curvature vanishes."""
  data = DATA.astype(params['a'].dtype)
  x = jnp.tanh(data @ params['a']) * params['b'][None, :4]
  layers = params['layers']
  y = jnp.tanh(data @ layers[:3, 0] @ layers[:3, 1]) * params['none'][0]
  y += jnp.sin(layers[3]).sum() * data
  return {'x': x + params['b'][4] ** 2, 'y': y}


def loss_fn(outputs):
  x, y = outputs['x'], outputs['y']
  return jnp.mean(jax.nn.logsumexp(x, axis=1)) + 0.5 * jnp.mean((y - 1) ** 2)


def value_fn(params):
  return loss_fn(output_fn(params))


@functools.cache
def dense():
  """H, G and F of each of the three blocks, as matrices in float64."""
  with jax.enable_x64(True):
    params = make_params(dtype=np.float64)
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jit(jax.hessian(lambda v: value_fn(unravel(v))))(vector)
    flat = lambda v: jax.flatten_util.ravel_pytree(output_fn(unravel(v)))[0]
    _, unravel_outputs = jax.flatten_util.ravel_pytree(output_fn(params))
    jacobian = jit(jax.jacobian(flat))(vector)
    inner = jit(jax.hessian(lambda z: loss_fn(unravel_outputs(z))))(flat(vector))
    gauss_newton = jacobian.T @ inner @ jacobian
    index = jax.tree.map(np.asarray, unravel(jnp.arange(len(vector), dtype=float)))
    index = [x.astype(int) for x in flatten(index)]
    matrices = {
      'hessian': hessian,
      'gauss_newton': gauss_newton,
      'functional': hessian - gauss_newton,
    }
    return {
      name: [np.asarray(c)[np.ix_(i, i)] for i in index] for name, c in matrices.items()
    }


@pytest.mark.slow
def test_hessian_top_k_is_that_of_the_dense_hessian():
  params = make_params()
  layout = make_layout(params)
  found = top_k(params, 3, layout, iterations=12)
  for i, matrix in enumerate(dense()['hessian']):
    values, vectors = np.linalg.eigh(matrix)
    rows = flatten(rows_of(found.basis))[i]
    np.testing.assert_allclose(found.eigenvalues[i], values[::-1][:3], atol=2e-6)
    cosines = np.abs(np.sum(rows * vectors.T[::-1][:3], axis=1))
    np.testing.assert_allclose(cosines, np.ones(3), atol=1e-3)
  assert (found.residuals < 1e-4).all()


@pytest.mark.slow
def test_residuals_tell_the_accuracy():
  params = make_params()
  few = top_k(params, 3, make_layout(params), iterations=4, key=jax.random.key(3))
  assert (few.residuals > 1e-4).any()
  rows = flatten(rows_of(few.basis))
  for i, matrix in enumerate(dense()['hessian']):
    error = rows[i] @ matrix - np.asarray(few.eigenvalues)[i][:, None] * rows[i]
    expected = np.linalg.norm(error, axis=1)
    np.testing.assert_allclose(few.residuals[i], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('with_projector', [False, True])
def test_curvature_energy_is_that_of_the_dense_matrices(with_projector):
  params, estimator = make_params(), ESTIMATORS['pca']
  memory = learned('pca')
  rows = flatten(rows_of(memory.basis))
  layout = estimator.layout(params)
  project = diagnostics.projector(estimator, memory)
  found = jit(
    lambda params, basis, key: diagnostics.curvature_energy(
      output_fn,
      loss_fn,
      params,
      project if with_projector else basis,
      layout,
      key=key,
      samples=2000,
    )
  )(params, memory.basis, jax.random.key(0))
  for name, matrices in dense().items():
    for i, c in enumerate(matrices):
      p = rows[i].T @ rows[i]
      trace, energy = np.trace(c @ p), np.sum((c @ p) ** 2)
      for split, inside, total in (
        (found.trace[name], trace, np.trace(c)),
        (found.energy[name], energy, np.sum(c**2)),
      ):
        if with_projector:
          assert abs(split.inside[i] - inside) < 4 * split.inside_error[i] + 1e-6
          assert split.inside_error[i] > 0
        else:
          np.testing.assert_allclose(split.inside[i], inside, atol=1e-5)
          assert split.inside_error[i] == 0
        outside = total - inside
        assert abs(split.outside[i] - outside) < 4 * split.outside_error[i] + 1e-6
        assert (
          0 < split.outside_error[i] < 0.1 * np.sqrt(np.sum(c**2)) + 0.1 * abs(total)
        )
        np.testing.assert_allclose(
          split.share[i], split.inside[i] / (split.inside[i] + split.outside[i])
        )


@pytest.mark.slow
def test_standard_error_is_the_spread_of_estimates():
  params = make_params()
  layout = make_layout(params)
  _, (a, _) = bases()
  split = lambda key: diagnostics.curvature_energy(
    output_fn, loss_fn, params, a, layout, key=key, samples=8
  ).energy['hessian']
  keys = jax.random.split(jax.random.key(1), 200)
  splits = jit(lambda keys: jax.lax.map(split, keys))(keys)
  spread, claimed = splits.outside.std(0), splits.outside_error.mean(0)
  np.testing.assert_allclose(claimed, spread, rtol=0.2)
  np.testing.assert_allclose(splits.share_error.mean(0), splits.share.std(0), rtol=0.25)


def sharded_output_fn(params):
  """Sums of entries: what explicit meshes contract without being told how."""
  a, b, layers = params['a'], params['b'], params['layers']
  return jnp.stack(
    [jnp.sin(3 * a).sum(), (a**3).sum(), jnp.exp(layers).sum() * (b**2).sum()]
  )


def all_diagnostics(params, a, b, estimator):
  layout = make_layout(params)
  memory = estimator.init(layout, params)._replace(
    basis=rows_of(b),
    variance=jnp.ones((3, 3)),
    total_variance=jnp.full((3,), 9.0),
    is_complete=jnp.array(True),
  )
  project = diagnostics.projector(estimator, memory)
  curvature = functools.partial(
    diagnostics.curvature_energy,
    sharded_output_fn,
    lambda z: jnp.sum(z**2),
    params,
    layout=layout,
    key=jax.random.key(0),
    samples=3,
  )
  hessian = diagnostics.hessian_top_k(
    lambda p: jnp.sum(sharded_output_fn(p) ** 2), params, 2, layout
  )
  small = {
    'overlap': diagnostics.subspace_overlap(a, b, layout),
    'projected overlap': diagnostics.subspace_overlap(a, project, layout),
    'angles': diagnostics.principal_angles(a, b, layout),
    'fraction': diagnostics.dominant_fraction(estimator, memory, params),
    'eigenvalues': hessian.eigenvalues,
    'curvature': curvature(a),
    'projected curvature': curvature(project),
  }
  return small, hessian.basis, project(params)


run_all = jit(functools.partial(all_diagnostics, estimator=ESTIMATORS['pca']))


@pytest.mark.slow
def test_sharded_diagnostics_are_the_unsharded_ones():
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
  _, (a, b) = bases()
  params = make_params()
  expected = jax.device_get(run_all(params, a, b)[0])
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    params = {k: put(x, SPECS[k]) for k, x in params.items()}
    a, b = (
      {k: x if k == 'none' else put(x, P(None, *SPECS[k])) for k, x in tree.items()}
      for tree in (a, b)
    )
    found, basis, projected = run_all(params, a, b)
  for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
  for k in ('a', 'layers'):
    where = NamedSharding(mesh, SPECS[k])
    assert projected[k].sharding.is_equivalent_to(where, projected[k].ndim)
    assert basis[k].rows.sharding.spec == P(None, *SPECS[k])


def test_wrong_arguments():
  params = make_params()
  layout = make_layout(params)
  _, (a, _) = bases()
  with pytest.raises(ValueError, match=r'a stack for each of the 3 leaves.*got 1'):
    diagnostics.subspace_overlap(a['a'], a, layout)
  with pytest.raises(ValueError, match=r'samples must be at least 2.*got 1'):
    diagnostics.curvature_energy(
      output_fn, loss_fn, params, a, layout, key=jax.random.key(0), samples=1
    )
  with pytest.raises(ValueError, match='rank must be a positive integer, got 0'):
    diagnostics.hessian_top_k(value_fn, params, 0)
  with pytest.raises(ValueError, match=r'iterations must exceed rank, got.*3'):
    diagnostics.hessian_top_k(value_fn, params, 3, iterations=3)
