"""Every bad option raises where it is given, with its name, its value and a remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bsfa_optax
from bsfa_optax import (
  accelerate,
  bsfa,
  bsfa_adamw,
  dct,
  diagnostics,
  hessian_lanczos,
  interpolated,
  kronecker,
  low_rank,
  pca,
  projected,
  scale_by_whitening,
  split_by_subspace,
  state,
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


SGD, IDENTITY = optax.sgd(0.1), optax.identity()
PARAMS = {'bias': jnp.ones(3), 'kernel': jnp.ones((4, 3))}
OTHER = {'bias': jnp.ones(3), 'kernel': jnp.ones((4, 5))}
SMALL = pca(2, 2)
LAYOUT = layout(PARAMS)
CURVED = bsfa(estimator=hessian_lanczos(2))


def update(tx, *state_of, updates=PARAMS, **kwargs):
  """A function that traces ``tx.update``, perhaps with the state of another one."""
  owner, params = state_of or (tx, PARAMS)
  call = lambda: tx.update(updates, owner.init(params), **kwargs)
  return lambda: jax.eval_shape(call)


def init(tx, params):
  return lambda: tx.init(params)


def two(filter, other):
  """The states of two whole forms do not fit each other either."""
  return update(filter, other, PARAMS)


graded = lambda alpha, gamma: bsfa(alpha, gamma, exponent=0.5)
with_pca = lambda *args, **kwargs: bsfa(estimator=pca(*args, **kwargs))
around = lambda estimator: interpolated(SGD, 0.0, 1.0, estimator=estimator)
REMEDY = 'or make a new state with init'
CALL = 'call the factory, as in'
NUMBER = 'pass a number of float32 or a schedule'
SCHEDULE = 'must be a scalar or a schedule, got Estimator; an estimator or'
CHOOSE = 'None for leaves that need no choice'
EMPTY = 'if the checkpoint has none, restore the parameters alone'

# What is called, and what the message must have: option, value, remedy.
CALLS = {
  # Combinations of options.
  'rank above history': (
    lambda: pca(16, 8, decay=0.0),
    ['rank must not exceed history', 'rank=16 and history=8', 'raise history'],
  ),
  'refreshes of a memory': (
    lambda: pca(history=4, refresh_every=8),
    ['refresh_every must be history', 'refresh_every=8 for history=4', 'leave it out'],
  ),
  'floor above ceiling': (
    lambda: graded(3.0, 2.0),
    ['alpha must not exceed gamma', 'alpha=3.0 and gamma=2.0', 'exponent=None'],
  ),
  'iterations as rank': (
    lambda: hessian_lanczos(4, iterations=4),
    ['iterations must exceed rank', 'iterations=4 and rank=4', 'leave it out'],
  ),
  # Something in the place of something else.
  'estimator for alpha': (lambda: bsfa(kronecker()), ['alpha', SCHEDULE]),
  'estimator for ridge': (lambda: scale_by_whitening(SMALL), ['ridge', SCHEDULE]),
  'parameters for a rate': (
    lambda: bsfa_adamw(PARAMS),
    ['learning_rate must be a scalar or a schedule', 'got dict', 'behind its own'],
  ),
  'filter for an estimator': (
    lambda: bsfa(estimator=scale_by_whitening()),
    ['estimator must be an Estimator', 'GradientTransformationExtraArgs', CALL],
  ),
  'filter in diagnostics': (
    lambda: diagnostics.projector(bsfa(), None),
    ['estimator must be an Estimator', 'GradientTransformationExtraArgs', CALL],
  ),
  'parameters in diagnostics': (
    lambda: diagnostics.dominant_fraction(PARAMS, SMALL, None),
    ['estimator must be an Estimator', "{'bias'", CALL],
  ),
  'filter in a spectrum': (
    lambda: diagnostics.spectrum(bsfa(), None, PARAMS),
    ['estimator must be an Estimator', 'GradientTransformationExtraArgs', CALL],
  ),
  'parameters for a layout': (
    lambda: diagnostics.principal_angles(PARAMS, PARAMS, PARAMS),
    ['layout must be a Layout', 'got dict', 'estimator.layout(params)'],
  ),
  'parameters for a basis': (
    lambda: diagnostics.subspace_overlap(PARAMS, PARAMS, LAYOUT),
    ['basis must have a stack for each of the 1 leaves', 'got 2', 'give the layout'],
  ),
  'parameters before tx': (
    lambda: bsfa_optax.summary(PARAMS, SGD),
    ['tx must be an optax.GradientTransformation', "{'bias'", CALL],
  ),
  # Options of the aliases.
  'mask': (
    lambda: bsfa_adamw(1e-3, mask='bias'),
    ['mask must be a tree of booleans', "'bias'", 'as in optax.adamw'],
  ),
  'nesterov': (
    lambda: bsfa_adamw(1e-3, nesterov='no'),
    ['nesterov must be True or False', "'no'"],
  ),
  # Schedules.
  'array from a schedule': (
    update(bsfa(lambda count: jnp.ones(2))),
    ['alpha must be one number', 'shape (2,)', 'from its schedule'],
  ),
  'nothing from a schedule': (
    update(graded(0.1, lambda count: None)),
    ['gamma must be one number', 'None', 'from its schedule'],
  ),
  'string from a schedule': (
    update(scale_by_whitening(lambda count: '0.3')),
    ['ridge must be one number', "'0.3'", 'from its schedule'],
  ),
  'interval from a schedule': (
    update(scale_by_whitening(refresh_every=lambda count: '5')),
    ['refresh_every must be one number', "'5'", 'from its schedule'],
  ),
  # States of others.
  'state of another estimator': (
    two(bsfa(), with_pca(2, 2)),
    ['state must be of the same', 'nothing for memory/0/basis/0', REMEDY],
  ),
  'state of the other family': (
    two(scale_by_whitening(), bsfa()),
    ['state must be of the same', 'memory/0/basis/0, expected nothing', REMEDY],
  ),
  'state of another rank': (
    two(with_pca(3, 2), with_pca(2, 2)),
    ['state must be of the same', '(2, 4, 3) for memory/basis/kernel', REMEDY],
  ),
  'state of another history': (
    two(with_pca(2, 3), with_pca(2, 2)),
    ['state must be of the same', '(2, 4, 3) for memory/history/kernel', REMEDY],
  ),
  'state of another curvature': (
    two(CURVED, bsfa(estimator=hessian_lanczos(3))),
    ['state must be of the same', '(3, 4, 3) for memory/basis/kernel', REMEDY],
  ),
  'state of another block size': (
    two(scale_by_whitening(block_size=2), scale_by_whitening()),
    ['state must be of the same', '(1, 1, 4, 5) for memory/0/packed/0', REMEDY],
  ),
  'state of other leaves': (
    two(scale_by_whitening(leaves=lambda *_: False), scale_by_whitening()),
    ['state must be of the same', 'memory', REMEDY],
  ),
  'state of another estimator inside': (
    update(around(SMALL), around(kronecker()), PARAMS),
    ['state must be of the same', 'memory/0/basis/0', REMEDY],
  ),
  'state of another filter inside': (
    update(
      accelerate(SGD, history=IDENTITY),
      accelerate(SGD, with_pca(2, 2), history=IDENTITY),
      PARAMS,
    ),
    ['state must be of the same', 'nothing for memory/0/basis/0', REMEDY],
  ),
  'state of another projector': (
    two(split_by_subspace(pca(3, 2), SGD, SGD), split_by_subspace(SMALL, SGD, SGD)),
    ['state must be of the same', '(2, 4, 3) for memory/basis/kernel', REMEDY],
  ),
  'state of no filter': (
    update(projected.projected(SGD, 1), bsfa(), PARAMS),
    ['state must be a ProjectedState', 'FilterState', 'use the state that init'],
  ),
  'memory that is lost': (
    lambda: bsfa().update(PARAMS, bsfa().init(PARAMS)._replace(memory=None)),
    ['state must be of the same', 'nothing for memory/0/basis/0', REMEDY],
  ),
  # Trees that do not match.
  'history without a leaf': (
    update(bsfa(), history={'kernel': PARAMS['kernel']}),
    ['history must be a tree like the updates', "nothing for 'bias'", 'make it from'],
  ),
  'history of another shape': (
    update(scale_by_whitening(), history=OTHER),
    ['history must be a tree like the updates', '(4, 5)', 'make it from'],
  ),
  'history by name': (
    update(bsfa(), history='gradients'),
    ['history must be a tree like the updates', 'got ()', 'make it from'],
  ),
  'parameters that are names': (
    init(bsfa(), {'kernel': 'w'}),
    ['parameters must be arrays', "'w' for 'kernel'", 'leave it out'],
  ),
  'functions among parameters': (
    lambda: bsfa_optax.muon_dimension_numbers({'activation': len}),
    ['parameters must be arrays', "for 'activation'", 'leave it out'],
  ),
  # Axes and leaves.
  'layers of a single matrix': (
    init(scale_by_whitening(batch_axes=0), PARAMS),
    ['batch_axes must leave a matrix', "(0,) for 'kernel'", 'needs none'],
  ),
  'layers of a single matrix, by leaf': (
    init(bsfa(estimator=kronecker(batch_axes={'bias': None, 'kernel': -1})), PARAMS),
    ['batch_axes must leave a matrix', "(1,) for 'kernel'", 'needs none'],
  ),
  'axis of Muon': (
    lambda: bsfa_optax.muon_dimension_numbers(PARAMS, batch_axes=5),
    ['batch_axes must lie within', "got 5 for 'bias'", CHOOSE],
  ),
  'leaves of Muon': (
    lambda: bsfa_optax.muon_dimension_numbers(PARAMS, leaves='kernel'),
    ['leaves must be a function', "'kernel'", 'for instance'],
  ),
  'axis name': (
    init(scale_by_whitening(axis_name=3), PARAMS),
    ['axis_name must be a name of a mesh axis', 'got 3', 'or a tuple of names'],
  ),
  # Curvature.
  'no function': (
    update(CURVED, params=PARAMS),
    ['needs value_fn', 'got None', 'call tx.update'],
  ),
  'number for a function': (
    update(CURVED, params=PARAMS, value_fn=3),
    ['needs value_fn', 'got 3', 'call tx.update'],
  ),
  'no parameters': (
    update(CURVED, value_fn=len),
    ['needs params', 'got None', 'call tx.update'],
  ),
  'rank of the Hessian': (
    lambda: diagnostics.hessian_top_k(len, PARAMS, '2'),
    ['rank must be a positive integer', "'2'"],
  ),
  # States as files.
  'no format': (
    lambda: state.check_state_format({}, bsfa().init(PARAMS)),
    ['saved must be the dictionary', 'got {}', EMPTY],
  ),
  'format that is a list': (
    lambda: state.check_state_format([], bsfa().init(PARAMS)),
    ['saved must be the dictionary', 'got []', EMPTY],
  ),
  'format that is cut': (
    lambda: state.check_state_format({'version': 1}, bsfa().init(PARAMS)),
    ['saved must be the dictionary', "{'version': 1}", EMPTY],
  ),
  'format of a later version': (
    lambda: state.check_state_format({'version': 9, 'leaves': {}}, ()),
    ['version 9', 'reads version 1', 'restore it with the release'],
  ),
  'state that is none': (
    lambda: state.state_format({'a': 3}),
    ['state must be a tree of arrays', "3 for 'a'", 'give what tx.init'],
  ),
  'names for shardings': (
    lambda: state.state_shardings(bsfa(), PARAMS, {'bias': None, 'kernel': 'fsdp'}),
    ['shardings must be of', "'fsdp'", "write jax.P('fsdp')"],
  ),
  'shardings of another tree': (
    lambda: state.state_shardings(bsfa(), PARAMS, {'kernel': jax.P('fsdp')}),
    ['shardings must be a tree', "'kernel'", 'pass a function'],
  ),
  'sharding of too many axes': (
    lambda: state.state_shardings(bsfa(), PARAMS, jax.P('a', 'b', 'c')),
    ['shardings must not have more axes', "P('a', 'b', 'c')", 'leave the last ones'],
  ),
  'no sharding': (
    lambda: state.abstract_state(bsfa(), jax.eval_shape(lambda: PARAMS)),
    ['shardings must be all', "['None']", 'put the parameters on a mesh'],
  ),
  # Low rank.
  'method': (
    lambda: low_rank.init(PARAMS, jax.random.key(0), 4),
    ['method must be sst(...), lora(...)', 'got 4'],
  ),
  'key': (
    lambda: low_rank.init(PARAMS, None, low_rank.lora(1)),
    ['key must be a random key', 'got None', 'as in jax.random.key(0)'],
  ),
  'warm-up longer than a round': (
    lambda: low_rank.rewarmed(1.0, 5, 6),
    ['steps must be at most every (5)', 'got 6'],
  ),
  'rate of a warm-up': (
    lambda: low_rank.rewarmed('1', 5, 2),
    ['learning_rate', "'1'", NUMBER],
  ),
  'parts of two structures': (
    lambda: low_rank.join(PARAMS, None),
    ['trained and frozen do not have one structure', 'give the two'],
  ),
}
for name, factory in (
  ('adamw', bsfa_adamw),
  ('adafactor', bsfa_optax.bsfa_adafactor),
  ('galore', projected.galore),
  ('fira', projected.fira),
  ('frugal', projected.frugal),
  ('dct_adamw', projected.dct_adamw),
):
  for value in ('1e-3', NAN, -1e-3, None):
    CALLS[f'learning rate of {name}, {value}'] = (
      lambda factory=factory, value=value: factory(value),
      ['learning_rate must be finite and non-negative', repr(value), NUMBER],
    )
for name, value in (('eps', -1), ('eps_root', '0'), ('weight_decay', NAN)):
  CALLS[f'{name} of adamw'] = (
    lambda name=name, value=value: bsfa_adamw(1e-3, **{name: value}),
    [f'{name} must be finite and non-negative', repr(value), NUMBER],
  )
CALLS['schedule for scale of projected'] = (
  lambda: projected.projected(SGD, 2, scale=optax.constant_schedule(1.0)),
  ['scale must be a number', 'a schedule goes to learning_rate'],
)
for name in ('step_length', 'embedding_scale', 'eps', 'eps_root'):
  CALLS[f'schedule for {name} of adamw'] = (
    lambda name=name: bsfa_adamw(1e-3, **{name: optax.constant_schedule(1.0)}),
    [f'{name} must be a number', 'a schedule goes to learning_rate'],
  )
for name in ('decay_rate', 'clipping_threshold'):
  CALLS[f'schedule for {name} of adafactor'] = (
    lambda name=name: bsfa_optax.bsfa_adafactor(
      1e-3, **{name: optax.constant_schedule(1.0)}
    ),
    [f'{name} must be a number', 'a schedule goes to learning_rate'],
  )
for name in ('step_length', 'embedding_scale'):
  CALLS[f'{name} of adamw'] = (
    lambda name=name: bsfa_adamw(1e-3, **{name: 0.0}),
    [f'{name} must be positive, got 0.0; pass a number above 0 in float32.'],
  )
for name, value in (('b1', 1.5), ('b1', NAN), ('b2', '0.9'), ('b2', -0.1)):
  CALLS[f'{name} of adamw, {value}'] = (
    lambda name=name, value=value: bsfa_adamw(1e-3, **{name: value}),
    [f'{name} must be in [0.0, 1.0)', repr(value)],
  )
for name, value in (('alpha', 1e39), ('gamma', NAN), ('threshold', 1.0), ('decay', -1)):
  CALLS[f'{name} of interpolated'] = (
    lambda name=name, value=value: interpolated(
      SGD, **{'alpha': 0.0, 'gamma': 1.0, name: value}
    ),
    [f'{name} must be', repr(value)],
  )
for name, call in {
  'summary': bsfa_optax.summary,
  'state_bytes': state.state_bytes,
  'temporary_bytes': state.temporary_bytes,
  'block_names': state.block_names,
  'abstract_state': state.abstract_state,
  'state_shardings': state.state_shardings,
  'renewable': lambda tx, params: low_rank.renewable(tx),
  'projected': lambda tx, params: projected.projected(tx, 2),
  'filter': lambda tx, params: bsfa_adamw(1e-3, filter=tx),
  'accelerate': lambda tx, params: accelerate(tx, history=IDENTITY),
  'filter in accelerate': lambda tx, params: accelerate(SGD, tx, history=IDENTITY),
  'history in accelerate': lambda tx, params: accelerate(SGD, history=tx),
  'interpolated': lambda tx, params: interpolated(tx, 0.0, 1.0),
  'dominant part': lambda tx, params: split_by_subspace(SMALL, tx, SGD),
  'bulk part': lambda tx, params: split_by_subspace(SMALL, SGD, tx),
}.items():
  for value in (bsfa, 'adam', kronecker()):
    CALLS[f'no transformation: {name}, {type(value).__name__}'] = (
      lambda call=call, value=value: call(value, PARAMS),
      ['must be an optax.GradientTransformation', repr(value), CALL],
    )
for name, call in {
  'bsfa': lambda x: bsfa(estimator=x),
  'interpolated': around,
  'split': lambda x: split_by_subspace(x, SGD, SGD),
}.items():
  for value in (pca, 'pca', 3) if name == 'bsfa' else (pca,):
    CALLS[f'no estimator: {name}, {type(value).__name__}'] = (
      lambda call=call, value=value: call(value),
      ['estimator must be an Estimator', repr(value), 'estimator=pca()'],
    )
for value in ('no', 1, 0.0, None):
  CALLS[f'grafting {value!r}'] = (
    lambda value=value: bsfa(grafting=value),
    ['grafting must be True or False', repr(value)],
  )


@pytest.mark.parametrize('name', CALLS)
def test_wrong_call(name):
  call, parts = CALLS[name]
  with pytest.raises((TypeError, ValueError)) as error:
    call()
  message = str(error.value)
  assert all(part in message for part in parts), message
  assert message.count('.\n') == 0


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
      {
        'axes': {'bias': None, 'kernel': 1},
        'batch_axes': {'bias': None, 'kernel': 1},
        'leaves': lambda name, leaf: True,
      },
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
