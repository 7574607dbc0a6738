"""Findings of the literature, reproduced; see `python -m benchmarks reproduce --help`.

Each module has `run(data, seeds, store)`, which trains what has no result yet. From the
results alone `plot(store, figures)` draws `figures / literature-NAME.svg`, and
`table(store)` is its table in docs/tables/literature.md.
"""

from pathlib import Path
from types import ModuleType

from benchmarks import report
from benchmarks.literature import ablation, bulk_sgd, gauss_newton, overlap, speedup
from benchmarks.literature.common import collection, seconds
from benchmarks.runs import duration
from benchmarks.store import Store

REPRODUCTIONS = {
  module.NAME: module for module in (bulk_sgd, overlap, speedup, ablation, gauss_newton)
}


def describe(name: str, store: Store) -> str:
  """What is there already, and how long it took, in words."""
  results = store.load(collection(name)).values()
  if not results:
    return 'no runs are recorded'
  return (
    f'{len(results)} runs are recorded and not repeated; they took about'
    f' {duration(sum(map(seconds, results)))}'
  )


def measured(store: Store) -> dict[str, ModuleType]:
  """The reproductions that have results."""
  return {
    name: module
    for name, module in REPRODUCTIONS.items()
    if store.load(collection(name))
  }


def pages(store: Store) -> dict[str, str]:
  """The text of the generated page by its name; empty without results."""
  tables = [
    f'({name}-table)=\n## {name}\n\n{module.table(store)}'
    for name, module in measured(store).items()
  ]
  return {'literature': report.page('Findings: tables', *tables)} if tables else {}


def write(store: Store, docs: Path) -> None:
  """Writes the pages and the figures."""
  report.write_pages(docs, pages(store))
  for module in measured(store).values():
    module.plot(store, docs / 'figures')
