"""What an optimizer's step costs: operations, memory, compile time, time of an update.

Operations are counted in the traced program: two for each multiplication of a product
of matrices, nine n^3 for an eigendecomposition, 8/3 n^3 for QR. Where a program has
branches, the dearest is that of a refresh and the cheapest that without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import math
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
import optax

from benchmarks import drawing, report
from benchmarks.soap import scale_by_soap
from benchmarks.store import Store
import bsfa_optax

COLLECTION = 'cost'
INTERVALS = {'soap': 1, 'soap-10': 10}  # of the others 5, in the long run
TOKENS = 32_768
WIDTHS = (128, 256, 512, 768, 1024, 2048)


class Shape(NamedTuple):
  """A LLaMA- or GPT-like model; `gated` says whether the feed-forward layer is."""

  vocabulary: int
  width: int
  feedforward: int
  layers: int
  gated: bool = True

  def params(self) -> Any:
    """Its matrices, abstract."""
    matrix = lambda *s: {'kernel': jax.ShapeDtypeStruct(s, jnp.float32)}
    d, f = self.width, self.feedforward
    layer = {name: matrix(d, d) for name in ('query', 'key', 'value', 'output')}
    layer |= {'up': matrix(d, f), 'down': matrix(f, d)}
    layer |= {'gate': matrix(d, f)} if self.gated else {}
    return {
      'embed': {'embedding': jax.ShapeDtypeStruct((self.vocabulary, d), jnp.float32)},
      'layers': [layer] * self.layers,
      'head': matrix(d, self.vocabulary),
    }

  def training_operations(self, tokens: int) -> float:
    """Of a forward and backward pass, six for each weight of a product and token."""
    weights = self.layers * (
      4 * self.width**2 + (2 + self.gated) * self.width * self.feedforward
    )
    return 6.0 * (weights + self.vocabulary * self.width) * tokens


SHAPES = {
  'LLaMA-72M': Shape(50_304, 410, 1036, 16),
  'LLaMA-134M': Shape(32_000, 768, 2048, 12),
  'GPT-2 124M': Shape(50_257, 768, 3072, 12, gated=False),
  'LLaMA 1B': Shape(32_000, 2048, 5504, 18),
  'LLaMA 7B': Shape(32_000, 4096, 11_008, 32),
}

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  'adamw': lambda: optax.adamw(1e-3),
  'muon': lambda: optax.contrib.muon(
    1e-3, muon_weight_dimension_numbers=bsfa_optax.muon_dimension_numbers
  ),
  'soap': lambda: _soap(1),
  'soap-10': lambda: _soap(10),
  'bsfa': lambda: bsfa_optax.bsfa_adamw(1e-3),
  'bsfa-adafactor': lambda: bsfa_optax.bsfa_adafactor(1e-3),
  'bsfa-kronecker': lambda: bsfa_optax.bsfa_adamw(
    1e-3, filter=bsfa_optax.bsfa(0.1, 4.0, exponent=0.5, grafting=True)
  ),
}


def _soap(refresh_every: int) -> optax.GradientTransformation:
  """SOAP on the leaves that the default filters, Adam on the others."""

  def is_filtered(params):
    numbers = bsfa_optax.muon_dimension_numbers(params)
    return jax.tree.map(lambda _, n: n is not None, params, numbers)

  return optax.chain(
    optax.partition(
      {
        True: scale_by_soap(refresh_every=refresh_every),
        False: optax.scale_by_adam(),
      },
      is_filtered,
    ),
    optax.add_decayed_weights(1e-4),
    optax.scale_by_learning_rate(1e-3),
  )


class Operations(NamedTuple):
  """Operations of an update without and with a refresh."""

  least: float
  most: float

  def amortised(self, interval: int = 5) -> float:
    return self.least + (self.most - self.least) / interval


def operations(jaxpr: Any) -> Operations:
  """Operations of a traced program's products and decompositions."""
  least = most = 0.0
  for equation in jaxpr.eqns:
    own = _product(equation) + _decomposition(equation)
    inner = [operations(x) for x in _programs(equation)]
    if equation.primitive.name == 'cond':
      least += min(x.least for x in inner)
      most += max(x.most for x in inner)
    else:
      times = equation.params.get('length', 1)
      least += own + times * sum(x.least for x in inner)
      most += own + times * sum(x.most for x in inner)
  return Operations(least, most)


