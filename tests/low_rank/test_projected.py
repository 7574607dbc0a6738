"""Projected optimizers against their authors' update rules, and as transformations."""

import functools

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import pytest

import bsfa_optax
from bsfa_optax.projected import dct_adamw, fira, frugal, galore, projected

RANK, GAP, STEPS, RATE = 3, 4, 10, 0.1
SHAPES = {'tall': (9, 6), 'wide': (5, 8), 'bias': (6,)}


def recorded(steps=STEPS, shapes=SHAPES, dtype=np.float32):
  """Gradients with falling singular values: no near ties to break differently."""
  rng = np.random.default_rng(0)
  out = []
  for _ in range(steps):
    grads = {k: rng.normal(size=s) for k, s in shapes.items()}
    for k, g in grads.items():
      if g.ndim > 1:
        u, s, vt = np.linalg.svd(g, full_matrices=False)
        grads[k] = (u * 2.0 ** -np.arange(s.shape[-1])) @ vt
    out.append({k: jnp.asarray(g, dtype) for k, g in grads.items()})
  return out


def run(tx, grads, params=None):
  params = params or jax.tree.map(jnp.ones_like, grads[0])
  state = tx.init(params)
  states = []
  step = jax.jit(tx.update)
  for g in grads:
    updates, state = step(g, state, params)
    params = optax.apply_updates(params, updates)
    states.append(state)
  return params, states


class Reference:
  """One matrix, as the authors' PyTorch code treats it, in float64."""

  def __init__(self, shape):
    self.right = shape[0] >= shape[1]
    self.m = self.v = 0.0
    self.t = 0

  def top(self, g, ours):
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    top = vt[:RANK].T if self.right else u[:, :RANK]
    return top * np.sign((top * ours).sum(0))  # the sign alone is nobody's choice

  down = lambda self, g, p: g @ p if self.right else p.T @ g
  up = lambda self, c, p: c @ p.T if self.right else p @ c

  def moments(self, c, b1=0.9, b2=0.999):
    self.t += 1
    self.m = b1 * self.m + (1 - b1) * c
    self.v = b2 * self.v + (1 - b2) * c**2
    return 1 - b1**self.t, 1 - b2**self.t


def by_authors(step, states):
  """Parameters after all steps by `step`, which may look at our bases."""
  references = {k: Reference(s) for k, s in SHAPES.items() if len(s) > 1}
  params = {k: np.ones(SHAPES[k]) for k in references}
  for i, grads in enumerate(recorded()):
    for k, reference in references.items():
      ours = np.asarray(states[i][0].projection_basis[k].vectors)
      params[k] = params[k] + step(reference, np.float64(grads[k]), i, ours, params[k])
  return params


def galore_step(self, g, i, ours, w):
  if i % GAP == 0:
    self.p = self.top(g, ours)
  c1, c2 = self.moments(self.down(g, self.p))
  direction = self.m / (np.sqrt(self.v) + 1e-6)
  return -RATE * np.sqrt(c2) / c1 * self.up(direction, self.p) * 0.25


def fira_step(self, g, i, ours, w):
  if i % GAP == 0:
    self.p = self.top(g, ours)
  c = self.down(g, self.p)
  c1, c2 = self.moments(c)
  direction = self.m / (np.sqrt(self.v) + 1e-6)
  axis = 0 if direction.shape[0] < direction.shape[1] else 1
  norm = functools.partial(np.linalg.norm, axis=axis, keepdims=True)
  scaled = (g - 0.25 * self.up(c, self.p)) * (norm(direction) / (norm(c) + 1e-8))
  size = np.linalg.norm(scaled)
  if i:
    limiter = max(size / (self.last + 1e-8), 1.01) / 1.01
    scaled, size = scaled / limiter, size / limiter
  self.last = size
  return -RATE * np.sqrt(c2) / c1 * (0.25 * self.up(direction, self.p) + scaled)


