"""The example from end to end at toy size: results, interruption, errors."""

import importlib.util
import json
import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import bsfa_optax

pytest.importorskip('flax')
pytest.importorskip('tqdm')

SCRIPT = Path(__file__).parents[2] / 'examples' / 'train_llama.py'
TIMEOUT = 240  # seconds for a process: a hang is a failure
STEPS = 30
JOB = ['--heads', '1', '--steps', str(STEPS), '--data', 'text.txt']
JOB += ['--optimizer', 'muon', 'bsfa']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Holds a text and the outputs of all runs."""
  folder = tmp_path_factory.mktemp('example')
  words = np.random.default_rng(0).choice(['the', 'bulk', 'is', 'flat', 'schön'], 4000)
  (folder / 'text.txt').write_text(' '.join(words), encoding='utf-8')
  (folder / 'short.txt').write_text('too short a text')
  return folder


def start(folder: Path, *options: str) -> subprocess.Popen:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    # The three jobs compile the same programs.
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONPATH': str(Path(bsfa_optax.__file__).parents[1]),
    'WITH_ENV': 'with-env x',
  }
  return subprocess.Popen(
    [sys.executable, '-W', 'error', str(SCRIPT), *options],
    cwd=folder,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """Exit status, output and errors."""
  out, err = process.communicate(timeout=TIMEOUT)
  return process.returncode, out, err


def results(output: Path) -> list[dict]:
  return json.loads((output / 'results.json').read_text())


@pytest.fixture(scope='module')
def uninterrupted(folder):
  """Output of a job that ran through."""
  status, out, err = finish(start(folder, *JOB, '--output', 'whole'))
  assert status == 0, err
  return out, err, folder / 'whole'


@pytest.mark.slow
def test_job_prints_and_writes_everything(uninterrupted):
  out, err, output = uninterrupted
  head, *rows = out.splitlines()
  assert 'validation loss' in head
  assert [row.split()[0] for row in rows] == ['muon', 'bsfa']
  assert f'{STEPS}/{STEPS}' in err  # the bar
  assert (output / 'loss.png').read_bytes().startswith(b'\x89PNG')
  runs = results(output)
  for run, row in zip(runs, rows, strict=True):
    assert len(run['losses']) == STEPS
    assert run['losses'][0] == runs[0]['losses'][0]  # same weights, same data
    assert run['validation_loss'] < run['losses'][0] / 2
    assert f'{run["validation_loss"]:.4f}' in row
    low, high = map(float, row.split('(')[1].rstrip(')').split('-'))
    assert low <= float(row.split()[4]) <= high
    assert run['seconds'] == sorted(run['seconds'])
  muon, bsfa = runs
  assert muon['matrices'] == []
  assert len(bsfa['matrices']) == 3 * 7  # of the layers alone
  assert all(1 <= int(name.split('/')[1]) <= 3 for name in bsfa['matrices'])
  assert np.shape(bsfa['directions']) == (STEPS // 10, 3 * 7)
  assert np.min(bsfa['directions']) >= 1


@pytest.mark.slow
def test_resumed_job_ends_with_the_same_numbers(folder, uninterrupted):
  output = folder / 'parts'
  process = start(folder, *JOB, '--output', 'parts')
  give_up = time.monotonic() + TIMEOUT
  while process.poll() is None and not (output / 'bsfa').exists():
    assert time.monotonic() < give_up
    time.sleep(0.005)
  # Both are caught: neither ends the process before it has saved.
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGINT)
  status, out, err = finish(process)
  assert status in (128 + signal.SIGINT, 128 + signal.SIGTERM), err
  assert 'Traceback' not in err
  assert not (output / 'results.json').exists()
  saved = [int(path.stem) for path in (output / 'bsfa').glob('*.ckpt')]
  assert len(saved) == 1
  assert saved[0] < STEPS

  given = list(process.args)
  assert shlex.split(out.splitlines()[-1]) == ['with-env', 'x', *given, '--resume']
  status, _, err = finish(start(folder, *given[4:], '--resume'))
  assert status == 0, err
  assert f'bsfa: 100%|██████████| {STEPS}/{STEPS}' in err
  for one, other in zip(results(uninterrupted[2]), results(output), strict=True):
    assert one['losses'] == other['losses']
    assert one['validation_loss'] == other['validation_loss']


@pytest.fixture(scope='module')
def module():
  """The script, in this process."""
  spec = importlib.util.spec_from_file_location('train_llama', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def error_of(module, folder, monkeypatch, capsys):
  """Options to the last line of the error."""
  monkeypatch.chdir(folder)

  def run(*options: str) -> str:
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *options])
    with pytest.raises(SystemExit) as error:
      module.main()
    out, err = capsys.readouterr()
    assert not out
    if isinstance(error.value.code, str):  # what Python prints at its exit
      return error.value.code
    assert error.value.code == 2
    return err.splitlines()[-1]

  return run


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--data', 'absent.txt'], ['absent.txt', 'No such file', 'give']),
    (['--data', 'short.txt'], ['--data', 'bytes', 'give']),
    (['--output', 'short.txt/sub'], ['short.txt/sub', 'Not a directory', 'give']),
    (['--optimizer', 'sgd'], ['--optimizer', "'sgd'", 'bsfa']),
    (['--learning-rate', '0.1'], ['--learning-rate', 'each --optimizer']),
    (['--learning-rate', '0.1', 'nan', '1'], ['--learning-rate', 'positive']),
    (['--steps', '0'], ['--steps', '1']),
    (['--seed', '-1'], ['--seed', '0']),
    (['--resume'], ['--resume', 'fresh', 'no run']),
  ],
  ids=lambda value: ' '.join(value) if value[0].startswith('--') else '',
)
def test_bad_input_is_explained(folder, error_of, options, words):
  error = error_of('--data', 'text.txt', '--output', 'fresh', *options)
  for word in words:
    assert word in error
  assert not (folder / 'fresh').exists()


@pytest.mark.slow
def test_existing_run_is_kept(error_of, uninterrupted):
  before = results(uninterrupted[2])
  error = error_of(*JOB, '--output', 'whole')
  assert '--output: whole has a run; give another or --resume' in error
  error = error_of(*JOB, '--output', 'whole', '--seed', '1', '--resume')
  assert f'whole/muon/{STEPS:08}.ckpt has other options' in error
  assert '--seed 0' in error
  assert results(uninterrupted[2]) == before
