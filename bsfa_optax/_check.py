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


def fraction(name: str, value: Any) -> None:
  """Raises unless `value` is a number in [0, 1); arrays are injected options."""
  if isinstance(value, (jax.Array, np.ndarray)):
    return
  if not _is_number(value) or not 0 <= value < 1:
    raise ValueError(f'{name} must be in [0.0, 1.0), got {value!r}.')


def multiplier(name: str, value: Any) -> None:
  """Raises unless `value` is a finite scalar >= 0, traced, or a schedule."""
  if callable(value):
    return
  # An estimator or parameters in the wrong place: NumPy may have no shape for it.
  is_tree = hasattr(value, '_fields') or isinstance(value, dict)
  if is_tree or np.ndim(value) != 0:
    shown = type(value).__name__ if is_tree else f'an array of shape {np.shape(value)}'
    raise ValueError(
      f'{name} must be a scalar or a schedule, got {shown}; an estimator or a filter'
      ' goes behind its own keyword, and one number stands for all blocks.'
    )
  try:
    number = concrete(value)  # which would take a string, too
    valid = not isinstance(value, (str, bytes))
    valid &= number is None or 0 <= number <= LARGEST
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
  if not all(callable(getattr(value, name, None)) for name in ('init', 'update')):
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


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
