"""Reparametrisations: their matrices, gradients, rounds and errors."""

import functools

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bsfa_optax
from bsfa_optax import low_rank
from bsfa_optax.projected import projected

METHODS = {
  'sst': low_rank.sst(2),
  'lora': low_rank.lora(2),
  'relora': low_rank.relora(2, scale=0.5),
  'normed': low_rank.relora(2, column_norm=True),
}
SHAPES = {'tall': (3, 8, 4), 'wide': (3, 4, 6), 'bias': (4,)}


def make_params(shapes=SHAPES, dtype=np.float32):
  rng = np.random.default_rng(0)
  return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def start(name, params=None, **options):
  params = make_params() if params is None else params
  return _init(params, name, **{'batch_axes': 1, **options})


@functools.partial(jax.jit, static_argnums=1, static_argnames='batch_axes')
def _init(params, name, batch_axes):
  return low_rank.init(params, jax.random.key(1), METHODS[name], batch_axes=batch_axes)


def loss_fn(trained, frozen):
  """Any function of all matrices, smooth and without symmetry."""
  joined = low_rank.join(trained, frozen)
  out = 0.0
  for i, k in enumerate(sorted(joined)):
    w = jnp.asarray(joined[k])
    weights = jnp.cos(jnp.arange(w.size, dtype=w.dtype).reshape(w.shape) + i)
    out += jnp.sum(jnp.sin(w) * weights)
  return out


TX = optax.chain(
  optax.clip_by_global_norm(1e3),
  low_rank.renewable(optax.adam(optax.constant_schedule(0.05))),
)


# Once for all tests of the same parts: compiling is most of the time.
@functools.partial(jax.jit, static_argnums=0)
def train_step(tx, trained, frozen, state):
  grads = jax.grad(loss_fn)(trained, frozen)
  updates, state = tx.update(grads, state, trained)
  return low_rank.retract(optax.apply_updates(trained, updates)), state


renew = jax.jit(low_rank.renew, static_argnums=0)
merge = jax.jit(low_rank.merge)


def train(tx, trained, frozen, state, steps):
  for _ in range(steps):
    trained, state = train_step(tx, trained, frozen, state)
  return trained, state


def assert_equal(a, b, **tolerance):
  a, b = (dict(jax.tree_util.tree_leaves_with_path(x)) for x in (a, b))
  assert list(a) == list(b)
  for path in a:
    np.testing.assert_allclose(a[path], b[path], err_msg=str(path), **tolerance)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [('sst', jnp.float32), ('normed', jnp.bfloat16)],
)
def test_merge_after_init_gives_back_the_parameters(name, dtype):
  params = make_params(dtype=dtype)
  trained, frozen = start(name, params)
  for tree in (low_rank.join(trained, frozen), merge(trained, frozen)):
    for k, w in tree.items():
      assert (w.shape, w.dtype, w.ndim) == (params[k].shape, dtype, params[k].ndim)
  tolerance = 1e-6 if dtype == jnp.float32 else 0.05
  merged = merge(trained, frozen)
  greatest = max(float(jnp.abs(w).max()) for w in params.values())
  assert_equal(
    *(jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (merged, params)),
    atol=tolerance * greatest,
  )
  assert all(x.size for x in jax.tree.leaves((trained, frozen)))
  assert all(x.dtype == dtype for x in jax.tree.leaves(trained))


def test_init_is_abstract_and_jitted():
  params, name = make_params(), 'sst'
  init = lambda p: low_rank.init(p, jax.random.key(1), METHODS[name], batch_axes=1)
  abstract, eager = jax.eval_shape(init, params), init(params)
  shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert shapes(abstract) == shapes(eager)
  assert_equal(start(name), eager, atol=1e-5)


