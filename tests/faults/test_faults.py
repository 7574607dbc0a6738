"""The harness with few repetitions: kills, damage, bad updates and a soak."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

pytest.importorskip('flax')
pytest.importorskip('tqdm')

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ and tests/ are no packages that are installed

from tests.faults import __main__ as faults  # noqa: E402
from tests.faults import updates  # noqa: E402


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
  """In a process of its own, as it forks before JAX has started."""
  options = ['--kills', '2', '--flips', '20', '--results', tmp_path]
  ended = subprocess.run(
    [sys.executable, '-m', 'tests.faults', *options],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert 'kills: 2, lost: 0' in ended.stdout
  assert 'flips: 20, lost: 0' in ended.stdout


@pytest.mark.slow
def test_default_does_not_drift(tmp_path, standard_promotion, capsys):
  assert not faults.attack('soak', 5000, tmp_path / 'soak.jsonl')
  assert 'soak: 5000, lost: 0' in capsys.readouterr().out


@pytest.mark.slow
def test_bad_updates_leave_a_finite_state(standard_promotion):
  name = 'bsfa: pca, no decay'
  result = updates.batch(name, updates.runner(updates.filters()[name], True), 0, 30)
  assert not result['lost'], result['why']


def test_results_are_kept_and_what_was_lost_is_told(tmp_path, capsys):
  path = tmp_path / 'flips.jsonl'
  results = [
    {'count': 3, 'tally': {'cut': 2, 'emptied': 1}, 'lost': 0, 'why': ''},
    {'count': 2, 'tally': {'cut': 2}, 'lost': 1, 'why': 'a test'},
  ]
  path.write_text(''.join(json.dumps(x) + '\n' for x in results) + '{"count": 9')
  assert faults.attack('flips', 5, path)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split() for line in lines] == [
    ['flips:', '5,', 'lost:', '1'],
    ['4', 'cut'],
    ['1', 'emptied'],
    ['LOST:', 'a', 'test'],
  ]


@pytest.mark.parametrize(
  ('options', 'words'),
  [([], 'give at least one of --kills'), (['--kills', '0'], 'at least 1')],
  ids=['nothing', 'zero'],
)
def test_bad_options_are_told(options, words, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['faults', *options])
  with pytest.raises(SystemExit) as error:
    faults.main()
  assert error.value.code == 2
  assert words in capsys.readouterr().err
