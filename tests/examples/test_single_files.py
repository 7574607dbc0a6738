"""Examples can be copied: each is one file, not too long, that needs no other."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'examples'
SCRIPTS = sorted(FOLDER.glob('*.py'))


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_example_is_a_single_file(script):
  text = script.read_text()
  assert f'python {script.name}' in ast.get_docstring(ast.parse(text))  # in --help
  assert len(text.splitlines()) <= 200
  imported = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      imported |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      imported.add((node.module or '.').split('.')[0])
  assert not imported & {'.', 'benchmarks', *(path.stem for path in SCRIPTS)}
