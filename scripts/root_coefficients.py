"""Prints the polynomials of bsfa_optax/_roots.py: minimax for a condition number.

Step k of the iteration multiplies a singular value x of the square root by
p(x) / x for an odd p(x) = a x + b x^3 + c x^5. The composition is best if each
p is the one closest to 1 on the interval in which the steps before have left x
(Amsel et al., "The Polar Express", https://arxiv.org/abs/2505.16932, 2025).

Example: python scripts/root_coefficients.py --condition 400 --steps 2
"""

import argparse

import numpy as np
from scipy.optimize import linprog


def minimax(low: float, high: float) -> tuple[np.ndarray, float]:
  """a, b, c of the odd quintic closest to 1 on [low, high], and its error."""
  x = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, 4001))) / 2
  powers = np.stack([x, x**3, x**5], axis=1)
  ones = np.ones((len(x), 1))
  # The least t with |p(x) - 1| <= t at every point.
  found = linprog(
    [0, 0, 0, 1],
    A_ub=np.block([[powers, -ones], [-powers, -ones]]),
    b_ub=np.concatenate([np.ones(len(x)), -np.ones(len(x))]),
    bounds=[(None, None)] * 3 + [(0, None)],
  )
  return found.x[:3], float(found.x[3])


def steps(condition: float, count: int) -> list[tuple[np.ndarray, float]]:
  """The polynomials for eigenvalues in [1 / condition, 1], each with its error."""
  low, high, out = condition**-0.5, 1.0, []
  for _ in range(count):
    coefficients, error = minimax(low, high)
    out.append((coefficients, error))
    low, high = 1 - error, 1 + error
  return out


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--condition', type=float, default=400, metavar='K', help='condition number (400)'
  )
  parser.add_argument(
    '--steps', type=int, default=2, metavar='N', help='how many polynomials (2)'
  )
  args = parser.parse_args()
  for (a, b, c), error in steps(args.condition, args.steps):
    print(f'({a:.4f}, {b:.4f}, {c:.4f}),  # error {error:.1e}')


if __name__ == '__main__':
  main()
