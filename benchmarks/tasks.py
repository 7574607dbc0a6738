"""What is trained: each task gives a model, its batches and how it is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import functools
import hashlib
import lzma
from pathlib import Path
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
from benchmarks.llama import Llama, next_token_loss, PRESETS
from benchmarks.progress import Progress
from benchmarks.text import (
  standard_library,
  Text,
  training_batch,
  validation_batches,
)
from benchmarks.training import Trainer

Params = Any
Batch = Any  # a tree of numpy arrays


class MissingData(Exception):
  """A data set is not where it should be; the message tells the user what to do."""


class Problem(NamedTuple):
  """A task with its data.

  Attributes:
    init: seed to parameters.
    loss: parameters and batch to the training loss.
    batch: seed and step to a batch; depends on nothing else.
    evaluate: parameters to the figures at the end of a run, by name.
    config: sizes and the data's fingerprint, for the results.
  """

  init: Callable[[int], Params]
  loss: Callable[[Params, Batch], jax.Array]
  batch: Callable[[int, int], Batch]
  evaluate: Callable[[Params], dict[str, float]]
  config: dict[str, Any]


class Task(NamedTuple):
  """A problem to be built from a folder of data, and what all contenders share.

  Attributes:
    title: for the report.
    steps: length of a run.
    build: folder of the data sets to the problem.
    measure: the figure of `evaluate` that contenders are compared by.
    warmup: share of the steps in which the learning rate rises from 0.
    floor: last learning rate as a share of the peak; between, half a cosine. 1 for a
      constant rate.
    b2: decay of Adam's second moment.
    weight_decay: decoupled, of all parameters.
    clip: greatest global norm of the gradient, or None.
  """

  title: str
  steps: int
  build: Callable[[Path], Problem]
  measure: str = 'validation_loss'
  warmup: float = 0.1
  floor: float = 0.05
  b2: float = 0.95
  weight_decay: float = 0.1
  clip: float | None = 1.0


def find(folder: Path, name: str) -> Path:
  """The path of a data set.

  Raises:
    MissingData: if it is not there.
  """
  path = folder / name
  if not path.is_file():
    raise MissingData(
      f'{name} is not in {folder}: give the folder with --data; docs/data.md says'
      ' where the file comes from'
    )
  return path


def fingerprint(*arrays: np.ndarray) -> str:
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()[:16]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable, Callable]:
  """A module as init(seed) -> parameters and apply(parameters, function) -> result."""
  graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def init(seed: int) -> Params:
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(seed)), nnx.Param))

  return init, lambda params: nnx.merge(graph, params)


def _mean_over(
  figures: Callable[[Params, Batch], dict[str, jax.Array]], batches: Batch
) -> Callable[[Params], dict[str, float]]:
  """Figures of a batch to means over batches, which are stacked on the first axis."""
  mapped = jax.jit(
    lambda params, batches: jax.lax.map(lambda b: figures(params, b), batches)
  )

  def evaluate(params: Params) -> dict[str, float]:
    values = jax.device_get(mapped(params, batches))
    return {name: float(np.mean(v, dtype=np.float64)) for name, v in values.items()}

  return evaluate


# Language models.


def python_sources(folder: Path) -> Text:
  """The standard library's, which need no folder."""
  del folder
  return standard_library()


def read_bytes(name: str, folder: Path) -> Text:
  """The bytes of a text in two files; a token is a byte."""
  train, validation = (
    np.frombuffer(
      lzma.decompress(find(folder, f'{name}_{part}.txt.xz').read_bytes()), 'u1'
    )
    for part in ('train', 'valid')
  )
  return Text(train, validation, name)


def read_words(name: str, folder: Path, vocabulary: int) -> Text:
  """The same text in words, punctuation marks and line ends.

  The most frequent of the training text have a number each, the others share 0.
  """
  text = read_bytes(name, folder)
  train, validation = (
    re.findall(r'\w+|[^\w\s]|\n', part.tobytes().decode()) for part in text[:2]
  )
  frequent = Counter(train).most_common(vocabulary - 1)
  number = {word: i for i, (word, _) in enumerate(frequent, start=1)}
  tokens = [
    np.array([number.get(word, 0) for word in part], np.uint16)
    for part in (train, validation)
  ]
  return Text(*tokens, f'{name}, words')


