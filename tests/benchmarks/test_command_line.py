"""What the command says before it trains: help, errors, plans; and interruption."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.__main__ import ACTIONS, main
from benchmarks.progress import Progress
import bsfa_optax

ROOT = Path(__file__).parents[2]
PATHS = [str(Path(bsfa_optax.__file__).parents[1]), str(ROOT)]


@pytest.mark.parametrize('command', ['', *ACTIONS])
def test_help_fits_a_screen_and_has_an_example(command, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  with pytest.raises(SystemExit) as error:
    main([command, '--help'] if command else ['--help'])
  assert error.value.code == 0
  text = capsys.readouterr().out
  assert text.count('\n') <= 30
  assert max(map(len, text.splitlines())) <= 80
  assert f'\nexample:\n  python -m benchmarks {command}' in text


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
      ['mnist_train.npz', 'nowhere', '--data', 'docs/data.md'],
    ),
  ],
  ids=lambda value: ' '.join(value) if value[0].startswith('--') else '',
)
def test_wrong_options_are_explained(options, words, capsys, folders, store):
  right = ['--task', 'masked-chain', '--contender', 'adamw', '--learning-rate', '0.1']
  with pytest.raises(SystemExit) as error:
    main(['run', *right, *folders, *options])
  assert error.value.code == 2
  message = capsys.readouterr().err
  for word in words:
    assert word in message
  assert not list(store.raw.glob('**/*'))


@pytest.mark.parametrize(
  'command',
  [
    ['run', '--learning-rate', '0.1'],
    ['tune'],
    ['seeds'],
    ['time', '--rounds', '1'],
    ['reproduce', 'bulk-sgd'],
  ],
  ids=lambda command: command[0],
)
def test_folder_that_cannot_be_written_is_noticed_at_once(
  command, tiny, tmp_path, capsys
):
  (tmp_path / 'file').write_text('')
  options = ['--results', str(tmp_path / 'file' / 'results')]
  if command[0] != 'reproduce':
    options += ['--task', tiny, '--contender', 'adamw']
  with pytest.raises(SystemExit) as error:
    main([*command, *options])
  assert error.value.code == 2
  out, err = capsys.readouterr()
  assert not out  # no training has begun
  for word in '--results', 'file/results', 'cannot be written', 'give a folder':
    assert word in err


def test_missing_data_of_a_reproduction(tmp_path, folders, capsys):
  with pytest.raises(SystemExit):
    main(['reproduce', 'bulk-sgd', '--data', str(tmp_path), *folders])
  assert 'mnist_train.npz is not in' in capsys.readouterr().err


def test_nothing_to_collect(folders, store, capsys):
  with pytest.raises(SystemExit) as error:
    main(['collect', *folders])
  assert error.value.code == 2
  message = capsys.readouterr().err
  for word in '--results', str(store.raw), 'python -m benchmarks tune':
    assert word in message
  assert not list(store.collected.iterdir())


def test_plan_says_what_and_how_long(tiny, folders, save_result, capsys):
  for seed in range(2):
    save_result('adamw', 0.1, seed, 1.0, step_ms=3_600_000)
  options = ['--task', tiny, '--contender', 'adamw', 'sgdm', *folders]
  main(['seeds', *options, '--seed', '0', '1', '--horizons'])
  assert '0 of 2 runs to do' in capsys.readouterr().out
  main(['run', *options, '--learning-rate', '0.1', '--seed', '0', '2'])
  plan = capsys.readouterr().out
  assert '3 of 4 runs to do' in plan
  assert f'{tiny} sgdm: 2' in plan
  assert '60 steps: about 20.0 h, but no time is recorded of sgdm on tiny' in plan
  main(['run', *options[:3], 'nadamw', *folders, '--learning-rate', '0.1'])
  plan = capsys.readouterr().out
  assert '20 steps: no time is recorded of nadamw on tiny' in plan
  main(['tune', *options, '--budget', '1'])
  assert 'at most 1 rates for each of 2 contenders' in capsys.readouterr().out


TOY = """
import functools, sys
from benchmarks import __main__, tasks
build = functools.partial(tasks.language_model, 'toy', tasks.python_sources)
tasks.TASKS['toy'] = tasks.Task('a test', 20, build)
sys.exit(__main__.main())
"""


@pytest.mark.slow
def test_interruption_leaves_whole_files_only(store, folders):
  options = ['run', '--task', 'toy', '--contender', 'adamw', '--learning-rate', '0.01']
  options += ['--seed', *map(str, range(2000)), *folders]
  process = subprocess.Popen(
    [sys.executable, '-c', TOY, *options],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(PATHS)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  give_up = time.monotonic() + 240
  while process.poll() is None and len(list(store.raw.glob('*/*.json'))) < 2:
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
  names = [path.name for path in store.raw.glob('*/*')]
  assert 2 <= len(names) < 2000
  assert all(name.endswith('.json') for name in names)
  assert all('validation_loss' in result for result in store.load('toy').values())


def test_interrupt_waits_for_the_next_update(capfd):
  before = signal.getsignal(signal.SIGINT)
  with Progress('work', 3, 'step') as bar:
    bar.update()
    signal.raise_signal(signal.SIGINT)  # as in a callback that swallows exceptions
    assert 'stopping at the next step' in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      bar.update()
  assert signal.getsignal(signal.SIGINT) == before
