"""The example from end to end at toy size: results, interruption, errors."""

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
pytest.importorskip('orbax.checkpoint')

SCRIPT = Path(__file__).parents[1] / 'examples' / 'train_llama.py'
TIMEOUT = 240  # seconds for a process: a hang is a failure
STEPS = 300
JOB = [
  '--preset',
  'toy',
  '--steps',
  str(STEPS),
  '--contenders',
  'adamw',
  'bsfa',
  'muon',
]
JOB += ['--horizons', '1', '1.5']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Holds a text and the outputs of all runs."""
  folder = tmp_path_factory.mktemp('example')
  words = np.random.default_rng(0).choice(['the', 'bulk', 'is', 'flat', 'schön'], 4000)
  (folder / 'text.txt').write_text(' '.join(words), encoding='utf-8')
  return folder


def start(folder: Path, *options: str) -> subprocess.Popen:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(Path(bsfa_optax.__file__).parents[1]),
  }
  return subprocess.Popen(
    [sys.executable, '-W', 'error', str(SCRIPT), *options],
    cwd=folder,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope='module')
def uninterrupted(folder):
  """Output of a job that ran through."""
  process = start(folder, *JOB, '--data', 'text.txt', '--output', 'whole')
  out, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 0, err
  return out, err, folder / 'whole'


@pytest.fixture(scope='module')
def resumed(folder, uninterrupted):
  """Output folder of a job that was interrupted in its second run and resumed."""
  output = folder / 'parts'
  job = [*JOB, '--data', 'text.txt', '--output', 'parts', '--checkpoint-every', '20']
  process = start(folder, *job)
  first = output / 'checkpoints' / f'bsfa-{STEPS}'
  give_up = time.monotonic() + TIMEOUT
  while process.poll() is None and not (first.exists() and list(first.glob('[0-9]*'))):
    assert time.monotonic() < give_up
    time.sleep(0.005)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 128 + signal.SIGINT, err
  assert not (output / 'results.json').exists()
  saved = [int(path.name) for path in first.glob('[0-9]*')]
  assert len(saved) == 1
  assert saved[0] < STEPS

  command = shlex.split(err.splitlines()[-1])
  assert command[:2] == [sys.executable, str(SCRIPT)]
  process = start(folder, *command[2:])
  _, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 0, err
  assert f'adamw-{STEPS}:' not in err  # it had finished, and is not trained again
  assert f'bsfa-{STEPS}: {STEPS}/{STEPS}' in err
  return output


def results(output: Path) -> dict:
  return json.loads((output / 'results.json').read_text())


def test_job_prints_and_writes_everything(uninterrupted):
  out, err, output = uninterrupted
  lines = out.splitlines()
  for position, contender in enumerate(('adamw', 'bsfa', 'muon')):
    assert lines[2 + position].startswith(contender)
  assert '1.00x' in lines[2]
  assert (
    10 <= sum(line.startswith(f'bsfa-{STEPS}: ') for line in err.splitlines()) <= 11
  )
  for name in ('loss.png', 'dominant_fraction.png'):
    assert (output / name).read_bytes().startswith(b'\x89PNG')

  content = results(output)
  assert content['versions']['jax']
  assert content['machine']['cpu_cores'] >= 1
  runs = content['runs']
  assert [(run['contender'], run['horizon']) for run in runs] == [
    ('adamw', 1), ('bsfa', 1), ('muon', 1), ('adamw', 1.5)
  ]  # fmt: skip
  for run in runs:
    assert len(run['losses']) == run['steps'] == STEPS * run['horizon']
    assert run['losses'][0] == runs[0]['losses'][0]  # same weights, same data
    assert run['train_loss'] == pytest.approx(np.mean(run['losses'][-50:]))
    assert run['validation_loss'] < run['losses'][0] / 2
    assert run['step_ms'] > 0
    assert run['worth_relation'] in ('<', '=', '>')
  adamw, bsfa = runs[:2]
  assert adamw['state_bytes'] == pytest.approx(8 * adamw['parameters'], abs=100)
  assert bsfa['state_bytes'] > adamw['state_bytes']
  steps, fractions = bsfa['dominant_fraction'][-1]
  assert steps == STEPS
  assert len(fractions) == len(bsfa['block_names'])
  assert all(0 <= fraction <= 1 for fraction in fractions)


def test_resumed_job_ends_with_the_same_bits(uninterrupted, resumed):
  whole, parts = results(uninterrupted[2]), results(resumed)
  for one, other in zip(whole['runs'], parts['runs'], strict=True):
    assert one['losses'] == other['losses']
    assert one['validation_loss'] == other['validation_loss']
    assert one['weights_sha256'] == other['weights_sha256']
  assert whole['config'] == parts['config']


def test_sigterm_between_checkpoints_saves_one(folder):
  job = ['--preset', 'toy', '--steps', '50000', '--contenders', 'adamw', '--horizons']
  options = ['--data', 'text.txt', '--checkpoint-every', '50000', '--output', 'stopped']
  process = start(folder, *job, *options)
  assert process.stderr.readline().startswith('adamw-50000: ')
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 128 + signal.SIGTERM, err
  (saved,) = (folder / 'stopped' / 'checkpoints' / 'adamw-50000').glob('[0-9]*')
  assert 5000 <= int(saved.name) < 50000


@pytest.fixture
def main(monkeypatch, folder):
  """The script's main function, in this process and in the folder."""
  monkeypatch.syspath_prepend(str(SCRIPT.parent))
  monkeypatch.chdir(folder)
  return pytest.importorskip('train_llama').main


