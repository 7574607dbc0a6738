"""Optax's own test matrices, as shipped in its wheel, with ours as entries.

The originals are found under the methods that absl generates from them, so that
they run here as they are. A failure says which of optax's tests to read. Skipping
is a failure: each test applies to each of our transformations.
"""

import functools
import inspect
import os
import unittest
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src import float64_test
from optax.contrib import _common_test
import pytest

import bsfa_optax

# On import it builds optimizers that warn, and replaces XLA_FLAGS.
_flags = os.environ.get('XLA_FLAGS')
with warnings.catch_warnings(action='ignore'):
  from optax._src import sharding_test
if _flags is None:
  del os.environ['XLA_FLAGS']
else:
  os.environ['XLA_FLAGS'] = _flags


def _small_pca(**kwargs):
  return bsfa_optax.pca(rank=2, history=2, storage_dtype=None, **kwargs)


def _joint_pca():
  """A single block of all leaves, so that vectors are filtered too."""
  joint = lambda params: jax.tree.map(lambda _: 'all', params)
  return _small_pca(labels=joint)


# Not under `from __future__ import annotations`: optax looks at the annotation.
def _whitening(learning_rate: optax.ScalarOrSchedule, ridge=0.2):
  return optax.chain(
    bsfa_optax.scale_by_whitening(ridge), optax.scale_by_adam(), _step(learning_rate)
  )


def _step(learning_rate):
  return optax.scale_by_learning_rate(learning_rate)


@functools.wraps(bsfa_optax.bsfa_adamw)
def _bsfa_adamw(*args, **kwargs):
  return bsfa_optax.bsfa_adamw(*args, **kwargs)


_bsfa_adamw.__signature__ = inspect.signature(bsfa_optax.bsfa_adamw, eval_str=True)


def _bsfa_in_adamw(make):
  def factory(learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0):
    filter_ = bsfa_optax.bsfa(alpha, gamma, estimator=make())
    return bsfa_optax.bsfa_adamw(learning_rate, filter=filter_)

  return factory


def _adamw_bsfa(make):
  def factory(learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0):
    filter_ = bsfa_optax.bsfa(alpha, gamma, estimator=make())
    return optax.chain(optax.adamw(learning_rate), filter_)

  return factory


def _accelerate(make):
  def factory(learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0):
    return bsfa_optax.accelerate(
      optax.adamw(learning_rate),
      bsfa_optax.bsfa(alpha, gamma, estimator=make()),
      history=optax.scale_by_adam(b1=0.0),
    )

  return factory


def _accelerate_whitening(learning_rate: optax.ScalarOrSchedule, ridge=0.2):
  return bsfa_optax.accelerate(
    optax.adamw(learning_rate),
    bsfa_optax.scale_by_whitening(ridge),
    history=optax.identity(),
  )


def _split(make):
  def factory(learning_rate: optax.ScalarOrSchedule):
    return bsfa_optax.split_by_subspace(
      make(),
      dominant=optax.adam(learning_rate),
      bulk=optax.adam(learning_rate, b1=0.8),  # takes all until there is a subspace
    )

  return factory


def _interpolated(make):
  def factory(learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0):
    return bsfa_optax.interpolated(
      optax.adam(learning_rate), alpha, gamma, estimator=make(), threshold=0.1
    )

  return factory


ESTIMATORS = {
  'kronecker': bsfa_optax.kronecker,
  'not yet refreshed': lambda: bsfa_optax.kronecker(refresh_every=2),
  'pca': _small_pca,
  'joint': _joint_pca,
  'dct': lambda: bsfa_optax.dct(rank=1),
}
DEFAULTS = {'whitening': _whitening, 'bsfa_adamw': _bsfa_adamw}
PLACEMENTS = {'bsfa_in_adamw': _bsfa_in_adamw, 'adamw_bsfa': _adamw_bsfa}
FORMS = {'accelerate': _accelerate, 'split': _split, 'interpolated': _interpolated}
FACTORIES = DEFAULTS | {
  f'{place}-{kind}': make(ESTIMATORS[kind])
  for place, make in (PLACEMENTS | FORMS).items()
  for kind in ESTIMATORS
}
FACTORIES['accelerate-whitening'] = _accelerate_whitening
# The default, every estimator in one placement, the other forms with one estimator.
ENTRIES = [*DEFAULTS, 'bsfa_in_adamw-kronecker']
ENTRIES += [f'adamw_bsfa-{kind}' for kind in ('pca', 'joint', 'dct')]
ENTRIES += ['accelerate-whitening', 'split-pca', 'interpolated-pca']
SLOW = pytest.mark.slow


