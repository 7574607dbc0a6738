"""The benchmark harness: runs, the search for learning rates, and the report."""

import json
import lzma
import math
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

import bsfa_optax

pytest.importorskip('flax')
pytest.importorskip('orbax.checkpoint')

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ belongs to the checkout, not to the package

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import contenders, report, runs, tasks  # noqa: E402
from benchmarks.progress import Progress  # noqa: E402

PATHS = [str(Path(bsfa_optax.__file__).parents[1]), str(ROOT)]
PAGE = 'before\n\n<!-- generated: begin -->\n<!-- generated: end -->\n\nafter\n'


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


def main(*options: str) -> int:
  return command.main(options)


def files(folder: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in sorted(folder.glob('**/*')) if p.is_file()}


# Runs.


def test_second_call_runs_nothing(tiny, tmp_path, monkeypatch):
  options = ['run', '--task', tiny, '--contender', 'adamw', '--learning-rate', '0.1']
  options += ['0.2', '--seed', '0', '1', '--results', str(tmp_path)]
  assert main(*options) == 0
  before = files(tmp_path)
  assert list(before) == [
    f'adamw-20-{rate}-{seed}.json' for rate in ('0.1', '0.2') for seed in (0, 1)
  ]
  monkeypatch.setattr(runs.Trainer, 'train', None)
  assert main(*options) == 0
  assert files(tmp_path) == before


def test_result_says_what_it_is_of(tiny, tmp_path):
  options = ['--task', tiny, '--contender', 'bsfa', '--learning-rate', '0.1']
  main('run', *options, '--steps', '33', '--results', str(tmp_path))
  (result,) = runs.load(tmp_path)
  assert result['steps'] == 33
  assert result['seed'] == 0
  assert len(result['loss_curve']['losses']) == 33
  assert result['validation_loss'] < result['loss_curve']['losses'][0]
  assert result['step_ms'] > 0
  assert result['parameters'] == 16
  assert result['state_bytes'] > 2 * 4 * 16
  assert result['settings']['filter']['gamma'] == 4.0
  assert result['recipe']['weight_decay'] == 0.1
  assert result['versions']['jax']
  assert result['machine']['platform'] == 'cpu'


def test_run_does_not_depend_on_those_before(tiny, tmp_path):
  """One compiled step serves all rates, lengths and seeds."""
  for folder, rates in ('one', ['0.1']), ('many', ['0.3', '0.1']):
    options = ['--task', tiny, '--contender', 'adamw', '--learning-rate', *rates]
    main('run', *options, '--results', str(tmp_path / folder))
  one, many = (
    json.loads((tmp_path / folder / tiny / 'adamw-20-0.1-0.json').read_text())
    for folder in ('one', 'many')
  )
  for result in one, many:
    del result['step_ms']
  assert one == many


def test_divergence_is_a_result(tiny, tmp_path):
  options = ['--task', tiny, '--contender', 'sgdm', '--learning-rate', '1e30']
  main('run', *options, '--results', str(tmp_path))
  (result,) = runs.load(tmp_path)
  assert runs.score(tasks.TASKS[tiny], result) == math.inf
  assert len(result['loss_curve']['losses']) == 10  # it stops at its next look


def test_changed_settings_are_noticed(tiny, tmp_path, monkeypatch, capsys):
  options = ['run', '--task', tiny, '--contender', 'adamw', '--learning-rate', '0.1']
  options += ['--results', str(tmp_path)]
  main(*options)
  changed = contenders.CONTENDERS['adamw']._replace(settings={'b1': 0.5})
  monkeypatch.setitem(contenders.CONTENDERS, 'adamw', changed)
  main(*options)
  assert 'other settings' in capsys.readouterr().out


@pytest.mark.parametrize('name', contenders.CONTENDERS)
def test_contender_lowers_the_loss(name, tiny):
  if name == 'kron':
    pytest.importorskip('psgdax')
  laboratory = runs.Laboratory(Path('unused'), Path('unused'))
  rate = 0.02 if name == 'sgdm' else 0.05
  with runs.tqdm(disable=True) as bar:
    result = laboratory.trainer(tiny, name).train(rate, 60, 0, bar)
  curve = result['loss_curve']['losses']
  assert result['validation_loss'] < curve[0] / 2


