"""A damaged checkpoint is refused, with a remedy that loses nothing; never taken."""

from collections.abc import Callable, Iterator
import json
from pathlib import Path
import random
import shutil
import tempfile
from types import ModuleType, SimpleNamespace

from tests.faults import tiny

BATCH = 50  # results are saved so many at a time


def trials(count: int, done: list[dict], cache: Path) -> Iterator[dict]:
  """One result for each batch of damaged copies, of both examples in turn."""
  number = sum(result['count'] for result in done)
  if number >= count:
    return
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tiny.prepare(folder, cache)
    single, manager = tiny.load_example(), tiny.load('multi_process')
    tiny.run_to_its_end(single, folder)
    tiny.run(folder, lambda: manager.train(folder / 'steps', 11, 5))
    while number < count:
      batch = range(number, min(number + BATCH, count))
      whys, tally = [], {}
      for trial in batch:
        copy, rng = folder / 'copy', random.Random(trial)
        original = folder / ('steps' if trial % 2 else 'run/bsfa')
        shutil.copytree(original, copy)
        attack = of_a_manager if trial % 2 else of_one_file
        kind, why = attack(manager if trial % 2 else single, original, copy, rng)
        shutil.rmtree(copy)
        name = f'{kind} in {"a file of a folder" if trial % 2 else "a single file"}'
        tally[name] = tally.get(name, 0) + 1
        whys += [f'trial {trial}, {name}: {why}'] if why else []
      number = batch.stop
      yield {
        'count': len(batch),
        'tally': tally,
        'lost': len(whys),
        'why': '; '.join(whys),
      }


def damage(path: Path, rng: random.Random) -> tuple[str, bool]:
  """What was done to a file, and whether that changed it."""
  was = path.read_bytes()
  content = bytearray(was)
  # A flipped bit is the fault that no format notices by itself.
  kinds = ['bit flipped', 'cut', 'emptied', 'zeros', 'deleted']
  (kind,) = rng.choices(kinds, [16, 1, 1, 1, 1])
  place = rng.randrange(len(content))
  if kind == 'bit flipped':
    content[place] ^= 1 << rng.randrange(8)
  elif kind == 'cut':
    del content[place:]
  elif kind == 'emptied':
    content.clear()
  elif kind == 'zeros':
    content[place:] = bytes(len(content) - place)
  path.write_bytes(content)
  if kind == 'deleted':
    path.unlink()
  return kind, kind == 'deleted' or content != was


def refusal(load: Callable[[], object], remedy: str) -> str:
  """What was wrong with how a damaged checkpoint was refused; nothing, if nothing."""
  try:
    load()
  except SystemExit as error:
    message = str(error.code)
    fine = '\n' not in message and 'damaged' in message and remedy in message
    return '' if fine else f'no remedy in {message!r}'
  except Exception as error:
    return f'not refused but raised: {type(error).__name__} {str(error)[:80]!r}'
  return 'taken without a word'


def of_one_file(
  example: ModuleType, original: Path, copy: Path, rng: random.Random
) -> tuple[str, str]:
  """What was done to the last checkpoint, and what went wrong, if anything did."""
  before, last = sorted(copy.glob('*.ckpt'))
  state, run = tiny.contents(last)
  load = lambda: example.load(copy, state, json.loads(run))
  kind, changed = damage(last, rng)
  if changed and kind != 'deleted':
    why = refusal(load, f'rm {last}')
    if why:
      return kind, why
    last.unlink()  # the remedy
  expected = original / (before if changed else last).name
  found, saved = load(), tiny.contents(expected)
  if tiny.digest(found[0]) != tiny.digest(saved[0]) or json.dumps(found[1]) != saved[1]:
    return kind, f'{expected.name} is not what it was'
  return kind, ''


def of_a_manager(
  example: ModuleType, original: Path, copy: Path, rng: random.Random
) -> tuple[str, str]:
  """The same for a file of an Orbax checkpoint, the checksums' own among them."""
  last = copy / '10'
  file = rng.choice(sorted(x for x in last.rglob('*') if x.is_file()))
  kind, changed = damage(file, rng)
  manager = SimpleNamespace(
    directory=copy,
    all_steps=lambda: [int(x.name) for x in copy.iterdir()],
    delete=lambda step: shutil.rmtree(copy / str(step)),
  )
  if changed and not (kind == 'deleted' and file.name == example.SUMS):
    why = refusal(lambda: example.last_step(manager), f'rm -r {last}')
    if why:
      return kind, f'{file.name}: {why}'
    shutil.rmtree(last)
  step = str(example.last_step(manager))
  if step != ('5' if changed else '10'):
    return kind, f'{file.name}: goes on from {step}'
  if example.checksums(copy / step) != example.checksums(original / step):
    return kind, f'{step} is not what it was'
  return kind, ''
