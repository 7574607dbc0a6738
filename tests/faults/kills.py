"""A run that is killed again and again ends with the bits of one that was not."""

from collections.abc import Iterator
from pathlib import Path
import random
import shutil
import signal
import tempfile

from tests.faults import tiny


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
  tally, lost, why = {}, 0, ''
  while True:
    kind = rng.choices(
      ['SIGKILL', 'SIGTERM', 'SIGINT twice', 'full disk'], [5, 2, 2, 1]
    )
    kind = kind[0] if sum(tally.values()) < most else None
    limit = rng.randrange(size // 2, size) if kind == 'full disk' else None
    process = tiny.start(example, folder, limit)
    try:
      if kind is None or kind == 'full disk':
        ended = process.wait(tiny.TIMEOUT)
      else:
        ended = process.wait(rng.uniform(0, seconds))
      if process.status == 0:
        break
      if kind == 'SIGKILL':
        process.send(signal.SIGKILL)
      elif kind == 'SIGTERM':
        process.send(signal.SIGTERM)
      elif kind == 'SIGINT twice':
        process.send(signal.SIGINT)
        process.wait(rng.uniform(0, 0.1))
        process.send(signal.SIGINT)
      elif not ended:
        lost, why = 1, 'it hangs'
      if not process.wait(tiny.TIMEOUT):
        lost, why = 1, f'{kind}: it hangs'
    finally:
      process.end()
    said = process.said()
    if kind is None or (kind == 'full disk' and 'File too large' not in ''.join(said)):
      lost, why = 1, f'{kind}: status {process.status}, {said}'
    if lost:
      break
    if kind:
      stopped = process.status > 0 and kind != 'full disk'
      name = f'{kind}, saved and stopped' if stopped else kind
      tally[name] = tally.get(name, 0) + 1
  return {
    'count': sum(tally.values()),
    'tally': tally,
    'lost': lost,
    'why': why,
    'seconds': process.seconds if process.status == 0 else seconds,
  }
