"""Which leaves are matrices to work on, of what rank, and what a restart keeps."""

from __future__ import annotations

from collections.abc import Callable
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _check

Leaves = Callable[[str, Any], bool] | None
BatchAxes = int | Callable[[str, Any], int]

_OTHER_NAMES = ('embed', 'head', 'norm', 'bias', 'position')


class Matrix(NamedTuple):
  """A leaf that was chosen."""

  name: str
  rows: int
  columns: int
  rank: int

  @property
  def wide(self) -> bool:
    """Whether the rows are the shorter side."""
    return self.rows < self.columns


def is_box(x: Any) -> bool:
  """Whether `x` is one of Flax's boxes around one array."""
  boxed = hasattr(x, 'get_metadata') or hasattr(x, 'unbox')
  return boxed and len(jax.tree.leaves(x)) == 1


def named(tree: Any) -> list[tuple[str, Any]]:
  """The arrays of a tree with their names, which are those of their boxes."""
  return [
    (jax.tree_util.keystr(path, simple=True, separator='/'), x)
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    for x in jax.tree.leaves(node)
  ]


def _chosen(params: Any, leaves: Leaves, batch_axes: BatchAxes) -> list[bool]:
  """For each leaf, whether it is a matrix, or a stack of them, to work on."""
  out = []
  for name, leaf in named(params):
    batch = batch_axes(name, leaf) if callable(batch_axes) else batch_axes
    matrix = leaf.ndim == 2 + batch and jnp.issubdtype(leaf.dtype, jnp.floating)
    if leaves is None:
      out.append(matrix and not any(w in name.lower() for w in _OTHER_NAMES))
    elif leaves(name, leaf):
      if not matrix:
        raise ValueError(
          f'leaves chose {name!r}, which is no real matrix: shape {leaf.shape}, dtype'
          f' {leaf.dtype}, with batch_axes {batch}. Leave it out, or say in batch_axes'
          ' how many leading axes index layers; split a complex leaf with'
          ' optax.contrib.split_real_and_imaginary.'
        )
      out.append(True)
    else:
      out.append(False)
  return out


def matrices(
  params: Any, rank: int | float, leaves: Leaves, batch_axes: BatchAxes
) -> list[Matrix | None]:
  """For each leaf its `Matrix`, or None if it is left alone."""
  out: list[Matrix | None] = []
  for (name, leaf), chosen in zip(
    named(params), _chosen(params, leaves, batch_axes), strict=True
  ):
    if chosen:
      rows, columns = leaf.shape[-2:]
      out.append(Matrix(name, rows, columns, _rank(rank, name, leaf)))
    else:
      out.append(None)
  return out


def _rank(rank: int | float, name: str, leaf: Any) -> int:
  shorter = min(leaf.shape[-2:])
  if isinstance(rank, float):
    return max(1, round(rank * shorter))
  if rank > shorter:
    raise ValueError(
      f'rank must be at most the shorter side of a matrix, got rank {rank} for {name!r}'
      f' of shape {leaf.shape}; lower it, give a share such as 0.25, or leave the leaf'
      ' out with `leaves`.'
    )
  return rank


def check(rank: Any, leaves: Any, batch_axes: Any) -> None:
  """Raises unless these options of a choice are of the right kind."""
  if isinstance(rank, float):
    if not 0 < rank <= 1:
      raise ValueError(
        f'rank must be a positive integer or a share of the shorter side in (0, 1], got'
        f' {rank!r}.'
      )
  else:
    _check.positive_int('rank', rank)
  if leaves is not None and not callable(leaves):
    raise TypeError(
      f'leaves must be a function (name, leaf) -> bool or None, got {leaves!r}; as in'
      " leaves=lambda name, leaf: 'mlp' in name."
    )
  if not callable(batch_axes):
    try:
      valid = operator.index(batch_axes) >= 0
    except TypeError:
      valid = False
    if not valid:
      raise ValueError(
        'batch_axes must be the number of leading axes that index layers, or a function'
        f' (name, leaf) -> number, got {batch_axes!r}; 1 for layers stacked for a scan.'
      )


_SCHEDULES = (optax.ScaleByScheduleState,)
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def restarted(old: optax.OptState, new: optax.OptState) -> optax.OptState:
  """The new state with the schedules' counts, and injected numbers, of the old."""

  def choose(old, new):
    if isinstance(old, _SCHEDULES):
      return old
    if isinstance(old, _INJECTED):
      return old._replace(inner_state=restarted(old.inner_state, new.inner_state))
    return new

  return jax.tree.map(
    choose, old, new, is_leaf=lambda x: isinstance(x, _SCHEDULES + _INJECTED)
  )
