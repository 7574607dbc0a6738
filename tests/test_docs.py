"""What README and docs say is complete and runs."""

import doctest
import functools
import json
import pathlib
import re

import matplotlib
import pytest

matplotlib.use('Agg')
import matplotlib.pyplot as plt

import bsfa_optax
from bsfa_optax import diagnostics, estimators, low_rank, projected, state

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
NOTEBOOKS = sorted((ROOT / 'docs' / 'tutorials').glob('*.ipynb'))
# Described where they are returned.
NO_EXAMPLES = {
  'bsfa_optax.state.Summary',
  'bsfa_optax.state.LeafSummary',
  'bsfa_optax.estimators.Decomposition',
  'bsfa_optax.estimators.Layout',
  'bsfa_optax.estimators.layout',
  'bsfa_optax.estimators.from_rows',
  'bsfa_optax.estimators.inner',
  'bsfa_optax.diagnostics.HessianTopK',
  'bsfa_optax.diagnostics.CurvatureEnergy',
  'bsfa_optax.diagnostics.CurvatureSplit',
  'bsfa_optax.projected.Basis',
  'bsfa_optax.projected.Coordinates',
  'bsfa_optax.low_rank.Spectrum',
  'bsfa_optax.low_rank.FrozenSpectrum',
  'bsfa_optax.low_rank.Factors',
  'bsfa_optax.low_rank.NormedFactors',
  'bsfa_optax.low_rank.FrozenFactors',
}
SITE = 'https://bsfa-optax.readthedocs.io/en/latest/'
REPOSITORY = 'https://github.com/bsfa-optax/bsfa_optax'
FILES = (
  f'{REPOSITORY}/blob/main/',
  'https://raw.githubusercontent.com/bsfa-optax/bsfa_optax/main/',
)
LINK = re.compile(r'\]\((\S+?)\)|^\[.+?\]: (\S+)$', re.MULTILINE)
PYTHON = re.compile(r'^```python\n(.*?)^```$', re.DOTALL | re.MULTILINE)


MODULES = [bsfa_optax, estimators, diagnostics, low_rank, projected, state]
# Of a module without `__all__` what is defined there; the package's names count once.
PUBLIC = {
  f'{module.__name__}.{name}'
  for module in MODULES
  for name in getattr(module, '__all__', vars(module))
  if not name.startswith('_')
  and callable(getattr(module, name))
  and (
    hasattr(module, '__all__') or getattr(module, name).__module__ == module.__name__
  )
}
ALIASES = {f'bsfa_optax.{n}' for n in bsfa_optax.__all__}


def documented(name):
  """Whether the reference has this name, or the package's name for the same."""
  short = f'bsfa_optax.{name.rsplit(".", 1)[1]}'
  return name in LISTED or (short in ALIASES and short in LISTED)


LISTED = {
  name
  for page in (ROOT / 'docs' / 'api').glob('*.md')
  for name in re.findall(r'^\.\. auto\w+:: ([\w.]+)$', page.read_text(), re.MULTILINE)
}


def find(name):
  return functools.reduce(getattr, name.split('.')[1:], bsfa_optax)


def test_api_reference_lists_the_public_names():
  states = {n for n in PUBLIC if n.endswith(('State', 'Factors'))} - LISTED
  assert {n for n in PUBLIC - states if not documented(n)} == set()
  for name in LISTED:
    find(name)


@pytest.mark.parametrize('name', sorted(LISTED - NO_EXAMPLES))
def test_public_name_has_an_example(name):
  docstring = find(name).__doc__
  assert docstring
  assert doctest.DocTestParser().get_examples(docstring)


def marks(page):
  if page.name == 'README.md':
    return []
  # Qwix, in the recipes, uses what Flax has deprecated.
  return [pytest.mark.slow, pytest.mark.filterwarnings('ignore::DeprecationWarning')]


@pytest.mark.parametrize(
  'page',
  [pytest.param(p, marks=marks(p)) for p in PAGES],
  ids=lambda page: page.name,
)
@pytest.mark.usefixtures('standard_promotion')  # as readers have it
def test_code_of_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = page.read_text()
  namespace = {'__name__': '__main__'}
  for block in PYTHON.finditer(text):
    if 'import wandb\n' in block[1]:
      pytest.importorskip('wandb', reason='wandb, of the extra `test`, is not here')
    # Padded so that a traceback gives the line of the page.
    padding = '\n' * text.count('\n', 0, block.start(1))
    exec(compile(padding + block[1], str(page), 'exec'), namespace)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_formulas_of_page_are_whole(page):
  """None is torn by a line that begins like an item of a list."""
  text = re.sub(r'```.*?```|`[^`]*`', '', page.read_text(), flags=re.DOTALL)
  paragraphs = re.split(r'\n\s*(?:\n|(?=[-+*] |\|))', text)
  assert [x for x in paragraphs if x.count('$') % 2] == []
  assert not re.findall(r'\\frac[^{].*', text)  # reads on to the end


def leads_somewhere(link, page):
  """Whether the part of a link that this checkout answers for is there."""
  address = link.partition('#')[0]
  for start in FILES:
    if address.startswith(start):
      return (ROOT / address.removeprefix(start)).exists()
  if address.startswith(SITE):
    name = address.removeprefix(SITE).removesuffix('.html') or 'index'
    return any((ROOT / 'docs').glob(f'{name}.*'))
  if '://' in address:
    return True
  return page.name != 'README.md' and (page.parent / address).exists()


# Those of the site are checked as it is built.
@pytest.mark.parametrize('page', sorted(ROOT.glob('*.md')), ids=lambda page: page.name)
def test_links_of_page_lead_somewhere(page):
  """README's are absolute, as it is shown elsewhere too."""
  links = [a or b for a, b in LINK.findall(page.read_text())]
  assert [link for link in links if not leads_somewhere(link, page)] == []


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