def _product(equation: Any) -> float:
  if equation.primitive.name != 'dot_general':
    return 0.0
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return (
    2.0
    * math.prod(equation.outvars[0].aval.shape)
    * math.prod(left[axis] for axis in contracted)
  )


def _decomposition(equation: Any) -> float:
  # QR is both of its factorisation and of the making of Q.
  cubes = {'eigh': 9.0, 'geqrf': 4 / 3, 'householder_product': 4 / 3}
  if (name := equation.primitive.name) not in cubes:
    return 0.0
  *batch, n, _ = equation.invars[0].aval.shape
  return cubes[name] * math.prod(batch) * n**3


def _programs(equation: Any) -> Iterator[Any]:
  for value in equation.params.values():
    for x in value if isinstance(value, (tuple, list)) else [value]:
      if isinstance(x, core.ClosedJaxpr):
        yield x.jaxpr
      elif isinstance(x, core.Jaxpr):
        yield x


def of_model(name: str, optimizer: str) -> dict[str, Any]:
  """Figures of an optimizer on the shapes of a model."""
  shape, tx = SHAPES[name], OPTIMIZERS[optimizer]()
  params = shape.params()
  count = sum(x.size for x in jax.tree.leaves(params))
  state = jax.eval_shape(tx.init, params)
  begin = time.process_time()
  traced = jax.jit(tx.update).trace(params, state, params)
  found = operations(traced.jaxpr.jaxpr)
  share = lambda x: x / shape.training_operations(TOKENS)
  memory = traced.lower().compile().memory_analysis()
  return {
    'model': name,
    'optimizer': optimizer,
    'parameters': count,
    'operations': share(found.amortised(INTERVALS.get(optimizer, 5))),
    'operations_without_refresh': share(found.least),
    'operations_with_refresh': share(found.most),
    'state_bytes': bsfa_optax.state.state_bytes(tx, params) / count,
    'temporary_bytes': memory.temp_size_in_bytes / count,
    'compile_seconds': time.process_time() - begin,
  }


def of_width(width: int, rounds: int = 7) -> dict[str, Any]:
  """Milliseconds of an update of one square matrix, medians of measurements in turns.

  Beside it those of the products of a training step with it, at 2,048 tokens.
  """
  work = _work(width)
  for run in work.values():
    jax.block_until_ready(run())
  times: dict[str, list[float]] = {name: [] for name in work}
  for _ in range(rounds):
    for name, run in work.items():
      begin = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(1e3 * (time.perf_counter() - begin))
  medians = {name: statistics.median(values) for name, values in times.items()}
  return {'width': width, 'ms': medians}


def _work(width: int) -> dict[str, Callable[[], Any]]:
  matrix = jax.random.normal(jax.random.key(0), (width, width))
  params = {'layer': {'kernel': matrix}}
  tokens = jax.random.normal(jax.random.key(1), (2048, width))

  def products(x, w):  # forward, and backward to both
    y = x @ w
    return y @ w.T, x.T @ y

  work: dict[str, Callable[[], Any]] = {
    'training step': functools.partial(jax.jit(products), tokens, matrix)
  }
  for name, make in OPTIMIZERS.items():
    kinds = {name: make}
    if name == 'bsfa':
      whitening = bsfa_optax.scale_by_whitening
      kinds = {
        'bsfa, refresh': lambda w=whitening: bsfa_optax.bsfa_adamw(
          1e-3, filter=w(refresh_every=1)
        ),
        'bsfa, no refresh': lambda w=whitening: bsfa_optax.bsfa_adamw(
          1e-3, filter=w(refresh_every=2**30)
        ),
      }
    for kind, factory in kinds.items():
      tx = factory()
      update = jax.jit(tx.update)
      _, state = update(params, tx.init(params), params)  # the first is another
      work[kind] = lambda u=update, s=state: u(params, s, params)
  return work


# The command.


