"""Findings of the literature, reproduced; see `python -m benchmarks reproduce --help`.

Each module has `run(data, seeds, results)`, which trains what has no result yet and
saves each run in `results / NAME` as a JSON file, and `plot(results, figures)`, which
draws `figures / literature-NAME.png` from these files alone.
"""

from pathlib import Path

from benchmarks.literature import ablation, bulk_sgd, gauss_newton, overlap, speedup

REPRODUCTIONS = {
  'bulk-sgd': bulk_sgd,
  'overlap': overlap,
  'speedup': speedup,
  'ablation': ablation,
  'gauss-newton': gauss_newton,
}


def plot_all(results: Path, figures: Path) -> None:
  """Draws the figures of those that have results."""
  for name, module in REPRODUCTIONS.items():
    if any((results / name).glob('*.json')):
      module.plot(results, figures)
