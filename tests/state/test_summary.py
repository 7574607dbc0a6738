"""What is said of an optimizer's state before there is one."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bsfa_optax
from bsfa_optax.state import block_names, scalars


def test_names_are_found_however_often_init_was_traced():
  params = {'dense': {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3))}}
  tx = bsfa_optax.bsfa_adamw(1e-3)
  jax.jit(tx.init)(params)  # JAX does not trace it again
  for _ in range(2):
    assert block_names(tx, params) == ['dense/kernel']
    assert len(bsfa_optax.summary(tx, params).leaves) == 2


def test_filter_is_seen_within_a_jitted_init_which_stays_as_it_was():
  params = {'dense': {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3))}}
  alone = bsfa_optax.bsfa_adamw(1e-3)
  tx = optax.GradientTransformationExtraArgs(jax.jit(alone.init), alone.update)
  assert block_names(tx, params) == ['dense/kernel']
  assert jax.tree.structure(tx.init(params)) == jax.tree.structure(alone.init(params))


def warnings(tx, shapes):
  is_shape = lambda x: isinstance(x, tuple)
  abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape
  )
  return bsfa_optax.summary(tx, abstract).warnings


def in_layers(params):
  return jax.tree.map_with_path(
    lambda path, _: 0 if 'layers' in str(path) else None, params
  )


STACKED = {'layers': {'up': {'kernel': (3, 8, 16), 'bias': (3, 16)}}, 'out': (8, 4)}
HEADS = {'layers': {'0': {'query': (8, 2, 4), 'out': (2, 4, 8), 'bias': (8,)}}}


@pytest.mark.parametrize(
  ('filter', 'shapes', 'expected'),
  [
    (bsfa_optax.scale_by_whitening(), STACKED, ['layers: all leaves have 3']),
    (bsfa_optax.scale_by_whitening(batch_axes=in_layers), STACKED, []),
    (bsfa_optax.scale_by_whitening(), HEADS, []),
    (bsfa_optax.scale_by_whitening(), {'bias': (8,)}, ['no leaf is filtered']),
    (bsfa_optax.bsfa(), {'kernel': (8, 300)}, ['kernel: an axis of (8, 300)']),
    (bsfa_optax.scale_by_whitening(), {'kernel': (8, 300)}, []),
  ],
)
def test_summary_warns_of_what_is_probably_not_wanted(filter, shapes, expected):
  found = warnings(bsfa_optax.bsfa_adamw(1e-3, filter=filter), shapes)
  assert len(found) == len(expected)
  for warning, start in zip(found, expected, strict=True):
    assert warning.startswith(start)


def test_larger_matrices_have_a_larger_share():
  shapes = {'a': (8, 8), 'b': (8, 8), 'large': (32, 32)}
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  rows = bsfa_optax.summary(bsfa_optax.scale_by_whitening(), params).leaves
  operations = {row.name: row.operations for row in rows}
  # A step takes 4 n^3 for a square; a fifth of a refresh, its moments and 3 products.
  assert operations['a'] == operations['b'] == int(8**3 * (4 + (4 + 12) / 5))
  assert operations['large'] == int(32**3 * (4 + (4 + 12) / 5))


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: tx,
    lambda tx: optax.chain(optax.clip(1.0), tx),
    lambda tx: optax.masked(tx, {'a': True, 'b': False}),
    lambda tx: optax.MultiSteps(tx, 1),
    lambda tx: optax.partition({'x': tx, 'y': optax.sgd(0.1)}, {'a': 'x', 'b': 'y'}),
    lambda tx: optax.contrib.schedule_free(tx, 0.1),
  ],
  ids=['alone', 'chain', 'masked', 'MultiSteps', 'partition', 'schedule_free'],
)
@pytest.mark.usefixtures('standard_promotion')
def test_scalars_are_found_in_any_wrapper(wrap):
  params = {'a': {'kernel': jnp.eye(4)}, 'b': {'bias': jnp.ones(4)}}
  tx = wrap(bsfa_optax.bsfa_adamw(1e-3))
  found = scalars(tx, params, prefix='opt')(tx.init(params))
  names = ('updates', 'skipped_updates', 'age', 'a/kernel/effective_directions')
  assert found == {f'opt/{name}': 0 for name in names}
  assert {type(x) for x in found.values()} == {float}


def test_two_filters_have_names_of_their_own():
  """In the order of the state, which sorts labels, not in that of `init`."""
  params = {'a': {'kernel': jnp.eye(4)}, 'b': {'kernel': jnp.eye(8)}}
  choose = {'a': 'z', 'b': 'y'}
  graded = bsfa_optax.bsfa_adamw(1e-3, filter=bsfa_optax.bsfa())
  tx = optax.partition({'z': bsfa_optax.bsfa_adamw(1e-3), 'y': graded}, choose)
  found = scalars(tx, params)(tx.init(params))
  assert 'bsfa/b/kernel/dominant_fraction' in found
  assert 'bsfa/1/a/kernel/effective_directions' in found


def test_age_counts_from_the_last_refresh():
  params = {'kernel': jnp.eye(4)}
  filter = bsfa_optax.scale_by_whitening(refresh_every=3)
  log, state = scalars(filter, params), filter.init(params)
  update, ages = jax.jit(filter.update), []
  for _ in range(7):
    _, state = update(params, state)
    ages.append(log(state)['bsfa/age'])
  assert ages == [1, 2, 0, 1, 2, 0, 1]
