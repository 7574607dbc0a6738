"""Inverse square roots of symmetric matrices by products alone."""

from __future__ import annotations

import jax
from jax.lax import Precision
import jax.numpy as jnp

# From scripts/root_coefficients.py --condition 400: at most 28 % from the root for
# condition numbers up to 400, and beyond too small in the flattest directions, as by a
# larger ridge. More products are nearer to it and train no better, two (degree 4, 49 %)
# train worse (docs/experiments.md, 67 and 75).
INNER = (-0.3123, -0.8801)
OUTER = ((1.6598, 1.8745, 3.4403), (15.1260, 26.2696, 3.8910, 81.5642))


def inverse_square_root(a: jax.Array) -> jax.Array:
  """A^(-1/2) for positive definite matrices, `(..., n, n) -> (..., n, n)`.

  A polynomial of degree 8 in T = 2 A / bound - I in three products, 6 n^3 operations:
  with S = T^2 and M = S (S + g T + h I) it is
  c0 I + c1 T + c2 S + d0 M + M (d1 T + d2 S + d3 M).

  The first product squares A, whose rounding is the floor of the error: it is made at
  full precision. The others have the platform's default, which is TF32 on GPUs and one
  pass of bfloat16 on TPUs; on CPU all is float32. T, S and M have norms of at most 1,
  so that rounding adds up to a few per cent of the least eigenvalue of the root even in
  bfloat16. In powers of A, with coefficients of 20,000, nothing would be left.

  References:
    Higham, `Functions of Matrices <https://doi.org/10.1137/1.9780898717778>`_,
    chapter 6, 2008

    Sastre, `Efficient evaluation of matrix polynomials
    <https://doi.org/10.1016/j.laa.2017.11.010>`_, 2018

    Amsel, Persson, Musco, Gower, `The Polar Express: Optimal Matrix Sign Methods and
    Their Application to the Muon Algorithm <https://arxiv.org/abs/2505.16932>`_, 2025

    Grishina, Smirnov, Rakhuba, `Accelerating Newton-Schulz Iteration for
    Orthogonalization via Chebyshev-type Polynomials
    <https://arxiv.org/abs/2506.10935>`_, 2025
  """
  (g, h), ((c0, c1, c2), (d0, d1, d2, d3)) = INNER, OUTER
  eye = jnp.eye(a.shape[-1], dtype=a.dtype)
  eye = eye.reshape((1,) * (a.ndim - 2) + eye.shape)
  square = jnp.matmul(a, a, precision=Precision.HIGHEST)
  # The fourth root of the sum of all eigenvalues' fourth powers: at least the greatest.
  bound = jnp.sqrt(jnp.linalg.norm(square, axis=(-2, -1), keepdims=True))
  a, square = 2 * a / bound, 4 * square / bound**2
  t, s = a - eye, square - 2 * a + eye
  m = jnp.matmul(s, s + g * t + h * eye)
  high = jnp.matmul(m, d1 * t + d2 * s + d3 * m)
  return (c0 * eye + c1 * t + c2 * s + d0 * m + high) / jnp.sqrt(bound)
