"""Results on disk: single files, and the compact ones that are committed."""

import json
from pathlib import Path

import pytest

from benchmarks import contenders, runs
from benchmarks.__main__ import collections, main
from benchmarks.store import BadResults, Store, write_json
from benchmarks.tasks import TASKS

ENVIRONMENT = {'versions': {'jax': '0.10'}, 'machine': {'cpu_cores': 2}}


def files(folder: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in sorted(folder.glob('**/*')) if p.is_file()}


@pytest.fixture
def few(save_result, store):
  """Results of two contenders, one of them of another problem and one without."""
  of_task = {'recipe': {'clip': 1.0}, 'problem': {'rows': 8}} | ENVIRONMENT
  losses = [3.0 - i / 100 for i in range(57)] + [None]
  for seed in range(3):
    curve = {'every': 5, 'losses': losses}
    more = {'settings': {'b1': 0.9}, 'loss_curve': curve} | of_task
    save_result('adamw', 0.1, seed, 1.0 / 3, **more)
  save_result('bsfa', 0.2, 0, None, **of_task | {'problem': {'rows': 16}})
  save_result('bsfa', 0.0123456789, 0, 0.5)
  store.add_times('tiny', {'adamw': {'step_ms': 1.23456} | ENVIRONMENT})
  return store


def test_compact_file_has_what_the_single_ones_have(few):
  single = few.load('tiny')
  few.collect(['tiny'])
  kept = Store(few.raw / 'none', few.collected)
  found = kept.load('tiny')
  assert list(found) == list(single)
  for name, result in single.items():
    curve, thin = (of.pop('loss_curve') for of in (result, found[name]))
    losses = [of.pop('validation_loss') or 0.0 for of in (result, found[name])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert found[name] == result
    assert len(thin['losses']) <= 20
    steps = [len(of['losses']) * of['every'] for of in (curve, thin)]
    assert steps[0] <= steps[1] < steps[0] + thin['every']
  assert kept.times('tiny') == {'adamw': {'step_ms': 1.235} | ENVIRONMENT}
  assert kept.get('tiny', 'adamw-20-0.1-0')['settings'] == {'b1': 0.9}
  assert kept.get('tiny', 'adamw-20-0.1-9') is None


def test_compact_file_says_once_what_runs_share(few):
  few.collect(['tiny'])
  text = few.path('tiny').read_text()
  lines = list(map(json.loads, text.splitlines()))
  assert sum('run' in line for line in lines) == 5
  for once in '"clip"', '"rows":8', '"jax"', '"b1"':
    assert text.count(once) == 1
  (curve,) = [x['loss_curve'] for x in lines if x.get('run') == 'adamw-20-0.1-0']
  assert curve['every'] == 15
  assert curve['losses'][:2] == [2.99, 2.96]
  assert curve['losses'][-1] is None


def test_collecting_again_changes_no_byte(few):
  assert few.collect(['tiny']) == [few.path('tiny')]
  before = files(few.collected)
  assert few.collect(['tiny']) == []
  assert Store(few.raw / 'none', few.collected).collect(['tiny']) == []
  assert files(few.collected) == before


def test_parts_give_the_same_bytes_as_the_whole(few, tmp_path):
  few.collect(['tiny'])
  in_parts = Store(tmp_path / 'part', tmp_path / 'kept-too')
  for name, result in reversed(few.load('tiny').items()):
    single = Store(in_parts.raw / name, in_parts.collected)
    single.save('tiny', name, result)
    single.add_times('tiny', few.times('tiny'))
    single.collect(['tiny'])
  assert files(in_parts.collected) == files(few.collected)


def test_rerun_replaces_the_old_result(few, save_result):
  few.collect(['tiny'])
  name = save_result('adamw', 0.1, 0, 0.25)
  assert few.get('tiny', name)['validation_loss'] == 0.25
  few.collect(['tiny'])
  kept = Store(few.raw / 'none', few.collected).load('tiny')
  assert kept[name]['validation_loss'] == 0.25
  assert len(kept) == 5


def test_collect_says_what_it_wrote(tiny, few, folders, capsys):
  assert main(['collect', *folders]) == 0
  assert str(few.path(tiny)) in capsys.readouterr().out
  assert main(['collect', *folders]) == 0
  assert 'is up to date' in capsys.readouterr().out


def test_broken_file_is_named(few):
  few.collect(['tiny'])
  path = few.path('tiny')
  path.write_text(path.read_text() + '{"run": "a",\n')
  with pytest.raises(BadResults, match=r'tiny\.jsonl, line \d+: .*git checkout'):
    few.load('tiny')
  single = few.raw / 'other' / 'a.json'
  write_json(single, {})
  single.write_text('{')
  with pytest.raises(BadResults, match=r'a\.json: not JSON .*delete it'):
    few.load('other')


def test_failed_writing_leaves_nothing(tmp_path):
  with pytest.raises(ValueError, match='JSON'):
    write_json(tmp_path / 'a.json', {'key': float('nan')})
  (tmp_path / 'b').mkdir()
  with pytest.raises(OSError, match='b'):
    write_json(tmp_path / 'b', {})
  assert files(tmp_path) == {}


def test_committed_results_are_of_contenders():
  store = Store(Path('none'))
  for task in filter(TASKS.__contains__, collections()):
    for name, result in store.load(task).items():
      run = runs.Run(*(result[field] for field in runs.Run._fields))
      assert (run.task, run.name) == (task, name)
      assert contenders.find(run.contender)
  assert store.load('llama-stdlib')
  assert store.load('literature/speedup')
