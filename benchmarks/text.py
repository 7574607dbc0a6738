"""Text as bytes, the standard library's own sources, and batches of it."""

import hashlib
import os
from pathlib import Path
import sysconfig
from typing import NamedTuple

import numpy as np

# Tests, tables, generated files, and what does not come with Python.
_SKIPPED = {
  '__pycache__',
  'dist-packages',
  'encodings',
  'idlelib',
  'lib2to3',
  'pydoc_data',
  'site-packages',
  'test',
  'tests',
}
_VALIDATION_SHARE = 10  # one part in ten


class Text(NamedTuple):
  """Tokens (uint8) to train and to validate on, and where they come from."""

  train: np.ndarray
  validation: np.ndarray
  source: str

  def fingerprint(self) -> str:
    """A hash of both parts, equal if and only if the text is."""
    digest = hashlib.sha256(self.train.tobytes())
    digest.update(b'|' + self.validation.tobytes())
    return digest.hexdigest()[:16]


def standard_library() -> Text:
  """The standard library's Python sources, one file in ten kept for validation.

  Which part a file belongs to depends on its relative path alone.
  """
  root = Path(sysconfig.get_path('stdlib'))
  names = []
  for folder, folders, files in os.walk(root):
    folders[:] = set(folders) - _SKIPPED
    names += [
      Path(folder, file).relative_to(root).as_posix()
      for file in files
      if file.endswith('.py') and not file.startswith('_sysconfigdata')
    ]
  parts: tuple[list[bytes], list[bytes]] = ([], [])
  for name in sorted(names):
    held_out = (
      int(hashlib.sha256(name.encode()).hexdigest(), 16) % _VALIDATION_SHARE == 0
    )
    parts[held_out].append((root / name).read_bytes())
  train, validation = (np.frombuffer(b'\n'.join(part), np.uint8) for part in parts)
  return Text(train, validation, 'standard library sources')


def training_batch(
  tokens: np.ndarray, rows: int, context: int, seed: int, step: int
) -> np.ndarray:
  """Rows of context + 1 tokens from random places; depends on (seed, step) alone."""
  starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - context, rows)
  return tokens[starts[:, None] + np.arange(context + 1)]


def validation_batches(
  tokens: np.ndarray, rows: int, context: int, count: int
) -> np.ndarray:
  """The same batches for everyone, evenly spread: (count, rows, context + 1)."""
  starts = np.linspace(0, len(tokens) - context - 1, count * rows).astype(np.int64)
  return tokens[starts.reshape(count, rows, 1) + np.arange(context + 1)]