def over(*entries):
  """A test of each of `entries`; the fast tier has the default."""
  return pytest.mark.parametrize(
    'entry',
    [pytest.param(x, marks=[] if x == 'bsfa_adamw' else [SLOW]) for x in entries],
  )


every_entry = over(*ENTRIES)
# Where the parameter is a vector, which this alone filters.
vectors = over('bsfa_adamw', 'adamw_bsfa-joint')
DTYPES = ('float16', 'bfloat16', 'float32', 'float64')
TARGETS = {
  'parabola': _common_test._setup_parabola,
  'rosenbrock': _common_test._setup_rosenbrock,
  'matrix_parabola': _common_test._setup_matrix_parabola,
  'mixed_tensor': _common_test._setup_mixed_tensor_target,
}


def _originals(case):
  """The functions that `case`'s parameterized methods were generated from."""
  methods = (getattr(case, name) for name in dir(case) if name.startswith('test_'))
  found = (getattr(method, '__wrapped__', None) for method in methods)
  return {function.__name__: function for function in found if function is not None}


COMMON = _originals(_common_test.ContribTest)
SHARDING = _originals(sharding_test.ShardingTest)
FLOAT64 = _originals(float64_test.Float64Test)


def _run(case, function, *args, **kwargs):
  try:
    function(case(), *args, **kwargs)
  except unittest.SkipTest as skip:
    pytest.fail(f'{function.__name__} skipped: {skip}')


@pytest.fixture
def run_common(monkeypatch):
  """Runs one of optax's common tests on one of our factories."""
  monkeypatch.setattr(_common_test, '_get_opt_factory', FACTORIES.__getitem__)

  def run(test, entry, **kwargs):
    _run(
      _common_test.ContribTest,
      COMMON[test],
      opt_name=entry,
      opt_kwargs={'learning_rate': 1e-2},
      wrapper_name=None,
      wrapper_kwargs=None,
      **kwargs,
    )

  return run


def test_no_test_of_optax_is_left_out():
  assert set(COMMON) == {
    'test_gradient_accumulation',
    'test_optimizers',
    'test_optimizers_accept_extra_args',
    'test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such',
    'test_optimizers_can_be_wrapped_in_inject_hyperparams',
    'test_preserve_dtype',
    'test_state_shape_dtype_shard_stability',
  }
  assert set(SHARDING) == {
    'test_init_with_abstract_input',
    'test_microbatch_with_explicit_sharding',  # takes no optimizer
    'test_state_sharding_type_init_match_update',
    'test_state_sharding_type_preserved_with_jit',
  }
  assert set(FLOAT64) == {'test_mixed_dtype_input_outputs'}


@vectors
def test_extra_args_and_no_recompilation(run_common, entry):
  run_common('test_optimizers_accept_extra_args', entry, wrap=False)


# All targets for the default; of the others' the hardest of each kind of parameter.
CONVERGE = [('bsfa_adamw', target) for target in TARGETS]
CONVERGE += [('adamw_bsfa-joint', 'rosenbrock'), ('whitening', 'matrix_parabola')]
CONVERGE += [(entry, 'mixed_tensor') for entry in ENTRIES[1:]]


@SLOW
@pytest.mark.parametrize(('entry', 'target'), dict.fromkeys(CONVERGE))
def test_converges(run_common, entry, target):
  run_common('test_optimizers', entry, target=TARGETS[target], dtype='float32')


@SLOW
@over('bsfa_adamw', 'whitening', 'bsfa_in_adamw-kronecker', 'interpolated-pca')
def test_inject_hyperparams(run_common, entry):
  test = 'test_optimizers_can_be_wrapped_in_inject_hyperparams'
  # It compares states after one update of rank 1: the rest of its basis is arbitrary.
  run_common(test, entry.replace('-kronecker', '-not yet refreshed'))


