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


def attack(folder, *options):
  return subprocess.run(
    [sys.executable, '-m', 'tests.faults', '--results', folder, *options],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
  options = ['--kills', '3', '--flips', '60']
  ended = attack(tmp_path, *options)
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert 'kills: 3, lost: 0' in ended.stdout
  assert 'flips: 60, lost: 0' in ended.stdout
  # What has a result is not done again; one that was lost stays so, and is told.
  path = tmp_path / 'flips-60.jsonl'
  result = json.loads(path.read_text().splitlines()[0]) | {'lost': 1, 'why': 'a test'}
  path.write_text(json.dumps(result | {'count': 60}) + '\n' + '{"cut')
  ended = attack(tmp_path, *options)
  assert ended.returncode == 1
  assert 'flips: 60, lost: 1' in ended.stdout
  assert 'LOST: a test' in ended.stdout


@pytest.mark.slow
def test_default_does_not_drift(tmp_path):
  ended = attack(tmp_path, '--soak', '5000')
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert 'soak: 5000, lost: 0' in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize('name', ['whitening', 'bsfa: pca, randomized'])
def test_bad_updates_leave_a_finite_state(name, standard_promotion):
  sys.path.append(str(ROOT))
  from tests.faults import updates

  result = updates.batch(name, updates.runner(updates.filters()[name], True), 0, 30)
  assert not result['lost'], result['why']


def test_nothing_to_do_is_told(tmp_path):
  ended = attack(tmp_path)
  assert ended.returncode == 2
  assert 'give at least one of --kills' in ended.stderr
