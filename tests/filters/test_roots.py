"""Inverse roots by products, against float64 eigendecompositions."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsfa_optax import _vectors
from bsfa_optax.whitening import INNER, inverse_square_root, OUTER

ROOT = pathlib.Path(__file__).parents[2]


def eigenvectors(n):
  return np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]


def matrix(spectrum):
  """A symmetric matrix with the given eigenvalues, float64."""
  q = eigenvectors(len(spectrum))
  return (q * np.asarray(spectrum, np.float64)) @ q.T


def error(spectrum, root):
  """Greatest relative error along an eigenvector."""
  a = matrix(spectrum)
  values, vectors = np.linalg.eigh(a)
  exact = (vectors * values**-0.5) @ vectors.T
  inverse = (vectors * values**0.5) @ vectors.T
  difference = np.asarray(root(jnp.asarray(a, jnp.float32)), np.float64) - exact
  return np.linalg.norm(inverse @ difference, 2)


SPECTRA = {
  'flat': lambda n: np.ones(n),
  'rank one': lambda n: np.append(np.zeros(n - 1), n),
  'power law': lambda n: n * (r := np.arange(1.0, n + 1) ** -1.5) / r.sum(),
  'two levels': lambda n: np.where(np.arange(n) < n // 4, 3.0, 1 / 3),
}


@pytest.mark.parametrize('name', SPECTRA)
@pytest.mark.parametrize('n', [2, 16, 60])
def test_root_of_whitened_covariances(n, name):
  # The ridge of the default bounds the condition number by (n + 0.2) / 0.2 <= 301.
  spectrum = SPECTRA[name](n) + 0.2
  assert error(spectrum, inverse_square_root) < 0.285


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rank one', 'power law'])
def test_root_of_large_covariances(name):
  n = 2048
  # Beyond the condition number of the polynomial only what is amplified too little.
  values, vectors = SPECTRA[name](n) + 0.2, eigenvectors(n)
  a = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)
  root = np.asarray(jax.jit(inverse_square_root)(a), np.float64)
  gains = np.einsum('ij,ij->j', vectors, root @ vectors) * np.sqrt(values)
  assert (gains > 0).all()
  assert (gains < 1.285).all()
  resolved = values > values.max() / 400
  assert abs(gains[resolved] - 1).max() < 0.285


@pytest.mark.parametrize(
  ('condition', 'greatest'), [(10, 0.285), (400, 0.285), (2500, 0.71)]
)
def test_error_grows_with_the_condition_number(condition, greatest):
  # As one direction holds nearly everything, the bound on the spectrum is tight.
  spectrum = np.append(np.geomspace(0.1, 1 / condition, 23), 1.0)
  assert error(spectrum, inverse_square_root) < greatest


def test_scale_of_the_matrix_does_not_matter():
  a = jnp.asarray(matrix(SPECTRA['power law'](12) + 0.2), jnp.float32)
  for factor in (1e-6, 1e6):
    scaled = inverse_square_root(factor * a) * np.float32(np.sqrt(factor))
    np.testing.assert_allclose(scaled, inverse_square_root(a), atol=1e-3)


def powers():
  """The same polynomial by powers of A / bound, the highest first, float64."""
  (g, h), (c, d) = INNER, OUTER
  t = np.poly1d([2.0, -1.0])
  m = t**2 * (t**2 + g * t + h)
  low = c[0] + c[1] * t + c[2] * t**2 + d[0] * m
  return (low + m * (d[1] * t + d[2] * t**2 + d[3] * m)).coeffs


def in_powers(a, product):
  """What must not be done: Horner's rule in powers of A."""
  bound = jnp.sqrt(jnp.linalg.norm(a @ a))
  eye = jnp.eye(a.shape[-1])
  z = jnp.zeros_like(a)
  for coefficient in powers():
    z = product(z, a / bound) + np.float32(coefficient) * eye
  return z / jnp.sqrt(bound)


def rounded(bits):
  """A product whose operands keep so many bits, as an accelerator's default does."""
  cut = lambda x: jax.lax.reduce_precision(x, 8, bits)
  return lambda x, y, precision=None: (
    jnp.dot(x, y) if precision else jnp.dot(cut(x), cut(y))
  )


@pytest.mark.parametrize('bits', [7, 10])  # bfloat16, TF32
@pytest.mark.parametrize('name', ['rank one', 'power law'])
def test_low_precision_of_the_later_products_does_no_harm(name, bits, monkeypatch):
  spectrum = SPECTRA[name](60) + 0.2
  product = rounded(bits)
  assert error(spectrum, lambda a: in_powers(a, jnp.dot)) < 0.4
  assert error(spectrum, lambda a: in_powers(a, product)) > 1
  monkeypatch.setattr(jnp, 'matmul', product)
  assert error(spectrum, inverse_square_root) < 0.29


@pytest.mark.slow
def test_coefficients_are_those_of_the_script():
  script = runpy.run_path(str(ROOT / 'scripts' / 'root_coefficients.py'))
  p, worst = script['minimax'](condition=400)
  assert worst < 0.283
  inner, *outer = script['factored'](p)
  np.testing.assert_allclose(inner, INNER, atol=2e-3)
  for found, stored in zip(outer, OUTER, strict=True):
    np.testing.assert_allclose(found, stored, rtol=2e-3)


def test_large_batches_go_through_in_portions(monkeypatch):
  matrices = [jnp.eye(64)[None] * jnp.arange(1.0, n)[:, None, None] for n in (20, 8)]

  def compiled():
    # A new function each time: the compiler's cache knows it by its identity.
    roots = lambda given: _vectors.by_size(inverse_square_root, given)
    return jax.jit(roots).lower(matrices).compile()

  whole = compiled()
  monkeypatch.setattr(_vectors, 'LARGE', 4 * 64**2)
  portions = compiled()
  temporary = lambda x: x.memory_analysis().temp_size_in_bytes
  assert temporary(portions) < 0.7 * temporary(whole)  # the rest: matrices and roots
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
    portions(matrices),
    whole(matrices),
  )