def language_model(
  preset_name: str, read: Callable[[Path], Text], folder: Path, rows: int | None = None
) -> Problem:
  """Next-token prediction with a LLaMA-style model.

  Other numbers of `rows` a step than the preset's are judged by the same tokens.
  """
  preset = PRESETS[preset_name]
  if rows:
    judged = preset.validation_batches * preset.rows
    preset = preset._replace(rows=rows, validation_batches=judged // rows)
  text = read(folder)
  init, module = functional(lambda rngs: Llama(preset.model, rngs=rngs))

  def loss(params, batch):
    parts = batch.reshape(preset.splits, -1, preset.context + 1)
    of_part = lambda rows: next_token_loss(module(params), rows)
    if preset.splits == 1:
      return of_part(parts[0])
    # What a part needs in the backward pass is computed again: all would not fit.
    return jax.lax.map(jax.checkpoint(of_part), parts).mean()

  validation = validation_batches(
    text.validation,
    preset.rows // preset.splits,
    preset.context,
    preset.validation_batches,
  )
  return Problem(
    init,
    loss,
    lambda seed, step: training_batch(
      text.train, preset.rows, preset.context, seed, step
    ),
    _mean_over(
      lambda params, rows: {'validation_loss': next_token_loss(module(params), rows)},
      validation,
    ),
    {
      'model': preset.model._asdict(),
      'rows': preset.rows,
      'context': preset.context,
      'text': text.fingerprint(),
    },
  )


def pretrained(problem: Problem) -> Callable[[int], Params]:
  """Parameters after 300 steps of AdamW, tuned for the small LLaMA, by the seed."""
  steps = 300
  rate = optax.warmup_cosine_decay_schedule(0.0, 8e-3, steps // 10, steps, 4e-4)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1)
  )
  trainer = Trainer(problem, lambda options: tx)

  @functools.cache
  def trained(seed: int) -> Params:
    carry = trainer.start(seed, {})
    with Progress(f'the model to be fine-tuned, seed {seed}', steps, 'step') as bar:
      for number in range(steps):
        carry, _ = trainer.step(carry, problem.batch(seed, number), {})
        bar.update()
    return jax.device_get(trainer.params(carry))

  # Other arrays each time, as a trainer gives its own away.
  return lambda seed: jax.tree.map(jnp.array, trained(seed))


def fine_tuning(
  preset_name: str,
  first: Callable[[Path], Text],
  then: Callable[[Path], Text],
  folder: Path,
) -> Problem:
  """A language model of one text, trained on with another."""
  start = language_model(preset_name, first, folder)
  problem = language_model(preset_name, then, folder)
  return problem._replace(
    init=pretrained(start),
    config=problem.config | {'first': start.config['text']},
  )


# A masked task which needs no data.


def masked_chain(
  folder: Path | None = None,
  *,
  symbols: int = 64,
  context: int = 64,
  rows: int = 32,
  hidden: float = 0.3,
) -> Problem:
  """Fills gaps in sequences of a random Markov chain, from what is on either side.

  The chain is the same for everybody; sequences and gaps are drawn for each step.
  """
  del folder
  transitions = np.random.default_rng(0).dirichlet(np.full(symbols, 0.1), symbols)
  steps_of_chain = transitions.cumsum(axis=1)
  mask = symbols  # one more token

  def draw(rng: np.random.Generator, count: int) -> Batch:
    tokens = np.empty((count, context), np.int32)
    tokens[:, 0] = rng.integers(0, symbols, count)
    uniform = rng.random((count, context))
    for i in range(1, context):
      passed = uniform[:, i, None] > steps_of_chain[tokens[:, i - 1]]
      tokens[:, i] = np.minimum(passed.sum(axis=1), symbols - 1)
    return {'tokens': tokens, 'gap': rng.random((count, context)) < hidden}

  init, module = functional(
    lambda rngs: models.Encoder(
      nnx.Embed(symbols + 1, 64, rngs=rngs),
      context,
      symbols,
      width=64,
      layers=3,
      heads=4,
      rngs=rngs,
    )
  )

  def loss(params, batch):
    logits = module(params)(jnp.where(batch['gap'], mask, batch['tokens']))
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch['tokens'])
    return entropy.mean(where=batch['gap'])

  validation = [draw(np.random.default_rng([1, i]), 128) for i in range(16)]
  return Problem(
    init,
    loss,
    lambda seed, step: draw(np.random.default_rng([2, seed, step]), rows),
    _mean_over(
      lambda params, batch: {'validation_loss': loss(params, batch)},
      jax.tree.map(lambda *x: np.stack(x), *validation),
    ),
    {'symbols': symbols, 'context': context, 'rows': rows, 'hidden': hidden},
  )


# MNIST.


def read_mnist(folder: Path) -> tuple[Batch, Batch]:
  """Images and labels of the training and the test set, uint8."""
  parts = []
  for part in ('train', 'test'):
    with np.load(find(folder, f'mnist_{part}.npz')) as file:
      parts.append({'images': file['images'], 'labels': file['labels']})
  return parts[0], parts[1]


def normalized(images: jax.Array) -> jax.Array:
  return (images.astype(jnp.float32) / 255 - 0.1307) / 0.3081


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(
    outputs, labels.astype(jnp.int32)
  ).mean()


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.square(outputs - jax.nn.one_hot(labels, 10)).mean()


