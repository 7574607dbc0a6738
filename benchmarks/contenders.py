"""What is compared: optimizers alike in everything but the direction of their updates.

Each is a direction (Adam's, momentum, Muon's ...), perhaps filtered by BSFA, the task's
decoupled weight decay and the learning rate. Muon, GaLore and BSFA take the
matrices and convolutions of the hidden layers; the embedding, the layer that reads the
input, the one that gives the output, norms and biases have Adam's direction, as Muon's
authors do. Kron has rules of its own.

To add one, add an entry to `CONTENDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

import jax
import optax

from benchmarks.tasks import Task
import bsfa_optax

Schedule = Callable[[jax.Array], jax.Array]
Direction = Callable[[Task], optax.GradientTransformation]


class UnknownPackage(Exception):
  """A contender's package is not installed; the message says how to get it."""


class Contender(NamedTuple):
  """An optimizer and where its tuning begins.

  Attributes:
    direction: task to a transformation of gradients to an ascent direction.
    learning_rate: where `tune` starts; it walks from there, so a guess will do.
    settings: for the results; whatever has an influence and is not in the task.
    decays: whether the task's weight decay applies.
  """

  direction: Direction
  learning_rate: float
  settings: dict[str, Any]
  decays: bool = True


def is_hidden(path: tuple, leaf: jax.Array) -> bool:
  """Whether a leaf is a matrix or a convolution of a hidden layer."""
  return path[0].key == 'layers' and leaf.ndim >= 2


def _on_hidden(value: Callable[[tuple, jax.Array], Any]) -> Callable[[Any], Any]:
  """A function from parameters to a tree of `value` on hidden leaves, else None."""
  return lambda params: jax.tree.map_with_path(
    lambda path, leaf: value(path, leaf) if is_hidden(path, leaf) else None, params
  )


def _as_matrix(numbers: type) -> Callable[[Any], Any]:
  """Optax's way to say that the last axis of a leaf is the output."""
  return _on_hidden(lambda _, leaf: numbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1))


_hidden_names = _on_hidden(
  lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/')
)


def adam(task: Task) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=0.9, b2=task.b2)


def nadam(task: Task) -> optax.GradientTransformation:
  """Adam with Nesterov's momentum, which Muon has too."""
  return optax.scale_by_adam(b1=0.9, b2=task.b2, nesterov=True)


def momentum(task: Task) -> optax.GradientTransformation:
  del task
  return optax.trace(decay=0.9)


def muon(task: Task) -> optax.GradientTransformation:
  return optax.contrib.muon(
    -1.0,  # the direction, not yet a descent
    adam_b1=0.9,
    adam_b2=task.b2,
    muon_weight_dimension_numbers=_as_matrix(optax.contrib.MuonDimensionNumbers),
    consistent_rms=0.2,  # the size of Adam's, so that one learning rate fits both
  )


# A third of the small models' width, and new projections six times in 300 steps.
_GALORE = {'rank': 32, 'update_proj_gap': 50}


def gradients(task: Task) -> optax.GradientTransformation:
  """A history: the gradients as they are."""
  del task
  return optax.identity()


def adams_metric(task: Task) -> optax.GradientTransformation:
  """A history: the gradients over their root mean square."""
  return optax.scale_by_adam(b1=0.0, b2=task.b2)


def galore(task: Task) -> optax.GradientTransformation:
  return optax.contrib.scale_by_galore(
    **_GALORE,
    base_optimizer=adam(task),
    weight_dimension_numbers=_as_matrix(optax.contrib.GaLoreDimensionNumbers),
  )


def kron(task: Task) -> optax.GradientTransformation:
  """PSGD Kron as its alias sets it, on all parameters."""
  del task
  try:
    import psgdax
  except ImportError as error:
    raise UnknownPackage('contender kron needs: pip install psgdax') from error
  scale_by_kron = psgdax.scale_by_kron(preconditioner_init_scale=None)
  # It says that it takes extra arguments, and fails with them.
  return optax.GradientTransformation(*scale_by_kron)


def _defaults(function: Callable) -> dict[str, Any]:
  """The options of a function which have defaults that JSON can hold, but for None."""
  options = inspect.signature(function).parameters.items()
  return {
    name: option.default
    for name, option in options
    if isinstance(option.default, bool | int | float | str)
  }


def _plain(
  direction: Direction, learning_rate: float, *, decays: bool = True, **settings: Any
) -> Contender:
  return Contender(direction, learning_rate, settings, decays)


