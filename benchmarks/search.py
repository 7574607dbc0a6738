"""Searches for learning rates and other options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import math

Point = dict[str, float]


def grid(half_steps: int) -> float:
  """Learning rates at half a factor of two: 0.001 at 0, 0.00141 at 1, 0.002 at 2 ...

  All contenders share this grid, so that their runs at AdamW's best rate are points
  of it.
  """
  return float(f'{1e-3 * 2 ** (half_steps / 2):.3g}')


def best_rate(
  start: float, budget: int, score_at: Callable[[float], float]
) -> float | None:
  """Walks by factors of two until the best rate has worse ones on both sides.

  Then tries the half-steps beside it.

  Args:
    start: about where to begin.
    budget: greatest number of rates to try.
    score_at: what a rate is judged by; infinite if it diverges.

  Returns:
    The best rate, or None if its neighbours on both sides are not yet known.
  """
  middle = 2 * round(math.log2(start / 1e-3))
  scores: dict[int, float] = {}

  def known(points: Iterable[int]) -> bool:
    """Tries what is missing; whether the budget sufficed."""
    for point in points:
      if point not in scores:
        if len(scores) == budget:
          return False
        scores[point] = score_at(grid(point))
    return True

  best = middle
  for distance in (2, 1):
    while True:
      if not known((best, best - distance, best + distance)):
        return None
      # Of equals the least: where all diverge, the way is down.
      better = min(scores, key=lambda point: (scores[point], point))
      if better == best:
        break
      best = better
  return grid(best)


def climb(
  start: Point,
  neighbours: Callable[[Point], list[Point]],
  judge: Callable[[Point], float],
  trials: int,
) -> Point:
  """Goes to the first better neighbour until none is or the trials are spent."""
  rounded = lambda point: {key: float(f'{x:.3g}') for key, x in point.items()}
  best = rounded(start)
  scores = {tuple(best.values()): judge(best)}
  while True:
    for point in map(rounded, neighbours(best)):
      key = tuple(point.values())
      if key in scores:
        continue
      if len(scores) == trials:
        return best
      scores[key] = judge(point)
      if scores[key] < scores[tuple(best.values())]:
        best = point
        break
    else:
      return best