@pytest.mark.slow
def test_gradient_of_sst():
  """Finite differences, and the enhanced one without the value but with its sign."""
  with jax.enable_x64(True):
    shapes = {'w': (5, 4)}
    params = make_params(shapes, np.float64)
    grads, loss = {}, jax.jit(loss_fn)
    for enhanced in (True, False):
      method = low_rank.sst(2, enhanced=enhanced)
      init = jax.jit(lambda p, m=method: low_rank.init(p, jax.random.key(1), m))
      trained, frozen = init(params)
      hot = frozen['w'].one_hot(np.float64)
      s = trained['w'].s * jnp.array([-1.0, 1.0, -1.0, 1.0])
      trained = {'w': low_rank.Spectrum(trained['w'].u, s, trained['w'].v)}
      grads[enhanced] = jax.jit(jax.grad(loss_fn))(trained, frozen)['w']
    own = hot @ s
    assert (own < 0).any()
    for k in 'usv':
      x, plain = getattr(trained['w'], k), getattr(grads[False], k)
      for index in np.ndindex(x.shape):
        values = []
        for step in (1e-6, -1e-6):
          moved = low_rank.Spectrum(
            **{n: getattr(trained['w'], n) for n in 'usv' if n != k},
            **{k: x.at[index].add(step)},
          )
          values.append(loss({'w': moved}, frozen))
        np.testing.assert_allclose(plain[index], (values[0] - values[1]) / 2e-6, 1e-5)
      scale = 1.0 if k == 's' else jnp.abs(own)[None]
      np.testing.assert_allclose(getattr(grads[True], k) * scale, plain, rtol=1e-12)


@pytest.mark.slow
def test_column_norm_is_the_formula():
  trained, frozen = start('normed')
  trained = jax.tree.map(lambda x: x + 0.1, trained)
  part, w0 = trained['tall'], frozen['tall'].w
  whole = w0 + part.i @ part.j
  norms = jnp.sqrt((whole**2).sum(1, keepdims=True))
  expected = part.magnitude[:, None] * whole / norms
  np.testing.assert_allclose(
    low_rank.merge(trained, frozen)['tall'], expected, rtol=1e-5
  )
  assert np.abs(expected - w0).max() > 0.01


