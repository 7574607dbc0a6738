"""The library needs none of what only examples and tests need."""

import subprocess
import sys

PROGRAM = """
import sys
import bsfa_optax, optax
optax.chain(bsfa_optax.scale_by_whitening(), optax.adamw(1e-3))
optax.chain(bsfa_optax.bsfa(), optax.adamw(1e-3))
optax.chain(optax.adamw(1e-3), bsfa_optax.bsfa(estimator=bsfa_optax.pca()))
bsfa_optax.bsfa_adamw(1e-3)
bsfa_optax.diagnostics.plot_spectrum
bsfa_optax.estimators.layout
bsfa_optax.state.state_bytes
print(*{name.partition('.')[0] for name in sys.modules})
"""


def test_chain_imports_no_optional_dependency():
  # The path of this process, as the package may not be installed.
  command = f'import sys; sys.path[:] = {sys.path!r}\n' + PROGRAM
  result = subprocess.run(
    [sys.executable, '-c', command], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  imported = set(result.stdout.split())
  assert {'bsfa_optax', 'jax', 'optax'} <= imported
  assert not imported & {'flax', 'orbax', 'matplotlib', 'tqdm'}
