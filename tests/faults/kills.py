"""A run that is killed again and again ends with the bits of one that was not."""

from collections.abc import Iterator
from pathlib import Path
import random
import shutil
import signal
import tempfile

from tests.faults import tiny

AT_START = 'before it saved anything'


def trials(count: int, done: list[dict], cache: Path) -> Iterator[dict]:
  """One result a run; each is killed until it ends before the next kill."""
  killed = sum(result['count'] for result in done)
  if killed >= count:
    return
  example = tiny.load_example()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tiny.prepare(folder, cache)
    tiny.run_to_its_end(example, folder)
    seconds = 2.0  # of a run that need not compile, to begin with
    expected = tiny.outcome(folder)
    size = max(x.stat().st_size for x in (folder / 'run' / 'bsfa').glob('*.ckpt'))
    number = len(done)
    while killed < count:
      shutil.rmtree(folder / 'run', ignore_errors=True)
      rng = random.Random(number)
      result = one_run(example, folder, rng, seconds, size, count - killed)
      seconds = result.pop('seconds')
      if not result['lost'] and tiny.outcome(folder) != expected:
        result |= {'lost': 1, 'why': f'run {number}: other numbers at its end'}
      killed += result['count']
      number += 1
      yield result


def one_run(example, folder, rng, seconds, size, most) -> dict:
  """Kills a run at most so often, then lets it end."""
  tally, why = {}, ''
  while not why:
    kind = 'none'
    if sum(tally.values()) < most:
      kinds = ['SIGKILL', 'SIGTERM', 'SIGINT twice', 'full disk']
      (kind,) = rng.choices(kinds, [5, 2, 2, 1])
    limit = rng.randrange(size // 2, size) if kind == 'full disk' else None
    before = saved(folder)
    process = tiny.start(example, folder, limit)
    try:
      waits = kind in ('none', 'full disk')
      ended = process.wait(tiny.TIMEOUT if waits else rng.uniform(0, seconds))
      if process.status == 0:
        seconds = process.seconds
        break
      if not ended and not waits:
        how = kill(process, kind, folder, before, rng)
      elif kind == 'full disk' and 'File too large' in process.said():
        how = kind
      else:
        how = ''
    finally:
      process.end()
    if how:
      tally[how] = tally.get(how, 0) + 1
      if how.endswith(AT_START):
        seconds *= 1.2  # the machine is slow: else it would never get on
    else:
      why = f'{kind}: status {process.status}, {process.said()}'
  return {
    'count': sum(tally.values()),
    'tally': tally,
    'lost': int(bool(why)),
    'why': why,
    'seconds': seconds,
  }


def kill(process, kind: str, folder: Path, before: list[str], rng) -> str:
  """What came of it; nothing if it hangs."""
  if kind == 'SIGKILL':
    process.send(signal.SIGKILL)
  elif kind == 'SIGTERM':
    process.send(signal.SIGTERM)
  else:
    process.send(signal.SIGINT)
    process.wait(rng.uniform(0, 0.1))
    process.send(signal.SIGINT)
  if not process.wait(tiny.TIMEOUT):
    return ''
  if process.status >= 0:
    return f'{kind}: stopped by itself'
  if any((folder / 'run').glob('*/new')):
    return f'{kind}: in mid-save'
  return f'{kind}: {AT_START if saved(folder) == before else "between two saves"}'


def saved(folder: Path) -> list[str]:
  return sorted(path.name for path in (folder / 'run').glob('*/*.ckpt'))
