"""Every bad option raises where it is given, with its name, its value and a remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bsfa_optax
from bsfa_optax import bsfa, bsfa_adamw, dct, hessian_lanczos, kronecker, pca

NAN, INF = float('nan'), float('inf')
INTEGER = 'must be a positive integer'
SCALAR = 'must be finite and non-negative'

# Factory, option, bad values, and what the message must say beside both.
OPTIONS = [
  (pca, 'rank', [0, -1, 2.0, True, None, '4'], INTEGER),
  (pca, 'history', [0, -3, 8.0, False, None], INTEGER),
  (pca, 'sample_every', [0, 1.5, None], INTEGER),
  (pca, 'refresh_every', [0, -1, 2.0, '8'], INTEGER),
  (pca, 'refresh_every', [3, 16], 'must be history * sample_every when decay > 0'),
  (
    pca,
    'decay',
    [1.0, -0.1, NAN, True, False, None, '0.9', 2],
    'must be in [0.0, 1.0)',
  ),
  (pca, 'solver', ['svd', 'Gram', None, 0], "must be 'auto', 'gram' or 'randomized'"),
  (pca, 'storage_dtype', [jnp.int8, 'foo', jnp.complex64], 'must be a floating-point'),
  (kronecker, 'decay', [1, -0.1, NAN, INF, True, False, None], 'must be in [0.0, 1.0)'),
  (kronecker, 'refresh_every', [0, -1, 1.5, True], INTEGER),
  (kronecker, 'max_size', [0, -1, 8.0, None], INTEGER),
  (kronecker, 'max_ratio', [0, -1.0, NAN, True, '8', None], 'must be positive'),
  (kronecker, 'storage_dtype', [jnp.int8, 'foo', bool], 'must be a floating-point'),
  (dct, 'rank', [0, -1, 2.0, True, None], INTEGER),
  (hessian_lanczos, 'rank', [0, 2.0, None], INTEGER),
  (hessian_lanczos, 'iterations', [0, 30.0, True], INTEGER),
  (hessian_lanczos, 'iterations', [5, 10], 'must exceed rank'),
  (hessian_lanczos, 'refresh_every', [0, 1.5, None], INTEGER),
  (hessian_lanczos, 'curvature', ['fisher', None], "must be 'hessian' or"),
  (hessian_lanczos, 'storage_dtype', [jnp.int8, 'foo'], 'must be a floating-point'),
]
for name in ('alpha', 'gamma', 'exponent'):
  bad = [-1.0, NAN, INF, -INF, 1j, 'x', np.float32(-2), jnp.array(NAN)]
  bad += [] if name == 'exponent' else [None]
  OPTIONS += [(bsfa, name, bad, SCALAR)]
  arrays = [np.ones(3), [1.0], jnp.ones((1, 1))]
  OPTIONS += [(bsfa, name, arrays, 'must be a scalar or a schedule')]
CASES = [
  pytest.param(factory, name, value, text, id=f'{factory.__name__}-{name}-{value}')
  for factory, name, values, text in OPTIONS
  for value in values
]


@pytest.mark.parametrize(('factory', 'name', 'value', 'text'), CASES)
def test_bad_option(factory, name, value, text):
  with pytest.raises(ValueError, match=re.escape(text)) as error:
    factory(**{name: value})
  message = str(error.value)
  assert message.startswith(f'{name} must ')
  shown = f'shape {np.shape(value)}' if np.ndim(value) else repr(value)
  assert shown in message


@pytest.mark.parametrize(
  ('factory', 'parts'),
  [
    (
      lambda: pca(rank=16, history=8, decay=0.0),
      ['rank must not exceed history', 'rank=16', 'history=8', 'raise history'],
    ),
    (
      lambda: pca(rank=1, history=1, centered=True),
      ['centered needs history of at least 2', 'history=1', 'raise history'],
    ),
    (
      lambda: pca(history=4, sample_every=2, refresh_every=4),
      ['refresh_every=4', 'history=4', 'sample_every=2', 'leave it out', 'decay=0'],
    ),
    (
      lambda: bsfa(3.0, 2.0, exponent=0.5),
      ['alpha must not exceed gamma', 'alpha=3.0', 'gamma=2.0', 'exponent=None'],
    ),
    (lambda: bsfa_adamw(1e-3, alpha=-1.0), ['alpha must be', '-1.0']),
    (lambda: bsfa_adamw(1e-3, gamma=NAN), ['gamma must be', 'nan']),
    (lambda: bsfa_adamw(1e-3, exponent=-2), ['exponent must be', '-2']),
  ],
)
def test_bad_combination(factory, parts):
  with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
    factory()
  assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize('estimator', [pca, 'pca', 3])
def test_estimator_that_is_none(estimator):
  with pytest.raises(TypeError, match='estimator must be an Estimator') as error:
    bsfa(estimator=estimator)
  assert repr(estimator) in str(error.value)
  assert 'pca()' in str(error.value)


PARAMS = {'bias': jnp.ones(3), 'kernel': jnp.ones((4, 3))}


@pytest.mark.parametrize(
  ('options', 'parts'),
  [
    (
      {'blocks': {'kernel': 'a'}},
      ['blocks must be a tree with the structure of the parameters', 'a function'],
    ),
    (
      {'blocks': lambda params: [*params]},
      ['blocks must be a tree with the structure of the parameters', '[*, *]'],
    ),
    (
      {'batch_axes': {'bias': None, 'other': 0}},
      ['batch_axes must be a tree with the structure of the parameters', "'other'"],
    ),
    (
      {'batch_axes': {'bias': None, 'kernel': 2}},
      ['batch_axes must lie within the axes', 'got 2', "'kernel'", '(4, 3)', 'None'],
    ),
    (
      {'batch_axes': {'bias': None, 'kernel': (0, -3)}},
      ['batch_axes must lie within the axes', '(0, -3)', "'kernel'"],
    ),
    ({'batch_axes': 1}, ['batch_axes must lie within the axes', 'got 1', "'bias'"]),
    ({'batch_axes': 'x'}, ['batch_axes must lie within the axes', 'got x']),
    ({'batch_axes': 0.0}, ['batch_axes must lie within the axes', 'got 0.0']),
    (
      {'blocks': 'all', 'batch_axes': 0},
      ['same batch shape', '[(3,), (4,)]', "'all'", 'different labels'],
    ),
  ],
)
@pytest.mark.parametrize('use', ['init', 'block_names'])
def test_bad_block_specs(use, options, parts):
  init = bsfa(estimator=pca(**options)).init
  names = lambda params: bsfa_optax.block_names(params, **options)
  with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
    (init if use == 'init' else names)(PARAMS)
  assert all(part in str(error.value) for part in parts)


def test_blocks_of_several_leaves_for_kronecker():
  tx = bsfa(estimator=kronecker(blocks='all'))
  with pytest.raises(ValueError, match='blocks must label every leaf') as error:
    tx.init(PARAMS)
  assert all(part in str(error.value) for part in ("'all'", '2 leaves', 'use pca'))


@pytest.mark.parametrize('abstract', [False, True])
@pytest.mark.parametrize('dtype', ['int32', 'uint8', 'bool', 'complex64'])
@pytest.mark.parametrize('estimator', [pca, kronecker])
def test_parameters_that_are_not_real_numbers(estimator, dtype, abstract):
  params = {'layer': {'table': jnp.ones((4, 3), dtype)}}
  params = jax.eval_shape(lambda: params) if abstract else params
  with pytest.raises(TypeError, match='parameters must be floating-point') as error:
    bsfa(estimator=estimator()).init(params)
  remedy = 'split_real_and_imaginary' if dtype == 'complex64' else 'optax.masked'
  assert all(part in str(error.value) for part in (dtype, "'layer/table'", remedy))


@pytest.mark.usefixtures('standard_promotion')  # for optax's complex numbers
def test_remedies_work():
  v = {
    'i': jnp.ones((2, 2), int),
    'w': jnp.ones((2, 2)),
    'z': jnp.ones((2, 2), complex),
  }
  split = optax.contrib.split_real_and_imaginary
  txs = {'real': bsfa(), 'complex': split(bsfa()), 'rest': optax.identity()}
  tx = optax.partition(txs, {'i': 'rest', 'w': 'real', 'z': 'complex'})
  updates, _ = jax.jit(tx.update)(v, tx.init(v))
  assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, v)


@pytest.mark.parametrize('value', [0, 1, 2.5, np.float32(0.5), jnp.array(2), INF])
def test_good_options_are_accepted(value):
  if np.isfinite(value):
    bsfa(value, value, exponent=value)
  if value:
    kronecker(max_ratio=float(value))
  bsfa(5.0, 1.0, exponent=None)
  pca(rank=np.int64(3), history=np.int32(4), decay=0, refresh_every=1)
  pca(history=4, sample_every=2, refresh_every=8)
