"""Progress bars that let work end."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from benchmarks.examples import StopSignals


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
