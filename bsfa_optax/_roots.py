"""Inverse square roots of symmetric matrices by products alone."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.lax import Precision
import jax.numpy as jnp

Polynomial = tuple[float, float, float]

# From scripts/root_coefficients.py --condition 400 --steps 2: at most 22 % from the
# root for condition numbers up to 400, and beyond too small in the flattest directions,
# as by a larger ridge. A third step, (1.9270, -1.3066, 0.3807), leaves 0.7 % for nearly
# twice the price, and trains no better (docs/experiments.md, 69).
POLYNOMIALS: tuple[Polynomial, ...] = (
  (6.7524, -18.3510, 13.2633),
  (2.5379, -1.8747, 0.4413),
)


def inverse_square_root(
  a: jax.Array, polynomials: Sequence[Polynomial] = POLYNOMIALS
) -> jax.Array:
  """A^(-1/2) for positive definite matrices, `(..., n, n) -> (..., n, n)`.

  Coupled iterates Y -> A^(1/2) and Z -> A^(-1/2), each step a polynomial P of E = Z Y:
  Z <- P Z, Y <- Y P. In this order rounding is not amplified; with E = Y Z it grows in
  every step. Two steps are five products, 10 n^3 operations, three are nine.

  The first step squares A, whose rounding is the floor of the error (8 % at a
  condition of 458 if A is rounded to bfloat16): it is made at full precision. Later
  ones correct themselves and have the platform's default, which is TF32 on GPUs and
  one pass of bfloat16 on TPUs; on CPU all is float32.

  References:
    Higham, `Functions of Matrices <https://doi.org/10.1137/1.9780898717778>`_,
    chapter 6, 2008

    Amsel, Persson, Musco, Gower, `The Polar Express: Optimal Matrix Sign Methods and
    Their Application to the Muon Algorithm <https://arxiv.org/abs/2505.16932>`_, 2025

    Grishina, Smirnov, Rakhuba, `Accelerating Newton-Schulz Iteration for
    Orthogonalization via Chebyshev-type Polynomials
    <https://arxiv.org/abs/2506.10935>`_, 2025
  """
  eye = jnp.eye(a.shape[-1], dtype=a.dtype)
  eye = eye.reshape((1,) * (a.ndim - 2) + eye.shape)
  square = jnp.matmul(a, a, precision=Precision.HIGHEST)
  # The fourth root of the sum of all eigenvalues' fourth powers: at least the greatest.
  bound = jnp.sqrt(jnp.linalg.norm(square, axis=(-2, -1), keepdims=True))
  y, e, e_squared = a / bound, a / bound, square / bound**2
  z = eye
  for step, (p1, p3, p5) in enumerate(polynomials):
    precision = Precision.HIGHEST if step == 0 else Precision.DEFAULT
    if step:
      e = jnp.matmul(z, y, precision=precision)
      e_squared = jnp.matmul(e, e, precision=precision)
    p = p1 * eye + p3 * e + p5 * e_squared
    z = jnp.matmul(p, z, precision=precision) if step else p
    if step + 1 < len(polynomials):  # the last Y is not needed
      y = jnp.matmul(y, p, precision=precision)
  return z / jnp.sqrt(bound)