def dct_step(self, g, i, ours, w):
  n = min(g.shape)
  rows, columns = np.meshgrid(np.arange(n), np.arange(n), indexing='ij')
  q = np.sqrt(2 / n) * np.cos(np.pi * rows * (2 * columns + 1) / (2 * n))
  q[0] *= np.sqrt(0.5)
  s = g @ q if self.right else q.T @ g
  norms = np.abs(s).sum(0 if self.right else 1)
  new = q[:, np.sort(np.argsort(-norms)[:RANK])]
  if i:
    if self.right:
      turn = self.p.T @ new
      self.m, self.v = self.m @ turn, np.abs(self.v @ turn)
    else:
      turn = new.T @ self.p
      self.m, self.v = turn @ self.m, np.abs(turn @ self.v)
  self.p = new
  c1, c2 = self.moments(self.down(g, new))
  direction = self.m / (1e-8 * np.sqrt(c2) + np.sqrt(self.v))
  return -RATE * np.sqrt(c2) / c1 * self.up(direction, new)


@pytest.mark.parametrize(
  ('make', 'step', 'options'),
  [
    (galore, galore_step, {'refresh_every': GAP}),
    (fira, fira_step, {'refresh_every': GAP}),
    (dct_adamw, dct_step, {}),
  ],
)
def test_is_the_authors_rule(make, step, options):
  params, states = run(make(RATE, RANK, **options), recorded())
  for k, expected in by_authors(step, states).items():
    np.testing.assert_allclose(params[k], expected, rtol=2e-4, atol=2e-4, err_msg=k)


@pytest.mark.slow
def test_frugal_is_the_authors_rule():
  params, states = run(frugal(RATE, 0.5, refresh_every=GAP), recorded())

  def step(self, g, i, ours, w):
    if i % GAP == 0:
      self.m = self.v = self.t = 0
    assert len(set(ours.tolist())) == round(min(g.shape) / 2)
    p = np.eye(min(g.shape))[:, ours]
    c = self.down(g, p)
    c1, c2 = self.moments(c)
    inside = self.up(self.m / c1 / (np.sqrt(self.v / c2) + 1e-8), p)
    return -RATE * (inside + np.sign(g - self.up(c, p))) - RATE * 0.01 * w

  for k, expected in by_authors(step, states).items():
    np.testing.assert_allclose(params[k], expected, rtol=2e-4, atol=2e-4, err_msg=k)
  bases = [s[0].projection_basis['tall'].vectors for s in states]
  drawn = {tuple(np.asarray(basis).tolist()) for basis in bases}
  assert len(drawn) > 1


def test_other_leaves_take_the_inner_optimizer():
  tx = projected(optax.scale_by_adam(), RANK, subspace='columns')
  tx = optax.chain(tx, optax.scale(-RATE))
  params, _ = run(tx, recorded())
  alone = [{'bias': g['bias']} for g in recorded()]
  expected, _ = run(optax.adam(RATE), alone)
  np.testing.assert_allclose(params['bias'], expected['bias'], rtol=1e-6)