def test_filtered_contender_is_the_alias(tiny, tmp_path):
  """`bsfa` is bsfa_adamw on the hidden matrices, with the task's settings."""
  task = tasks.TASKS[tiny]._replace(clip=None)
  params = line_fit(None).init(0)
  gradient = {'layers': [{'kernel': np.arange(16, dtype=np.float32).reshape(4, 4)}]}
  ours = contenders.make_optimizer(contenders.CONTENDERS['bsfa'], task, lambda _: 0.1)
  alias = bsfa_optax.bsfa_adamw(0.1, b2=0.95, weight_decay=0.1)
  states = ours.init(params), alias.init(params)
  update, update_alias = jax.jit(ours.update), jax.jit(alias.update)
  for _ in range(4):
    one, state = update(gradient, states[0], params)
    two, other = update_alias(gradient, states[1], params)
    states = state, other
    np.testing.assert_array_equal(
      one['layers'][0]['kernel'], two['layers'][0]['kernel']
    )


def test_schedule_is_the_one_of_the_example(standard_promotion):
  task = tasks.TASKS['llama-stdlib']
  expected = optax.warmup_cosine_decay_schedule(0.0, 1.0, 30, 300, 1 / 20)
  for count in (0, 1, 29, 30, 31, 150, 299, 300):
    share = runs.share_of_peak(task, np.int32(count), np.float32(300))
    np.testing.assert_allclose(share, expected(count), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ['masked-chain', 'llama-stdlib'])
def test_batches_depend_on_seed_and_step_alone(name):
  one, two = (tasks.TASKS[name].build(Path('none')).batch for _ in range(2))

  def equal(first, second):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))

  for place in (0, 0), (0, 1), (1, 0):
    assert equal(one(*place), two(*place))
  assert not equal(one(0, 0), one(0, 1))
  assert not equal(one(0, 0), one(1, 0))


def test_words_share_zero_if_rare(tmp_path):
  for part, text in ('train', 'a a a, b b\nc'), ('valid', 'c b a'):
    (tmp_path / f't_{part}.txt.xz').write_bytes(lzma.compress(text.encode()))
  text = tasks.read_words('t', tmp_path, vocabulary=3)
  np.testing.assert_array_equal(text.train, [1, 1, 1, 0, 2, 2, 0, 0])
  np.testing.assert_array_equal(text.validation, [0, 2, 1])


# The search.


@pytest.mark.parametrize('optimum', [1e-5, 3e-3, 8e-3, 0.03, 2.0])
def test_search_ends_between_worse_neighbours(optimum):
  tried = []

  def score_at(rate):
    tried.append(rate)
    return abs(math.log(rate / optimum))

  best = runs.search(8e-3, 40, score_at)
  assert abs(math.log2(best / optimum)) <= 0.26  # half of a half-step
  below, above = (best * 2**x for x in (-0.5, 0.5))
  for neighbour in below, above:
    assert any(abs(rate / neighbour - 1) < 0.01 for rate in tried)
  assert len(tried) == len(set(tried))


def test_search_stops_at_its_budget():
  tried = []
  assert runs.search(1e-3, 4, lambda rate: tried.append(rate) or -rate) is None
  assert len(tried) == 4


def test_rates_are_ranked_by_mean_over_most_seeds(tiny):
  losses = {0.1: [1.0], 0.2: [1.1, 1.5], 0.3: [1.2, 1.3], 0.4: [1.0, math.nan]}
  results = [
    {'learning_rate': rate, 'steps': 20, 'seed': seed, 'validation_loss': loss}
    for rate, values in losses.items()
    for seed, loss in enumerate(values)
  ]
  assert runs.ranked_rates(results, tasks.TASKS[tiny], 20) == [0.3, 0.2, 0.1]
  assert runs.best_rate(results, tasks.TASKS[tiny], 10) is None


