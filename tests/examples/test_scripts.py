"""Scripts say how they are called. Examples are one file each; on a mesh they learn."""

import ast
import os
from pathlib import Path
import re
import runpy
import subprocess
import sys

import pytest

FOLDER = Path(__file__).parents[2] / 'examples'
SCRIPTS = sorted(FOLDER.glob('*.py'))
OTHERS = sorted((FOLDER.parent / 'scripts').glob('*.py'))


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_example_is_a_single_file(script):
  text = script.read_text()
  assert len(text.splitlines()) <= 200
  imported = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      imported |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      imported.add((node.module or '.').split('.')[0])
  assert not imported & {'.', 'benchmarks', *(path.stem for path in SCRIPTS)}


@pytest.mark.parametrize('script', [*SCRIPTS, *OTHERS], ids=lambda path: path.stem)
def test_help_fits_a_screen_and_has_an_example(script, monkeypatch, capsys):
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setattr(sys, 'argv', [str(script), '--help'])
  with pytest.raises(SystemExit) as error:
    runpy.run_path(str(script), run_name='__main__')
  assert error.value.code == 0
  out = capsys.readouterr().out
  assert re.search(rf'\bpython \S*\b{script.name} --', out)
  assert out.count('\n') <= 30
  assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize('script', ['fsdp_tensor_parallel', 'linen_train_state'])
def test_example_learns(script):
  path = f'{FOLDER.parent}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
  output = subprocess.run(
    [sys.executable, FOLDER / f'{script}.py', '--simulate=8', '--steps=12'],
    env={**os.environ, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  ).stdout
  assert '8 devices' in output
  first, last = re.search(r'loss ([\d.]+) -> ([\d.]+)', output).groups()
  assert float(last) < 0.9 * float(first)
  if script == 'fsdp_tensor_parallel':
    assert 'bfloat16[5,3,32@fsdp,64@tensor]' in output
