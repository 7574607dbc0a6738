"""What README and docs say is complete and runs."""

import doctest
import functools
import pathlib
import re

import pytest

import bsfa_optax
from bsfa_optax import diagnostics, estimators, low_rank, projected, state

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
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
  'bsfa_optax.low_rank.FrozenFactors',
}
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


LISTED = set(
  re.findall(
    r'^\.\. auto\w+:: ([\w.]+)$', (ROOT / 'docs' / 'api.md').read_text(), re.MULTILINE
  )
)


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


@pytest.mark.parametrize(
  'page',
  [
    pytest.param(p, marks=[] if p.name == 'README.md' else [pytest.mark.slow])
    for p in PAGES
  ],
  ids=lambda page: page.name,
)
def test_code_of_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = page.read_text()
  namespace = {'__name__': '__main__'}
  for block in PYTHON.finditer(text):
    # Padded so that a traceback gives the line of the page.
    padding = '\n' * text.count('\n', 0, block.start(1))
    exec(compile(padding + block[1], str(page), 'exec'), namespace)
