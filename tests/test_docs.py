"""What README and docs say is complete and runs."""

import doctest
import pathlib
import re

import pytest

import bsfa_optax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
PYTHON = re.compile(r'^```python\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def test_api_reference_lists_the_public_names():
  text = (ROOT / 'docs' / 'api.md').read_text()
  listed = re.findall(r'^\.\. auto\w+:: bsfa_optax\.(\w+)$', text, re.MULTILINE)
  assert sorted(listed) == sorted(bsfa_optax.__all__)


@pytest.mark.parametrize('name', bsfa_optax.__all__)
def test_public_name_has_an_example(name):
  docstring = getattr(bsfa_optax, name).__doc__
  assert docstring
  assert doctest.DocTestParser().get_examples(docstring)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_code_of_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = page.read_text()
  namespace = {'__name__': '__main__'}
  for block in PYTHON.finditer(text):
    # Padded so that a traceback gives the line of the page.
    padding = '\n' * text.count('\n', 0, block.start(1))
    exec(compile(padding + block[1], str(page), 'exec'), namespace)
