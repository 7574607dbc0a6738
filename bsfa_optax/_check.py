"""Eager checks of options: each error names the option, the value and the remedy."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)


def concrete(value: Any) -> float | None:
  """The Python float behind a scalar option; None if traced or a schedule."""
  if callable(value) or isinstance(value, jax.core.Tracer):
    return None
  return float(value)


def positive_int(name: str, value: Any) -> None:
  """Raises unless `value` is an integer of at least 1."""
  try:
    valid = not isinstance(value, bool) and operator.index(value) >= 1
  except TypeError:
    valid = False
  if not valid:
    raise ValueError(f'{name} must be a positive integer, got {value!r}.')


def interval(name: str, value: Any) -> None:
  """Raises unless `value` is an integer of at least 1, or a schedule of it."""
  if not callable(value):
    positive_int(name, value)


def in_range(name: str, value: Any, low: float, high: float) -> None:
  """Raises unless `value` is a number in [low, high)."""
  if not _is_number(value) or not low <= value < high:
    raise ValueError(f'{name} must be in [{low}, {high}), got {value!r}.')


def multiplier(name: str, value: Any) -> None:
  """Raises unless `value` is a finite scalar >= 0, traced, or a schedule."""
  if callable(value):
    return
  if hasattr(value, '_fields') or isinstance(value, dict):
    raise ValueError(
      f'{name} must be a scalar or a schedule, got {type(value).__name__}; an estimator'
      ' or a filter goes behind its own keyword.'
    )
  if np.ndim(value) != 0:
    raise ValueError(
      f'{name} must be a scalar or a schedule, got an array of shape'
      f' {np.shape(value)}; pass one number for all blocks.'
    )
  try:
    if isinstance(value, (str, bytes)):
      raise TypeError
    number = concrete(value)
    valid = number is None or 0 <= number <= LARGEST
  except (TypeError, ValueError):
    valid = False
  if not valid:
    raise ValueError(
      f'{name} must be finite and non-negative, got {value!r}; pass a number of float32'
      ' or a schedule that returns such numbers.'
    )


def positive_scalar(name: str, value: Any) -> None:
  """Raises unless `value` is a finite scalar > 0, traced, or a schedule."""
  multiplier(name, value)
  number = concrete(value)
  if number is not None and not number >= SMALLEST:
    raise ValueError(
      f'{name} must be positive, got {value!r}; pass a number above 0 in float32 or a'
      ' schedule that returns such numbers.'
    )


def boolean(name: str, value: Any) -> None:
  """Raises unless `value` is True or False."""
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(f'{name} must be True or False, got {value!r}.')


def share(name: str, value: Any) -> None:
  """Raises unless `value` is a number in [0, 1), or traced."""
  if not isinstance(value, (jax.Array, np.ndarray)):  # injected hyperparameters
    in_range(name, value, 0.0, 1.0)


def positive(name: str, value: Any) -> None:
  """Raises unless `value` is a positive number (infinity included)."""
  if not _is_number(value) or not value > 0:
    raise ValueError(f'{name} must be positive, got {value!r}.')


def one_of(name: str, value: Any, *choices: str | None) -> None:
  """Raises unless `value` is one of the choices."""
  if value not in choices:
    *others, last = map(repr, choices)
    raise ValueError(f'{name} must be {", ".join(others)} or {last}, got {value!r}.')


def predicate(leaves: Any) -> None:
  """Raises unless `leaves` is a function, or None for the default."""
  if leaves is not None and not callable(leaves):
    raise TypeError(
      f'leaves must be a function of a name and a leaf, got {leaves!r}; for instance'
      " leaves=lambda name, leaf: name.endswith('kernel')."
    )


def floating(name: str, value: Any) -> None:
  """Raises unless `value` is a floating-point dtype or None."""
  try:
    valid = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
  except TypeError:
    valid = False
  if not valid:
    raise ValueError(f'{name} must be a floating-point dtype, got {value!r}.')


def transformation(name: str, value: Any) -> None:
  """Raises unless `value` has what an Optax transformation has."""
  if not (
    callable(getattr(value, 'init', 0)) and callable(getattr(value, 'update', 0))
  ):
    raise TypeError(
      f'{name} must be an optax.GradientTransformation, got {value!r}; call the'
      ' factory, as in optax.sgd(0.1).'
    )


def sharding(value: Any) -> None:
  """Raises unless `value` is a sharding, a partition spec or None."""
  if not (value is None or isinstance(value, (jax.sharding.Sharding, jax.P))):
    raise TypeError(
      'shardings must be of jax.sharding.Sharding, jax.P or None, got'
      f' {value!r}; write jax.P({value!r}).'
    )


def names(name: str, value: Any) -> tuple[str, ...]:
  """A name, several or None as a tuple; raises for anything else."""
  if value is None:
    return ()
  found = (value,) if isinstance(value, str) else value
  if not isinstance(found, (tuple, list)) or not all(isinstance(x, str) for x in found):
    raise TypeError(
      f'{name} must be a name of a mesh axis or a tuple of names, got {value!r}.'
    )
  return tuple(found)


def like_updates(name: str, value: Any, updates: Any) -> None:
  """Raises unless a tree has the structure and the shapes of the updates."""
  given, wanted = shapes(value), shapes(updates)
  if (where := _first_difference(given, wanted)) is not None:
    raise ValueError(
      f'{name} must be a tree like the updates, got {given.get(where, "nothing")} for'
      f' {where!r}, expected {wanted.get(where, "nothing")}; make it from the'
      ' gradients.'
    )


def memory(given: Any, wanted: dict[str, Any]) -> None:
  """Raises unless a filter's memory has these shapes by name."""
  found = shapes(given)
  if (where := _first_difference(found, wanted)) is not None:
    raise ValueError(
      'state must be of the same transformation and of parameters like the updates, got'
      f' {found.get(where, "nothing")} for memory/{where}, expected'
      f' {wanted.get(where, "nothing")}; build the transformation as the state was'
      ' made, or make a new state with init.'
    )


def _first_difference(given: dict[str, Any], wanted: dict[str, Any]) -> str | None:
  names = given.keys() | wanted
  return min((n for n in names if given.get(n) != wanted.get(n)), default=None)


def shapes(tree: Any) -> dict[str, Any]:
  """The shapes of a tree's leaves by their paths."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): jnp.shape(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def is_state(name: str, kind: type, state: Any) -> None:
  """Raises unless `state` is what this transformation's `init` gives."""
  if not isinstance(state, kind):
    article = 'an' if name[0] in 'AEIO' else 'a'
    raise TypeError(
      f'state must be {article} {name}, got {type(state).__name__}; use the state that'
      ' init of the same transformation returned.'
    )
