"""`scale_by_whitening` against a dense reference, its program and its cost."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bsfa_optax
from bsfa_optax import scale_by_whitening
from bsfa_optax.state import state_bytes
from bsfa_optax.whitening import INNER, OUTER


def polynomial(x):
  """The polynomial of the roots."""
  (g, h), (c, d) = INNER, OUTER
  t = 2 * x - 1
  m = t**2 * (t**2 + g * t + h)
  return np.polyval(c[::-1], t) + d[0] * m + m * (d[1] * t + d[2] * t**2 + d[3] * m)


def root_of(side, ridge=0.2, blocks=1):
  """What the polynomial makes of the diagonal blocks of a covariance, float64."""
  size = -(-len(side) // blocks)
  out = np.zeros_like(side)
  for start in range(0, len(side), size):
    own = np.s_[start : start + size]
    block = side[own, own] / (np.trace(side) / len(side))
    values, vectors = np.linalg.eigh(block + ridge * np.eye(len(block)))
    filled = np.append(values, [ridge] * (size - len(block)))
    bound = np.sqrt(np.linalg.norm(filled**2))
    roots = polynomial(values / bound) / np.sqrt(bound)
    out[own, own] = (vectors * roots) @ vectors.T
  return out


def reference(updates, *, ridge=0.2, decay=0.9, blocks=(1, 1)):
  """The last of the updates, whitened; a refresh at each, float64."""
  left = right = 0.0
  for u in updates:
    v = np.asarray(u, np.float64)
    size = (v**2).sum()
    left = decay * left + (1 - decay) * v @ v.T / size
    right = decay * right + (1 - decay) * v.T @ v / size
  out = root_of(left, ridge, blocks[0]) @ v @ root_of(right, ridge, blocks[1])
  return out * np.linalg.norm(v) / np.linalg.norm(out)


def updates_of(shape, count, seed=0):
  """Updates of which a few directions hold most."""
  rng = np.random.default_rng(seed)
  weights = np.ones(shape)
  for axis, n in enumerate(shape):
    ones = [1] * len(shape)
    ones[axis] = n
    weights = weights * (np.arange(1, n + 1) ** -0.5).reshape(ones)
  return [
    jnp.asarray(weights * rng.normal(size=shape), jnp.float32) for _ in range(count)
  ]


# One object for the same options, and so one compilation for the same shapes.
whitening = functools.cache(scale_by_whitening)


def run(tx, updates):
  state, update = tx.init(updates[0]), jax.jit(tx.update)
  for u in updates:
    out, state = update(u, state)
  return out, state


def assert_close(found, expected, tolerance=1e-3):
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
  assert difference < tolerance, difference


EVERY = {'refresh_every': 1}


@pytest.mark.parametrize('shape', [(6, 10), (12, 3), (2, 2)])
def test_equals_the_dense_formula(shape):
  updates = updates_of(shape, 4)
  out, _ = run(whitening(**EVERY), updates)
  assert_close(out, reference(updates))
  np.testing.assert_allclose(
    jnp.linalg.norm(out), jnp.linalg.norm(updates[-1]), rtol=1e-5
  )


@pytest.mark.parametrize('length', [12, 11])  # 11 does not divide into blocks of 4
def test_long_sides_in_diagonal_blocks(length):
  updates = updates_of((4, length), 4)
  out, state = run(whitening(block_size=4, **EVERY), updates)
  assert_close(out, reference(updates, blocks=(1, 3)))
  assert state.memory[0].packed[1].shape == (1, 3, 4, 5)


def test_blocks_are_no_longer_than_the_other_side():
  # Else a side just over the limit would cost more than one within it.
  state = scale_by_whitening(block_size=8).init(jnp.ones((4, 9)))
  assert state.memory[0].packed[1].shape == (1, 3, 3, 4)


@pytest.mark.slow
def test_layers_and_experts_are_whitened_each_on_its_own():
  stacked = updates_of((3, 5, 7), 3)
  out, _ = run(whitening(batch_axes=0, **EVERY), stacked)
  last = updates_of((5, 3, 7), 3)
  middle, _ = run(whitening(batch_axes=1, **EVERY), last)
  for i in range(3):
    assert_close(out[i], reference([u[i] for u in stacked]))
    assert_close(middle[:, i], reference([u[:, i] for u in last]))


@pytest.mark.slow
def test_layers_alike_are_one_part_and_equal_to_single_ones():
  layers = [updates_of((5, 7), 3, seed) for seed in range(3)]
  trees = [{'layers': [{'w': x} for x in step]} for step in zip(*layers, strict=True)]
  out, state = run(whitening(**EVERY), trees)
  assert len(state.memory) == 1
  for layer, found in zip(layers, out['layers'], strict=True):
    single, _ = run(whitening(**EVERY), layer)
    np.testing.assert_allclose(found['w'], single, atol=1e-6)


def test_convolutions_share_covariances_over_their_window():
  updates = updates_of((2, 2, 6, 5), 2)
  out, state = run(whitening(**EVERY), updates)
  assert [x.shape for x in state.memory[0].packed] == [(1, 1, 6, 7), (1, 1, 5, 6)]
  left = right = 0.0
  for u in updates:
    v = np.asarray(u, np.float64)
    size = (v**2).sum()
    left = 0.9 * left + 0.1 * np.einsum('hwio,hwjo->ij', v, v) / size
    right = 0.9 * right + 0.1 * np.einsum('hwio,hwip->op', v, v) / size
  roots = root_of(left), root_of(right)
  expected = np.einsum('hwio,ij,op->hwjp', v, *roots)
  assert_close(out, expected * np.linalg.norm(v) / np.linalg.norm(expected))


def test_effective_directions_count_those_that_carry_the_updates():
  tx = whitening(**EVERY)
  rank_one = {'a': jnp.outer(jnp.arange(1.0, 5), jnp.ones(3))}
  _, state = run(tx, [rank_one])
  np.testing.assert_allclose(optax.tree.get(state, 'effective_directions'), [1], 1e-5)
  _, state = run(tx, [{'a': jnp.eye(4)}])
  np.testing.assert_allclose(optax.tree.get(state, 'effective_directions'), [16], 1e-5)


def test_between_refreshes_the_roots_stay():
  tx = scale_by_whitening(refresh_every=3)
  updates = updates_of((4, 5), 3)
  first, state = run(tx, updates[:2])
  np.testing.assert_allclose(first, updates[1], rtol=1e-6)  # nothing is known yet
  _, later = run(tx, updates)
  before, after = state.memory[0].packed[0], later.memory[0].packed[0]
  assert not jnp.array_equal(before, after)


def test_leaves_take_turns_within_an_interval():
  sizes = [(4, 9), (4, 9), (9, 4), (4, 4), (4, 5), (4, 6)]
  shapes = dict(zip('abcdef', sizes, strict=True))
  ones = {name: jnp.ones(shape) for name, shape in shapes.items()}
  tx = scale_by_whitening(refresh_every=5)

  def step(state, _):
    state = tx.update(ones, state)[1]
    return state, [jnp.trace(x.packed[0][0, 0]) for x in state.memory]

  _, traces = jax.lax.scan(step, tx.init(ones), length=10)
  refreshed = np.diff(np.stack(traces), axis=1, prepend=0) > 0
  np.testing.assert_array_equal(refreshed.sum(1), 2)  # each leaf in each interval
  np.testing.assert_array_equal(refreshed[:, :5], refreshed[:, 5:])
  in_step = refreshed[:, :5].sum(0)
  assert in_step.max() == 2
  # The longest have a step of their own.
  assert all(in_step[refreshed[i, :5].argmax()] == 1 for i in range(3))


def test_a_large_ridge_is_the_identity():
  updates = updates_of((4, 6), 3)
  out, _ = run(whitening(1e6, **EVERY), updates)
  assert_close(out, updates[-1], 1e-3)


@pytest.mark.slow
def test_ridge_may_be_a_schedule_or_injected():
  updates = updates_of((4, 6), 3)
  plain, _ = run(whitening(0.3, **EVERY), updates)
  scheduled, _ = run(whitening(lambda _: 0.3, **EVERY), updates)
  injected = optax.inject_hyperparams(
    scale_by_whitening, static_args=('refresh_every', 'block_size', 'decay')
  )(ridge=0.3, **EVERY)
  found, state = run(injected, updates)
  np.testing.assert_allclose(scheduled, plain, rtol=1e-6)
  np.testing.assert_allclose(found, plain, rtol=1e-5)
  assert state.hyperparams['ridge'] == np.float32(0.3)


@pytest.mark.parametrize(
  'dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)]
)
def test_updates_keep_their_dtype(dtype):
  updates = updates_of((4, 6), 2)
  wide, _ = run(whitening(**EVERY), updates)
  out, state = run(whitening(**EVERY), [u.astype(dtype) for u in updates])
  assert out.dtype == dtype
  assert {x.dtype.name for x in jax.tree.leaves(state.memory)} == {'float32'}
  assert_close(out, wide, 0.03)


# The program.


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_no_decomposition_in_the_default(platform):
  tx = bsfa_optax.bsfa_adamw(1e-3)
  params = {'w': jnp.ones((6, 4)), 'b': jnp.ones(4)}
  lowered = (
    jax.jit(tx.update)
    .trace(params, tx.init(params), params)
    .lower(lowering_platforms=(platform,))
  )
  text = lowered.as_text()
  assert 'dot_general' in text
  for word in ('custom_call', 'cholesky', 'triangular_solve', 'eigh'):
    assert word not in text, word


def equations(jaxpr):
  """All equations, those of inner programs included."""
  count = 0
  for equation in jaxpr.eqns:
    count += 1
    for value in equation.params.values():
      inner = value if isinstance(value, (tuple, list)) else [value]
      count += sum(equations(x.jaxpr) for x in inner if hasattr(x, 'jaxpr'))
  return count


def traced(tx, params):
  return jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)


def layers_of(count):
  shape = lambda *s: {'kernel': jax.ShapeDtypeStruct(s, jnp.float32)}
  layer = {'q': shape(8, 8), 'up': shape(8, 16), 'down': shape(16, 8), 'o': shape(8, 6)}
  return {'layers': [layer] * count}


@pytest.mark.parametrize(
  'filter',
  [scale_by_whitening(), bsfa_optax.bsfa(0.1, 4.0, exponent=0.5, grafting=True)],
  ids=['whitening', 'kronecker'],
)
def test_layers_cost_hardly_more_equations_than_one(filter):
  tx = bsfa_optax.bsfa_adamw(1e-3, filter=filter)
  hundred = equations(traced(tx, layers_of(25)).jaxpr.jaxpr)
  assert hundred <= 6000
  muon = optax.contrib.muon(1e-3)
  assert hundred < 1.5 * equations(traced(muon, layers_of(25)).jaxpr.jaxpr)
  # What is left for a leaf is Adam's, and to stack it and take it out again.
  adamw = equations(traced(optax.adamw(1e-3), layers_of(25)).jaxpr.jaxpr)
  few = equations(traced(tx, layers_of(5)).jaxpr.jaxpr)
  assert (hundred - few) / 80 < adamw / 100 + 16


def test_equations_grow_with_the_leaves_and_no_faster():
  tx = bsfa_optax.bsfa_adamw(1e-3)
  leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  few, more, most = (
    equations(traced(tx, {f'w{i}': leaf for i in range(n)}).jaxpr.jaxpr)
    for n in (20, 40, 60)
  )
  assert 0 < most - more == more - few


def test_state_of_a_llama_takes_12_bytes_a_parameter():
  shape = lambda *s: {'kernel': jax.ShapeDtypeStruct(s, jnp.float32)}
  layer = {name: shape(768, 768) for name in ('q', 'k', 'v', 'o')}
  layer |= {'gate': shape(768, 2048), 'up': shape(768, 2048), 'down': shape(2048, 768)}
  params = {
    'embed': {'embedding': jax.ShapeDtypeStruct((32_000, 768), jnp.float32)},
    'head': shape(768, 32_000),
    'layers': [layer] * 12,
  }
  count = sum(x.size for x in jax.tree.leaves(params))
  assert state_bytes(bsfa_optax.bsfa_adamw(1e-3), params) < 12 * count


# The alias, and Muon with the same leaves.


@pytest.mark.slow
def test_the_alias_is_the_chain_it_says():
  params = {'w': updates_of((4, 6), 1)[0], 'embedding': jnp.ones((8, 4))}
  alias = bsfa_optax.bsfa_adamw(
    1e-2, weight_decay=0.1, step_length=2.0, embedding_scale=3.0
  )
  chain = optax.chain(
    optax.scale_by_adam(nesterov=True),
    scale_by_whitening(),
    optax.masked(optax.scale(3.0), {'w': False, 'embedding': True}),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(2e-2),
  )
  found, _ = jax.jit(alias.update)(params, alias.init(params), params)
  expected, _ = jax.jit(chain.update)(params, chain.init(params), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
  )


def test_tables_of_embeddings_have_longer_steps():
  params = {
    'embed': {'embedding': jnp.ones((16, 4))},
    'wte': {'weight': jnp.ones((16, 4))},
    'layers': [{'kernel': jnp.ones((4, 6)), 'bias': jnp.ones(6)}],
    'norm': {'scale': jnp.ones(4)},
    'head': {'kernel': jnp.ones((4, 16))},
  }

  def step(params, factor):
    tx = bsfa_optax.bsfa_adamw(1e-2, weight_decay=0.0, embedding_scale=factor)
    return jax.jit(lambda tree: tx.update(tree, tx.init(tree), tree)[0])(params)

  for tree in params, jax.tree.map(nnx.Param, params):  # and with Flax's metadata
    ratios = jax.tree.map(np.divide, step(tree, 3.0), step(tree, 1.0))
    for path, ratio in jax.tree_util.tree_leaves_with_path(ratios):
      longer = 'embed' in str(path) or 'wte' in str(path)
      np.testing.assert_allclose(ratio, 3.0 if longer else 1.0, rtol=1e-5)


def test_muon_takes_the_same_leaves(standard_promotion):
  params = {
    'embed': {'embedding': jnp.ones((16, 8))},
    'layers': {
      'query': {'kernel': jnp.ones((8, 2, 4))},
      'out': {'kernel': jnp.ones((2, 4, 8))},
      'conv': {'kernel': jnp.ones((3, 3, 4, 6))},
    },
  }
  numbers = bsfa_optax.muon_dimension_numbers(params)
  axes = lambda name: tuple(numbers['layers'][name]['kernel'])
  assert numbers['embed']['embedding'] is None
  assert axes('query') == ((0,), (1, 2))
  assert axes('out') == ((0, 1), (2,))
  assert axes('conv') == ((0, 1, 2), (3,))
  tx = optax.contrib.muon(
    1e-3, muon_weight_dimension_numbers=bsfa_optax.muon_dimension_numbers
  )
  updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
