"""Settings of the whole suite: eight CPU devices and no silent promotion."""

import gc
import os

# Two workers on two cores gain nothing from thread pools of their own, and compiling is
# most of the time: the little there is to run needs no tuning.
if 'PYTEST_XDIST_WORKER' in os.environ:
  os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0'
    ' --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false',
  )
  os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import optax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Adam's `float ** int32` is the one step of optax's that strict promotion refuses.
_bias_correction = optax.tree.bias_correction


def _promoting_bias_correction(moment, decay, count):
  with jax.numpy_dtype_promotion('standard'):
    return _bias_correction(moment, decay, count)


optax.tree.bias_correction = _promoting_bias_correction


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is installed
def pytest_xdist_make_scheduler(config, log):
  """Neighbours run in one process: they share fixtures and compiled functions."""
  from xdist.scheduler import WorkStealingScheduling

  return WorkStealingScheduling(config, log)


def pytest_collection_finish():
  """What is imported stays: the garbage collector need not go through it again."""
  gc.freeze()
  gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def standard_promotion():
  """JAX's default promotion, for code of others that relies on it."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture
def round_trip(tmp_path):
  """A tree through an Orbax checkpoint, restored into one of shapes."""
  import orbax.checkpoint as ocp

  def restored(tree, target):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / 'checkpoint', tree)
      checkpointer.wait_until_finished()
      return checkpointer.restore(tmp_path / 'checkpoint', target)

  return restored