def test_search_avoids_divergence():
  best = runs.search(1.0, 40, lambda rate: math.inf if rate > 0.05 else -rate)
  assert best == pytest.approx(0.0453, rel=1e-2)


def test_tune_and_seeds(tiny, tmp_path, capsys):
  options = ['--task', tiny, '--contender', 'adamw', 'sgdm', '--results', str(tmp_path)]
  main('seeds', *options)
  assert capsys.readouterr().out.count('call tune first') == 2
  main('tune', *options, '--budget', '2')
  assert 'call again' in capsys.readouterr().out
  main('tune', *options, '--budget', '30')
  assert 'the best rate is' in capsys.readouterr().out
  main('seeds', *options, '--horizons', '0.5', '2')
  found = runs.load(tmp_path)
  adamw = [r for r in found if r['contender'] == 'adamw']
  best = runs.best_rate(adamw, tasks.TASKS[tiny], 20)
  for steps in 10, 20, 40:
    of_length = [r for r in adamw if (r['steps'], r['learning_rate']) == (steps, best)]
    assert [r['seed'] for r in of_length] == [0, 1, 2]
  assert all(r['steps'] == 20 for r in found if r['contender'] == 'sgdm')
  of_both = [r for r in adamw if r['steps'] == 20 and r['seed'] == 2]
  assert len(of_both) == 2  # the best rate and the second best
  equal = [r for r in found if (r['contender'], r['learning_rate']) == ('sgdm', best)]
  assert {r['seed'] for r in equal} == {0, 1, 2}


def test_bsfa_is_also_trained_shorter(tiny, tmp_path):
  options = ['--task', tiny, '--contender', 'bsfa', '--results', str(tmp_path)]
  main('run', *options, '--learning-rate', '0.1')
  main('seeds', *options, '--seed', '0', '--horizons', '0.5', '2')
  assert {r['steps'] for r in runs.load(tmp_path)} == {10, 20}


# Interruption and errors.


TOY = """
import functools, sys
from benchmarks import __main__, tasks
build = functools.partial(tasks.language_model, 'toy', tasks.python_sources)
tasks.TASKS['toy'] = tasks.Task('a test', 20, build)
sys.exit(__main__.main())
"""


def test_interruption_leaves_whole_files_only(tmp_path):
  options = ['run', '--task', 'toy', '--contender', 'adamw', '--learning-rate', '0.01']
  options += ['--seed', *map(str, range(2000)), '--results', str(tmp_path)]
  process = subprocess.Popen(
    [sys.executable, '-c', TOY, *options],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(PATHS)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  give_up = time.monotonic() + 240
  while process.poll() is None and len(list(tmp_path.glob('*/*.json'))) < 2:
    assert time.monotonic() < give_up
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  try:
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 130, err
  assert 'goes on with what is missing' in err
  assert 'Traceback' not in err
  names = list(files(tmp_path))
  assert 2 <= len(names) < 2000
  assert all(name.endswith('.json') for name in names)
  assert all('validation_loss' in result for result in runs.load(tmp_path))


def test_interrupt_waits_for_the_next_update(capfd):
  before = signal.getsignal(signal.SIGINT)
  with Progress('work', 3, 'step') as bar:
    bar.update()
    signal.raise_signal(signal.SIGINT)  # as in a callback that swallows exceptions
    assert 'stopping at the next step' in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      bar.update()
  assert signal.getsignal(signal.SIGINT) == before


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
  def interrupted(self, text):
    self.write_bytes(text[:5].encode())
    raise KeyboardInterrupt

  monkeypatch.setattr(Path, 'write_text', interrupted)
  with pytest.raises(KeyboardInterrupt):
    runs.write_json(tmp_path / 'a.json', {'key': 'value'})
  assert files(tmp_path) == {}


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--task', 'nonsense'], ["'nonsense'", 'masked-chain']),
    (['--contender', 'nonsense'], ["'nonsense'", 'adamw']),
    (['--learning-rate', '-1'], ['--learning-rate', 'positive', '-1']),
    (['--learning-rate', 'nan'], ['--learning-rate', 'positive', 'nan']),
    (['--seed', '-1'], ['--seed', 'at least 0', '-1']),
    (['--steps', '0'], ['--steps', 'at least 1', '0']),
    (
      ['--task', 'vit-mnist', '--data', 'nowhere'],
      ['mnist_train.npz', 'nowhere', '--data', 'docs/benchmarks.md'],
    ),
  ],
  ids=lambda value: ' '.join(value) if value[0].startswith('--') else '',
)
def test_wrong_options_are_explained(options, words, capsys, tmp_path):
  right = ['--task', 'masked-chain', '--contender', 'adamw', '--learning-rate', '0.1']
  with pytest.raises(SystemExit) as error:
    main('run', *right, '--results', str(tmp_path), *options)
  assert error.value.code == 2
  message = capsys.readouterr().err
  for word in words:
    assert word in message
  assert files(tmp_path) == {}


