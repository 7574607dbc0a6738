"""The literature's reproductions, tiny, on made-up images in the form of MNIST."""

import functools
import math

import numpy as np
import pytest

from benchmarks import __main__, literature, models, report, runs, tasks
from benchmarks.literature import ablation, bulk_sgd, common, speedup
from bsfa_optax import pca


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
  build = functools.partial(
    tasks.mnist, mlp, tasks.squared_error, rows=common.ROWS, images=1000
  )
  task = tasks.TASKS[common.TASK]._replace(build=build)
  monkeypatch.setitem(tasks.TASKS, common.TASK, task)
  monkeypatch.setattr(common, 'IMAGES', 1000)


def no_training(*args, **kwargs):
  raise AssertionError('a result that is there was measured again')


def test_bulk_sgd(data, small, tmp_path, monkeypatch):
  monkeypatch.setattr(bulk_sgd, 'STEPS', 40)
  monkeypatch.setattr(bulk_sgd, 'LOOK_EVERY', 10)
  monkeypatch.setattr(bulk_sgd, 'HESSIAN_IMAGES', 20)
  monkeypatch.setattr(bulk_sgd, 'THRESHOLD', 0.0)
  methods = {name: bulk_sgd.METHODS[name] for name in ('sgd', 'dom')}
  monkeypatch.setattr(bulk_sgd, 'METHODS', methods)
  bulk_sgd.run(data, [0], tmp_path)
  found = common.load(tmp_path / 'bulk-sgd')
  assert bulk_sgd.switch_of(found['sgd-0']) == found['dom-0']['hyper']['switch'] == 10
  sgd, dom = (found[name]['full_set_losses'] for name in ('sgd-0', 'dom-0'))
  assert sgd[:2] == dom[:2]  # until the filter is switched on
  assert sgd[-1] < dom[-1]
  assert all(0 < x <= 1 for x in found['sgd-0']['watched']['chi'])
  bulk_sgd.plot(tmp_path, tmp_path)
  assert (tmp_path / 'literature-bulk-sgd.png').stat().st_size > 1000


def test_speedup(data, small, tmp_path, monkeypatch):
  monkeypatch.setattr(speedup, 'STEPS', 200)
  monkeypatch.setattr(speedup, 'WARMUP', 20)
  monkeypatch.setattr(common, 'STAYS', 20)
  monkeypatch.setattr(speedup, 'TRIALS', 2)
  monkeypatch.setattr(speedup, 'TRIAL_STEPS', 100)
  monkeypatch.setattr(speedup, 'RATES', [0.002, 0.01])
  estimator = lambda: pca(2, 2, decay=0.9)
  methods = {
    'momentum': speedup.METHODS['momentum'],
    'pca': speedup.Method('PCA', estimator, alpha=1.0, gamma=4.0),
  }
  monkeypatch.setattr(speedup, 'METHODS', methods)
  speedup.run(data, [0], tmp_path)
  of = speedup.tuned(tmp_path)
  assert of['sgd'][0]['hyper'] == {'rate': 0.01}
  assert speedup.speed_ups(of)['pca'][0] > 1
  monkeypatch.setattr(common.Trainer, 'train', no_training)
  speedup.run(data, [0], tmp_path)
  speedup.plot(tmp_path, tmp_path)
  assert (tmp_path / 'literature-speedup.png').stat().st_size > 1000


def test_ablation(data, small, tmp_path, monkeypatch):
  monkeypatch.setattr(ablation, 'STEPS', 100)
  monkeypatch.setattr(ablation, 'RATE', 0.02)
  monkeypatch.setattr(ablation, 'WHOLE', (1.0, 1000.0))
  estimator = lambda: pca(2, 2, decay=0.9)
  study = ablation.Study('PCA', estimator, (1.0,), 2.0, (1.0, 2.0))
  monkeypatch.setattr(ablation, 'STUDIES', {'pca': study})
  results, figures = tmp_path / 'literature', tmp_path / 'figures'
  command = ['reproduce', 'ablation', '--seed', '0', '--data', str(data)]
  command += ['--results', str(results), '--figures', str(figures)]
  assert __main__.main(command) == 0
  found = common.load(results / 'ablation')
  (diverged,) = ablation.at(found, 'whole', {'gamma': 1000.0})
  (plain,) = ablation.at(found, 'whole', {'gamma': 1.0})
  (same,) = ablation.at(found, 'pca', {'alpha': 1.0, 'gamma': 1.0})
  assert diverged['diverged']
  np.testing.assert_allclose(
    same['full_set_losses'], plain['full_set_losses'], rtol=1e-3
  )
  assert ablation.speed(same, plain) == pytest.approx(1, rel=0.02)
  figure = figures / 'literature-ablation.png'
  figure.unlink()
  for page, name in (report.PAGE, 'generated'), (literature.PAGE, 'ablation'):
    (tmp_path / page).write_text(f'<!-- {name}: begin -->\n<!-- {name}: end -->')
  command = ['report', '--results', str(tmp_path), '--docs', str(tmp_path)]
  assert __main__.main(command) == 0  # of the others there is nothing to report
  assert '| 1000 | 1 of 1 diverged |  |\n' in (tmp_path / literature.PAGE).read_text()
  assert figure.exists()


def test_tables_of_the_page_are_those_of_the_results(tmp_path):
  committed = (__main__.DOCS / literature.PAGE).read_text()
  page = tmp_path / literature.PAGE
  page.write_text(committed)
  tables = {
    name: module.table(runs.RESULTS / 'literature')
    for name, module in literature.REPRODUCTIONS.items()
  }
  report.rewrite(page, tables)
  assert page.read_text() == committed


def test_page_is_rewritten_between_its_lines_or_not_at_all(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text('one\n<!-- a: begin -->\nold\n<!-- a: end -->\ntwo\n')
  report.rewrite(page, {'a': 'new'})
  after = 'one\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\ntwo\n'
  assert page.read_text() == after
  with pytest.raises(SystemExit, match='lines <!-- b: begin -->'):
    report.rewrite(page, {'a': 'newer', 'b': 'new'})
  assert page.read_text() == after
  assert list(tmp_path.iterdir()) == [page]


def test_speed_up_in_words():
  show = lambda reached: f'{sum(reached):g}'
  assert speedup.worth([2.0, 3.0], show) == '5x'
  assert speedup.worth([2.0, None], show) == '2x (1 of 2 seeds)'
  assert speedup.worth([None], show) == 'not reached'


def test_missing_data(tmp_path, capsys):
  with pytest.raises(SystemExit):
    __main__.main(['reproduce', 'bulk-sgd', '--data', str(tmp_path)])
  assert 'mnist_train.npz is not in' in capsys.readouterr().err


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
  neighbours = lambda hyper: speedup.moves('pca-20', hyper)
  tried = []

  def judge(hyper):
    tried.append(hyper)
    return abs(hyper['gamma'] - 16) + hyper['alpha']

  best = speedup.search(start, neighbours, judge)
  assert best == {'rate': 0.1, 'alpha': 0.25, 'gamma': 16.0}
  assert len(tried) == speedup.TRIALS
