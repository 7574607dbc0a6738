"""Two real processes on this machine train, crash and go on as one process would."""

import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'multi_process.py'
STEPS, SAVE_EVERY, CRASH = 10, 3, 7
TIMEOUT = 120


def losses_in(output):
  return {int(k): float(v) for k, v in re.findall(r'step (\d+) loss ([\d.]+)', output)}


class Run:
  """Two processes of two devices each; none is left behind."""

  def __init__(self, directory):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    env = {'XLA_FLAGS': '--xla_backend_optimization_level=0'} | os.environ
    env['PYTHONPATH'] = f'{ROOT}{os.pathsep}{env.get("PYTHONPATH", "")}'
    command = [sys.executable, SCRIPT, f'--directory={directory}', f'--steps={STEPS}']
    command += [f'--save_every={SAVE_EVERY}', '--simulate=2']
    command += ['--processes=2', f'--coordinator=localhost:{port}']
    self.processes = [
      subprocess.Popen(
        [*command, f'--id={i}'],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for i in range(2)
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
    return list(map(losses_in, outputs))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='no gloo collectives')
@pytest.mark.usefixtures('standard_promotion')
def test_crashed_processes_restart_from_the_checkpoint(tmp_path, capsys):
  script = runpy.run_path(str(SCRIPT))
  script['train'](tmp_path / 'one', STEPS, SAVE_EVERY)  # in this process
  expected = losses_in(capsys.readouterr().out)
  assert sorted(expected) == list(range(STEPS))

  with Run(tmp_path / 'two') as run:
    victim = run.processes[1]
    for line in victim.stdout:
      if line.startswith(f'step {CRASH} '):
        break
    victim.kill()
    assert victim.wait(TIMEOUT) != 0

  with Run(tmp_path / 'two') as run:
    first, second = run.losses()
  # It went on from a checkpoint, and not from the beginning.
  assert sorted(first) == list(range(min(first), STEPS))
  assert min(first) in range(SAVE_EVERY, CRASH + 1, SAVE_EVERY)
  assert first == second
  steps = sorted(first)
  np.testing.assert_allclose(
    [first[step] for step in steps], [expected[step] for step in steps], rtol=1e-4
  )