# The report.


def save_result(folder, contender, rate, seed, loss, steps=20, **more):
  result = {
    'task': 'tiny',
    'contender': contender,
    'learning_rate': rate,
    'steps': steps,
    'seed': seed,
    'validation_loss': loss,
    'loss_curve': {'every': 1, 'losses': [3.0, loss]},
    'parameters': 16,
    'state_bytes': 128,
  }
  run = runs.Run('tiny', contender, rate, steps, seed)
  runs.write_json(run.path(folder), result | more)


@pytest.fixture
def study(tiny, tmp_path):
  """Results in which bsfa is worth twice its steps and sgdm less than half."""
  results, docs = tmp_path / 'results', tmp_path / 'docs'
  docs.mkdir()
  (docs / report.PAGE).write_text(PAGE)
  for seed in range(3):
    for steps, loss in (10, 2.0), (20, 1.0), (40, 0.5), (60, 0.4):
      save_result(results, 'adamw', 0.1, seed, loss + 0.01 * seed, steps)
    for steps, loss in (5, 1.5), (20, 0.5):
      save_result(results, 'bsfa', 0.2, seed, loss + 0.01 * seed, steps)
    save_result(results, 'sgdm', 0.2, seed, 2.5)
    for steps, loss in (20, 0.75), (40, 0.25):
      save_result(results, 'muon', 0.2, seed, loss + 0.01 * seed, steps)
  save_result(results, 'muon', 0.2, 0, 0.2, steps=60)
  for contender, rate, loss in (
    ('adamw', 0.05, 1.2),
    ('adamw', 0.2, 1.3),
    ('bsfa', 0.1, 0.75),
    ('bsfa', 0.4, None),
  ):
    save_result(results, contender, rate, 0, loss)
  runs.add_times(results, 'tiny', {'adamw': [1.0, 2.0, 3.0], 'bsfa': [1.6, 3.2, 4.8]})
  return results, docs


def rows_of(page: str, contender: str) -> list[list[str]]:
  return [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in page.splitlines()
    if line.startswith(f'| {contender} ')
  ]