@pytest.mark.parametrize(
  'subspace',
  ['dct', *(pytest.param(x, marks=pytest.mark.slow) for x in ('svd', 'columns'))],
)
def test_the_whole_space_is_the_inner_optimizer(subspace):
  tx = projected(
    optax.trace(0.9), 1.0, subspace=subspace, refresh_every=3, batch_axes=1
  )
  grads = recorded(5, {'tall': (2, 7, 4), 'wide': (2, 3, 5)})
  params, _ = run(tx, grads)
  expected, _ = run(optax.trace(0.9), grads)
  for k in params:
    np.testing.assert_allclose(params[k], expected[k], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_random_svd_finds_the_top_directions_of_a_large_matrix():
  rng = np.random.default_rng(0)
  u, _ = np.linalg.qr(rng.normal(size=(60, 40)))
  v, _ = np.linalg.qr(rng.normal(size=(40, 40)))
  g = jnp.asarray((u * 1.5 ** -np.arange(40)) @ v.T, jnp.float32)
  tx = projected(optax.identity(), 4)
  updates, _ = jax.jit(tx.update)(g, tx.init(g))
  expected = (u[:, :4] * 1.5 ** -np.arange(4)) @ v[:, :4].T
  np.testing.assert_allclose(updates, expected, atol=2e-3)


@pytest.mark.slow
def test_carry():
  """At a turn: zero moments and count; the same numbers; or the same matrix."""
  grads = recorded(GAP + 1)
  states = {}
  for carry in ('reset', 'keep', 'rotate'):
    tx = projected(
      optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda c: 1.0)),
      RANK,
      subspace='columns',
      refresh_every=GAP,
      carry=carry,
    )
    _, seen = run(tx, grads)
    states[carry] = [s.coordinate_state for s in seen]
    bases = [s.projection_basis['tall'].vectors for s in seen]
  p_old, p_new = (np.eye(6, dtype=np.float32)[:, bases[i]] for i in (GAP - 1, GAP))
  assert not np.array_equal(p_old, p_new)
  before = states['keep'][GAP - 1][0].mu['tall'].values
  new = grads[GAP]['tall'] @ p_new
  after = {k: s[GAP][0] for k, s in states.items()}
  mu = {k: s.mu['tall'].values for k, s in after.items()}
  np.testing.assert_allclose(mu['reset'], 0.1 * new, atol=1e-6)
  np.testing.assert_allclose(mu['keep'], 0.9 * before + 0.1 * new, atol=1e-6)
  carried = before @ p_old.T @ p_new
  np.testing.assert_allclose(mu['rotate'], 0.9 * carried + 0.1 * new, atol=1e-6)
  assert (after['reset'].count, after['keep'].count) == (1, GAP + 1)
  assert states['reset'][GAP][1].count == GAP + 1  # the schedule goes on
  assert (after['rotate'].nu['tall'].values >= 0).all()


INNER = {
  'adadelta': lambda: optax.adadelta(1.0),
  'adafactor': lambda: optax.adafactor(0.02),
  'adan': lambda: optax.adan(0.02),
  'rms': lambda: optax.chain(optax.scale_by_factored_rms(), optax.scale(-0.02)),
  'prodigy': optax.contrib.prodigy,
  'bsfa_adafactor': lambda: bsfa_optax.bsfa_adafactor(0.02),
  'bsfa_adamw': lambda: bsfa_optax.bsfa_adamw(0.02),
  'whitening': lambda: optax.chain(bsfa_optax.scale_by_whitening(), optax.scale(-0.02)),
}


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize(
  'name',
  [pytest.param(x, marks=() if x == 'adan' else pytest.mark.slow) for x in INNER],
)
def test_optimizers_go_on_over_turns(name):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 9), (9, 6)))
  loss = lambda params: jnp.square(x @ (params - w)).mean()
  tx = projected(INNER[name](), 4, subspace='random', refresh_every=4)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  params = jnp.zeros_like(w)
  state = tx.init(params)
  for _ in range(12):
    params, state = step(params, state)
  assert loss(params) < loss(jnp.zeros_like(w))


def test_momentum_of_one_sign_is_no_second_moment():
  """A subspace may come back with its sign changed."""
  g = jnp.ones((4, 1))
  leaves = lambda name, leaf: True
  tx = projected(optax.trace(0.9), 1, subspace='random', refresh_every=1, leaves=leaves)
  params, states = run(tx, [g] * 5)
  expected, _ = run(optax.trace(0.9), [g] * 5)
  np.testing.assert_allclose(params, expected, rtol=1e-4)
  assert len({s.projection_basis.vectors.item() > 0 for s in states}) == 2


@pytest.mark.slow
def test_a_partition_is_carried_like_its_parts():
  def labels(tree):
    return jax.tree.map_with_path(lambda path, _: 'tall' in str(path), tree)

  adam = optax.scale_by_adam()
  parts = optax.partition({True: adam, False: adam}, labels)
  tx = functools.partial(projected, rank=RANK, subspace='columns', refresh_every=2)
  expected, _ = run(tx(adam), recorded(5))
  params, _ = run(tx(parts), recorded(5))
  for k in params:
    np.testing.assert_allclose(params[k], expected[k], rtol=1e-6, atol=1e-6, err_msg=k)