@every_entry
def test_preserves_dtype(run_common, entry):
  run_common('test_preserve_dtype', entry, dtype='bfloat16')


@pytest.mark.usefixtures('standard_promotion')  # for MultiSteps
@vectors
@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float32', marks=SLOW)])
def test_gradient_accumulation(run_common, entry, dtype):
  run_common('test_gradient_accumulation', entry, dtype=dtype)


@vectors
@pytest.mark.parametrize(
  'dtype', [pytest.param(x, marks=[] if x == 'float32' else [SLOW]) for x in DTYPES]
)
def test_state_is_stable(run_common, entry, dtype):
  dtype = getattr(jnp, dtype)
  run_common('test_state_shape_dtype_shard_stability', entry, dtype=dtype)


@every_entry
def test_learning_rate_schedule(run_common, entry):
  test = 'test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such'
  run_common(test, entry)


@every_entry
def test_float64(entry):
  try:
    test, kwargs = FLOAT64['test_mixed_dtype_input_outputs'], {'learning_rate': 0.1}
    _run(float64_test.Float64Test, test, FACTORIES[entry], kwargs)
  finally:
    jax.config.update('jax_enable_x64', False)  # optax forgets to when it fails


@every_entry
def test_abstract_init(entry):
  opt = FACTORIES[entry](1.0)
  test = SHARDING['test_init_with_abstract_input']
  _run(sharding_test.ShardingTest, test, opt)


@SLOW
@pytest.mark.parametrize(
  'test',
  [
    'test_state_sharding_type_init_match_update',
    'test_state_sharding_type_preserved_with_jit',
  ],
)
def test_sharding(monkeypatch, test):
  # Compared as a string there, where '0.10' < '0.7.2', and all would be skipped.
  monkeypatch.setattr(jax, '__version__', '9')
  opt = FACTORIES['bsfa_adamw'](1.0)
  _run(sharding_test.ShardingTest, SHARDING[test], opt)


# optax's parameters are vectors, which most of ours do not filter.
FILTERS = {
  'whitening': lambda: bsfa_optax.scale_by_whitening(),
  **{
    kind: lambda make=make: bsfa_optax.bsfa(0.5, 2.0, estimator=make())
    for kind, make in ESTIMATORS.items()
  },
}
slow_but = lambda *quick: pytest.mark.parametrize(
  'name',
  [pytest.param(k, marks=[] if k in quick else [SLOW]) for k in FILTERS],
)


@slow_but('whitening')
def test_leaves_of_two_dtypes(name):
  tx = FILTERS[name]()
  # Alike, and so one array in those that stack.
  params = [jnp.asarray(np.diag(range(1, 4)) / 3, x) for x in ('bfloat16', 'float16')]
  first = state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(2):
    updates, state = update(params, state, params)
  types = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
  assert types(updates) == types(params)
  assert types(state) == types(first)
  for out, v in zip(updates, params, strict=True):
    assert np.isfinite(np.float64(out)).all()
    assert (np.float64(out) != np.float64(v)).any()


# optax's parameter has three axes; ours have one to three, and each is sharded.
SPECS = {
  (8,): ('x',),
  (8, 4): ('x', None),
  (4, 8): (None, 'x'),
  (8, 4, 2): ('x', None, None),
  (2, 8, 4): (None, 'x', None),
  (4, 2, 8): (None, None, 'x'),
}


@pytest.mark.parametrize('name', [*FILTERS, 'split-pca', 'interpolated-pca'])
def test_types_of_the_state_on_a_mesh_are_those_of_init(name):
  tx = FILTERS[name]() if name in FILTERS else FACTORIES[name](1.0)
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,))
  # In words, where a scalar has no mesh to differ in.
  types = functools.partial(jax.tree.map, lambda x: str(jax.typeof(x)))

  def update(params):  # traced alone: types are known then
    first = tx.init(params)
    updates, state = tx.update(params, first, params)
    assert types(state) == types(first)
    assert types(updates) == types(params)
    return updates

  with jax.set_mesh(mesh):
    params = [
      jax.ShapeDtypeStruct(
        shape, jnp.float16, sharding=jax.sharding.NamedSharding(mesh, jax.P(*spec))
      )
      for shape, spec in SPECS.items()
    ]
    jax.eval_shape(update, params)