@pytest.mark.slow
def test_galore_is_lora_with_a_frozen_orthonormal_factor():
  """Until the subspace is renewed: the coordinates are the other factor's gradient."""
  params = {'w': make_params()['tall'][0]}
  target = make_params()['tall'][1]
  loss = lambda w: jnp.sum(jnp.sin(w[...] - target))
  galore = optax.chain(
    projected(optax.scale_by_adam(), 2, subspace='random'),
    optax.scale_by_learning_rate(0.1),
  )
  state, dense = galore.init(params), params
  _, frozen = low_rank.init(params, jax.random.key(0), low_rank.lora(2))
  update = jax.jit(galore.update)
  _, (after, *_) = update(params, state, params)
  p = after.projection_basis['w'].vectors  # (4, rank): the shorter side is the second
  # W0 + I J with J = P^T kept and I from zero.
  parts = lambda i: ({'w': low_rank.Factors(i, p.T)}, frozen)
  factor = jnp.zeros((8, 2))
  adam = optax.adam(0.1)
  lora_state = adam.init(factor)
  grad_of_factor = jax.jit(jax.grad(lambda i: loss(low_rank.join(*parts(i))['w'])))
  for _ in range(5):
    grads = jax.grad(lambda p: loss(p['w']))(dense)
    updates, state = update(grads, state, dense)
    dense = optax.apply_updates(dense, updates)
    change, lora_state = adam.update(grad_of_factor(factor), lora_state)
    factor += change
  merged = low_rank.merge(*parts(factor))
  np.testing.assert_allclose(merged['w'], dense['w'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'name',
  [
    'sst',
    *(pytest.param(x, marks=pytest.mark.slow) for x in ('lora', 'relora')),
  ],
)
def test_renew_keeps_the_matrices_and_restarts_what_is_renewed(name):
  """And nothing compiles twice."""
  trained, frozen = start(name)
  trained, state = train(TX, trained, frozen, TX.init(trained), 3)
  compiled = []
  for turn in (1, 2):
    before = merge(trained, frozen)
    new, new_frozen, state = renew(TX, trained, frozen, state, jax.random.key(turn))
    assert_equal(merge(new, new_frozen), before, atol=1e-5)
    states = state[1].inner_states
    vectors, values, rest = (
      states[name].inner_state for name in ('vectors', 'values', 'rest')
    )
    counts = [int(s[0].count) for s in (vectors, values, rest)]
    schedules = [int(s[1].count) for s in (vectors, values, rest)]
    assert schedules == [3 * turn] * 3
    restarts = [name != 'lora', name == 'sst' and turn == 2, False]
    assert [c == 0 for c in counts] == restarts
    mu = vectors[0].mu['tall']
    assert all((x == 0).all() == restarts[0] for x in jax.tree.leaves(mu))
    if name == 'sst':
      drawn = np.asarray(new_frozen['tall'].drawn)
      assert all(len(set(row)) == 2 for row in drawn.tolist())
      assert new_frozen['tall'].draws == turn % 2
      if turn == 2:  # decomposed: orthonormal again
        u = new_frozen['tall'].u
        np.testing.assert_allclose(u.mT @ u, np.eye(4)[None].repeat(3, 0), atol=1e-5)
    trained, frozen = new, new_frozen
    trained, state = train(TX, trained, frozen, state, 3)
    compiled.append((train_step._cache_size(), renew._cache_size()))
  assert compiled[0] == compiled[1]


@pytest.mark.slow
def test_factors_take_an_optimizer_of_their_own():
  """GradNormLoRP's composition: gradients of normed factors in a subspace."""
  inside = optax.chain(
    projected(optax.scale_by_adam(), 1, subspace='random', batch_axes=1),
    optax.scale(-0.05),
  )
  tx = low_rank.renewable(inside, optax.sgd(0.01))
  trained, frozen = start('normed', {'tall': make_params()['tall']})
  state = tx.init(trained)
  inner = state.inner_states['vectors'].inner_state
  assert inner[0].coordinate_state.mu['tall'].i.values.shape == (3, 8, 1)
  before = loss_fn(trained, frozen)
  trained, _ = train(tx, trained, frozen, state, 4)
  assert loss_fn(trained, frozen) < before


def test_default_leaves_are_the_matrices_of_the_package():
  shapes = {'embedding': (11, 8), 'head': (8, 11), 'norm': (8,)}
  shapes['layers'] = {'q': (3, 8, 4), 'norm': (3, 8), 'attention': (3, 8, 2, 4)}
  params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
  stacked = lambda name, leaf: int(name.startswith('layers'))
  init = lambda p: low_rank.init(
    p, jax.random.key(0), METHODS['sst'], batch_axes=stacked
  )
  trained, _ = jax.eval_shape(init, params)
  q = trained['layers'].pop('q')
  assert q.u.shape == (3, 8, 2)
  del params['layers']['q']
  assert jax.tree.structure(trained) == jax.tree.structure(params)
  tx = projected(optax.scale_by_adam(), 2, batch_axes=stacked)
  with pytest.raises(ValueError, match='leaves chose no matrix among 5 arrays'):
    tx.init(params)


def test_vectors_are_drawn_by_singular_value():
  values = jnp.array([8.0, 4.0, -2.0, 1.0])
  w = jnp.diag(values)
  keys = jax.random.split(jax.random.key(0), 2000)
  draw = lambda key: low_rank.init({'w': w}, key, low_rank.sst(1))[1]['w'].drawn[0]
  first = jax.jit(jax.vmap(draw))(keys)
  share = np.bincount(np.asarray(first), minlength=4) / 2000
  np.testing.assert_allclose(share, np.array([8, 4, 2, 1]) / 15, atol=0.04)


def test_unit_vectors_after_retract():
  trained, frozen = start('sst')
  trained, _ = train(TX, trained, frozen, TX.init(trained), 2)
  np.testing.assert_allclose(jnp.square(trained['tall'].u).sum(1), 1.0, rtol=1e-5)
  trained, _ = start('lora')
  assert jax.tree.all(jax.tree.map(jnp.array_equal, low_rank.retract(trained), trained))


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('sst', jnp.float32),
    pytest.param('sst', jnp.bfloat16, marks=pytest.mark.slow),
    ('normed', jnp.float32),
  ],
)
def test_dot_is_the_dense_product(name, dtype):
  params = {'w': make_params()['tall'][0].astype(dtype)}
  trained, frozen = start(name, params, batch_axes=0)
  trained = jax.tree.map(lambda x: x - 0.05, trained)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), dtype)

  def loss(trained, x, product):
    out = product(x, low_rank.join(trained, frozen)['w'])
    assert (out.shape, out.dtype) == ((2, 3, 4), dtype)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))

  by_hand, dense = (
    jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(trained, x, product)
    for product in (low_rank.dot, lambda x, w: x @ w[...])
  )
  wide = lambda tree: jax.tree.map(lambda y: y.astype(jnp.float32), tree)
  tolerance = {'rtol': 1e-4, 'atol': 1e-5}
  if dtype == jnp.bfloat16:
    tolerance = {'rtol': 0.1, 'atol': 0.3}
  assert_equal(wide(by_hand), wide(dense), **tolerance)