@pytest.mark.slow
def test_checkpoint_between_turns(round_trip):
  tx = fira(RATE, RANK, refresh_every=3)
  grads = recorded(8)
  params = jax.tree.map(jnp.ones_like, grads[0])
  step = jax.jit(tx.update)

  def steps(state, grads):
    for g in grads:
      updates, state = step(g, state, params)
    return updates, state

  _, state = steps(tx.init(params), grads[:5])
  restored = round_trip(state, jax.eval_shape(tx.init, params))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  ended = [steps(x, grads[5:]) for x in (state, restored)]
  assert jax.tree.all(jax.tree.map(jnp.array_equal, *ended))


def test_gradient_that_is_not_finite_makes_no_subspace():
  tx = projected(optax.identity(), RANK)
  (g,) = recorded(1, {'tall': SHAPES['tall']})
  state, update = tx.init(g), jax.jit(tx.update)
  bad = g | {'tall': g['tall'].at[0, 0].set(jnp.nan)}
  _, state = update(bad, state)
  updates, state = update(g, state)
  assert np.isfinite(updates['tall']).all()
  assert np.abs(updates['tall']).max() > 0


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize('dtypes', [('bfloat16', 'float32'), ('float32', 'bfloat16')])
def test_updates_may_have_another_dtype_than_parameters(dtypes):
  tx = projected(optax.scale_by_adam(), RANK)
  params, g = (jax.tree.map(jnp.ones_like, recorded(1, dtype=x)[0]) for x in dtypes)
  updates, state = jax.eval_shape(tx.update, g, jax.eval_shape(tx.init, params), params)
  found = state.projection_basis['tall'].vectors.dtype, updates['tall'].dtype
  assert found == dtypes


@pytest.mark.slow
def test_dtypes_are_kept_and_nothing_compiles_twice():
  dtype = jnp.bfloat16
  tx = fira(RATE, RANK, refresh_every=2)
  grads = recorded(4, dtype=dtype)
  params = jax.tree.map(jnp.ones_like, grads[0])
  abstract = jax.eval_shape(tx.init, params)
  state = tx.init(params)
  traces = []

  @jax.jit
  def step(g, state, params):
    traces.append(1)
    return tx.update(g, state, params)

  for g in grads:
    updates, state = step(g, state, params)
    assert all(x.dtype == dtype for x in jax.tree.leaves(updates))
  assert len(traces) == 1
  same = jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, state
  )
  assert jax.tree.all(same)
  assert all(x.size for x in jax.tree.leaves(state))


def test_specs_of_parameters_do_not_fit_the_state():
  tx = projected(optax.scale_by_adam(), RANK)
  params = {'tall': jnp.ones((9, 6))}
  state = tx.init(params)
  doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
  assert jax.tree.structure(doubled) == jax.tree.structure(state)
  with pytest.raises(ValueError):  # noqa: PT011
    optax.tree.map_params(tx, lambda x, s: x, state, {'tall': P('fsdp')})


def test_options_under_injection():
  """A traced scale, and the same run."""
  grads = recorded(3)
  make = lambda rate, scale: galore(rate, RANK, scale=scale, subspace='dct')
  injected = optax.inject_hyperparams(make)(rate=RATE, scale=0.25)
  expected, _ = run(make(RATE, 0.25), grads)
  params, _ = run(injected, grads)
  np.testing.assert_allclose(params['tall'], expected['tall'], rtol=1e-5)


MESHES = {'explicit': AxisType.Explicit, 'auto': AxisType.Auto}
SPECS = {
  'rows': ((4, 8, 4), P(None, 'fsdp', None)),
  'columns': ((4, 4, 8), P(None, None, 'fsdp')),
  'layers': ((4, 4, 8), P('fsdp', 'tensor', None)),
}


