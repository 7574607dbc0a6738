"""Eager checks of options: each error names the option, the value and the remedy."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


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
  if np.ndim(value) != 0:
    raise ValueError(
      f'{name} must be a scalar or a schedule, got an array of shape'
      f' {np.shape(value)}; pass one number for all blocks.'
    )
  try:
    if isinstance(value, (str, bytes)):
      raise TypeError
    number = concrete(value)
    valid = number is None or (math.isfinite(number) and number >= 0)
  except (TypeError, ValueError):
    valid = False
  if not valid:
    raise ValueError(
      f'{name} must be finite and non-negative, got {value!r}; pass a number or a'
      ' schedule that returns such numbers.'
    )


def positive_scalar(name: str, value: Any) -> None:
  """Raises unless `value` is a finite scalar > 0, traced, or a schedule."""
  multiplier(name, value)
  number = concrete(value)
  if number is not None and not number > 0:
    raise ValueError(
      f'{name} must be positive, got {value!r}; pass a number above 0 or a schedule'
      ' that returns such numbers.'
    )


def boolean(name: str, value: Any) -> None:
  """Raises unless `value` is True or False."""
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(f'{name} must be True or False, got {value!r}.')


def positive(name: str, value: Any) -> None:
  """Raises unless `value` is a positive number (infinity included)."""
  if not _is_number(value) or not value > 0:
    raise ValueError(f'{name} must be positive, got {value!r}.')


def floating(name: str, value: Any) -> None:
  """Raises unless `value` is a floating-point dtype or None."""
  try:
    valid = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
  except TypeError:
    valid = False
  if not valid:
    raise ValueError(f'{name} must be a floating-point dtype, got {value!r}.')


def transformation(name: str, value: Any) -> None:
  """Raises unless `value` is an Optax transformation."""
  if not isinstance(value, optax.GradientTransformation):
    raise TypeError(
      f'{name} must be an optax.GradientTransformation, got {value!r}; call the'
      ' factory, as in optax.sgd(0.1).'
    )


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
