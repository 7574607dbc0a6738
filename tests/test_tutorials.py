"""The notebooks of docs/tutorials run from top to bottom, with few steps."""

import json
import pathlib

import matplotlib
import pytest

matplotlib.use('Agg')
import matplotlib.pyplot as plt

pytest.importorskip('flax')

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parents[1] / 'docs' / 'tutorials').glob('*.ipynb')
)


@pytest.mark.slow
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.usefixtures('standard_promotion')
def test_notebook_runs(notebook, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('TUTORIAL_STEPS', '3')
  namespace = {'__name__': '__main__'}
  for number, cell in enumerate(json.loads(notebook.read_text())['cells']):
    if cell['cell_type'] == 'code':
      code = ''.join(cell['source'])
      exec(compile(code, f'{notebook.name}, cell {number}', 'exec'), namespace)
  assert len(plt.get_fignums()) >= 4
  plt.close('all')