def mnist(
  make: Callable[[nnx.Rngs], nnx.Module],
  distance: Callable[[jax.Array, jax.Array], jax.Array],
  folder: Path,
  *,
  rows: int = 128,
  images: int = 60_000,
) -> Problem:
  """Classification of the first `images` images of MNIST."""
  train, test = read_mnist(folder)
  train = {name: x[:images] for name, x in train.items()}
  init, module = functional(make)

  def outputs(params, batch):
    return module(params)(normalized(batch['images']))

  def figures(params, batch):
    answers = outputs(params, batch)
    correct = answers.argmax(axis=1) == batch['labels']
    return {'loss': distance(answers, batch['labels']), 'accuracy': correct.mean()}

  def batch(seed, step):
    chosen = np.random.default_rng([seed, step]).integers(0, images, rows)
    return {name: x[chosen] for name, x in train.items()}

  stacked = lambda part: {
    name: x.reshape(-1, 1000, *x.shape[1:]) for name, x in part.items()
  }
  on_test = _mean_over(figures, stacked(test))
  # All that the MLP trains on; for the others a sample, as it takes its time.
  on_train = _mean_over(figures, stacked({n: x[:5000] for n, x in train.items()}))

  def evaluate(params):
    tested = on_test(params)
    return {
      'validation_loss': tested['loss'],
      'accuracy': tested['accuracy'],
      'train_set_loss': on_train(params)['loss'],
    }

  return Problem(
    init,
    lambda params, batch: distance(outputs(params, batch), batch['labels']),
    batch,
    evaluate,
    {
      'rows': rows,
      'images': images,
      'data': fingerprint(*train.values(), *test.values()),
    },
  )


def _vit(rngs: nnx.Rngs) -> nnx.Module:
  return models.ViT(28, 7, 10, width=64, layers=3, heads=4, rngs=rngs)


def _cnn(rngs: nnx.Rngs) -> nnx.Module:
  return models.CNN((16, 32, 64), 10, rngs=rngs)


def mlp(rngs: nnx.Rngs) -> nnx.Module:
  return models.MLP((784, 200, 200), 10, rngs=rngs)


TASKS = {
  'llama-stdlib': Task(
    "small LLaMA on bytes of Python's standard library",
    300,
    functools.partial(language_model, 'small', python_sources),
  ),
  'llama-wikitext2': Task(
    'small LLaMA on bytes of WikiText-2',
    300,
    functools.partial(
      language_model, 'small', functools.partial(read_bytes, 'wikitext2')
    ),
  ),
  'llama-novels': Task(
    'small LLaMA on bytes of novels',
    300,
    functools.partial(language_model, 'small', functools.partial(read_bytes, 'novels')),
  ),
  'masked-chain': Task('gaps in sequences of a Markov chain', 300, masked_chain),
  'vit-mnist': Task(
    'small ViT on MNIST', 400, functools.partial(mnist, _vit, cross_entropy)
  ),
  'cnn-mnist': Task(
    'small CNN on MNIST', 400, functools.partial(mnist, _cnn, cross_entropy)
  ),
  # As in the literature: no schedule, no decay, judged by the loss on all it trains on.
  'mlp-mnist5k': Task(
    'tanh MLP on 5,000 images of MNIST, squared error',
    1000,
    functools.partial(mnist, mlp, squared_error, rows=50, images=5000),
    measure='train_set_loss',
    warmup=0.0,
    floor=1.0,
    b2=0.999,
    weight_decay=0.0,
    clip=None,
  ),
  # These two are for an accelerator.
  'llama-72m': Task(
    'LLaMA-72M on words of novels',
    2000,
    functools.partial(
      language_model,
      'llama-72m',
      functools.partial(read_words, 'novels', vocabulary=50_304),
    ),
  ),
  'llama-134m': Task(
    'LLaMA-134M on words of novels',
    1000,
    functools.partial(
      language_model,
      'llama-134m',
      functools.partial(read_words, 'novels', vocabulary=50_304),
    ),
  ),
}

# For docs/scaling.md alone: the model of `llama-novels` at other widths, its smallest
# with other numbers of rows a step (64 tokens each), and fine-tuning.
_novels = functools.partial(read_bytes, 'novels')
OTHER_WIDTHS = {f'llama-novels-{width}': width for width in (64, 192, 384, 512)}
OTHER_ROWS = {f'llama-novels-64-rows-{rows}': rows for rows in (8, 128, 256)}
STUDIED_APART = {
  name: Task(
    f'LLaMA of width {width} on bytes of novels',
    300,
    functools.partial(language_model, f'width-{width}', _novels),
  )
  for name, width in OTHER_WIDTHS.items()
}
STUDIED_APART |= {
  name: Task(
    f'LLaMA of width 64 on bytes of novels, {64 * rows:,} a step',
    300,
    functools.partial(language_model, 'width-64', _novels, rows=rows),
  )
  for name, rows in OTHER_ROWS.items()
}
STUDIED_APART['finetune-novels'] = Task(
  'small LLaMA of WikiText-2, fine-tuned on novels',
  100,
  functools.partial(
    fine_tuning, 'small', functools.partial(read_bytes, 'wikitext2'), _novels
  ),
)
TASKS |= STUDIED_APART
