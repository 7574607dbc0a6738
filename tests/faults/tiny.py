"""The example `train_llama.py`, made tiny, in processes that can be killed.

They are forked from one that has imported everything, but has not started JAX yet: a
process that is killed costs little more than what it trained.
"""

from collections.abc import Callable
import contextlib
import hashlib
import importlib.util
import json
import os
from pathlib import Path
import resource
import signal
import sys
import threading
import time
import traceback
from types import ModuleType

from flax import serialization
import jax
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
STEPS = 300
TIMEOUT = 120  # seconds of a process: a hang is a failure
JOB = ['--optimizer', 'bsfa', '--heads', '1', '--steps', str(STEPS)]
JOB += ['--data', 'text.txt', '--output', 'run']


def load(name: str) -> ModuleType:
  """An example as a module."""
  path = ROOT / 'examples' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  return example


def load_example() -> ModuleType:
  example = load('train_llama')
  example.LAYERS, example.ROWS, example.CONTEXT, example.HEAD = 1, 2, 8, 8
  example.LOOK_EVERY = example.SAVE_EVERY = 5
  # Of the table and the figure only what holds the run's numbers.
  example.show = lambda runs, output: (output / 'results.json').write_text(
    json.dumps(runs)
  )
  return example


def prepare(folder: Path, cache: Path) -> None:
  """Puts the text there; `cache` is for functions that were compiled once."""
  words = np.random.default_rng(0).choice(['the', 'bulk', 'is', 'flat'], 2000)
  (folder / 'text.txt').write_text(' '.join(words))
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_compilation_cache_dir', str(cache.absolute()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


class Process:
  """Runs `main` in a process of its own, whose output goes to a file."""

  def __init__(
    self, folder: Path, main: Callable[[], None], file_limit: int | None = None
  ):
    self.log = folder / 'log.txt'
    self.begin = time.monotonic()
    self.status = None
    self.pid = os.fork()
    if self.pid:
      return
    status = 1
    try:
      os.setsid()  # Ctrl-C is for the parent
      signal.signal(signal.SIGINT, signal.default_int_handler)
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
      log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      for stream in (1, 2):
        os.dup2(log, stream)
      os.chdir(folder)
      # Its own is shared by all that are forked, and one that is killed may hold it.
      tqdm.set_lock(threading.RLock())
      if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
      status = status_of(main)
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(status)

  def wait(self, seconds: float) -> bool:
    """Whether it has ended, after at most so many seconds."""
    until = time.monotonic() + seconds
    while self.status is None:
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      if pid:
        self.status = os.waitstatus_to_exitcode(status)
        self.seconds = time.monotonic() - self.begin
      elif time.monotonic() >= until:
        return False
      else:
        time.sleep(0.002)
    return True

  def send(self, number: int) -> None:
    if self.status is None:
      os.kill(self.pid, number)

  def end(self) -> None:
    """Leaves nothing behind, hung or not."""
    with contextlib.suppress(ProcessLookupError):
      self.send(signal.SIGKILL)
    self.wait(TIMEOUT)

  def said(self) -> str:
    """Its last line."""
    return ''.join(self.log.read_text(errors='replace').strip().splitlines()[-1:])


def status_of(main: Callable[[], None]) -> int:
  """As Python's own at its end."""
  try:
    main()
  except SystemExit as error:
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
      return 1
    return error.code or 0
  except KeyboardInterrupt:  # before the example's own handler was there
    return 130
  except Exception:
    traceback.print_exc()
    return 1
  return 0


def start(example: ModuleType, folder: Path, file_limit: int | None = None) -> Process:
  """A run of the example, from its last checkpoint on if it has one."""
  resumed = any((folder / 'run').glob('*/*.ckpt'))
  options = [*JOB, *(['--resume'] if resumed else [])]

  def main():
    sys.argv = ['train_llama.py', *options]
    example.main()

  return Process(folder, main, file_limit)


def run(folder: Path, main: Callable[[], None]) -> float:
  """Runs it to its end in a process; returns seconds."""
  return finished(Process(folder, main))


def run_to_its_end(example: ModuleType, folder: Path) -> float:
  """A run of the example without a fault; returns seconds."""
  return finished(start(example, folder))


def finished(process: Process) -> float:
  try:
    process.wait(TIMEOUT)
  finally:
    process.end()
  if process.status:
    raise RuntimeError(process.log.read_text())
  return process.seconds


def outcome(folder: Path) -> dict:
  """Of a run that has ended: everything but times, bit for bit."""
  (run,) = json.loads((folder / 'run' / 'results.json').read_text())
  del run['seconds']
  state, _ = contents(sorted((folder / 'run' / 'bsfa').glob('*.ckpt'))[-1])
  return {'run': json.dumps(run), 'state': digest(state)}


def contents(path: Path) -> tuple[dict, str]:
  """A checkpoint's state and record of the run, without any check."""
  saved = serialization.msgpack_restore(path.read_bytes()[32:])
  return saved['0'], saved['1']


def digest(state: dict) -> str:
  return hashlib.sha256(serialization.msgpack_serialize(state)).hexdigest()
