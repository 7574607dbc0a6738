"""The examples on a mesh learn, on simulated devices by their flag."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize('script', ['fsdp_tensor_parallel', 'linen_train_state'])
def test_example_learns(script):
  path = f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
  output = subprocess.run(
    [sys.executable, ROOT / 'examples' / f'{script}.py', '--simulate=8', '--steps=12'],
    env={**os.environ, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  ).stdout
  assert '8 devices' in output
  first, last = re.search(r'loss ([\d.]+) -> ([\d.]+)', output).groups()
  assert float(last) < 0.9 * float(first)
  if script == 'fsdp_tensor_parallel':
    assert 'float32[5,3,32@fsdp,64@tensor]' in output
