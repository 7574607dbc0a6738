"""Plots of what the diagnostics measure over steps; they need Matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bsfa_optax.diagnostics._curvature import CurvatureEnergy, CurvatureSplit, MATRICES

MAX_NAMED_LINES = 10  # more lines than this have no legend entry of their own
MAX_TICKS = 50  # more directions than this are drawn on a logarithmic axis


def plot_overlap(
  steps: Sequence[int],
  overlaps: Any,
  names: Sequence[str] | None = None,
  *,
  ax: Any = None,
) -> Any:
  """Plots overlaps of subspaces over steps, a line for each block.

  Args:
    steps: the steps, ``(steps,)``.
    overlaps: what `subspace_overlap` gave at each, ``(steps, blocks)``.
    names: names of the blocks, as of `bsfa_optax.state.block_names`. More than ten are
      drawn alike, with their median.
    ax: Matplotlib axes to draw on; new ones by default.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_overlap([0, 10], [[0.1], [0.8]], ['dense/kernel'])
    >>> ax.get_ylabel()
    'subspace overlap'
  """
  ax = _block_lines(steps, overlaps, names, ax)
  ax.set(ylabel='subspace overlap', ylim=(-0.02, 1.02))
  return ax


def plot_dominant_fraction(
  steps: Sequence[int],
  fractions: Any,
  names: Sequence[str] | None = None,
  *,
  overall: Any = None,
  ax: Any = None,
) -> Any:
  """Plots the dominant fractions of gradients over steps, a line for each block.

  Args:
    steps: the steps, ``(steps,)``.
    fractions: the first result of `dominant_fraction` at each, or what
      ``optax.tree.get(opt_state, 'dominant_fraction')`` gave, ``(steps, blocks)``.
    names: as in `plot_overlap`.
    overall: the second result of `dominant_fraction` at each step, ``(steps,)``.
    ax: as in `plot_overlap`.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_dominant_fraction([0, 10], [[0.1], [0.8]])
    >>> ax.get_xlabel()
    'step'
  """
  ax = _block_lines(steps, fractions, names, ax)
  if overall is not None:
    ax.plot(steps, np.asarray(overall), 'k--', linewidth=2, label='all parameters')
    _legend(ax)
  ax.set(ylabel=r'dominant fraction $|Pg|\,/\,|g|$', ylim=(-0.02, 1.02))
  return ax


def plot_principal_angles(
  steps: Sequence[int], angles: Any, *, block: int = 0, ax: Any = None
) -> Any:
  """Plots the principal angles of one block over steps, a line for each angle.

  Args:
    steps: the steps, ``(steps,)``.
    angles: what `principal_angles` gave at each, ``(steps, blocks, k)``.
    block: which block.
    ax: as in `plot_overlap`.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_principal_angles([0, 10], [[[0.1, 1.2]], [[0.2, 1.5]]])
    >>> len(ax.lines)
    2
  """
  degrees = np.rad2deg(np.asarray(angles, float)[:, block])
  ax = _ordered_lines(steps, degrees, r'$\theta_{%d}$', ax)
  ax.set(ylabel='principal angle (degrees)', ylim=(-2, 92), yticks=range(0, 91, 15))
  return ax


def plot_hessian_spectrum(
  steps: Sequence[int], eigenvalues: Any, *, block: int = 0, ax: Any = None
) -> Any:
  """Plots the top eigenvalues of one block's Hessian over steps, a line for each.

  Args:
    steps: the steps, ``(steps,)``.
    eigenvalues: ``HessianTopK.eigenvalues`` of each, ``(steps, blocks, rank)``.
    block: which block.
    ax: as in `plot_overlap`. The scale is logarithmic if all values are positive
      and span a factor of ten.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_hessian_spectrum([0, 10], [[[30.0, 2.0]], [[50.0, 3.0]]])
    >>> ax.get_yscale()
    'log'
  """
  values = np.asarray(eigenvalues, float)[:, block]
  ax = _ordered_lines(steps, values, r'$\lambda_{%d}$', ax)
  ax.set(ylabel='eigenvalue of the Hessian')
  if (values > 0).all() and values.max() > 10 * values.min():
    ax.set_yscale('log')
  return ax


def plot_curvature_energy(
  steps: Sequence[int],
  curvature: Sequence[CurvatureEnergy],
  *,
  measure: str = 'energy',
  block: int | None = None,
  ax: Any = None,
) -> Any:
  """Plots the share of curvature in a subspace over steps, a line for each matrix.

  Args:
    steps: the steps, ``(steps,)``.
    curvature: what `curvature_energy` gave at each.
    measure: ``'energy'`` or ``'trace'``.
    block: which block; by default the sums over all blocks.
    ax: as in `plot_overlap`. Error bars are two standard errors.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.
    ValueError: for another `measure`.

  Examples:
    >>> import numpy as np
    >>> from bsfa_optax import diagnostics
    >>> split = diagnostics.CurvatureSplit(*np.array([[3.0], [1.0], [0.0], [0.1]]))
    >>> splits = {k: split for k in ('hessian', 'gauss_newton', 'functional')}
    >>> energy = diagnostics.CurvatureEnergy(splits, splits)
    >>> ax = diagnostics.plot_curvature_energy([0], [energy])
    >>> ax.get_ylabel()
    'share of curvature energy in the subspace'
  """
  if measure not in CurvatureEnergy._fields:
    raise ValueError(f"measure must be 'energy' or 'trace', got {measure!r}.")
  ax = _axes(ax)
  chosen = [getattr(c, measure) for c in curvature]
  pick = lambda x: x.sum(1) if block is None else x[:, block]
  root = lambda x: np.sqrt(pick(x**2))  # errors of blocks are independent
  for name, label in MATRICES.items():
    inside, outside, inside_error, outside_error = np.moveaxis(
      np.asarray([c[name] for c in chosen], float), 1, 0
    )  # (steps, blocks) each
    split = CurvatureSplit(
      pick(inside), pick(outside), root(inside_error), root(outside_error)
    )
    ax.errorbar(
      steps,
      split.share,
      yerr=2 * np.asarray(split.share_error),
      marker=_marker(steps),
      capsize=3,
      label=label,
    )
  quantity = 'curvature energy' if measure == 'energy' else 'trace'
  ax.set(xlabel='step', ylabel=f'share of {quantity} in the subspace')
  if measure == 'energy':  # a share of the trace may be negative
    ax.set_ylim(bottom=0)
  _legend(ax)
  return ax


def plot_spectrum(
  spectra: Sequence[Any], names: Sequence[str] | None = None, *, ax: Any = None
) -> Any:
  """Plots the relative spectra of the blocks at one step, a line for each block.

  Args:
    spectra: what `spectrum` gave.
    names: as in `plot_overlap`.
    ax: as in `plot_overlap`.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_spectrum([[4.0, 2.0, 0.5]], ['dense/kernel'])
    >>> ax.get_yscale()
    'log'
  """
  ax = _axes(ax)
  names = [f'block {i}' for i in range(len(spectra))] if names is None else names
  named = len(spectra) <= MAX_NAMED_LINES
  for i, values in enumerate(spectra):
    values = np.asarray(values, float)
    index = np.unique(np.geomspace(1, max(len(values), 1), 512).astype(int))
    index = index[values[index - 1] > 0]
    style = {} if named else {'color': '0.6', 'linewidth': 0.8}
    label = names[i] if named else f'{len(spectra)} blocks' if i == 0 else None
    ax.plot(index, values[index - 1], marker=_marker(index), label=label, **style)
  ax.axhline(1, color='k', linestyle=':', linewidth=1, zorder=0)
  ax.set(xlabel='direction', ylabel='relative variance')
  if max(map(len, spectra), default=0) > MAX_TICKS:
    ax.set_xscale('log')
  else:
    ax.xaxis.get_major_locator().set_params(integer=True)
  ax.set_yscale('log')
  _legend(ax)
  return ax


def _axes(ax: Any) -> Any:
  if ax is not None:
    return ax
  try:
    import matplotlib.pyplot as plt
  except ImportError as e:
    raise ImportError(
      "the plots need Matplotlib; install it with pip install 'bsfa-optax[plots]'."
    ) from e
  return plt.subplots(layout='constrained')[1]


def _legend(ax: Any) -> None:
  # Beside the axes, as names may be long and lines anywhere.
  ax.legend(loc='upper left', bbox_to_anchor=(1, 1), frameon=False)


def _marker(points: Sequence[Any] | np.ndarray) -> str:
  return '.' if len(points) <= 50 else ''


def _block_lines(
  steps: Sequence[int], values: Any, names: Sequence[str] | None, ax: Any
) -> Any:
  """A line for each column of `(steps, blocks)`; of many, grey ones and the median."""
  ax = _axes(ax)
  values = np.asarray(values, float)
  count = values.shape[1]
  names = [f'block {i}' for i in range(count)] if names is None else names
  marker = _marker(steps)
  if count <= MAX_NAMED_LINES:
    for column, name in zip(values.T, names, strict=True):
      ax.plot(steps, column, marker=marker, label=name)
  else:
    lines = ax.plot(steps, values, color='0.75', linewidth=0.8)
    lines[0].set_label(f'{count} blocks')
    median = np.median(values, 1)
    ax.plot(steps, median, color='k', marker=marker, label='median')
  ax.set_xlabel('step')
  _legend(ax)
  return ax


def _ordered_lines(
  steps: Sequence[int], values: np.ndarray, label: str, ax: Any
) -> Any:
  """Lines for the columns of `(steps, k)`, from dark to light."""
  ax = _axes(ax)
  count = values.shape[1]
  for i, column in enumerate(values.T):
    # A legend of more lines than this names the first and the last alone.
    named = count <= MAX_NAMED_LINES or i in (0, count - 1)
    ax.plot(
      steps,
      column,
      color=_shade(i / max(count - 1, 1)),
      marker=_marker(steps),
      label=label % (i + 1) if named else None,
    )
  ax.set_xlabel('step')
  _legend(ax)
  return ax


def _shade(x: float) -> tuple[float, float, float]:
  """From dark blue at 0 to light orange at 1."""
  dark, light = np.array([0.05, 0.15, 0.4]), np.array([1.0, 0.7, 0.35])
  red, green, blue = (dark + x * (light - dark)).tolist()
  return red, green, blue
