"""Eager checks of options: each error names the option, the value and the remedy.

Options are given by name, as in ``_check.fraction(b1=b1, b2=b2)``.
"""

from __future__ import annotations

from collections.abc import Callable
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)
NUMBERS = 'or a schedule that returns such numbers'


def concrete(value: Any) -> float | None:
  """The Python float behind a scalar option; None if traced or a schedule."""
  if callable(value) or isinstance(value, jax.core.Tracer):
    return None
  return float(value)


def _must_be(what: str, remedy: str = '', error: type[Exception] = ValueError) -> Any:
  """Makes a check of options from a test of values; what it cannot test is wrong."""

  def check_of(test: Callable[[Any], Any]) -> Callable[..., None]:
    def check(**options):
      for name, value in options.items():
        try:
          valid = test(value)
        except (TypeError, ValueError):
          valid = False
        if not valid:
          raise error(f'{name} must be {what}, got {value!r}{remedy.format(value)}.')

    return check

  return check_of


@_must_be('a positive integer')
def positive_int(value):
  return not isinstance(value, bool) and operator.index(value) >= 1


def interval(**options: Any) -> None:
  """Raises unless all are integers of at least 1, or schedules of it."""
  positive_int(**{name: x for name, x in options.items() if not callable(x)})


@_must_be('in [0.0, 1.0)')
def fraction(value):
  is_injected = isinstance(value, (jax.Array, np.ndarray))
  return is_injected or (_is_number(value) and 0 <= value < 1)


@_must_be('positive')
def positive(value):  # infinity is
  return _is_number(value) and value > 0


@_must_be('finite and non-negative', f'; pass a number of float32 {NUMBERS}')
def _nonnegative(value):
  number = concrete(value)  # which would take a string, too
  is_text = isinstance(value, (str, bytes))
  return not is_text and (number is None or 0 <= number <= LARGEST)


def _is_above_zero(value: Any) -> bool:
  number = concrete(value)
  within = number is None or SMALLEST <= number <= LARGEST
  return within and not isinstance(value, str)


positive_number = _must_be('positive', '; pass a number above 0 in float32')(
  _is_above_zero
)
_above_zero = _must_be('positive', f'; pass a number above 0 in float32 {NUMBERS}')(
  _is_above_zero
)


def multiplier(**options: Any) -> None:
  """Raises unless all are finite scalars >= 0, traced, or schedules."""
  for name, value in options.items():
    # An estimator or parameters in the wrong place: NumPy may have no shape for it.
    is_tree = hasattr(value, '_fields') or isinstance(value, dict)
    if is_tree or np.ndim(value) != 0:
      array = f'an array of shape {np.shape(value)}'
      raise ValueError(
        f'{name} must be a scalar or a schedule, got'
        f' {type(value).__name__ if is_tree else array}; an estimator or a filter'
        ' goes behind its own keyword, and one number stands for all blocks.'
      )
  _nonnegative(**options)


def positive_scalar(**options: Any) -> None:
  """Raises unless all are finite scalars > 0, traced, or schedules."""
  multiplier(**options)
  _above_zero(**options)


@_must_be('a number', '; a schedule goes to learning_rate', TypeError)
def no_schedule(value):
  return not callable(value)


@_must_be('True or False', error=TypeError)
def boolean(value):
  return isinstance(value, (bool, np.bool_))


def one_of(*choices: str | None, **options: Any) -> None:
  """Raises unless all are among the choices."""
  *others, last = map(repr, choices)
  _must_be(f'{", ".join(others)} or {last}')(choices.__contains__)(**options)


@_must_be(
  'a function of a name and a leaf',
  "; for instance leaves=lambda name, leaf: name.endswith('kernel')",
  TypeError,
)
def predicate(value):
  return value is None or callable(value)


@_must_be('a floating-point dtype')
def floating(value):
  return value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)


@_must_be(
  'an optax.GradientTransformation',
  '; call the factory, as in optax.sgd(0.1)',
  TypeError,
)
def transformation(value):
  return all(callable(getattr(value, name, None)) for name in ('init', 'update'))


@_must_be('of jax.sharding.Sharding, jax.P or None', '; write jax.P({!r})', TypeError)
def sharding(value):
  return value is None or isinstance(value, (jax.sharding.Sharding, jax.P))


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
