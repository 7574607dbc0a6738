"""What is compared: optimizers alike in everything but the direction of their updates.

`bsfa` is the library's default as a user gets it, `bsfa_adamw(rate)`. The others are a
direction (Adam's, momentum, Muon's ...), perhaps filtered, the task's decoupled weight
decay and the learning rate. Muon takes the leaves that `bsfa` takes; SOAP and the other
rivals, GaLore and the other filters the matrices and convolutions of the hidden layers;
all else has Adam's direction. Kron has rules of its own.

To add one, add an entry to `CONTENDERS`, or to `FAMILY` if it is to save memory.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

import jax
import optax

from benchmarks import rivals
from benchmarks.soap import scale_by_soap
from benchmarks.tasks import Task
import bsfa_optax
from bsfa_optax import estimators, low_rank, projected

Schedule = Callable[[jax.Array], jax.Array]
Direction = Callable[[Task], optax.GradientTransformation]


class UnknownPackage(Exception):
  """A contender's package is not installed; the message says how to get it."""


class Parts(NamedTuple):
  """What is trained in place of the matrices of hidden layers.

  Attributes:
    method: `low_rank.sst`, `lora` or `relora` of a rank.
    round: steps between two calls of `low_rank.renew`; None for one endless round.
  """

  method: Any
  round: int | None = None


class Contender(NamedTuple):
  """An optimizer and where its tuning begins.

  Attributes:
    direction: task to a transformation of gradients to an ascent direction.
    learning_rate: where `tune` starts; it walks from there, so a guess will do.
    settings: for the results; whatever has an influence and is not in the task.
    decays: whether the task's weight decay applies.
    alias: instead of `direction`, task and schedule to a whole optimizer.
    schedule_free: whether the rate stays after its warm-up, and the parameters that are
      evaluated are Schedule-Free's mean.
    parts: of matrices that are trained in few numbers.
  """

  direction: Direction
  learning_rate: float
  settings: dict[str, Any]
  decays: bool = True
  alias: Callable[[Task, Schedule], optax.GradientTransformation] | None = None
  schedule_free: bool = False
  parts: Parts | None = None


def is_hidden(name: str, leaf: jax.Array) -> bool:
  """Whether a leaf is a matrix or a convolution of a hidden layer."""
  return name.startswith('layers/') and leaf.ndim >= 2


def are_hidden(params: Any) -> Any:
  """`is_hidden` for each leaf of a tree."""
  named = lambda path, leaf: is_hidden(
    jax.tree_util.keystr(path, simple=True, separator='/'), leaf
  )
  return jax.tree.map_with_path(named, params)


def _as_matrix(numbers: type) -> Callable[[Any], Any]:
  """Optax's way to say that the last axis of a hidden leaf is the output."""

  def of(leaf, hidden):
    last = leaf.ndim - 1
    return numbers(tuple(range(last)), last) if hidden else None

  return lambda params: jax.tree.map(of, params, are_hidden(params))


def adam(task: Task) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=0.9, b2=task.b2)


def nadam(task: Task, b1: float = 0.9) -> optax.GradientTransformation:
  """Adam with Nesterov's momentum, which Muon has too."""
  return optax.scale_by_adam(b1=b1, b2=task.b2, nesterov=True)


def momentum(task: Task) -> optax.GradientTransformation:
  del task
  return optax.trace(decay=0.9)


def muon(
  task: Task, beta: float = 0.95, others: float = 1.0
) -> optax.GradientTransformation:
  return optax.contrib.muon(
    -1.0,  # the direction, not yet a descent
    beta=beta,
    adam_b1=0.9,
    adam_b2=task.b2,
    adam_learning_rate=-others,
    # The leaves that `bsfa` filters by default.
    muon_weight_dimension_numbers=bsfa_optax.muon_dimension_numbers,
    consistent_rms=0.2,  # the size of Adam's, so that one learning rate fits both
  )


# A third of the small models' width, and new projections six times in 300 steps.
_GALORE = {'rank': 32, 'update_proj_gap': 50}


