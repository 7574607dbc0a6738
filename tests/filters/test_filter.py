"""What filters promise whatever they learn: identities, state, composition."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src import test_utils
import pytest

import bsfa_optax
from bsfa_optax import (
  _learned,
  bsfa,
  dct,
  FilterState,
  kronecker,
  pca,
  scale_by_whitening,
)
from bsfa_optax.estimators import Decomposition, Estimator, layout
from bsfa_optax.state import block_names, state_bytes

pca = functools.partial(pca, storage_dtype=None)  # rows in full precision

# Compiling is most of the time, and the little there is to run needs no tuning.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

SHAPES = {'bias': (5,), 'conv': (2, 3, 4), 'kernel': (6, 5)}
BLOCKS = ['conv', 'kernel']
ESTIMATORS = {
  'gram': pca(3, 4, solver='gram'),
  'randomized': pca(3, 4, solver='randomized'),
  'kronecker': kronecker(refresh_every=4),
  'dct': dct(2),
}
FILTERS = [*ESTIMATORS, 'whitening']
STEPS = 9  # two refreshes and one update more
ROUNDING = 2e-5  # of float32 sums of this size, relative to the update

QUICK = ('kronecker', 'whitening')  # to compile


def over(names, quick=QUICK):
  """A test of each of `names`; the fast tier has those that compile quickly."""
  marks = lambda name: [] if name in quick else [pytest.mark.slow]
  return pytest.mark.parametrize(
    'name', [pytest.param(name, marks=marks(name)) for name in names]
  )


every_estimator = over(ESTIMATORS)
every_filter = over(FILTERS)
# Of what is the skeleton's: a filter that learns parts, and one that learns rows.
default_first = over(['whitening', 'gram'], ['whitening'])
# The projector of `dct` is that of the update it is applied to, whatever came before:
# f(C) v is not linear in v.
every_learner = over(name for name in ESTIMATORS if name != 'dct')


@functools.cache
def make_updates(steps=STEPS, dtype='float32', seed=0):
  """Updates with three strong directions in each leaf: a gap behind the rank."""
  rng = np.random.default_rng(seed)

  def leaf(shape):
    directions = rng.normal(size=(3, *shape))
    weights = rng.normal(size=(steps, 3)) * [5.0, 4.0, 3.0]
    return np.tensordot(weights, directions, 1) + rng.normal(size=(steps, *shape))

  rows = {name: leaf(shape) for name, shape in SHAPES.items()}
  return [
    {name: jnp.asarray(row[i], dtype) for name, row in rows.items()}
    for i in range(steps)
  ]


@functools.cache
def make_filter(name):
  """A graded filter of each kind."""
  if name == 'whitening':
    return scale_by_whitening(refresh_every=4)
  return bsfa(0.1, 4.0, exponent=0.5, estimator=ESTIMATORS[name])


@functools.cache
def update_fn(name):
  """One compilation for all tests that need a step."""
  return jit(make_filter(name).update)


def train(update, state, updates):
  filtered = []
  for u in updates:
    out, state = update(u, state)
    filtered.append(out)
  return filtered, state


@functools.cache
def warm_state(name, dtype='float32'):
  updates = make_updates(dtype=dtype)
  state = make_filter(name).init(updates[0])
  return train(update_fn(name), state, updates)[1]


@functools.cache
def apply_fn(name):
  """f(C) v with one number for the dominant directions and one for the rest."""
  estimator = ESTIMATORS[name]

  def run(on_dominant, on_rest, updates, state):
    def f(variance, dominant):
      on = [jnp.asarray(x, variance.dtype) for x in (on_dominant, on_rest)]
      return jnp.where(dominant, *on)

    parts = estimator.layout(updates)
    vector = parts.select(updates)
    found = estimator.decompose(parts, vector, state.memory)
    filtered = parts.replace(updates, _learned.filtered(f, parts, vector, found))
    return filtered, _learned.dominant_fraction(parts, vector, found)

  return jit(run)


def add(a, b):
  return jax.tree.map(jnp.add, a, b)


def scale(c, tree):
  return jax.tree.map(lambda x: x * jnp.asarray(c, x.dtype), tree)


def measured(state):
  """The one number a block that a filter measures."""
  (value,) = state.measured.values()
  return value


def norms(tree):
  return np.array([np.linalg.norm(tree[name]) for name in BLOCKS])


def assert_close(actual, desired, tol=ROUNDING):
  """Leaf by leaf, relative to the norm of the leaf."""

  def close(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tol * np.linalg.norm(b)

  chex.assert_trees_all_equal_shapes_and_dtypes(actual, desired)
  jax.tree.map(close, actual, desired)


# Identities of the projector P and of f(C).


@every_learner
def test_projector_is_idempotent_and_symmetric(name):
  project = functools.partial(apply_fn(name), 1.0, 0.0)
  state = warm_state(name)
  v, w = make_updates(2, seed=1)
  (pv, fraction), (pw, _) = project(v, state), project(w, state)
  assert_close(
    {k: project(pv, state)[0][k] for k in BLOCKS}, {k: pv[k] for k in BLOCKS}
  )
  for k in BLOCKS:
    left, right = np.vdot(pv[k], w[k]), np.vdot(v[k], pw[k])
    assert abs(left - right) <= ROUNDING * np.linalg.norm(v[k]) * np.linalg.norm(w[k])
  assert 0.05 < fraction.min() < fraction.max() < 1  # a projector on something
  np.testing.assert_allclose(fraction, norms(pv) / norms(v), rtol=ROUNDING)
  chex.assert_trees_all_equal(pv['bias'], v['bias'])  # in no block


@every_learner
def test_linearity(name):
  run = functools.partial(apply_fn(name), 0.3, 2.0)
  state = warm_state(name)
  v, w = make_updates(2, seed=2)
  actual = run(add(scale(0.7, v), scale(-1.9, w)), state)[0]
  desired = add(scale(0.7, run(v, state)[0]), scale(-1.9, run(w, state)[0]))
  assert_close(actual, desired)


@every_estimator
def test_dominant_and_bulk_part_add_up(name):
  state = warm_state(name)
  (v,) = make_updates(1, seed=3)
  dominant, bulk = (apply_fn(name)(*f, v, state)[0] for f in ((1.0, 0.0), (0.0, 1.0)))
  total = add(dominant, bulk) | {'bias': v['bias']}
  assert_close(total, v)
  for k in BLOCKS:  # and are orthogonal
    size = np.linalg.norm(v[k]) ** 2
    assert abs(np.vdot(dominant[k], bulk[k])) <= ROUNDING * size
  filtered = apply_fn(name)(0.3, 2.0, v, state)[0]
  parts = add(scale(0.3, dominant), scale(2.0, bulk)) | {'bias': v['bias']}
  assert_close(filtered, parts)


@every_estimator
def test_equal_alpha_and_gamma_scale(name):
  (v,) = make_updates(1, seed=4)
  scaled = apply_fn(name)(1.7, 1.7, v, warm_state(name))[0]
  chex.assert_trees_all_equal(scaled, scale(1.7, v) | {'bias': v['bias']})


SLOW = pytest.mark.slow
ONES = [(name, 'float32') for name in ('kronecker', 'gram', 'dct')]
ONES += [('kronecker', 'bfloat16'), ('randomized', 'float64')]


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    pytest.param(name, dtype, marks=[] if (name, dtype) == ONES[0] else [SLOW])
    for name, dtype in ONES
  ],
)
def test_ones_are_the_identity_to_the_last_bit(name, dtype):
  kinds = [(None, False), (0.5, True)]

  def run(updates, state):
    txs = [
      bsfa(1.0, 1.0, exponent=p, grafting=n, estimator=ESTIMATORS[name])
      for p, n in kinds
    ]
    return [tx.update(updates, state)[0] for tx in txs]

  with jax.enable_x64(dtype == 'float64'):
    (v,) = make_updates(1, dtype, seed=5)
    state = warm_state(name, dtype)
    changed = update_fn(name)(v, state)[0]
    assert all((changed[k] != v[k]).mean() > 0.9 for k in BLOCKS)
    for u in (v, scale(2.0**-90, v)):  # of the second the squares underflow
      for same in jit(run)(u, state):
        chex.assert_trees_all_equal_shapes_and_dtypes(same, v)
        chex.assert_trees_all_equal(same, u)


@every_estimator
def test_grafting_keeps_the_norm_of_each_block(name):
  def run(updates, state):
    plain, keep = (
      bsfa(0.3, 2.0, grafting=norm, estimator=ESTIMATORS[name])
      for norm in (False, True)
    )
    return plain.update(updates, state)[0], keep.update(updates, state)[0]

  (v,) = make_updates(1, seed=6)
  plain, kept = jit(run)(v, warm_state(name))
  assert np.all(np.abs(norms(plain) / norms(v) - 1) > 0.01)
  np.testing.assert_allclose(norms(kept), norms(v), rtol=ROUNDING)
  ratio = norms(kept) / norms(plain)
  desired = {k: r * plain[k] for k, r in zip(BLOCKS, ratio, strict=True)}
  assert_close({k: kept[k] for k in BLOCKS}, scale(1, desired))


def test_steep_graded_filter_is_the_two_level_one():
  def run(updates, state):
    steep, two_level = (
      bsfa(0.3, 2.0, exponent=p, estimator=ESTIMATORS['kronecker']) for p in (1e5, None)
    )
    return steep.update(updates, state)[0], two_level.update(updates, state)[0]

  (v,) = make_updates(1, seed=7)
  steep, two_level = jit(run)(v, warm_state('kronecker'))
  assert_close(steep, two_level)


def test_whitening_keeps_the_norm_of_each_block():
  (v,) = make_updates(1, seed=6)
  out, _ = update_fn('whitening')(v, warm_state('whitening'))
  np.testing.assert_allclose(norms(out), norms(v), rtol=ROUNDING)
  assert all(np.linalg.norm(out[k] - v[k]) > 0.1 * np.linalg.norm(v[k]) for k in BLOCKS)
  chex.assert_trees_all_equal(out['bias'], v['bias'])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['grafting', 'whitening'])
def test_large_float16_updates_stay_finite(kind):
  # Their squares, and their norm, are beyond float16.
  tx = {
    'grafting': bsfa(0.3, 2.0, grafting=True, estimator=kronecker(refresh_every=1)),
    'whitening': scale_by_whitening(refresh_every=1),
  }[kind]
  rng = np.random.default_rng(10)
  rows = [
    {'kernel': jnp.asarray(3e4 * np.diag(rng.uniform(0.5, 1, 8)), jnp.float16)}
    for _ in range(3)
  ]
  filtered, state = train(jit(tx.update), tx.init(rows[0]), rows)
  assert state.skipped_updates == 0
  for out, v in zip(filtered, rows, strict=True):
    chex.assert_tree_all_finite(out)
    assert out['kernel'].dtype == jnp.float16
    size = lambda x: np.linalg.norm(np.float64(x['kernel']))
    np.testing.assert_allclose(size(out), size(v), rtol=1e-3)
  chex.assert_tree_all_finite(state)
  assert np.abs(np.float64(filtered[-1]['kernel'] - rows[-1]['kernel'])).max() > 1e3


@every_filter
def test_scale_of_updates_does_not_matter(name):
  updates = make_updates()
  tx = make_filter(name)
  desired = train(update_fn(name), tx.init(updates[0]), updates)
  for power in (-40, 40):
    state = tx.init(updates[0])
    actual = train(update_fn(name), state, [scale(2.0**power, u) for u in updates])
    assert_close([scale(2.0**-power, u) for u in actual[0]], desired[0], 1e-4)


@every_learner
def test_zero_history_is_the_identity(name):
  v, *updates = make_updates()
  state = bsfa(estimator=ESTIMATORS[name]).init(v)
  state = train(update_fn(name), state, [scale(0, u) for u in updates])[1]
  filtered, state = update_fn(name)(v, state)
  chex.assert_trees_all_equal(filtered, v)
  chex.assert_tree_all_finite(state)
  assert not measured(state).any()


def test_zero_history_is_the_identity_for_the_whitening():
  v, *updates = make_updates()
  tx, update = make_filter('whitening'), update_fn('whitening')
  state = train(update, tx.init(v), [scale(0, u) for u in updates])[1]
  filtered, state = update(v, state)
  assert_close(filtered, v)
  chex.assert_tree_all_finite(state)
  assert not measured(state).any()


# alpha and gamma.


def mirror(seen=None, variance=1.0):
  """An estimator with a direction for each entry, which notes what it sees.

  Its memory counts what it learns from; a direction is dominant from variance 1 on.
  """

  def learn(parts, vector, memory, count, params, **extra_args):
    if seen is not None:
      seen.append((vector, params, extra_args))
    return memory + 1

  def decompose(parts, vector, memory):
    variances = [jnp.broadcast_to(jnp.float32(variance), v.shape) for v in vector]
    known = jnp.ones((parts.count,), bool)
    return Decomposition(
      vector,
      variances,
      [x >= 1 for x in variances],
      known.astype(jnp.float32),
      known,
      spread=lambda values: [jnp.broadcast_to(values[0], v.shape) for v in vector],
      collect=lambda arrays: jnp.stack([x.sum() for x in arrays]),
      synthesize=lambda arrays: arrays,
    )

  return Estimator(
    layout, lambda parts, params: jnp.zeros((), jnp.int32), learn, decompose
  )


def forms_of(alpha, gamma, exponent):
  """The same filter with its numbers given in every way."""
  make = functools.partial(bsfa, estimator=ESTIMATORS['gram'])
  constant = optax.constant_schedule
  return {
    'float': make(alpha, gamma, exponent=exponent),
    'array': make(np.float32(alpha), jnp.asarray(gamma), exponent=np.array(exponent)),
    'schedule': make(
      constant(alpha),
      lambda step: gamma + 0.0 * step.astype(float),
      exponent=constant(exponent),
    ),
    'inject': optax.inject_hyperparams(make)(
      constant(alpha), gamma, exponent=constant(exponent)
    ),
  }


NUMBERS = (0.2, 3.0, 0.4)


@functools.cache
def run_with_floats():
  tx, updates = forms_of(*NUMBERS)['float'], make_updates()
  return train(jit(tx.update), tx.init(updates[0]), updates)


@pytest.mark.slow
@pytest.mark.parametrize('form', [*forms_of(1, 1, 1), 'jit_argument'][1:])
def test_every_form_of_alpha_and_gamma_gives_the_same_run(form):
  updates = make_updates()
  if form == 'jit_argument':

    def step(numbers, u, state):
      alpha, gamma, exponent = numbers
      tx = bsfa(alpha, gamma, exponent=exponent, estimator=ESTIMATORS['gram'])
      return tx.update(u, state)

    update = functools.partial(jit(step), NUMBERS)
    init = forms_of(*NUMBERS)['float'].init
  else:
    tx = forms_of(*NUMBERS)[form]
    update, init = jit(tx.update), tx.init
  actual, state = train(update, init(updates[0]), updates)
  desired, desired_state = run_with_floats()
  assert_close(actual, desired)
  for field in ('variance', 'dominant_fraction'):
    assert_close(*(optax.tree.get(s, field) for s in (state, desired_state)))


def test_schedules_are_evaluated_at_the_finite_updates_before():
  tx = bsfa(
    lambda step: 1.0 + step.astype(float), 99.0, exponent=None, estimator=mirror()
  )
  good, bad = jnp.ones((2, 2)), jnp.full((2, 2), jnp.nan)
  filtered, state = train(jit(tx.update), tx.init(good), [good, good, bad, good])
  assert [float(u[0, 0]) for u in filtered if jnp.isfinite(u).all()] == [1, 2, 3]
  assert state.filter_count == state.memory == 3
  assert state.skipped_updates == 1


@pytest.mark.slow
def test_graded_filter_clips_the_power_of_the_variance():
  variance = np.array([[0.0, 1e-6, 0.25], [1.0, 4.0, 1e6]])
  ones = jnp.ones((2, 3))

  def run(exponent):
    probe = mirror(variance=variance)
    tx = bsfa(0.1, 3.0, exponent=exponent, estimator=probe)
    return tx.update(ones, tx.init(ones))[0]

  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  close(run(0.5), [[3, 3, 2], [1, 0.5, 0.1]])
  close(run(0.0), ones)
  close(run(None), [[3, 3, 3], [0.1, 0.1, 0.1]])


def test_estimator_sees_updates_params_and_extra_arguments():
  seen = []
  tx = optax.chain(optax.scale(2.0), bsfa(estimator=mirror(seen)))
  v = jnp.ones((2, 2))
  tx.update(v, tx.init(v), jnp.ones((3, 3)), value=4.0)
  # Called once, to trace the branch, so that shapes must tell which is which.
  ((vector, params, extra_args),) = seen
  assert ([x.shape for x in vector], params.shape) == ([(2, 2)], (3, 3))
  assert extra_args == {'value': 4.0}


# The state.


@pytest.mark.parametrize('leaf', BLOCKS)
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 1e30], ids=str)
@every_filter
def test_non_finite_update_passes_and_leaves_no_trace(name, value, leaf):
  (v,) = make_updates(1, seed=8)
  bad = v | {leaf: v[leaf].at[(0,) * v[leaf].ndim].set(value)}
  state = warm_state(name)  # three updates before the next refresh
  filtered, after = update_fn(name)(bad, state)
  chex.assert_trees_all_equal(filtered, bad)
  assert after.skipped_updates == state.skipped_updates + 1
  untouched = after._replace(skipped_updates=state.skipped_updates)
  chex.assert_trees_all_equal(untouched, state)
  assert any((update_fn(name)(v, after)[0][k] != v[k]).any() for k in BLOCKS)


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e30], ids=str)
@every_filter
def test_non_finite_leaf_in_no_block_does_not_matter(name, value):
  (v,) = make_updates(1, seed=8)
  bad = v | {'bias': v['bias'].at[0].set(value)}
  desired, desired_state = update_fn(name)(v, warm_state(name))
  filtered, state = update_fn(name)(bad, warm_state(name))
  chex.assert_trees_all_equal(filtered, desired | {'bias': bad['bias']})
  chex.assert_trees_all_equal(state, desired_state)
  assert state.skipped_updates == 0


@default_first
def test_history_that_is_not_finite_is_not_learnt_from(name):
  (v,) = make_updates(1, seed=8)
  state = warm_state(name)
  filtered, after = update_fn(name)(v, state, history=scale(np.nan, v))
  chex.assert_trees_all_equal(filtered, v)
  assert after.skipped_updates == state.skipped_updates + 1
  chex.assert_trees_all_equal(after.memory, state.memory)


@every_filter
def test_count_goes_on_at_the_end_of_int32(name):
  end = np.iinfo(np.int32).max
  updates = make_updates(6, seed=11)
  state = warm_state(name)._replace(filter_count=jnp.int32(end - 1))
  counts, memories = [], [state.memory]
  for u in updates:
    filtered, state = update_fn(name)(u, state)
    counts.append(int(state.filter_count))
    memories.append(state.memory)
    chex.assert_tree_all_finite(filtered)
  assert counts[0] == end
  assert all(2**30 <= b <= 2**30 + 5 for b in counts[1:])
  assert counts[1:] == sorted(set(counts[1:]))
  assert state.skipped_updates == 0
  if name != 'dct':  # which remembers nothing
    late = zip(*map(jax.tree.leaves, memories[-5:]), strict=True)
    assert any((x[0] != x[-1]).any() for x in late)  # it goes on learning


@every_filter
def test_types_of_state_are_those_of_init(name):
  tx = make_filter(name)
  (v,) = make_updates(1)
  state = tx.init(v)
  types = jax.tree.map(jax.typeof, state)
  assert not any(t.weak_type for t in jax.tree.leaves(types))
  assert jax.tree.map(jax.typeof, warm_state(name)) == types

  def body(state, due):  # both raise where types differ
    skip = lambda u, s: (u, s)
    return jax.lax.cond(due, tx.update, skip, v, state)[::-1]

  final, _ = jax.eval_shape(lambda s: jax.lax.scan(body, s, jnp.ones(3, bool)), state)
  chex.assert_trees_all_equal_shapes_and_dtypes(final, state)


@over(['whitening'])
def test_scan_is_the_loop(name):
  updates, tx = make_updates(), make_filter(name)
  state = tx.init(updates[0])
  stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *updates)
  scan = jit(lambda s, us: jax.lax.scan(lambda s, u: tx.update(u, s)[::-1], s, us))
  final, filtered = scan(state, stacked)
  desired, desired_state = train(update_fn(name), state, updates)
  assert_close(filtered, jax.tree.map(lambda *rows: jnp.stack(rows), *desired))
  assert_close(measured(final), measured(desired_state))


@pytest.mark.parametrize(
  ('name', 'eager'),
  [
    ('whitening', False),
    pytest.param('gram', False, marks=SLOW),
    pytest.param('whitening', True, marks=SLOW),
    pytest.param('kronecker', True, marks=SLOW),
  ],
)
def test_later_calls_compile_nothing(name, eager):
  falling = lambda step: 1.0 / (1 + step.astype(float))
  tx = (
    scale_by_whitening(falling, refresh_every=4)
    if name == 'whitening'
    else bsfa(falling, estimator=ESTIMATORS[name])
  )
  tx = optax.chain(optax.scale(-1.0), tx)
  updates = make_updates()
  update = tx.update if eager else jit(tx.update)
  before = 5 if eager else 1  # up to the first step behind a refresh
  state = train(update, tx.init(updates[0]), updates[:before])[1]
  with test_utils.log_compilations() as compilations:
    train(update, state, updates[before:])
  assert not [log.getMessage() for log in compilations]


FIELDS = {
  'pca': {
    'basis',
    'history',
    'squared_norms',
    'variance',
    'total_variance',
    'is_complete',
  },
  'hessian': {'basis', 'curvature', 'is_known'},
}


@pytest.mark.parametrize('name', [*FILTERS, 'hessian'])
def test_every_field_is_found_beside_adamw(name):
  fields = {'filter_count', 'skipped_updates', 'measured', 'memory'}
  assert fields == {*FilterState._fields}
  fields.add('effective_directions' if name == 'whitening' else 'dominant_fraction')
  fields |= FIELDS.get('pca' if name in ('gram', 'randomized') else name, set())
  hessian = bsfa(estimator=bsfa_optax.hessian_lanczos(2))
  tx = optax.chain(
    optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)),
    hessian if name == 'hessian' else make_filter(name),
  )
  state = tx.init(make_updates()[0])
  own = getattr(state[1].memory, '_fields', ())
  assert fields >= {*own}
  for field in fields:  # raises where there are two
    found = optax.tree.get(state, field)
    assert jax.tree.leaves(found) or (name, field) == ('dct', 'memory')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@every_filter
def test_state_bytes_are_those_of_the_arrays(name, dtype):
  tx = optax.chain(make_filter(name), optax.adamw(1e-3))
  params = make_updates(1, dtype)[0]
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  nbytes = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
  assert state_bytes(tx, abstract) == nbytes
  assert nbytes > sum(x.nbytes for x in jax.tree.leaves(params))


# States of others.


FOREIGN = {
  'bsfa': lambda: bsfa(),
  'whitening': lambda: scale_by_whitening(),
  'split': lambda: bsfa_optax.split_by_subspace(
    kronecker(), optax.identity(), optax.identity()
  ),
  'accelerate': lambda: bsfa_optax.accelerate(
    optax.identity(), history=optax.identity()
  ),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_state_of_another_transformation(name):
  v, tx = jnp.ones((2, 2)), FOREIGN[name]()
  own = type(tx.init(v)).__name__
  for other in (optax.scale_by_adam(), optax.chain(tx)):
    state = other.init(v)
    with pytest.raises(TypeError, match=f'state must be an? {own}, got') as error:
      tx.update(v, state, v)
    assert f'got {type(state).__name__};' in str(error.value)
    assert 'use the state that init' in str(error.value)


def test_state_of_another_transformation_in_a_chain():
  v, tx = jnp.ones((2, 2)), bsfa_optax.interpolated(optax.identity(), 0.0, 1.0)
  base, state = tx.init(v)
  with pytest.raises(TypeError, match='an InterpolatedState, got FilterState'):
    tx.update(v, (base, state.filter_state), v)


@pytest.mark.slow
def test_average_of_interpolated_does_not_move_on_a_bad_step():
  tx = bsfa_optax.interpolated(
    optax.identity(), 0.0, 1.0, estimator=kronecker(refresh_every=1), threshold=0.5
  )
  updates, update = make_updates(4), jit(tx.update)
  _, state = train(update, tx.init(updates[0]), updates[:3])
  average = optax.tree.get(state, 'average_fraction')
  assert (average > 0).all()
  assert not optax.tree.get(state, 'switched_on').any()
  bad = updates[3] | {'kernel': scale(np.nan, updates[3]['kernel'])}
  filtered, after = train(update, state, [bad] * 20)
  chex.assert_trees_all_equal(filtered[-1], bad)
  chex.assert_trees_all_equal(optax.tree.get(after, 'average_fraction'), average)
  assert not optax.tree.get(after, 'switched_on').any()
  assert optax.tree.get(after, 'skipped_updates') == 20
  _, moved = train(update, state, updates[3:])
  assert (optax.tree.get(moved, 'average_fraction') > average).all()


# Beside and inside Optax's other transformations.


@default_first
def test_donated_buffers(name):
  tx = optax.chain(optax.adamw(1e-3), make_filter(name))

  @functools.partial(jit, donate_argnums=(0, 1))
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  grads = make_updates()[0]
  params = scale(1, grads)
  state = tx.init(params)
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
  assert len(set(pointers)) == len(pointers)
  for _ in range(2):
    old, (params, state) = (params, state), step(params, state, grads)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
  chex.assert_tree_all_finite((params, state))


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')  # for MultiSteps
def test_multi_steps_learns_once_an_emitted_step():
  tx = make_filter('gram')
  multi = optax.MultiSteps(tx, every_k_schedule=2)
  updates = make_updates(8)
  filtered, state = train(jit(multi.update), multi.init(updates[0]), updates)
  means = [scale(0.5, add(*updates[i : i + 2])) for i in range(0, 8, 2)]
  desired, desired_state = train(update_fn('gram'), tx.init(updates[0]), means)
  assert optax.tree.get(state, 'filter_count') == 4
  assert_close(filtered[1::2], desired)
  assert_close(
    state.inner_opt_state.memory.history['kernel'].rows,
    desired_state.memory.history['kernel'].rows,
  )
  assert not any(x.any() for u in filtered[::2] for x in jax.tree.leaves(u))


@default_first
def test_leaves_left_out_pass_unchanged(name):
  tx = make_filter(name)
  updates = make_updates()
  only = [{'kernel': u['kernel']} for u in updates]
  with_none = [{'conv': None, 'kernel': u['kernel'], 'x': {}} for u in updates]
  labels = {k: 'bsfa' if k == 'kernel' else 'rest' for k in SHAPES}
  mask = {k: k == 'kernel' for k in SHAPES}
  wrapped = {
    'masked': (optax.masked(tx, mask), updates),
    'partition': (
      optax.partition({'bsfa': tx, 'rest': optax.identity()}, labels),
      updates,
    ),
    'none': (tx, with_none),
  }
  runs = {'alone': (tx, only)} | wrapped
  # One compilation for all runs.
  txs, trees = ({k: run[i] for k, run in runs.items()} for i in (0, 1))

  @jit
  def step(updates, states):
    out = {k: txs[k].update(updates[k], states[k]) for k in txs}
    return {k: x[0] for k, x in out.items()}, {k: x[1] for k, x in out.items()}

  steps = [{k: trees[k][i] for k in txs} for i in range(STEPS)]
  filtered, _ = train(step, {k: txs[k].init(trees[k][0]) for k in txs}, steps)
  for i, out in enumerate(filtered):
    for k in wrapped:
      assert_close(out[k]['kernel'], out['alone']['kernel'])
      assert jax.tree.structure(out[k]) == jax.tree.structure(trees[k][i])
    for k in ('masked', 'partition'):
      for leaf in ('bias', 'conv'):
        chex.assert_trees_all_equal(out[k][leaf], updates[i][leaf])
  assert (filtered[-1]['alone']['kernel'] != only[-1]['kernel']).all()


@pytest.mark.parametrize(
  'params', [{}, None, (), {'a': jnp.ones(3), 'b': jnp.ones(())}], ids=str
)
@every_filter
def test_trees_without_a_block(name, params):
  tx = make_filter(name)
  filtered, state = train(jit(tx.update), tx.init(params), [params] * 5)
  for out in filtered:
    chex.assert_trees_all_equal(out, params)
  assert measured(state).shape == (1,)  # Orbax saves no empty arrays
  assert state.filter_count == 5
  assert block_names(tx, params) == []


@pytest.mark.slow
def test_apply_if_finite_around_the_filter():
  tx = optax.apply_if_finite(make_filter('gram'), 3)
  updates = make_updates()
  bad = scale(np.nan, updates[0])
  update = jit(tx.update)
  filtered, state = train(
    update, tx.init(updates[0]), [*updates[:6], bad, *updates[6:]]
  )
  desired, desired_state = train(
    update_fn('gram'), make_filter('gram').init(updates[0]), updates
  )
  assert not any(x.any() for x in jax.tree.leaves(filtered.pop(6)))
  assert state.total_notfinite == 1
  assert_close(filtered, desired)
  counts = optax.tree.get(state, 'filter_count'), desired_state.filter_count
  assert counts == (STEPS, STEPS)
  assert optax.tree.get(state, 'skipped_updates') == 0  # it was not asked


@pytest.mark.parametrize('name', ['kronecker', pytest.param('gram', marks=SLOW)])
def test_dominant_fraction_is_that_of_the_update(name):
  (v,) = make_updates(1, seed=9)
  state = warm_state(name)
  pv, _ = apply_fn(name)(1.0, 0.0, v, state)
  _, state = update_fn(name)(v, state)
  found = optax.tree.get(state, 'dominant_fraction')
  np.testing.assert_allclose(found, norms(pv) / norms(v), rtol=ROUNDING)
  assert block_names(make_filter(name), v) == BLOCKS
