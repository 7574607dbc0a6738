"""Inverse roots by products, against float64 eigendecompositions."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsfa_optax import _roots

ROOT = pathlib.Path(__file__).parents[2]


def matrix(spectrum, seed=0):
  """A symmetric matrix with the given eigenvalues, float64."""
  spectrum = np.asarray(spectrum, np.float64)
  n = len(spectrum)
  q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
  return (q * spectrum) @ q.T


def error(spectrum, root):
  """Greatest relative error along an eigenvector."""
  a = matrix(spectrum)
  values, vectors = np.linalg.eigh(a)
  exact = (vectors * values**-0.5) @ vectors.T
  inverse = (vectors * values**0.5) @ vectors.T
  difference = np.asarray(root(jnp.asarray(a, jnp.float32)), np.float64) - exact
  return np.linalg.norm(inverse @ difference, 2)


EXACT = (*_roots.POLYNOMIALS, (1.9270, -1.3066, 0.3807))  # a step more
THREE = functools.partial(_roots.inverse_square_root, polynomials=EXACT)
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
  assert error(spectrum, _roots.inverse_square_root) < 0.22
  assert error(spectrum, THREE) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rank one', 'power law'])
def test_root_of_large_covariances(name):
  n = 1024
  # Beyond the condition number of the polynomials only what is amplified too little.
  a = jnp.asarray(matrix(SPECTRA[name](n) + 0.2), jnp.float32)
  values, vectors = np.linalg.eigh(np.asarray(a, np.float64))
  root = np.asarray(jax.jit(_roots.inverse_square_root)(a), np.float64)
  gains = np.einsum('ij,ij->j', vectors, root @ vectors) * np.sqrt(values)
  assert (gains < 1.22).all()
  resolved = values > values.max() / 400
  assert abs(gains[resolved] - 1).max() < 0.22


@pytest.mark.parametrize(
  ('condition', 'two', 'three'),
  [(10, 0.22, 0.01), (400, 0.22, 0.01), (2500, 0.7, 0.45)],
)
def test_error_grows_with_the_condition_number(condition, two, three):
  # As one direction holds nearly everything, the bound on the spectrum is tight.
  spectrum = np.append(np.geomspace(0.1, 1 / condition, 23), 1.0)
  assert error(spectrum, _roots.inverse_square_root) < two
  assert error(spectrum, THREE) < three


def test_scale_of_the_matrix_does_not_matter():
  a = jnp.asarray(matrix(SPECTRA['power law'](12) + 0.2), jnp.float32)
  for factor in (1e-6, 1e6):
    scaled = _roots.inverse_square_root(factor * a) * np.float32(np.sqrt(factor))
    np.testing.assert_allclose(scaled, _roots.inverse_square_root(a), atol=1e-3)


def in_bfloat16(a, steps, order):
  """The iteration with the products of E in either order, all in bfloat16."""
  bound = jnp.sqrt(jnp.linalg.norm(a @ a))
  eye = jnp.eye(a.shape[-1], dtype=jnp.bfloat16)
  y, z = (a / bound).astype(jnp.bfloat16), eye
  polynomials = (*EXACT, *[(15 / 8, -10 / 8, 3 / 8)] * steps)[:steps]
  for p1, p3, p5 in polynomials:
    e = z @ y if order == 'ZY' else y @ z
    p = p1 * eye + p3 * e + p5 * (e @ e)
    y, z = y @ p, p @ z
  return z.astype(jnp.float32) / jnp.sqrt(bound)


def test_the_order_of_the_products_keeps_rounding_small():
  spectrum = np.geomspace(458, 1, 48)
  stable = [error(spectrum, lambda a, n=n: in_bfloat16(a, n, 'ZY')) for n in (3, 6)]
  other = [error(spectrum, lambda a, n=n: in_bfloat16(a, n, 'YZ')) for n in (3, 6)]
  assert stable[1] < 2 * stable[0] < 1
  assert other[1] > 100 * other[0] > 100 * stable[0]


@pytest.mark.slow
def test_coefficients_are_those_of_the_script():
  script = runpy.run_path(str(ROOT / 'scripts' / 'root_coefficients.py'))
  found = script['steps'](condition=400, count=2)
  for (coefficients, _), stored in zip(found, _roots.POLYNOMIALS, strict=True):
    np.testing.assert_allclose(coefficients, stored, rtol=2e-3)
