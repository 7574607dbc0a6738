"""Findings of the literature, reproduced; see `python -m benchmarks reproduce --help`.

Each module has `run(data, seeds, results)`, which trains what has no result yet and
saves each run in `results / NAME` as a JSON file. From these files alone
`plot(results, figures)` draws `figures / literature-NAME.png`, and `table(results)` is
the table of docs/literature.md.
"""

from pathlib import Path

from benchmarks import report
from benchmarks.literature import ablation, bulk_sgd, gauss_newton, overlap, speedup

PAGE = 'literature.md'
REPRODUCTIONS = {
  'bulk-sgd': bulk_sgd,
  'overlap': overlap,
  'speedup': speedup,
  'ablation': ablation,
  'gauss-newton': gauss_newton,
}


def write(results: Path, docs: Path) -> None:
  """Rewrites the tables of the page and the figures of those that have results."""
  measured = {
    name: module
    for name, module in REPRODUCTIONS.items()
    if any((results / name).glob('*.json'))
  }
  if measured:
    tables = {name: module.table(results) for name, module in measured.items()}
    report.rewrite(docs / PAGE, tables)
  for module in measured.values():
    module.plot(results, docs / 'figures')
