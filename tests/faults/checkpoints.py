"""A damaged checkpoint is refused, with a remedy that loses nothing; never taken."""

from collections.abc import Iterator
import json
from pathlib import Path
import random
import shlex
import shutil
import tempfile

from tests.faults import tiny

BATCH = 50  # results are saved so many at a time


def trials(count: int, done: list[dict], cache: Path) -> Iterator[dict]:
  """One result for each batch of damaged copies."""
  number = sum(result['count'] for result in done)
  if number >= count:
    return
  example = tiny.load_example()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tiny.prepare(folder, cache)
    tiny.run_to_its_end(example, folder)
    original = folder / 'run' / 'bsfa'
    while number < count:
      batch = range(number, min(number + BATCH, count))
      whys, tally = [], {}
      for trial in batch:
        copy = folder / 'copy'
        shutil.copytree(original, copy)
        name, why = one_copy(example, original, copy, random.Random(trial))
        shutil.rmtree(copy)
        tally[name] = tally.get(name, 0) + 1
        whys += [f'trial {trial}, {name}: {why}'] if why else []
      number = batch.stop
      yield {
        'count': len(batch),
        'tally': tally,
        'lost': len(whys),
        'why': '; '.join(whys),
      }


def damage(path: Path, rng: random.Random) -> str:
  """What was done to a file."""
  content = bytearray(path.read_bytes())
  # A flipped bit is the fault that no format notices by itself.
  kind = rng.choices(
    ['bit flipped', 'cut', 'emptied', 'other bytes', 'deleted'], [16, 1, 1, 1, 1]
  )
  kind = kind[0]
  if kind == 'bit flipped':
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  elif kind == 'cut':
    del content[rng.randrange(len(content)) :]
  elif kind == 'emptied':
    content.clear()
  elif kind == 'other bytes':
    start = rng.randrange(len(content) - 512)
    content[start : start + 512] = bytes(512)
  path.write_bytes(content)
  if kind == 'deleted':
    path.unlink()
  return kind


def one_copy(
  example, original: Path, copy: Path, rng: random.Random
) -> tuple[str, str]:
  """What was done to the last checkpoint, and what went wrong, if anything did."""
  before, last = sorted(copy.glob('*.ckpt'))
  state, run = tiny.contents(last)
  was = last.read_bytes()
  kind = damage(last, rng)

  def load():  # it checks structure and options against what is given
    return example.load(copy, state, json.loads(run))

  untouched = last.exists() and last.read_bytes() == was  # zeros over zeros
  if kind != 'deleted' and not untouched:
    try:
      load()
    except SystemExit as error:
      message = str(error.code)
      if '\n' in message or f'rm {shlex.quote(str(last))}' not in message:
        return kind, f'no remedy in {message!r}'
    except Exception as error:
      return kind, f'not refused but raised: {error!r}'
    else:
      return kind, 'taken without a word'
    last.unlink()  # the remedy
  expected = original / (last if untouched else before).name
  found = load()
  saved = tiny.contents(expected)
  if tiny.digest(found[0]) != tiny.digest(saved[0]) or json.dumps(found[1]) != saved[1]:
    return kind, f'{expected.name} is not what it was'
  return kind, ''