@functools.cache
def unsharded(subspace):
  tx = projected(
    optax.scale_by_adam(),
    2,
    subspace=subspace,
    residual='scaled',
    refresh_every=2,
    batch_axes=1,
  )
  grads = recorded(3, {k: shape for k, (shape, _) in SPECS.items()})
  return tx, grads, run(tx, grads)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('subspace', 'kind'),
  [('svd', 'explicit'), ('random', 'auto'), ('dct', 'explicit')],
)
def test_sharded_is_unsharded(subspace, kind):
  tx, grads, expected = unsharded(subspace)
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(MESHES[kind],) * 2)
  shardings = {k: NamedSharding(mesh, s) for k, (_, s) in SPECS.items()}
  with jax.set_mesh(mesh):
    grads = [jax.device_put(g, shardings) for g in grads]
    params = jax.device_put(jax.tree.map(jnp.ones_like, grads[0]), shardings)
    specs = bsfa_optax.state.state_shardings(tx, params)
    on_auto = kind == 'auto'
    state = jax.jit(tx.init, out_shardings=specs if on_auto else None)(params)
    types = jax.tree.map(jax.typeof, state)
    assert on_auto or all(
      x.sharding.is_equivalent_to(s, x.ndim)
      for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True)
    )
    step = jax.jit(tx.update, out_shardings=(shardings, specs) if on_auto else None)
    for g in grads:
      updates, state = step(g, state, params)
      params = optax.apply_updates(params, updates)
    assert jax.tree.map(jax.typeof, state) == types
  for k in expected:
    np.testing.assert_allclose(params[k], expected[k], rtol=1e-3, atol=1e-3, err_msg=k)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 3}, r'coordinate_state/mu/tall/values, expected \(9, 2\)'),
    ({'subspace': 'dct'}, r'got \(2,\) for projection_basis/tall/vectors'),
    ({'residual': 'scaled'}, r'got \(\) for residual_norm/tall, expected nothing'),
    ({'inner': optax.scale_by_lion()}, 'got nothing for coordinate_state/nu/tall/val'),
    ({'leaves': lambda name, leaf: name == 'wide'}, 'got nothing for coordinate_state'),
  ],
)
def test_state_of_another_configuration_is_refused(options, message):
  (g,) = recorded(1)
  own = {'inner': optax.scale_by_adam(), 'rank': 2}
  state = jax.eval_shape(projected(**own | options).init, g)
  with pytest.raises(ValueError, match=f'state must be of the same options.*{message}'):
    jax.eval_shape(projected(**own).update, g, state)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'rank must be a positive integer, got 0'),
    ({'rank': 1.5}, 'share of the shorter side in .0, 1., got 1.5'),
    ({'rank': 7}, "rank 7 for 'tall' of shape .9, 6.; lower it"),
    ({'subspace': 'pca'}, "subspace must be 'svd', .* or 'dct', got 'pca'"),
    ({'residual': 'keep'}, "residual must be None, 'sign' or 'scaled', got 'keep'"),
    ({'carry': None}, 'carry must be .*, got None'),
    ({'refresh_every': 0}, 'refresh_every must be a positive integer, got 0'),
    ({'scale': -1.0}, 'scale must be finite and non-negative, got -1.0'),
    ({'batch_axes': 'layers'}, "batch_axes must be the number .*, got 'layers'"),
    ({'batch_axes': 1}, "batch_axes must leave a matrix .* .0,. for 'tall'"),
    (
      {'leaves': lambda name, leaf: True},
      "leaves chose 'bias', which is no real matrix",
    ),
  ],
)
def test_bad_options(options, message):
  params = {'tall': jnp.ones((9, 6)), 'bias': jnp.ones(6)}
  with pytest.raises(ValueError, match=message):
    projected(optax.scale_by_adam(), **{'rank': 2, **options}).init(params)


def test_bad_types():
  with pytest.raises(TypeError, match='inner must be an optax'):
    projected(optax.adam, 2)
  with pytest.raises(TypeError, match='leaves must be a function'):
    projected(optax.scale_by_adam(), 2, leaves=['kernel'])
