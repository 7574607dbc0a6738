"""Runs of contenders on tasks, and the search for learning rates."""

import json
import lzma
import math
from pathlib import Path

from flax import nnx
import jax
import numpy as np
import optax
import pytest
from tqdm import tqdm

from benchmarks import contenders, llama, runs, search, tasks, training
from benchmarks.__main__ import main
from benchmarks.text import Text
import bsfa_optax

# Runs.


def test_second_call_runs_nothing(tiny, store, folders, capsys):
  options = ['run', '--task', tiny, '--contender', 'adamw', '--learning-rate', '0.1']
  options += ['0.2', '--seed', '0', '1', *folders]
  assert main(options) == 0
  found = store.load(tiny)
  assert list(found) == [
    f'adamw-20-{rate}-{seed}' for rate in ('0.1', '0.2') for seed in (0, 1)
  ]
  assert '4 of 4 runs to do' in capsys.readouterr().out
  assert main(options) == 0
  assert store.load(tiny) == found  # the times of a step included
  assert '0 of 4 runs to do' in capsys.readouterr().out


def test_collected_run_is_not_repeated_unless_asked(tiny, store, folders):
  options = ['run', '--task', tiny, '--contender', 'adamw', '--learning-rate', '0.1']
  main([*options, *folders])
  main(['collect', *folders])
  path = store.raw / tiny / 'adamw-20-0.1-0.json'
  path.unlink()
  main([*options, *folders])
  main(['tune', *options[1:5], '--budget', '1', *folders])
  assert not path.exists()
  main([*options, *folders, '--again'])
  assert path.exists()


def test_result_says_what_it_is_of(tiny, store, folders):
  options = ['--task', tiny, '--contender', 'bsfa', '--learning-rate', '0.1']
  main(['run', *options, '--steps', '33', *folders])
  (result,) = store.load(tiny).values()
  assert result['steps'] == 33
  assert result['seed'] == 0
  assert len(result['loss_curve']['losses']) == 33
  assert result['validation_loss'] < result['loss_curve']['losses'][0]
  assert result['step_ms'] > 0
  assert result['parameters'] == 16
  assert result['state_bytes'] > 2 * 4 * 16
  assert result['settings']['filter']['ridge'] == 0.2
  assert result['recipe']['weight_decay'] == 0.1
  assert result['versions']['jax']
  assert result['machine']['platform'] == 'cpu'


def test_run_does_not_depend_on_those_before(tiny, tmp_path):
  """One compiled step serves all rates, lengths and seeds."""
  for folder, rates in ('one', ['0.1']), ('many', ['0.3', '0.1']):
    options = ['--task', tiny, '--contender', 'adamw', '--learning-rate', *rates]
    main(['run', *options, '--results', str(tmp_path / folder)])
  one, many = (
    json.loads((tmp_path / folder / tiny / 'adamw-20-0.1-0.json').read_text())
    for folder in ('one', 'many')
  )
  for result in one, many:
    del result['step_ms']
  assert one == many


def test_divergence_is_a_result(tiny, store, folders):
  options = ['--task', tiny, '--contender', 'sgdm', '--learning-rate', '1e30']
  main(['run', *options, *folders])
  (result,) = store.load(tiny).values()
  assert runs.score(tasks.TASKS[tiny], result) == math.inf
  assert len(result['loss_curve']['losses']) == 10  # it stops at its next look


def test_changed_settings_are_noticed(tiny, folders, save_result, capsys):
  save_result('adamw', 0.1, 0, 1.0, settings={'b1': 0.5})
  options = ['run', '--task', tiny, '--contender', 'adamw', '--learning-rate', '0.1']
  main([*options, *folders])
  assert 'other settings' in capsys.readouterr().out


