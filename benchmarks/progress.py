"""Progress bars that let work end."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tqdm import tqdm


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
    # Not print, which may be what the signal interrupted.
    os.write(sys.stderr.fileno(), b'\nstopping at the next step ...\n')

  def restore(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)


class Progress(tqdm):
  """A bar with which Ctrl-C ends the work at the next update; a second one at once.

  A KeyboardInterrupt raised wherever Python happens to be may get lost: JAX has a
  callback in the garbage collector, out of which no exception comes.
  """

  def __init__(self, label: str, total: int, unit: str):
    super().__init__(desc=label, total=total, unit=unit, disable=None)

  def __enter__(self) -> Progress:
    self._stop = StopSignals()
    return super().__enter__()

  def update(self, n: float | None = 1) -> bool | None:
    shown = super().update(n)
    if self._stop.received:
      raise KeyboardInterrupt
    return shown

  def __exit__(self, *exception: Any) -> None:
    self._stop.restore()
    super().__exit__(*exception)