def measure(store: Store, limit: float) -> Iterator[str]:
  """Measures what has no result, until `limit` seconds have passed; says what."""
  begin = time.perf_counter()
  jobs: dict[str, Callable[[], dict[str, Any]]] = {
    f'width-{width:04}': functools.partial(of_width, width) for width in WIDTHS
  }
  jobs |= {
    f'{model}-{optimizer}'.replace(' ', '-'): functools.partial(
      of_model, model, optimizer
    )
    for model in SHAPES
    for optimizer in OPTIMIZERS
  }
  todo = [name for name in jobs if store.get(COLLECTION, name) is None]
  yield f'{len(todo)} of {len(jobs)} measurements to do, begun for {limit / 60:g} min'
  for done, name in enumerate(todo):
    if time.perf_counter() - begin > limit:
      yield f'{len(todo) - done} left for the next call: the time is over'
      return
    store.once(COLLECTION, name, jobs[name])
    yield f'{done + 1}/{len(todo)} {name}'


def write(store: Store, docs: Path) -> None:
  """The page of the costs, and its figure; nothing without results."""
  if texts := pages(store):
    report.write_pages(docs, texts)
    plot(_results(store)[1], docs / 'figures' / 'cost.svg')


def _results(store: Store) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Those of models, and those of widths, ascending."""
  results = store.load(COLLECTION).values()
  widths = [r for r in results if 'width' in r]
  return [r for r in results if 'model' in r], sorted(widths, key=lambda r: r['width'])


def pages(store: Store) -> dict[str, str]:
  """The text of the page by its name; none without results."""
  models, widths = _results(store)
  if not models or not widths:
    return {}
  percent = lambda x: f'{100 * x:.2g} %' if x < 0.1 else f'{100 * x:.0f} %'
  of_models = report.markdown(
    [
      'model',
      'optimizer',
      'operations',
      'with a refresh',
      'state',
      'temporary',
      'trace and compile',
    ],
    [
      [
        r['model'],
        f'`{r["optimizer"]}`',
        percent(r['operations']),
        percent(r['operations_with_refresh']),
        f'{r["state_bytes"]:.1f}',
        f'{r["temporary_bytes"]:.1f}',
        f'{r["compile_seconds"]:.1f} s',
      ]
      for name in SHAPES
      for optimizer in OPTIMIZERS
      for r in models
      if (r['model'], r['optimizer']) == (name, optimizer)
    ],
  )
  names = list(widths[0]['ms'])
  of_widths = report.markdown(
    ['width', *names],
    [[str(r['width']), *(f'{r["ms"][n]:.2f}' for n in names)] for r in widths],
  )
  text = report.page(
    'Cost',
    f'Operations of an update over those of a training step of {TOKENS:,} tokens, one'
    ' refresh in five updates (SOAP: in one, and in ten); bytes of state and peak'
    ' temporary bytes of the compiled update (on CPU), for each parameter; CPU seconds'
    ' to trace and compile. Of the 7B model `kronecker` factors no axis, as all are'
    ' longer than its limit.',
    of_models,
    'Milliseconds of an update of one square matrix, medians, measured in turns on'
    f' {widths[0]["machine"]["device_kind"]}, and of the products of a training step'
    ' with it (2,048 tokens, forward and backward).',
    of_widths,
    '![Time of an update over the training step](../figures/cost.svg)',
  )
  return {'cost': text}


def plot(widths: list[dict[str, Any]], path: Path) -> None:
  figure, axes = drawing.plt.subplots(figsize=(6, 4), layout='constrained')
  x = [r['width'] for r in widths]
  for name in widths[0]['ms']:
    if name != 'training step':
      y = [r['ms'][name] / r['ms']['training step'] for r in widths]
      style = 'o--' if name.endswith('no refresh') else 'o-'
      axes.plot(x, y, style, color=drawing.COLOURS[name.split(',')[0]], label=name)
  axes.set(
    xscale='log',
    yscale='log',
    xlabel='width of the matrix',
    ylabel="time of an update / training step's products",
    xticks=(ticks := [width for width in x if width & (width - 1) == 0]),  # with room
    xticklabels=list(map(str, ticks)),
  )
  axes.minorticks_off()
  figure.legend(loc='outside right upper')
  drawing.save(figure, path)