def test_dot_knows_which_vectors_are_drawn_in_half_precision():
  """bfloat16 has no 257."""
  k, rank = 300, 1
  vectors, ones = jnp.eye(k), jnp.ones((k, rank))
  trained = {'w': low_rank.Spectrum(0 * ones, jnp.eye(k)[257], ones)}
  drawn, none = jnp.array([257]), jnp.array(0)
  frozen = low_rank.FrozenSpectrum(vectors, vectors, drawn, none, k, enhanced=True)
  w = low_rank.join(trained, {'w': frozen})['w']
  assert (low_rank.dot(jnp.ones(k, jnp.bfloat16), w) == 0).all()


@pytest.mark.slow
def test_dot_makes_no_dense_matrix():
  w = {'w': jnp.ones((300, 200))}
  x = jnp.ones((7, 300))
  for method in (low_rank.sst(5), low_rank.lora(5, column_norm=True)):
    trained, frozen = low_rank.init(w, jax.random.key(0), method)
    step = jax.jit(
      jax.grad(lambda t, f: low_rank.dot(x, low_rank.join(t, f)['w']).sum())
    )
    memory = step.lower(trained, frozen).compile().memory_analysis()
    dense = 300 * 200 * 4
    assert memory.temp_size_in_bytes < dense * 0.9, type(method)


MESHES = {'explicit': AxisType.Explicit, 'auto': AxisType.Auto}
SPECS = {
  'tall': P(None, 'fsdp', 'tensor'),
  'wide': P(None, None, 'tensor'),
  'bias': P('fsdp'),
}


def two_rounds(trained, frozen, state):
  for turn in range(2):
    trained, state = train_step(TX, trained, frozen, state)
    trained, frozen, state = renew(TX, trained, frozen, state, jax.random.key(turn))
  trained, state = train_step(TX, trained, frozen, state)
  return trained, frozen, state


@functools.cache
def unsharded(name):
  trained, frozen = start(name)
  return merge(*two_rounds(trained, frozen, TX.init(trained))[:2])


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'kind'), [('sst', 'explicit'), ('normed', 'auto')])
def test_sharded_is_unsharded(name, kind):
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(MESHES[kind],) * 2)
  expected = unsharded(name)
  with jax.set_mesh(mesh):
    params = jax.device_put(
      make_params(), {k: NamedSharding(mesh, s) for k, s in SPECS.items()}
    )
    trained, frozen = start(name, params)
    state = jax.jit(TX.init)(trained)
    types = jax.tree.map(jax.typeof, (trained, frozen, state))
    ended = two_rounds(trained, frozen, state)
    merged = merge(*ended[:2])
    if kind == 'explicit':
      same = jax.tree.map(lambda x, t: jax.typeof(x) == t, ended, types)
      assert jax.tree.all(same), same
      assert {k: jax.typeof(w).sharding.spec for k, w in merged.items()} == SPECS
  assert_equal(merged, expected, atol=2e-4)


@pytest.mark.slow
def test_checkpoint_in_mid_round(round_trip):
  name = 'sst'
  trained, frozen = start(name)
  trained, frozen, state = two_rounds(trained, frozen, TX.init(trained))
  saved = {'trained': trained, 'frozen': frozen, 'state': state}
  target = jax.eval_shape(lambda: dict(zip(saved, fresh(name), strict=True)))
  restored = round_trip(saved, target)
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  ended = [two_rounds(*(x[k] for k in saved)) for x in (saved, restored)]
  assert jax.tree.all(jax.tree.map(jnp.array_equal, *ended))


def fresh(name):
  trained, frozen = start(name)
  return trained, frozen, TX.init(trained)


@pytest.mark.slow
def test_checkpoint_of_another_configuration(tmp_path):
  """The matrices come back as they were, or there is an error."""
  with ocp.StandardCheckpointer() as checkpointer:
    for name in ('relora', 'normed'):
      trained, frozen = start(name)
      trained, _ = train(TX, trained, frozen, TX.init(trained), 2)
      checkpointer.save(tmp_path / name, {'trained': trained, 'frozen': frozen})
      if name == 'relora':
        expected = merge(trained, frozen)
    checkpointer.wait_until_finished()

    def restore(name, method):
      make = lambda p: low_rank.init(p, jax.random.key(1), method, batch_axes=1)
      parts = jax.eval_shape(make, make_params())
      target = dict(zip(('trained', 'frozen'), parts, strict=True))
      return checkpointer.restore(tmp_path / name, target)

    restored = restore('relora', low_rank.relora(2, scale=7.0))
    assert_equal(low_rank.merge(**restored), expected, atol=1e-6)
    for name, method in (
      ('relora', low_rank.sst(2)),
      ('relora', METHODS['normed']),
      ('normed', low_rank.relora(2)),
    ):
      with pytest.raises(ValueError, match='structure'):
        restore(name, method)


