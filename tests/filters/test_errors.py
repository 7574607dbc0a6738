"""Every bad option raises where it is given, with its name, its value and a remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsfa_optax import (
  accelerate,
  bsfa,
  bsfa_adamw,
  dct,
  hessian_lanczos,
  interpolated,
  kronecker,
  pca,
  scale_by_whitening,
  split_by_subspace,
)
from bsfa_optax.estimators import layout

NAN, INF = float('nan'), float('inf')
INTEGER = 'must be a positive integer'
SCALAR = 'must be finite and non-negative'

# Factory, option, bad values, and what the message must say beside both.
OPTIONS = [
  (pca, 'rank', [0, -1, 2.0, True, None, '4'], INTEGER),
  (pca, 'history', [0, -3, 8.0, False, None], INTEGER),
  (pca, 'refresh_every', [0, -1, 2.0, '8'], INTEGER),
  (pca, 'refresh_every', [3, 16], 'must be history when decay > 0'),
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
  (
    scale_by_whitening,
    'ridge',
    [0, 0.0, np.float32(0), jnp.zeros(())],
    'must be positive',
  ),
  (scale_by_whitening, 'ridge', [-1.0, NAN, INF, '0.3', None, 1j], SCALAR),
  (scale_by_whitening, 'ridge', [np.ones(2), [0.2]], 'must be a scalar or a schedule'),
  (
    scale_by_whitening,
    'decay',
    [1, -0.1, NAN, True, None, '0.9'],
    'must be in [0.0, 1.0)',
  ),
  (scale_by_whitening, 'refresh_every', [0, -1, 1.5, True, '5'], INTEGER),
  (scale_by_whitening, 'block_size', [0, -1, 64.0, None, False], INTEGER),
  (dct, 'rank', [0, -1, 2.0, True, None], INTEGER),
  (hessian_lanczos, 'rank', [0, 2.0, None], INTEGER),
  (hessian_lanczos, 'iterations', [0, 30.0, True], INTEGER),
  (hessian_lanczos, 'iterations', [5, 10], 'must exceed rank'),
  (hessian_lanczos, 'refresh_every', [0, 1.5, None], INTEGER),
  (hessian_lanczos, 'curvature', ['fisher', None], "must be 'hessian' or"),
  (hessian_lanczos, 'storage_dtype', [jnp.int8, 'foo'], 'must be a floating-point'),
]
for name in ('alpha', 'gamma', 'exponent'):
  bad = [-1.0, NAN, INF, -INF, 1j, 'x', '0.3', b'1', np.float32(-2), jnp.array(NAN)]
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


SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
  ('factory', 'parts'),
  [
    (
      lambda: pca(rank=16, history=8, decay=0.0),
      ['rank must not exceed history', 'rank=16', 'history=8', 'raise history'],
    ),
    (
      lambda: pca(history=4, refresh_every=8),
      ['refresh_every=8', 'history=4', 'leave it out', 'decay=0'],
    ),
    (
      lambda: bsfa(3.0, 2.0, exponent=0.5),
      ['alpha must not exceed gamma', 'alpha=3.0', 'gamma=2.0', 'exponent=None'],
    ),
    (lambda: interpolated(SGD, -1.0, 1.0), ['alpha must be', '-1.0', 'a schedule']),
    (lambda: interpolated(SGD, 0.0, NAN), ['gamma must be', 'nan', 'a schedule']),
    (lambda: interpolated(SGD, 0, 1, threshold=1.0), ['threshold must be', '1.0']),
    (lambda: interpolated(SGD, 0, 1, decay=-0.1), ['decay must be in', '-0.1']),
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


@pytest.mark.parametrize('value', ['no', 1, 0.0, None, jnp.ones(())], ids=str)
def test_grafting_that_is_no_boolean(value):
  with pytest.raises(TypeError, match='grafting must be True or False') as error:
    bsfa(grafting=value)
  assert repr(value) in str(error.value)


@pytest.mark.parametrize(
  ('name', 'factory'),
  [
    ('filter', lambda x: bsfa_adamw(1e-3, filter=x)),
    ('base_optimizer', lambda x: accelerate(x, history=optax.identity())),
    ('filter', lambda x: accelerate(SGD, x, history=optax.identity())),
    ('history', lambda x: accelerate(SGD, history=x)),
    ('base_optimizer', lambda x: interpolated(x, 0.0, 1.0)),
    ('dominant', lambda x: split_by_subspace(kronecker(), x, SGD)),
    ('bulk', lambda x: split_by_subspace(kronecker(), SGD, x)),
  ],
)
@pytest.mark.parametrize(
  'value',
  [bsfa, 'adam', 3, kronecker()],
  ids=['factory', 'name', 'number', 'estimator'],
)
def test_transformation_that_is_none(name, factory, value):
  with pytest.raises(TypeError, match=f'{name} must be an optax.Gradient') as error:
    factory(value)
  assert repr(value) in str(error.value)
  assert 'call the factory, as in optax.sgd' in str(error.value)


@pytest.mark.parametrize(
  'make',
  [
    lambda x: interpolated(SGD, 0.0, 1.0, estimator=x),
    lambda x: split_by_subspace(x, SGD, SGD),
  ],
)
def test_estimator_of_another_form_that_is_none(make):
  with pytest.raises(TypeError, match=r'estimator must be an Estimator.*pca\(\)'):
    make(pca)


PARAMS = {'bias': jnp.ones(3), 'kernel': jnp.ones((4, 3))}


AXIS = 'must lie within the axes'


@pytest.mark.parametrize(
  ('options', 'parts'),
  [
    (
      {'labels': {'kernel': 'a'}},
      ['labels must be a tree with the structure of the parameters', 'a function'],
    ),
    (
      {'labels': lambda params: [*params]},
      ['labels must be a tree with the structure of the parameters', '[*, *]'],
    ),
    (
      {'batch_axes': {'bias': None, 'other': 0}},
      ['batch_axes must be a tree with the structure of the parameters', "'other'"],
    ),
    (
      {'batch_axes': {'bias': None, 'kernel': 2}},
      [f'batch_axes {AXIS}', 'got 2', "'kernel'", '(4, 3)', 'None'],
    ),
    (
      {'batch_axes': {'bias': None, 'kernel': (0, -3)}},
      [f'batch_axes {AXIS}', '(0, -3)', "'kernel'"],
    ),
    ({'batch_axes': 1}, [f'batch_axes {AXIS}', 'got 1', "'bias'", 'use None']),
    ({'batch_axes': 'x'}, [f'batch_axes {AXIS}', 'got x']),
    ({'batch_axes': 0.0}, [f'batch_axes {AXIS}', 'got 0.0']),
    ({'axes': {'bias': None, 'kernel': 2}}, [f'axes {AXIS}', 'got 2', "'kernel'"]),
    (
      {'axes': {'bias': None, 'kernel': 1}, 'batch_axes': {'bias': None, 'kernel': 1}},
      ['axes must not be batch axes', 'axes=1', "'kernel'", '(1,)', 'one of them'],
    ),
    (
      {'labels': 'all', 'batch_axes': 0},
      ['same batch shape', '[(3,), (4,)]', "'all'", 'different labels'],
    ),
  ],
)
def test_bad_block_specs(options, parts):
  uses = [lambda params: layout(params, **options)]
  if 'axes' not in options:
    uses.append(bsfa(estimator=pca(**options)).init)
  if 'labels' not in options:
    uses += [scale_by_whitening(**options).init, bsfa(estimator=dct(**options)).init]
  for use in uses:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
      use(PARAMS)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize('value', [True, False, 3, 1.5])
@pytest.mark.parametrize('factory', [pca, hessian_lanczos])
def test_labels_that_are_no_strings(factory, value):
  tx = bsfa(estimator=factory(labels={'bias': None, 'kernel': value}))
  with pytest.raises(TypeError, match='labels must be strings, or None') as error:
    tx.init(PARAMS)
  assert all(x in str(error.value) for x in (repr(value), "'kernel'", 'leaves=lambda'))


@pytest.mark.parametrize('value', ['kernel', True, {'bias': False, 'kernel': True}])
def test_leaves_that_are_no_function(value):
  for tx in (scale_by_whitening(leaves=value), bsfa(estimator=pca(leaves=value))):
    with pytest.raises(TypeError, match='leaves must be a function') as error:
      tx.init(PARAMS)
    assert all(x in str(error.value) for x in (repr(value), 'leaves=lambda name, leaf'))


@pytest.mark.parametrize('abstract', [False, True])
@pytest.mark.parametrize('dtype', ['int32', 'uint8', 'bool', 'complex64'])
@pytest.mark.parametrize(
  'make',
  [
    lambda: bsfa(estimator=pca()),
    lambda: bsfa(),
    lambda: scale_by_whitening(),
  ],
  ids=['pca', 'kronecker', 'whitening'],
)
def test_parameters_that_are_not_real_numbers(make, dtype, abstract):
  params = {'layer': {'kernel': jnp.ones((4, 3), dtype)}}
  params = jax.eval_shape(lambda: params) if abstract else params
  with pytest.raises(TypeError, match='parameters must be floating-point') as error:
    make().init(params)
  remedy = 'split_real_and_imaginary' if dtype == 'complex64' else 'optax.masked'
  assert all(part in str(error.value) for part in (dtype, "'layer/kernel'", remedy))


@pytest.mark.parametrize('make', [bsfa, scale_by_whitening])
@pytest.mark.usefixtures('standard_promotion')  # for optax's complex numbers
def test_remedies_work(make):
  v = {
    'i': jnp.ones((2, 2), int),
    'w': jnp.ones((2, 2)),
    'z': jnp.ones((2, 2), complex),
  }
  split = optax.contrib.split_real_and_imaginary
  txs = {'real': make(), 'complex': split(make()), 'rest': optax.identity()}
  tx = optax.partition(txs, {'i': 'rest', 'w': 'real', 'z': 'complex'})
  updates, _ = jax.eval_shape(tx.update, v, tx.init(v))
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert types(updates) == types(v)


@pytest.mark.parametrize('value', [0, 1, 2.5, np.float32(0.5), jnp.array(2), INF])
def test_good_options_are_accepted(value):
  if np.isfinite(value):
    bsfa(value, value, exponent=value)
  if value:
    kronecker(max_ratio=float(value))
  if value and np.isfinite(value):
    scale_by_whitening(value)
  bsfa(5.0, 1.0, exponent=None)
  pca(rank=np.int64(3), history=np.int32(4), decay=0, refresh_every=1)
  pca(history=4, refresh_every=4)
  scale_by_whitening(lambda step: 0.1, refresh_every=lambda step: 3.5)
  kronecker(refresh_every=np.int64(2))
