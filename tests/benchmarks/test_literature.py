"""The literature's reproductions, tiny, on made-up images in the form of MNIST."""

import functools
import math

import numpy as np
import pytest

from benchmarks import models, search, tasks
from benchmarks.__main__ import main
from benchmarks.literature import ablation, bulk_sgd, common, speedup
from benchmarks.literature.subspaces import matrices, pca


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """1,000 images whose pixels tell the label, so that a few steps learn something."""
  folder = tmp_path_factory.mktemp('data')
  rng = np.random.default_rng(0)
  patterns = rng.integers(0, 200, (10, 28, 28))
  for part in ('train', 'test'):
    labels = rng.integers(0, 10, 1000)
    images = patterns[labels] + rng.integers(0, 55, (1000, 28, 28))
    np.savez(
      folder / f'mnist_{part}.npz',
      images=images.astype(np.uint8),
      labels=labels.astype(np.uint8),
    )
  return folder


@pytest.fixture
def small(monkeypatch):
  """The same task with these images and 16 neurons a layer."""
  mlp = lambda rngs: models.MLP((784, 16, 16), 10, rngs=rngs)
  build = functools.partial(tasks.mnist, mlp, tasks.squared_error, rows=50, images=1000)
  task = tasks.TASKS[common.TASK]._replace(build=build)
  monkeypatch.setitem(tasks.TASKS, common.TASK, task)


def saved(store, module):
  return store.load(common.collection(module.NAME))


def few_directions():
  return pca(2, 2, decay=0.9, leaves=matrices)


@pytest.mark.slow
def test_bulk_sgd(data, small, store):
  plan = bulk_sgd.Plan(
    steps=40, look_every=10, hessian_images=20, threshold=0.0, methods=('sgd', 'dom')
  )
  bulk_sgd.run(data, [0], store, plan)
  found = saved(store, bulk_sgd)
  switch = bulk_sgd.switch_of(found['sgd-0'], plan)
  assert switch == found['dom-0']['hyper']['switch'] == 10
  sgd, dom = (found[name]['full_set_losses'] for name in ('sgd-0', 'dom-0'))
  assert sgd[:2] == dom[:2]  # until the filter is switched on
  assert sgd[-1] < dom[-1]
  assert all(0 < x <= 1 for x in found['sgd-0']['watched']['chi'])


@pytest.mark.slow
def test_speedup(data, small, store):
  methods = {
    'momentum': speedup.METHODS['momentum'],
    'pca': speedup.Method('PCA', few_directions, alpha=1.0, gamma=4.0),
  }
  plan = speedup.Plan(
    steps=300, warmup=20, rates=(0.002, 0.01), trials=2, trial_steps=100,
    methods=methods,
  )  # fmt: skip
  speedup.run(data, [0], store, plan)
  before = saved(store, speedup)
  sgd = before['sgd-0.01-0']
  target = speedup.final(sgd)
  assert target < speedup.final(before['sgd-0.002-0'])
  (pca_run,) = (r for name, r in before.items() if name.startswith('pca-'))
  steps = common.crossing(pca_run['full_set_losses'], pca_run['every'], target)
  assert steps < 200
  speedup.run(data, [0], store, plan)  # nothing is measured again
  assert saved(store, speedup) == before


@pytest.mark.slow
def test_ablation(data, small, store):
  study = ablation.Study('PCA', few_directions, (1.0,), 2.0, (1.0, 2.0))
  plan = ablation.Plan(
    steps=100, rate=0.02, whole=(1.0, 1000.0), studies={'pca': study}
  )
  ablation.run(data, [0], store, plan)
  found = saved(store, ablation)
  (diverged,) = ablation.at(found, 'whole', {'gamma': 1000.0})
  (plain,) = ablation.at(found, 'whole', {'gamma': 1.0})
  (same,) = ablation.at(found, 'pca', {'alpha': 1.0, 'gamma': 1.0})
  assert diverged['diverged']
  np.testing.assert_allclose(
    same['full_set_losses'], plain['full_set_losses'], rtol=1e-3
  )


def test_page_of_a_reproduction(store, folders, tmp_path):
  for gamma, losses in (1.0, [1.0] * 16), (8.0, [1.0, None]):
    result = {'seed': 0, 'hyper': {'gamma': gamma}, 'every': 20, 'spikes': 0}
    result |= {'full_set_losses': losses, 'diverged': None in losses}
    name = common.run_name('whole', result['hyper'], 0)
    store.save(common.collection('ablation'), name, result)
  assert main(['report', *folders, '--docs', str(tmp_path)]) == 0
  page = (tmp_path / 'tables' / 'literature.md').read_text()
  assert '\n## ablation\n' in page
  assert '| 8 | 1 of 1 diverged |  |  |\n' in page
  assert '| 1 | 1.0000 |  |  |\n' in page
  assert (tmp_path / 'figures' / 'literature-ablation.svg').exists()


def test_speed_up_in_words():
  show = lambda reached: f'{sum(reached):g}'
  assert speedup.worth([2.0, 3.0], show) == '5x'
  assert speedup.worth([2.0, None], show) == '2x (1 of 2 seeds)'
  assert speedup.worth([None], show) == 'not reached'


def test_reached_and_crossing():
  losses = [10.0, 8.0, 6.0, 4.0, 2.0, *[0.0] * 20]
  # The means over five looks are 6, 4, 2.4, 1.2, 0.4, 0 ..., the first one at step 80.
  assert common.reached(losses, 20, 4.0) == 100
  assert common.reached(losses, 20, -1.0) is None
  assert common.reached(losses[:8], 20, 4.0) is None  # not yet for long
  losses[9] = 100.0  # so it did not stay
  assert common.reached(losses, 20, 4.0) == 280
  assert common.crossing(losses, 20, 5.0) == pytest.approx(90)
  assert common.crossing(losses, 20, -1.0) is None


def test_spikes():
  losses = np.ones(200)
  losses[10] = 9.0  # there is no median yet
  losses[[100, 150]] = 2.5
  losses[120] = 1.5
  assert common.spikes(losses) == 2
  assert common.spikes([*losses, math.nan]) == 3


def test_search():
  start = {'rate': 0.1, 'alpha': 0.5, 'gamma': 4.0}
  method = speedup.METHODS['pca-20']
  tried = []

  def judge(hyper):
    tried.append(hyper)
    return abs(hyper['gamma'] - 16) + hyper['alpha']

  best = search.climb(start, lambda hyper: speedup.moves(method, hyper), judge, 6)
  assert best == {'rate': 0.1, 'alpha': 0.25, 'gamma': 16.0}
  assert len(tried) == 6