def _bsfa(
  base: Direction,
  learning_rate: float,
  estimator: Callable[..., bsfa_optax.Estimator] = bsfa_optax.kronecker,
  *,
  history: Direction | None = None,
  filter_options: dict[str, Any] | None = None,
  blocks: Any = _hidden_names,
  **estimator_options: Any,
) -> Contender:
  """BSFA over a direction, with the options given and the library's defaults."""
  of_filter = filter_options or {}

  def direction(task):
    return bsfa_optax.accelerate(
      base(task),
      history=history and history(task),
      estimator=estimator(blocks=blocks, **estimator_options),
      **of_filter,
    )

  settings = {
    'base': base.__name__,
    'history': history.__name__ if history else 'updates',
    'filter': _defaults(bsfa_optax.bsfa) | of_filter,
    'estimator': {'name': estimator.__name__}
    | _defaults(estimator)
    | estimator_options,
  }
  return Contender(direction, learning_rate, settings)


# The filter as the alias has it; that of `bsfa` and `accelerate` has two levels.
_GRADED = {
  name: inspect.signature(bsfa_optax.bsfa_adamw).parameters[name].default
  for name in ('alpha', 'gamma', 'exponent', 'preserve_norm')
}

# Momentum's updates have no set size, so that a decay in proportion to the learning
# rate would be many times that of the others: it has none.
CONTENDERS = {
  'adamw': _plain(adam, 4e-3),
  'nadamw': _plain(nadam, 4e-3),
  'sgdm': _plain(momentum, 0.256, decays=False, momentum=0.9),
  'muon': _plain(muon, 1.6e-2, consistent_rms=0.2),
  'galore': _plain(galore, 1.6e-2, **_GALORE),
  'kron': _plain(kron, 8e-3, package='psgdax'),
  'bsfa': _bsfa(nadam, 2.26e-2, filter_options=_GRADED),
  'bsfa-adam': _bsfa(adam, 2.26e-2, filter_options=_GRADED),
  'bsfa-two-level': _bsfa(adam, 1.6e-2),
  'bsfa-pca': _bsfa(adam, 8e-3, bsfa_optax.pca),
  'bsfa-dct': _bsfa(adam, 8e-3, bsfa_optax.dct),
  'bsfa-hessian': _bsfa(
    adam, 4e-3, bsfa_optax.hessian_lanczos, blocks='all', refresh_every=20
  ),
  'bsfa-gradients': _bsfa(adam, 1.6e-2, history=gradients),
  'bsfa-metric': _bsfa(adam, 1.6e-2, history=adams_metric),
  'bsfa-muon': _bsfa(muon, 1.6e-2, filter_options=_GRADED),
}

# `bsfa` with one option changed, for the figure of its sensitivity.
_VALUES = {
  'alpha': (0.025, 0.05, 0.2, 0.4),
  'gamma': (1.0, 2.0, 8.0, 16.0),
  'exponent': (0.25, 0.35, 0.7, 1.0),
  'decay': (0.5, 0.75, 0.95, 0.98),
  'refresh_every': (1, 2, 5, 10, 20),
}


class Variant(NamedTuple):
  """A contender that differs from `bsfa` in one option."""

  option: str
  value: float
  contender: Contender


def _variant(option: str, value: float) -> Variant:
  of_filter, of_estimator = dict(_GRADED), {}
  (of_filter if option in _GRADED else of_estimator)[option] = value
  contender = _bsfa(nadam, 2.26e-2, filter_options=of_filter, **of_estimator)
  return Variant(option, value, contender)


VARIANTS = {
  f'bsfa-{option}-{value:g}': _variant(option, value)
  for option, values in _VALUES.items()
  for value in values
}


def find(name: str) -> Contender:
  """A contender or a variant of `bsfa` by its name."""
  return VARIANTS[name].contender if name in VARIANTS else CONTENDERS[name]


def make_optimizer(
  contender: Contender, task: Task, learning_rate: Schedule
) -> optax.GradientTransformation:
  """The whole optimizer of a contender on a task."""
  parts = [optax.clip_by_global_norm(task.clip)] if task.clip else []
  parts.append(contender.direction(task))
  if contender.decays and task.weight_decay:
    parts.append(optax.add_decayed_weights(task.weight_decay))
  parts.append(optax.scale_by_learning_rate(learning_rate))
  return optax.chain(*parts)
