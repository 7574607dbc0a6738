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
import optax
from optax._src import float64_test, test_utils
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
  return bsfa_optax.pca(rank=2, history=2, **kwargs)


def _joint_pca():
  """A single block of all leaves, so that vectors are filtered too."""
  joint = lambda params: jax.tree.map(lambda _: 'all', params)
  return _small_pca(blocks=joint)


# Not under `from __future__ import annotations`: optax looks at the annotation.
def _adamw_bsfa(
  learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0, estimator=None
):
  return optax.chain(
    optax.adamw(learning_rate), bsfa_optax.bsfa(alpha, gamma, estimator=estimator)
  )


def _bsfa_adamw_chain(
  learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0, estimator=None
):
  return optax.chain(
    bsfa_optax.bsfa(alpha, gamma, estimator=estimator), optax.adamw(learning_rate)
  )


def _accelerate(
  learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0, estimator=None
):
  metric = optax.scale_by_adam(b1=0.0)
  return bsfa_optax.accelerate(
    optax.adamw(learning_rate), alpha, gamma, history=metric, estimator=estimator
  )


def _split(learning_rate: optax.ScalarOrSchedule, estimator=None):
  return bsfa_optax.split_by_subspace(
    estimator or bsfa_optax.kronecker(),
    dominant=optax.adam(learning_rate),
    bulk=optax.sgd(learning_rate),
  )


def _interpolated(
  learning_rate: optax.ScalarOrSchedule, alpha=0.5, gamma=2.0, estimator=None
):
  return bsfa_optax.interpolated(
    optax.adam(learning_rate), alpha, gamma, estimator=estimator, threshold=0.1
  )


@functools.wraps(bsfa_optax.bsfa_adamw)
def _bsfa_adamw(*args, **kwargs):
  return bsfa_optax.bsfa_adamw(*args, **kwargs)


_bsfa_adamw.__signature__ = inspect.signature(bsfa_optax.bsfa_adamw, eval_str=True)

FACTORIES = {
  'adamw_bsfa': _adamw_bsfa,
  'bsfa_adamw_chain': _bsfa_adamw_chain,
  'bsfa_adamw': _bsfa_adamw,
}
OTHER_FORMS = {
  'accelerate': _accelerate,
  'split': _split,
  'interpolated': _interpolated,
}
ESTIMATORS = {
  'default': lambda: None,
  'not yet refreshed': lambda: bsfa_optax.kronecker(refresh_every=2),
  'pca': _small_pca,
  'joint': _joint_pca,
  'dct': lambda: bsfa_optax.dct(rank=1),
}
TARGETS = {
  'parabola': _common_test._setup_parabola,
  'rosenbrock': _common_test._setup_rosenbrock,
  'matrix_parabola': _common_test._setup_matrix_parabola,
  'mixed_tensor': _common_test._setup_mixed_tensor_target,
}

# Every placement with the default, every estimator in one, the other forms with PCA.
ENTRIES = [(name, 'default') for name in FACTORIES]
ENTRIES += [('adamw_bsfa', kind) for kind in ('pca', 'joint', 'dct')]
ENTRIES += [(name, 'pca') for name in OTHER_FORMS]
FACTORIES |= OTHER_FORMS
every_entry = pytest.mark.parametrize(('opt_name', 'estimator'), ENTRIES)


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

  def run(test, opt_name, estimator, **kwargs):
    opt_kwargs = {'learning_rate': 1e-2, 'estimator': ESTIMATORS[estimator]()}
    _run(
      _common_test.ContribTest,
      COMMON[test],
      opt_name=opt_name,
      opt_kwargs=opt_kwargs,
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


@every_entry
def test_extra_args_and_no_recompilation(run_common, opt_name, estimator):
  run_common('test_optimizers_accept_extra_args', opt_name, estimator, wrap=False)


@every_entry
@pytest.mark.parametrize('target', TARGETS.values(), ids=TARGETS)
def test_converges(run_common, opt_name, estimator, target):
  run_common('test_optimizers', opt_name, estimator, target=target, dtype='float32')


@every_entry
def test_inject_hyperparams(run_common, opt_name, estimator):
  test = 'test_optimizers_can_be_wrapped_in_inject_hyperparams'
  # It compares states after one update of rank 1: the rest of its basis is arbitrary.
  kind = 'not yet refreshed' if estimator == 'default' else estimator
  run_common(test, opt_name, kind)


@every_entry
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_preserves_dtype(run_common, opt_name, estimator, dtype):
  run_common('test_preserve_dtype', opt_name, estimator, dtype=dtype)


@pytest.mark.usefixtures('standard_promotion')  # for MultiSteps
@every_entry
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_gradient_accumulation(run_common, opt_name, estimator, dtype):
  run_common('test_gradient_accumulation', opt_name, estimator, dtype=dtype)


@every_entry
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32', 'float64'])
def test_state_is_stable(run_common, opt_name, estimator, dtype):
  dtype = getattr(jnp, dtype)
  run_common('test_state_shape_dtype_shard_stability', opt_name, estimator, dtype=dtype)


@every_entry
def test_learning_rate_schedule(run_common, opt_name, estimator):
  test = 'test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such'
  run_common(test, opt_name, estimator)


@every_entry
def test_float64(opt_name, estimator):
  try:
    kwargs = {'learning_rate': 0.1, 'estimator': ESTIMATORS[estimator]()}
    test = FLOAT64['test_mixed_dtype_input_outputs']
    _run(float64_test.Float64Test, test, FACTORIES[opt_name], kwargs)
  finally:
    jax.config.update('jax_enable_x64', False)  # optax forgets to when it fails


@every_entry
def test_abstract_init(opt_name, estimator):
  opt = FACTORIES[opt_name](1.0, estimator=ESTIMATORS[estimator]())
  test = SHARDING['test_init_with_abstract_input']
  _run(sharding_test.ShardingTest, test, opt)


@every_entry
@pytest.mark.parametrize(
  'test',
  [
    'test_state_sharding_type_init_match_update',
    'test_state_sharding_type_preserved_with_jit',
  ],
)
def test_sharding(monkeypatch, opt_name, estimator, test):
  # Compared as a string there, where '0.10' < '0.7.2', and all would be skipped.
  monkeypatch.setattr(jax, '__version__', '9')
  opt = FACTORIES[opt_name](1.0, estimator=ESTIMATORS[estimator]())
  _run(sharding_test.ShardingTest, SHARDING[test], opt)


# optax's parameter has three axes; ours has one to three, and each is sharded.
@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((8,), ('x',)),
    ((8, 4), ('x', None)),
    ((4, 8), (None, 'x')),
    ((8, 4, 2), ('x', None, None)),
    ((2, 8, 4), (None, 'x', None)),
    ((4, 2, 8), (None, None, 'x')),
  ],
  ids=str,
)
def test_sharding_of_every_axis(estimator, shape, spec):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
  opt = bsfa_optax.bsfa(0.5, 2.0, estimator=ESTIMATORS[estimator]())
  types = functools.partial(jax.tree.map, jax.typeof)
  with jax.set_mesh(mesh):
    params = jnp.zeros(shape, jnp.float16, out_sharding=sharding)
    state = opt.init(params)
    _, eager = opt.update(params, state, params)
    jitted_init = jax.jit(opt.init)(params)
    _, jitted = jax.jit(opt.update)(params, state, params)
  test_utils.assert_trees_all_equal(types(eager), types(state))
  test_utils.assert_trees_all_equal(types(jitted_init), types(state))
  test_utils.assert_trees_all_equal(types(jitted), types(state))