# The slow mean's memory is a third of the small models' runs: with the authors' 0.9999
# there would hardly be any.
_ADEMAMIX = {'b3': 0.99, 'alpha': 5.0}


def gradients(task: Task) -> optax.GradientTransformation:
  """A history: the gradients as they are."""
  del task
  return optax.identity()


def adams_metric(task: Task) -> optax.GradientTransformation:
  """A history: the gradients over their root mean square."""
  return optax.scale_by_adam(b1=0.0, b2=task.b2)


def on_hidden(chosen: optax.GradientTransformation, others: float = 1.0) -> Direction:
  """A direction for the hidden leaves, Adam's times a factor for the others."""

  def direction(task):
    rest = optax.chain(adam(task), optax.scale(others))
    return optax.partition({True: chosen, False: rest}, are_hidden)

  return direction


def ademamix(task: Task) -> optax.GradientTransformation:
  return optax.contrib.scale_by_ademamix(b1=0.9, b2=task.b2, **_ADEMAMIX)


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


def _rival(
  make: Callable[..., optax.GradientTransformation],
  learning_rate: float,
  others: float = 1.0,
  **options: Any,
) -> Contender:
  """A method for the hidden leaves, with its authors' defaults and these options."""
  of_method = {k: v for k, v in _defaults(make).items() if k != 'eps'} | options
  of_method |= {'others': others} if others != 1 else {}
  return _plain(on_hidden(make(**options), others), learning_rate, **of_method)


def _schedule_free(learning_rate: float) -> Contender:
  """Schedule-Free AdamW."""

  def alias(task, rate):
    return optax.contrib.schedule_free_adamw(
      rate, b1=0.9, b2=task.b2, weight_decay=task.weight_decay
    )

  settings = {'b1': 0.9, 'schedule': 'constant after its warm-up'}
  return Contender(adam, learning_rate, settings, alias=alias, schedule_free=True)


def _filtered(
  base: Direction,
  learning_rate: float,
  estimator: Callable[..., estimators.Estimator] = bsfa_optax.kronecker,
  *,
  source: Direction | None = None,
  filter_options: dict[str, Any] | None = None,
  **estimator_options: Any,
) -> Contender:
  """A direction filtered by `bsfa`, with the options given and the defaults."""
  of_filter = filter_options or {}
  leaves = {} if 'labels' in estimator_options else {'leaves': is_hidden}

  def direction(task):
    last = bsfa_optax.bsfa(
      **of_filter, estimator=estimator(**leaves, **estimator_options)
    )
    if source is None:
      return optax.chain(base(task), last)
    return bsfa_optax.accelerate(base(task), last, history=source(task))

  settings = {
    'base': base.__name__,
    'history': source.__name__ if source else 'updates',
    'filter': _defaults(bsfa_optax.bsfa) | of_filter,
    'estimator': {'name': estimator.__name__}
    | _defaults(estimator)
    | {k: v for k, v in estimator_options.items() if v is not None},
  }
  return Contender(direction, learning_rate, settings)


def _default(**options: Any) -> Contender:
  """`bsfa_adamw(rate)`, with options of its filter that differ from the defaults."""

  def alias(task, learning_rate):
    return bsfa_optax.bsfa_adamw(
      learning_rate,
      b2=task.b2,
      weight_decay=task.weight_decay,
      filter=bsfa_optax.scale_by_whitening(**options) if options else None,
    )

  settings = _defaults(bsfa_optax.bsfa_adamw)
  names = 'nesterov', 'step_length', 'embedding_scale'
  settings = {name: settings[name] for name in names}
  settings['filter'] = _defaults(bsfa_optax.scale_by_whitening) | options
  return Contender(nadam, 8e-3, settings, alias=alias)


def _lean() -> Contender:
  """`bsfa_adafactor(rate)`."""

  def alias(task, learning_rate):
    return bsfa_optax.bsfa_adafactor(learning_rate, weight_decay=task.weight_decay)

  settings = _defaults(bsfa_optax.bsfa_adafactor)
  settings['filter'] = _defaults(bsfa_optax.scale_by_whitening)
  del settings['weight_decay']
  return Contender(nadam, 8e-3, settings, alias=alias)


