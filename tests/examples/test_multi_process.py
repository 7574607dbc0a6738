"""Two real processes on this machine train, crash and go on as one process would."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'multi_process.py'
STEPS, SAVE_EVERY, CRASH = 10, 3, 7
TIMEOUT = 120


class Run:
  """Processes of one run; none is left behind."""

  def __init__(self, directory, processes, devices):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    env['PYTHONPATH'] = f'{ROOT}{os.pathsep}{env.get("PYTHONPATH", "")}'
    command = [sys.executable, SCRIPT, f'--directory={directory}', f'--steps={STEPS}']
    command += [f'--save_every={SAVE_EVERY}', f'--simulate={devices}']
    command += [f'--processes={processes}', f'--coordinator=localhost:{port}']
    self.processes = [
      subprocess.Popen(
        [*command, f'--id={i}'],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for i in range(processes)
    ]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.communicate()

  def losses(self):
    """Of every process, once all have ended: a dictionary from step to loss."""
    outputs = [process.communicate(timeout=TIMEOUT)[0] for process in self.processes]
    for process, output in zip(self.processes, outputs, strict=True):
      assert process.returncode == 0, output
    return [
      {int(k): float(v) for k, v in re.findall(r'step (\d+) loss ([\d.]+)', output)}
      for output in outputs
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='no gloo collectives')
def test_crashed_processes_restart_from_the_checkpoint(tmp_path):
  with Run(tmp_path / 'one', processes=1, devices=4) as run:
    (expected,) = run.losses()
  assert sorted(expected) == list(range(STEPS))

  with Run(tmp_path / 'two', processes=2, devices=2) as run:
    victim = run.processes[1]
    for line in victim.stdout:
      if line.startswith(f'step {CRASH} '):
        break
    victim.kill()
    assert victim.wait(TIMEOUT) != 0

  with Run(tmp_path / 'two', processes=2, devices=2) as run:
    first, second = run.losses()
  # It went on from a checkpoint, and not from the beginning.
  assert sorted(first) == list(range(min(first), STEPS))
  assert min(first) in range(SAVE_EVERY, CRASH + 1, SAVE_EVERY)
  assert first == second
  steps = sorted(first)
  np.testing.assert_allclose(
    [first[step] for step in steps], [expected[step] for step in steps], rtol=1e-4
  )