# Kron is of a package that is no dependency.
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[] if name in ('adamw', 'bsfa') else [pytest.mark.slow])
    for name in contenders.CONTENDERS
    if name != 'kron'
  ],
)
def test_contender_lowers_the_loss(name, tiny):
  task = tasks.TASKS[tiny]
  trainer = runs.TaskTrainer(task, task.build(None), contenders.find(name))
  with tqdm(disable=True) as bar:
    result = trainer.train(0.02 if name == 'sgdm' else 0.05, 60, 0, bar)
  assert result['validation_loss'] < result['loss_curve']['losses'][0] / 2


@pytest.mark.slow
def test_filtered_contender_is_the_alias(tiny):
  """`bsfa` is bsfa_adamw as a user gets it, with the task's settings."""
  task = tasks.TASKS[tiny]._replace(clip=None)
  rng = np.random.default_rng(0)
  shapes = {'embed/table': (8, 4), 'layers/kernel': (4, 4), 'layers/bias': (4,)}
  shapes |= {'patch/kernel': (3, 4), 'head/kernel': (4, 8)}
  params, gradient = (
    {name: rng.normal(size=s).astype('f') for name, s in shapes.items()}
    for _ in range(2)
  )
  rate = lambda _: 0.1  # of both, so that one program is compiled, and rounds alike
  ours = contenders.make_optimizer(contenders.CONTENDERS['bsfa'], task, rate)
  alias = bsfa_optax.bsfa_adamw(rate, b2=0.95, weight_decay=0.1)
  states = ours.init(params), alias.init(params)
  update, update_alias = jax.jit(ours.update), jax.jit(alias.update)
  for _ in range(4):
    one, state = update(gradient, states[0], params)
    two, other = update_alias(gradient, states[1], params)
    states = state, other
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_schedule_is_warm_up_and_cosine(standard_promotion):
  task = tasks.TASKS['llama-stdlib']
  expected = optax.warmup_cosine_decay_schedule(0.0, 1.0, 30, 300, 1 / 20)
  for count in (0, 1, 29, 30, 31, 150, 299, 300):
    share = training.share_of_peak(task, np.int32(count), np.float32(300))
    np.testing.assert_allclose(share, expected(count), rtol=1e-5, atol=1e-7)


def test_fine_tuning_starts_from_a_trained_model(tiny):
  problem = tasks.TASKS[tiny].build(None)
  init = tasks.pretrained(problem)
  batch = problem.batch(7, 0)
  for seed in 0, 1:
    trained = problem.loss(init(seed), batch)
    assert trained < problem.loss(problem.init(seed), batch) / 2
  # A trainer gives its arrays away, and asks for shapes in a trace.
  task, contender = tasks.TASKS[tiny], contenders.find('adamw')
  trainer = runs.TaskTrainer(task, problem._replace(init=init), contender)
  with tqdm(disable=True) as bar:
    first, second = (trainer.train(0.01, 20, 1, bar)['train_loss'] for _ in range(2))
  assert first == second
  assert trainer.sizes(1, {'rate': 0.0, 'steps': 1.0})['parameters'] == 16


@pytest.mark.parametrize('name', ['masked-chain', 'llama-stdlib'])
def test_batches_depend_on_seed_and_step_alone(name):
  one, two = (tasks.TASKS[name].build(Path('none')).batch for _ in range(2))

  def equal(first, second):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))

  for place in (0, 0), (0, 1), (1, 0):
    assert equal(one(*place), two(*place))
  assert not equal(one(0, 0), one(0, 1))
  assert not equal(one(0, 0), one(1, 0))


def test_other_numbers_of_rows_are_judged_by_the_same_tokens(standard_promotion):
  text = Text(np.arange(200, dtype='u1'), np.arange(256, dtype='u1')[::-1], 'numbers')
  few, more = (
    tasks.language_model('toy', lambda _: text, Path('none'), rows)
    for rows in (None, 8)
  )
  assert len(more.batch(0, 0)) == 2 * len(few.batch(0, 0)) == 8
  params = few.init(0)
  loss = few.evaluate(params)['validation_loss']
  assert more.evaluate(params)['validation_loss'] == pytest.approx(loss, rel=1e-5)


