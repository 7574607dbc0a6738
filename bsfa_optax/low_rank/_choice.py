"""Which leaves are matrices to work on, of what rank, and what a restart keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _check, _leaves
from bsfa_optax._leaves import Predicate

BatchAxes = int | Callable[[str, Any], int]


class Matrix(NamedTuple):
  """A leaf that was chosen."""

  rows: int
  columns: int
  rank: int

  @property
  def wide(self) -> bool:
    """Whether the rows are the shorter side."""
    return self.rows < self.columns


def is_box(x: Any) -> bool:
  """Whether `x` is one of Flax's boxes, around one array."""
  return _leaves.is_box(x) and len(jax.tree.leaves(x)) == 1


def _named(tree: Any) -> list[tuple[str, Any]]:
  """The arrays of a tree with their names, which are those of their boxes."""
  return [
    (jax.tree_util.keystr(path, simple=True, separator='/'), x)
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    for x in jax.tree.leaves(node)
  ]


def matrices(
  params: Any, rank: int | float, leaves: Predicate, batch_axes: BatchAxes
) -> list[Matrix | None]:
  """For each leaf its `Matrix`, or None if it is left alone."""
  named = _named(params)
  batch = [batch_axes(*x) if callable(batch_axes) else batch_axes for x in named]
  if leaves is None:
    inner = [x.shape[n:] for (_, x), n in zip(named, batch, strict=True)]
    by_rule = _leaves.default_rule([name for name, _ in named], inner)
    chosen = [yes for yes, _ in by_rule]
  else:
    chosen = [leaves(name, x) for name, x in named]
  out: list[Matrix | None] = []
  for (name, x), n, yes in zip(named, batch, chosen, strict=True):
    matrix = x.ndim == 2 + n and jnp.issubdtype(x.dtype, jnp.floating)
    if yes and not matrix and leaves is not None:
      raise ValueError(
        f'leaves chose {name!r}, which is no real matrix: shape {x.shape}, dtype'
        f' {x.dtype}, with batch_axes {n}. Leave it out, or say in batch_axes how many'
        ' leading axes index layers; split a complex leaf with'
        ' optax.contrib.split_real_and_imaginary.'
      )
    if yes and matrix:
      rows, columns = x.shape[-2:]
      out.append(Matrix(rows, columns, _rank(rank, name, x)))
    else:
      out.append(None)
  if named and not any(out):
    raise ValueError(
      f'leaves chose no matrix among {len(named)} arrays; name some in `leaves`, or say'
      ' in batch_axes how many leading axes index layers.'
    )
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
  if not callable(batch_axes) and not (isinstance(batch_axes, int) and batch_axes >= 0):
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
