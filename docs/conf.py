"""Sphinx configuration; `.ci/run` builds the site with warnings as errors."""

project = 'bsfa_optax'
author = 'The bsfa_optax authors'
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
]
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings say it in words
napoleon_use_ivar = True
html_theme = 'furo'
html_title = 'bsfa_optax'
html_copy_source = False