def one_error_line(capsys, main, *options: str) -> str:
  with pytest.raises(SystemExit) as error:
    main(['--preset', 'toy', *options])
  assert error.value.code == 2
  out, err = capsys.readouterr()
  assert not out
  assert err.count('\n') == 1
  return err


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--data', 'absent.txt'], ['--data', 'absent.txt', 'No such file']),
    (['--data', 'empty.txt'], ['--data', 'empty.txt', 'is empty']),
    (['--data', 'latin.txt'], ['--data', 'latin.txt', 'not UTF-8']),
    (['--data', 'short.txt'], ['--preset', 'context', '16', 'longer text']),
    (['--output', 'empty.txt/sub'], ['--output', 'empty.txt/sub', 'cannot be written']),
    (['--contenders', 'sgd'], ['--contenders', "'sgd'", 'bsfa']),
    (['--learning-rate', 'sgd=1'], ['--learning-rate', 'sgd=1', 'adamw, bsfa, muon']),
    (['--learning-rate', 'bsfa'], ['--learning-rate', "'bsfa'", 'bsfa=0.01']),
    (['--learning-rate', 'bsfa=-1'], ['--learning-rate', 'bsfa=-1', 'bsfa=0.01']),
    (['--learning-rate', 'bsfa=nan'], ['--learning-rate', 'bsfa=nan', 'bsfa=0.01']),
    (['--steps', '0'], ['--steps', "'0'", 'positive integer']),
    (['--horizons', '-1'], ['--horizons', "'-1'", 'positive number']),
    (['--resume'], ['--resume', 'fresh', 'leave out']),
    (['--seed', '-1'], ['--seed', "'-1'", 'whole number']),
    (['--bogus'], ['--bogus']),
  ],
)
def test_bad_input_is_one_line(capsys, main, folder, options, words):
  (folder / 'empty.txt').write_bytes(b'')
  (folder / 'latin.txt').write_bytes('schön'.encode('latin-1'))
  (folder / 'short.txt').write_bytes(b'too short a text')
  error = one_error_line(capsys, main, '--output', 'fresh', *options)
  for word in words:
    assert word in error
  assert not (folder / 'fresh').exists()


def test_existing_run_is_kept(capsys, main, uninterrupted):
  before = results(uninterrupted[2])
  job = [*JOB, '--data', 'text.txt', '--output', 'whole']
  error = one_error_line(capsys, main, *job)
  for word in ('--output', 'whole', '--resume', '--overwrite'):
    assert word in error
  assert results(uninterrupted[2]) == before


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--seed', '1'], ['seed', '0', '1']),
    (['--steps', '7'], ['steps', str(STEPS), '7']),
    (['--learning-rate', 'bsfa=0.5'], ['0.5']),
    (['--data', 'text.txt', 'text.txt'], ['text']),
  ],
)
def test_resume_with_other_options_is_refused(
  capsys, main, uninterrupted, options, words
):
  del uninterrupted
  job = [*JOB, '--data', 'text.txt', '--output', 'whole', *options, '--resume']
  error = one_error_line(capsys, main, *job)
  for word in ('--resume', 'was', *words):
    assert word in error


def test_worth_interpolates_in_log_steps(main):
  del main
  import report

  reference = [(100, 2.0), (400, 1.0)]
  assert report.adamw_steps_worth(1.5, reference) == ('=', pytest.approx(200))
  assert report.adamw_steps_worth(2.0, reference) == ('=', 100)
  assert report.adamw_steps_worth(1.0, reference) == ('=', 400)
  assert report.adamw_steps_worth(2.1, reference) == ('<', 100)
  assert report.adamw_steps_worth(float('nan'), reference) == ('<', 100)
  assert report.adamw_steps_worth(0.9, reference) == ('>', 400)
  assert report.adamw_steps_worth(1.0, []) is None


@pytest.mark.parametrize(
  ('preset', 'millions'), [('llama-72m', 72.4), ('llama-134m', 133.9)]
)
def test_literature_presets_have_the_literature_sizes(main, preset, millions):
  del main
  from flax import nnx
  import jax
  import llama
  import train_llama

  config = train_llama.PRESETS[preset].model
  model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
  sizes = [leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))]
  assert round(sum(sizes) / 1e6, 1) == millions
