"""Sphinx configuration; `.ci/run docs` builds the site with warnings as errors."""

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml

import bsfa_optax

REPOSITORY = 'https://github.com/bsfa-optax/bsfa_optax'

project = 'bsfa_optax'
author = 'The bsfa_optax authors'
copyright = f'2026, {author}'
release = bsfa_optax.__version__
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # outputs are those of the run that is in the notebook
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings say it in words
napoleon_use_ivar = True
html_theme = 'furo'
html_title = 'bsfa_optax'
html_copy_source = False
html_static_path = ['_static']
html_css_files = ['site.css']
html_math_renderer = 'mathml'
html_theme_options = {
  'source_repository': REPOSITORY,
  'source_branch': 'main',
  'source_directory': 'docs/',
  'top_of_page_buttons': ['view', 'edit'],
  'footer_icons': [
    {'name': 'Repository', 'url': REPOSITORY, 'html': 'Repository', 'class': 'source'}
  ],
}


def inline_formula(translator, node):
  """MathML, which browsers set themselves: no script, and nothing is fetched."""
  translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
  raise SkipNode


def displayed_formula(translator, node):
  formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
  translator.body.append(f'<div class="formula">{formula}</div>')
  raise SkipNode


def setup(app):
  app.add_html_math_renderer(
    'mathml', (inline_formula, None), (displayed_formula, None)
  )