def test_report_writes_tables_and_figures(study, capsys):
  results, docs = study
  readme = docs.parent / 'README.md'
  readme.write_text(PAGE.replace('generated', 'headline'))
  main('report', '--results', str(results), '--docs', str(docs))
  (headline,) = rows_of(readme.read_text(), '`tiny`')
  assert headline[1:] == [
    '>1.00 ± 0.00x',
    '**2.00 ± 0.00x**',  # half way in log(steps)
    '1.41 ± 0.00x',
    '**2.00 ± 0.00x**',
    '1.41 ± 0.00x',
    '1.25 ± 0.00x',
  ]
  page = (docs / report.PAGE).read_text()
  assert page.startswith('before\n')
  assert page.endswith('\nafter\n')
  tuned, equal, *lengths = rows_of(page, 'bsfa')
  speed_ups = ['2.00 ± 0.00x', '2.00 ± 0.00x', '1.41 ± 0.00x', '1.60x', '1.25 ± 0.00x']
  assert tuned == ['bsfa', '0.2', '0.5100 ± 0.0100', *speed_ups, '8.0']
  assert equal == ['bsfa', '0.7500', '1.41x', '1']  # half way in log(steps)
  sweep = lengths[2:]
  assert [row[1] for row in lengths[:2]] == ['5', '20']
  assert [row[1] for row in sweep] == ['0.1', '**0.2**', '0.4']
  assert sweep[2][2] == 'diverged'
  assert rows_of(page, 'muon')[0][4] == '>1.00 ± 0.00x'
  assert rows_of(page, 'sgdm')[0][3:6] == ['<0.50 ± 0.00x', '-', '<1.00 ± 0.00x']
  names = {'sweep-tiny.png', 'curves-tiny.png', 'speed-ups.png'}
  assert set(files(docs / 'figures')) == names
  printed = capsys.readouterr().out
  assert 'missing: tiny: all runs of nadamw' in printed
  assert "sgdm's best rate, 0.2, is at the end of its grid" in printed
  assert 'no time of sgdm' in printed
  assert '1 of 3 seeds of muon, 60 steps' in printed
  assert 'muon, 40 steps' not in printed
  assert 'of bsfa at' not in printed
  assert 'no time of bsfa\n' not in printed
  assert 'missing: masked-chain: everything' in printed
  assert '- masked-chain: everything\n' in page


def test_report_twice_gives_the_same_bytes(study):
  results, docs = study
  main('report', '--results', str(results), '--docs', str(docs))
  before = files(docs)
  main('report', '--results', str(results), '--docs', str(docs))
  assert files(docs) == before


def test_report_without_results_says_so(tmp_path, capsys):
  (tmp_path / report.PAGE).write_text(PAGE)
  main('report', '--results', str(tmp_path / 'none'), '--docs', str(tmp_path))
  assert 'No results yet.' in (tmp_path / report.PAGE).read_text()
  assert 'missing: masked-chain: everything' in capsys.readouterr().out


def test_sensitivity(tiny, tmp_path, monkeypatch, capsys):
  results, docs = tmp_path / 'results', tmp_path / 'docs'
  docs.mkdir()
  (docs / report.PAGE).write_text(PAGE)
  some = ('bsfa-alpha-0.2', 'bsfa-refresh_every-5')
  monkeypatch.setattr(
    command, 'VARIANTS', {name: contenders.VARIANTS[name] for name in some}
  )
  options = ['--task', tiny, '--results', str(results)]
  main('sensitivity', *options)
  assert 'call tune first' in capsys.readouterr().out
  main('run', *options, '--contender', 'bsfa', '--learning-rate', '0.1')
  main('sensitivity', *options)
  changed = {r['contender']: r['settings'] for r in runs.load(results)}
  assert set(changed) == {'bsfa', *some}
  assert changed[some[0]]['filter'] == changed['bsfa']['filter'] | {'alpha': 0.2}
  assert changed[some[1]]['estimator']['refresh_every'] == 5
  main('report', '--results', str(results), '--docs', str(docs))
  assert (docs / 'figures' / 'sensitivity-tiny.png').exists()
  assert 'figures/sensitivity-tiny.png' in (docs / report.PAGE).read_text()


def test_times_are_in_units_of_adamw_and_accumulate(tiny, tmp_path):
  options = ['time', '--task', tiny, '--rounds', '2', '--steps-a-round', '3']
  options += ['--results', str(tmp_path)]
  main(*options, '--contender', 'sgdm')
  main(*options, '--contender', 'galore')
  times = runs.read_times(tmp_path, tiny)
  assert set(times) == {'adamw', 'sgdm', 'galore'}
  assert times['adamw']['times_adamw'] == 1
  assert times['galore']['step_ms'] > 0


def test_committed_results_are_of_contenders():
  found = runs.load(runs.RESULTS)
  assert found
  for result in found:
    run = runs.Run(*(result[name] for name in runs.Run._fields))
    assert run.path(runs.RESULTS).exists()
    assert contenders.find(run.contender)