def test_parts_of_another_configuration_are_refused():
  params = make_params()
  trained, frozen = start('sst')
  other_rank, other_frozen = low_rank.init(
    params, jax.random.key(0), low_rank.sst(3), batch_axes=1
  )
  with pytest.raises(ValueError, match=r"part of 'tall' do not belong together.*rank"):
    low_rank.join(other_rank, frozen)
  with pytest.raises(ValueError, match="part of 'tall' do not belong together"):
    low_rank.merge(trained, start('lora')[1])
  for pair in (('lora', 'normed'), ('normed', 'lora')):
    with pytest.raises(ValueError, match="part of 'tall' do not belong together"):
      low_rank.join(start(pair[0])[0], start(pair[1])[1])
  with pytest.raises(ValueError, match='do not have one structure'):
    low_rank.join(trained, {'tall': other_frozen['tall']})
  with pytest.raises(ValueError, match="part of 'tall' do not belong together"):
    low_rank.join(params, frozen)


def test_renew_refuses_a_state_of_another_optimizer():
  trained, frozen = start('sst')
  key = jax.random.key(0)
  adam, wrapped = optax.adam(0.1), low_rank.renewable(optax.adam(0.1))
  with pytest.raises(TypeError, match=r'wrapped as low_rank.renewable'):
    low_rank.renew(adam, trained, frozen, adam.init(trained), key)
  sgd = low_rank.renewable(optax.sgd(0.1, momentum=0.9))
  with pytest.raises(ValueError, match='state is not that of tx'):
    low_rank.renew(wrapped, trained, frozen, sgd.init(trained), key)
  with pytest.raises(ValueError, match='key must be a random key, got None'):
    low_rank.renew(wrapped, trained, frozen, wrapped.init(trained), None)


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    ((None, low_rank.sst(2)), {}, 'key must be a random key, got None'),
    ((7, low_rank.sst(2)), {}, 'key must be a random key, got 7'),
    ((jax.random.key, low_rank.sst(5)), {}, "rank 5 for 'tall' of shape .3, 8, 4."),
    (
      (jax.random.key, low_rank.sst(2)),
      {'leaves': lambda name, leaf: True},
      "leaves chose 'bias', which is no real matrix",
    ),
    ((jax.random.key, low_rank.lora(2)), {'batch_axes': 2}, 'batch_axes must leave a'),
  ],
)
def test_bad_arguments(arguments, options, message):
  key, method = arguments
  key = key(0) if callable(key) else key
  with pytest.raises(ValueError, match=message):
    low_rank.init(make_params(), key, method, **{'batch_axes': 1, **options})


def test_bad_options():
  with pytest.raises(TypeError, match=r'method must be sst\(...\)'):
    low_rank.init(make_params(), jax.random.key(0), 4)
  for params, error, message in (
    ({'w': jnp.ones((8, 4)), 'activation': jnp.tanh}, TypeError, "for 'activation'"),
    (start('lora')[0], TypeError, 'params are split already'),
    ({}, ValueError, 'params must have a matrix, got {}'),
  ):
    with pytest.raises(error, match=message):
      low_rank.init(params, jax.random.key(0), METHODS['lora'])
  with pytest.raises(ValueError, match='rank must be a positive integer, got 0'):
    low_rank.init(make_params(), jax.random.key(0), low_rank.lora(0))
  with pytest.raises(ValueError, match='scale must be positive, got -1'):
    low_rank.lora(2, scale=-1)
  with pytest.raises(ValueError, match=r'steps must be at most every \(5\), got 6'):
    low_rank.rewarmed(1.0, 5, 6)
  with pytest.raises(ValueError, match='dot takes x'):
    low_rank.dot(jnp.ones((2, 8)), low_rank.join(*start('lora'))['tall'])


def test_state_is_small():
  """SST at 6 % of the width trains, and keeps state for, about an eighth."""
  params = {'w': jax.ShapeDtypeStruct((100, 100), jnp.float32)}
  trained, _ = jax.eval_shape(
    lambda p: low_rank.init(p, jax.random.key(0), low_rank.sst(0.06)), params
  )
  small = bsfa_optax.state.state_bytes(low_rank.renewable(optax.adam(0.1)), trained)
  assert small / bsfa_optax.state.state_bytes(optax.adam(0.1), params) < 0.131