_TUNED_ADAM = {'b1': 0.8}
_TUNED_MUON = {'beta': 0.85, 'others': 3.0}

# What `bsfa_adamw` filtered with before the whitening.
_GRADED = {'alpha': 0.1, 'gamma': 4.0, 'exponent': 0.5, 'grafting': True}

# Momentum's updates have no set size, so that a decay in proportion to the learning
# rate would be many times that of the others: it has none.
CONTENDERS = {
  'adamw': _plain(adam, 4e-3),
  'nadamw': _plain(nadam, 4e-3),
  'sgdm': _plain(momentum, 0.256, decays=False, momentum=0.9),
  'muon': _plain(muon, 1.6e-2, consistent_rms=0.2),
  'galore': _plain(galore, 1.6e-2, **_GALORE),
  'kron': _plain(kron, 8e-3, package='psgdax'),
  'soap': _rival(scale_by_soap, 8e-3, refresh_every=1),
  'soap-10': _rival(scale_by_soap, 8e-3, refresh_every=10),
  'kl-shampoo': _rival(rivals.kl_shampoo, 8e-3),
  'kl-soap': _rival(rivals.kl_shampoo, 8e-3, adam=True),
  'asgo': _rival(rivals.asgo, 1.6e-2),
  'soap-muon': _rival(rivals.soap_muon, 1.6e-2),
  'normuon': _rival(rivals.normuon, 1.6e-2),
  'cosmos': _rival(rivals.cosmos, 1.6e-2),
  'ademamix': _plain(ademamix, 4e-3, **_ADEMAMIX),
  'schedule-free': _schedule_free(8e-3),
  # With what momentum, and what factor for the leaves that stay with Adam, is best on
  # `llama-wikitext2` at its 300 steps.
  'adamw-tuned': _plain(functools.partial(nadam, **_TUNED_ADAM), 8e-3, **_TUNED_ADAM),
  'muon-tuned': _plain(
    functools.partial(muon, **_TUNED_MUON), 2.26e-2, consistent_rms=0.2, **_TUNED_MUON
  ),
  'soap-tuned': _rival(scale_by_soap, 2.26e-2, 2.0, b1=0.85, refresh_every=1),
  'soap-muon-tuned': _rival(rivals.soap_muon, 2.26e-2, 2.0, b1=0.85),
  'bsfa': _default(),
  'bsfa-adafactor': _lean(),
  'bsfa-kronecker': _filtered(nadam, 2.26e-2, filter_options=_GRADED),
  'bsfa-adam': _filtered(adam, 2.26e-2, filter_options=_GRADED),
  'bsfa-two-level': _filtered(adam, 1.6e-2),
  'bsfa-pca': _filtered(
    adam, 8e-3, bsfa_optax.pca, rank=16, history=8, storage_dtype=None
  ),
  'bsfa-dct': _filtered(adam, 8e-3, bsfa_optax.dct),
  'bsfa-hessian': _filtered(
    adam, 4e-3, bsfa_optax.hessian_lanczos, labels='all', refresh_every=20
  ),
  'bsfa-gradients': _filtered(adam, 1.6e-2, source=gradients),
  'bsfa-metric': _filtered(adam, 1.6e-2, source=adams_metric),
  'bsfa-muon': _filtered(muon, 1.6e-2, filter_options=_GRADED),
}

# Methods that save memory, trained for longer and reported apart: see `family`.


def _projected(
  make: Callable[..., optax.GradientTransformation],
  rank: float,
  learning_rate: float,
) -> Contender:
  """An optimizer of `bsfa_optax.projected` with its authors' defaults."""

  def alias(task, rate):
    return make(
      rate, rank, b2=task.b2, weight_decay=task.weight_decay, leaves=is_hidden
    )

  of_task = 'b2', 'weight_decay'
  settings = {k: v for k, v in _defaults(make).items() if k not in of_task}
  return Contender(adam, learning_rate, settings | {'rank': rank}, alias=alias)


