"""Results on disk: a JSON file for each run as it ends, a compact one for each task.

The files of single runs lie in an ignored folder. `Store.collect` folds them into files
that are committed: JSON Lines, first what runs have in common, then times of a step,
then a line a run, its loss curve thinned. The same results give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
import platform
import statistics
import tempfile
from typing import Any, NamedTuple

import jax

import bsfa_optax

ROOT = Path(__file__).parents[1]
RAW = ROOT / 'runs' / 'benchmarks'
COLLECTED = ROOT / 'benchmarks' / 'results'
CURVE_POINTS = 20
CURVE_DIGITS = 4

# Significant digits in the compact files; what is not named keeps all it has.
DIGITS = {
  'train_loss': 7,
  'validation_loss': 7,
  'train_set_loss': 7,
  'accuracy': 7,
  'times_adamw': 6,
  'quartiles': 6,
  'step_ms': 4,
}
SHARED = ('task', 'recipe', 'problem')  # by the runs of a file
OF_CONTENDER = ('settings', 'parameters', 'state_bytes')
OF_ENVIRONMENT = ('versions', 'machine')
TIMES = '.times'

Result = dict[str, Any]
Results = dict[str, Result]  # by name of run


class BadResults(Exception):
  """A folder or file is not as it should be; the message tells the user what to do."""


# What a result is recorded with.


def versions() -> dict[str, str]:
  """Versions of what has an influence on a result."""
  python = platform.python_version()
  found = {'python': python, 'bsfa-optax': bsfa_optax.__version__}
  for name in ('jax', 'optax', 'flax', 'numpy', 'psgdax'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # psgdax
      found[name] = importlib.metadata.version(name)
  return found


def machine() -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    'platform': device.platform,
    'device_kind': device.device_kind,
    'cpu_cores': len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count(),
  }


def environment() -> dict[str, Any]:
  return {'versions': versions(), 'machine': machine()}


# Files.


def write_text(path: Path, text: str) -> None:
  """Writes a file as a whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_text(text)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
  write_text(path, json.dumps(content, indent=1, allow_nan=False) + '\n')


def read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise BadResults(f'{path}: not JSON ({error}); delete it to run again') from error


class Store(NamedTuple):
  """The two folders of results.

  A collection is a task or `literature/NAME`. Where a run is in both folders the single
  file counts.

  Attributes:
    raw: of single runs, `COLLECTION/RUN.json`, and times, `COLLECTION.times.json`.
    collected: of compact files, `COLLECTION.jsonl`.
  """

  raw: Path = RAW
  collected: Path = COLLECTED

  def load(self, collection: str) -> Results:
    """All results of a collection by name of run, sorted."""
    found, _ = self._read_collected(collection)
    for path in (self.raw / collection).glob('*.json'):
      found[path.stem] = read_json(path)
    return dict(sorted(found.items()))

  def get(self, collection: str, run: str) -> Result | None:
    path = self._path(collection, run)
    if path.exists():
      return read_json(path)
    return self._read_collected(collection)[0].get(run)

  def save(self, collection: str, run: str, result: Result) -> None:
    write_json(self._path(collection, run), result)

  def once(
    self, collection: str, run: str, measure: Callable[[], Result], again: bool = False
  ) -> Result:
    """The result of a run, measured and saved if there is none."""
    found = None if again else self.get(collection, run)
    if found is None:
      self.save(collection, run, measure() | environment())
      found = self.get(collection, run)
    return found

  def times(self, collection: str) -> Results:
    """Measured times of a step by contender."""
    _, found = self._read_collected(collection)
    path = self.raw / f'{collection}{TIMES}.json'
    return dict(sorted((found | (read_json(path) if path.exists() else {})).items()))

  def add_times(self, collection: str, measured: Results) -> None:
    """Contenders that are not measured now keep their times."""
    path = self.raw / f'{collection}{TIMES}.json'
    before = read_json(path) if path.exists() else {}
    write_json(path, before | measured)

  def collect(self, collections: Iterable[str]) -> list[Path]:
    """Brings the compact files up to date; returns those that changed."""
    changed = []
    for name in collections:
      path, text = self.path(name), encode(self.load(name), self.times(name))
      if text and (not path.exists() or path.read_text() != text):
        write_text(path, text)
        changed.append(path)
    return changed

  def holds_raw(self, collections: Iterable[str]) -> bool:
    return any(
      (self.raw / f'{name}{TIMES}.json').exists()
      or any((self.raw / name).glob('*.json'))
      for name in collections
    )

  def holds_collected(self, collections: Iterable[str]) -> bool:
    return any(self.path(name).exists() for name in collections)

  def path(self, collection: str) -> Path:
    """Of the compact file."""
    return self.collected / f'{collection}.jsonl'

  def _path(self, collection: str, run: str) -> Path:
    return self.raw / collection / f'{run}.json'

  def _read_collected(self, collection: str) -> tuple[Results, Results]:
    path = self.path(collection)
    return decode(path) if path.exists() else ({}, {})

  def check_writable(self) -> None:
    """Raises BadResults if results could not be saved."""
    try:
      self.raw.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=self.raw):
        pass
    except OSError as error:
      raise BadResults(
        f'argument --results: {self.raw}: cannot be written to ({error.strerror}); give'
        ' a folder that can'
      ) from error


