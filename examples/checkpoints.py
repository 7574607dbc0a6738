"""Stopping at a step boundary, and continuing from there bit for bit."""

import hashlib
import os
from pathlib import Path
import signal
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class StopSignals:
  """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step."""

  def __init__(self):
    self.received: signal.Signals | None = None
    self._previous = {
      number: signal.signal(number, self._receive)
      for number in (signal.SIGINT, signal.SIGTERM)
    }

  def _receive(self, number, frame):
    del frame
    self.received = signal.Signals(number)
    self.restore()  # a second one stops at once
    os.write(
      sys.stderr.fileno(), b'\nstopping at the next step ...\n'
    )  # print may not nest

  def restore(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)


class Checkpoints:
  """The newest checkpoint of a run: weights, optimizer state, record of the run."""

  def __init__(self, directory: Path):
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

  def save(self, step: int, record: dict, **trees: Any) -> None:
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    self._manager.save(
      step,
      args=ocp.args.Composite(record=ocp.args.JsonSave(record), **items),
      force=True,
    )
    # The next step donates the arrays, so the write must be over.
    self._manager.wait_until_finished()

  def record(self) -> dict | None:
    if self._manager.latest_step() is None:
      return None
    return self._restore(record=ocp.args.JsonRestore())['record']

  def restore(self, **like: Any) -> dict[str, Any]:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    return self._restore(**items)

  def _restore(self, **items: Any) -> dict[str, Any]:
    step = self._manager.latest_step()
    return self._manager.restore(step, args=ocp.args.Composite(**items))

  def close(self) -> None:
    self._manager.close()


def fingerprint(params: Any) -> str:
  """A hash of the weights, equal if and only if every bit is."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()
