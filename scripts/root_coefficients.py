"""Prints the coefficients of bsfa_optax/whitening.py.

Of all polynomials of degree 8 it finds the p for which p(x) sqrt(x) is closest
to 1 on [1 / condition, 1], and factors it for three products: in t = 2 x - 1,
with s = t^2 and m = s (s + g t + h), it is
c0 + c1 t + c2 s + d0 m + m (d1 t + d2 s + d3 m). As t is in [-1, 1], the
coefficients are small, and so is what rounding does to the sum.

Sastre, "Efficient evaluation of matrix polynomials", 2018,
https://doi.org/10.1016/j.laa.2017.11.010, has such schemes.

Example: python scripts/root_coefficients.py --condition 400
"""

import argparse

import numpy as np
from numpy.polynomial import chebyshev, polynomial
from scipy.optimize import linprog

DEGREE = 8


def minimax(condition: float) -> tuple[np.ndarray, float]:
  """Coefficients of the powers of t, the lowest first, and the greatest error."""
  x = np.geomspace(1 / condition, 1, 2001)
  columns = chebyshev.chebvander(2 * x - 1, DEGREE) * np.sqrt(x)[:, None]
  ones = np.ones((len(x), 1))
  # The least e with |p(x) sqrt(x) - 1| <= e at every point.
  found = linprog(
    [0] * (DEGREE + 1) + [1],
    A_ub=np.block([[columns, -ones], [-columns, -ones]]),
    b_ub=np.concatenate([np.ones(len(x)), -np.ones(len(x))]),
    bounds=[(None, None)] * (DEGREE + 1) + [(0, None)],
  )
  return chebyshev.cheb2poly(found.x[:-1]), float(found.x[-1])


def factored(p: np.ndarray) -> tuple[np.ndarray, ...]:
  """(g, h), (c0, c1, c2) and (d0, d1, d2, d3) with the same sum."""
  add, subtract, multiply = polynomial.polyadd, polynomial.polysub, polynomial.polymul
  h = np.array([0.0, 1.0])  # all below are polynomials in h, which comes last
  d3 = p[8]
  g = p[7] / (2 * d3)
  d2 = subtract([p[6] - d3 * g**2], 2 * d3 * h)
  d1 = subtract([p[5]], add(2 * g * d3 * h, g * d2))
  d0 = subtract([p[4]], add(add(d3 * multiply(h, h), g * d1), multiply(h, d2)))
  roots = polynomial.polyroots(subtract([p[3]], add(g * d0, multiply(h, d1))))
  solutions = []
  for root in roots[np.isreal(roots)].real:
    d = np.array([*(polynomial.polyval(root, q) for q in (d0, d1, d2)), d3])
    c = np.array([p[0], p[1], p[2] - root * d[0]])
    solutions.append((np.array([g, root]), c, d))
  return min(solutions, key=lambda solution: abs(solution[2]).max())


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--condition', type=float, default=400, metavar='K', help='condition number (400)'
  )
  p, error = minimax(parser.parse_args().condition)
  for numbers in factored(p):
    print(f'({", ".join(f"{x:.4f}" for x in numbers)})')
  print(f'error: {error:.1%}')


if __name__ == '__main__':
  main()
