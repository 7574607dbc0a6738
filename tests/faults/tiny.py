"""The example `train_llama.py`, made tiny, in processes that can be killed.

They are forked from one that has imported everything, but has not started JAX yet: a
process that is killed costs little more than what it trained.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
from pathlib import Path
import resource
import signal
import sys
import time

from flax import serialization
import jax
import numpy as np

ROOT = Path(__file__).parents[2]
STEPS = 300
TIMEOUT = 120  # seconds of a process: a hang is a failure
JOB = ['--optimizer', 'bsfa', '--heads', '1', '--steps', str(STEPS)]
JOB += ['--data', 'text.txt', '--output', 'run']


def load_example():
  spec = importlib.util.spec_from_file_location(
    'train_llama', ROOT / 'examples' / 'train_llama.py'
  )
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
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
  """A run of the example, from its last checkpoint on if it has one."""

  def __init__(self, example, folder: Path, file_limit: int | None = None):
    self.log = folder / 'log.txt'
    self.begin = time.monotonic()
    self.status = None
    resumed = any((folder / 'run').glob('*/*.ckpt'))
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
      if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
      sys.argv = ['train_llama.py', *JOB, *(['--resume'] if resumed else [])]
      try:
        example.main()
        status = 0
      except SystemExit as error:
        if isinstance(error.code, str):
          print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else 1
      except KeyboardInterrupt:  # before the example's own handler was there
        status = 130
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

  def said(self) -> list[str]:
    """Its last line, if there is one."""
    return self.log.read_text(errors='replace').strip().splitlines()[-1:]


def run_to_its_end(example, folder: Path) -> float:
  """Without a fault; returns seconds."""
  process = Process(example, folder)
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