def _in_parts(parts: Parts, learning_rate: float) -> Contender:
  """Adam on the trained parts of matrices, and on all else."""
  return Contender(
    lambda task: low_rank.renewable(adam(task)),
    learning_rate,
    {'method': parts.method._asdict(), 'round': parts.round},
    parts=parts,
  )


def _in_parts_with_bsfa(parts: Parts, learning_rate: float) -> Contender:
  """`bsfa_adamw(rate)` in Adam's place."""

  def alias(task, rate):
    tx = bsfa_optax.bsfa_adamw(rate, b2=task.b2, weight_decay=task.weight_decay)
    return low_rank.renewable(tx)

  plain = _in_parts(parts, learning_rate)
  return plain._replace(alias=alias, settings=plain.settings | _default().settings)


_FEW, _MORE = 0.06, 0.25  # of the width
_ROUNDS = (25, 50, 100, 200, 400, 800, 1200)

FAMILY = {
  'lora-6': _in_parts(Parts(low_rank.lora(_FEW)), 8e-3),
  'lora-6-norm': _in_parts(Parts(low_rank.lora(_FEW, column_norm=True)), 8e-3),
  'lora-6-bsfa': _in_parts_with_bsfa(Parts(low_rank.lora(_FEW)), 4e-3),
  'galore-6': _projected(projected.galore, _FEW, 1.6e-2),
  'fira-6': _projected(projected.fira, _FEW, 8e-3),
  'frugal-6': _projected(projected.frugal, _FEW, 2.83e-3),
  'frugal-25': _projected(projected.frugal, _MORE, 2.83e-3),
  'dct-6': _projected(projected.dct_adamw, _FEW, 4e-3),
}
for _steps in _ROUNDS:
  _few, _more = (Parts(low_rank.sst(rank), _steps) for rank in (_FEW, _MORE))
  FAMILY |= {
    f'relora-6-{_steps}': _in_parts(Parts(low_rank.relora(_FEW), _steps), 8e-3),
    f'sst-6-{_steps}': _in_parts(_few, 1.13e-2),
    f'sst-6-bsfa-{_steps}': _in_parts_with_bsfa(_few, 4e-3),
    f'sst-25-{_steps}': _in_parts(_more, 1.13e-2),
  }

# `bsfa` with one option changed, for the figure of its sensitivity.
_VALUES = {
  'ridge': (0.02, 0.05, 0.1, 0.4, 1.0),
  'decay': (0.5, 0.8, 0.95, 0.98),
  'refresh_every': (1, 2, 5, 10),
  'block_size': (32, 64, 128),
}


class Variant(NamedTuple):
  """A contender that differs from `bsfa` in one option."""

  option: str
  value: float
  contender: Contender


VARIANTS = {
  f'bsfa-{option}-{value:g}': Variant(option, value, _default(**{option: value}))
  for option, values in _VALUES.items()
  for value in values
}


def find(name: str) -> Contender:
  """A contender, of the family or not, or a variant of `bsfa` by its name."""
  if name in VARIANTS:
    return VARIANTS[name].contender
  return FAMILY[name] if name in FAMILY else CONTENDERS[name]


def make_optimizer(
  contender: Contender, task: Task, learning_rate: Schedule
) -> optax.GradientTransformation:
  """The whole optimizer of a contender on a task."""
  if contender.parts and (steps := contender.parts.round):
    learning_rate = low_rank.rewarmed(learning_rate, steps, max(1, steps // 10))
  chain = [optax.clip_by_global_norm(task.clip)] if task.clip else []
  if contender.alias:
    return optax.chain(*chain, contender.alias(task, learning_rate))
  chain.append(contender.direction(task))
  if contender.decays and task.weight_decay:
    chain.append(optax.add_decayed_weights(task.weight_decay))
  chain.append(optax.scale_by_learning_rate(learning_rate))
  return optax.chain(*chain)
