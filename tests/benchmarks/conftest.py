"""A task of milliseconds, and folders for its results."""

from pathlib import Path
import sys

import numpy as np
import pytest

pytest.importorskip('flax')

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ belongs to the checkout, not to the package

from benchmarks import tasks  # noqa: E402
from benchmarks.store import Store  # noqa: E402


def line_fit(folder):
  """The smallest problem there is: a matrix times a vector."""
  del folder
  target = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)

  def loss(params, batch):
    return ((batch @ (params['layers'][0]['kernel'] - target)) ** 2).mean()

  def batch(seed, step):
    rng = np.random.default_rng([seed, step])
    return rng.standard_normal((8, 4)).astype(np.float32)

  return tasks.Problem(
    init=lambda seed: {
      'layers': [{'kernel': np.eye(4, dtype=np.float32) * (1 + seed)}]
    },
    loss=loss,
    batch=batch,
    evaluate=lambda params: {
      'validation_loss': float(loss(params, np.eye(4, dtype=np.float32)))
    },
    config={},
  )


@pytest.fixture
def tiny(monkeypatch, standard_promotion):
  """A task of milliseconds, under a name of the command line."""
  monkeypatch.setitem(tasks.TASKS, 'tiny', tasks.Task('a test', 20, line_fit))
  return 'tiny'


@pytest.fixture
def store(tmp_path):
  return Store(tmp_path / 'raw', tmp_path / 'kept')


@pytest.fixture
def folders(store):
  """The options that name the folders of the store."""
  store.collected.mkdir()
  return ['--results', str(store.raw), '--collected', str(store.collected)]


@pytest.fixture
def save_result(store):
  """Saves a made-up result."""

  def save(contender, rate, seed, loss, steps=20, task='tiny', **more):
    name = f'{contender}-{steps}-{rate:g}-{seed}'
    result = {
      'task': task,
      'contender': contender,
      'learning_rate': rate,
      'steps': steps,
      'seed': seed,
      'validation_loss': loss,
      'loss_curve': {'every': 1, 'losses': [3.0, loss]},
      'step_ms': 2.0,
      'parameters': 16,
      'state_bytes': 128,
    }
    store.save(task, name, result | more)
    return name

  return save