def test_words_share_zero_if_rare(tmp_path):
  for part, text in ('train', 'a a a, b b\nc'), ('valid', 'c b a'):
    (tmp_path / f't_{part}.txt.xz').write_bytes(lzma.compress(text.encode()))
  text = tasks.read_words('t', tmp_path, vocabulary=3)
  np.testing.assert_array_equal(text.train, [1, 1, 1, 0, 2, 2, 0, 0])
  np.testing.assert_array_equal(text.validation, [0, 2, 1])


@pytest.mark.parametrize(
  ('preset', 'millions'), [('llama-72m', 72.4), ('llama-134m', 133.9)]
)
def test_literature_presets_have_the_literature_sizes(preset, millions):
  config = llama.PRESETS[preset].model
  model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
  sizes = [leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))]
  assert round(sum(sizes) / 1e6, 1) == millions


# The search.


@pytest.mark.parametrize('optimum', [1e-5, 3e-3, 8e-3, 0.03, 2.0])
def test_search_ends_between_worse_neighbours(optimum):
  tried = []

  def score_at(rate):
    tried.append(rate)
    return abs(math.log(rate / optimum))

  best = search.best_rate(8e-3, 40, score_at)
  assert abs(math.log2(best / optimum)) <= 0.26  # half of a half-step
  below, above = (best * 2**x for x in (-0.5, 0.5))
  for neighbour in below, above:
    assert any(abs(rate / neighbour - 1) < 0.01 for rate in tried)
  assert len(tried) == len(set(tried))


def test_search_stops_at_its_budget():
  tried = []
  assert search.best_rate(1e-3, 4, lambda rate: tried.append(rate) or -rate) is None
  assert len(tried) == 4


def test_search_avoids_divergence():
  best = search.best_rate(1.0, 40, lambda rate: math.inf if rate > 0.05 else -rate)
  assert best == pytest.approx(0.0453, rel=1e-2)


def test_rates_are_ranked_by_mean_over_most_seeds(tiny):
  losses = {0.1: [1.0], 0.2: [1.1, 1.5], 0.3: [1.2, 1.3], 0.4: [1.0, math.nan]}
  results = [
    {'learning_rate': rate, 'steps': 20, 'seed': seed, 'validation_loss': loss}
    for rate, values in losses.items()
    for seed, loss in enumerate(values)
  ]
  assert runs.ranked_rates(results, tasks.TASKS[tiny], 20) == [0.3, 0.2, 0.1]
  assert runs.best_rate(results, tasks.TASKS[tiny], 10) is None


@pytest.mark.slow
def test_tune_and_seeds(tiny, store, folders, capsys):
  options = ['--task', tiny, '--contender', 'adamw', 'sgdm', *folders]
  main(['seeds', *options])
  assert capsys.readouterr().out.count('call tune first') == 2
  main(['tune', *options, '--budget', '2'])
  assert 'call again' in capsys.readouterr().out
  main(['tune', *options, '--budget', '30'])
  assert 'the best rate is' in capsys.readouterr().out
  main(['collect', *folders])
  main(['seeds', *options, '--horizons', '0.5', '2'])
  found = store.load(tiny).values()
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


@pytest.mark.slow
def test_bsfa_is_also_trained_shorter(tiny, store, folders):
  options = ['--task', tiny, '--contender', 'bsfa', *folders]
  main(['run', *options, '--learning-rate', '0.1'])
  main(['seeds', *options, '--seed', '0', '--horizons', '0.5', '2'])
  assert {r['steps'] for r in store.load(tiny).values()} == {10, 20}


@pytest.mark.slow
def test_times_are_in_units_of_adamw_and_accumulate(tiny, store, folders):
  options = ['time', '--task', tiny, '--rounds', '2', '--steps-a-round', '3', *folders]
  main([*options, '--contender', 'sgdm'])
  main(['collect', *folders])
  main([*options, '--contender', 'galore'])
  times = store.times(tiny)
  assert set(times) == {'adamw', 'sgdm', 'galore'}
  assert times['adamw']['times_adamw'] == 1
  assert times['galore']['step_ms'] > 0