# The compact form.


def rounded(value: Any, digits: int) -> Any:
  """Numbers to so many significant digits, in lists too."""
  if isinstance(value, list):
    return [rounded(x, digits) for x in value]
  return float(f'{value:.{digits}g}') if isinstance(value, float) else value


def thinned(curve: dict[str, Any]) -> dict[str, Any]:
  """A loss curve of at most `CURVE_POINTS` means; None where a loss is not finite."""
  losses, every = curve['losses'], curve['every']
  size = max(1, math.ceil(len(losses) / CURVE_POINTS))
  parts = [losses[i : i + size] for i in range(0, len(losses), size)]
  means = [None if None in part else statistics.fmean(part) for part in parts]
  return {'every': every * size, 'losses': rounded(means, CURVE_DIGITS)}


def compact(result: Result) -> Result:
  kept = {
    key: rounded(value, DIGITS[key]) if key in DIGITS else value
    for key, value in result.items()
  }
  if 'loss_curve' in kept:
    kept['loss_curve'] = thinned(kept['loss_curve'])
  return kept


def _line(content: Any) -> str:
  return json.dumps(content, separators=(',', ':'), allow_nan=False)


def _commonest(values: Iterable[Any]) -> Any:
  """Of equally frequent values the first in the order of their text."""
  count = Counter(map(_line, values))
  return json.loads(min(count, key=lambda text: (-count[text], text)))


def _defaults(results: Iterable[Result], keys: Iterable[str]) -> dict[str, Any]:
  results = list(results)
  found = {key: _commonest(r.get(key) for r in results) for key in keys if results}
  return {key: value for key, value in found.items() if value is not None}


def _without(result: Result, keys: Iterable[str], defaults: Result) -> Result:
  """What differs from the defaults; None for what has a default and is absent."""
  rest = {key: value for key, value in result.items() if key not in keys}
  own = {key: result.get(key) for key in keys if result.get(key) != defaults.get(key)}
  return rest | own


def encode(runs: Results, times: Results) -> str:
  """The text of a compact file; none of nothing."""
  if not runs and not times:
    return ''
  runs = {name: compact(result) for name, result in sorted(runs.items())}
  shared = _defaults(runs.values(), SHARED)
  names = sorted({r['contender'] for r in runs.values() if 'contender' in r})
  contenders = {
    name: _defaults(
      (r for r in runs.values() if r.get('contender') == name), OF_CONTENDER
    )
    for name in names
  }
  environments = {}

  def in_environment(result: Result) -> Result:
    where = {key: result[key] for key in OF_ENVIRONMENT if key in result}
    name = hashlib.sha256(_line(where).encode()).hexdigest()[:6]
    environments[name] = where
    rest = {key: x for key, x in result.items() if key not in OF_ENVIRONMENT}
    return rest | {'environment': name}

  of_times = [
    {'time_of': name} | in_environment(compact(entry))
    for name, entry in sorted(times.items())
  ]
  of_runs = []
  for name, result in runs.items():
    rest = _without(result, SHARED, shared)
    if 'contender' in result:
      rest = _without(rest, OF_CONTENDER, contenders[result['contender']])
    of_runs.append({'run': name} | in_environment(rest))
  head = [{'shared': shared}]
  head += [{'environment': name} | environments[name] for name in sorted(environments)]
  head += [{'contender': name} | contenders[name] for name in names]
  return ''.join(f'{_line(one)}\n' for one in head + of_times + of_runs)


def decode(path: Path) -> tuple[Results, Results]:
  """Runs and times of a compact file."""
  runs, times, shared = {}, {}, {}
  environments, contenders = {}, {}
  for number, text in enumerate(path.read_text().splitlines(), 1):
    try:
      line = json.loads(text)
      if 'run' in line:
        name = line.pop('run')
        of = contenders.get(line.get('contender'), {})
        result = shared | of | environments[line.pop('environment')] | line
        defaulted = (*SHARED, *OF_CONTENDER)
        runs[name] = {
          key: x for key, x in result.items() if x is not None or key not in defaulted
        }
      elif 'time_of' in line:
        name = line.pop('time_of')
        times[name] = environments[line.pop('environment')] | line
      elif 'environment' in line:
        name = line.pop('environment')
        environments[name] = line
      elif 'contender' in line:
        name = line.pop('contender')
        contenders[name] = line
      else:
        shared = line['shared']
    except (ValueError, KeyError, AttributeError) as error:
      raise BadResults(
        f'{path}, line {number}: not a line of results ({error!r}); restore the file,'
        ' for example with git checkout'
      ) from error
  return runs, times
