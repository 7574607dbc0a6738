"""A small LLaMA-style language model in Flax NNX.

RMSNorm before each sub-layer, rotary positions, causal attention, SwiGLU, untied
embeddings and no biases. Parameters are float32; `dtype` is what the model computes in.
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax


class LlamaConfig(NamedTuple):
  """Sizes of the model."""

  vocabulary: int
  width: int
  layers: int
  heads: int
  feedforward: int
  dtype: str = 'float32'


class Preset(NamedTuple):
  """A model and how much it sees in a step.

  Attributes:
    model: its sizes.
    context: tokens of a sequence that are predicted.
    rows: sequences a step.
    validation_batches: how many batches the validation loss is over.
    splits: parts in which a step's rows go through the model, to fit in memory.
  """

  model: LlamaConfig
  context: int
  rows: int
  validation_batches: int
  splits: int = 1


# `toy` is for tests, the last two have the literature's sizes; between them width and
# depth grow in proportion.
PRESETS = {
  'toy': Preset(LlamaConfig(256, 16, 1, 2, 32), 16, 4, 2),
  'width-64': Preset(LlamaConfig(256, 64, 2, 4, 171), 64, 32, 64),
  'small': Preset(LlamaConfig(256, 96, 3, 4, 256), 64, 32, 64),
  'width-192': Preset(LlamaConfig(256, 192, 6, 8, 512), 64, 32, 64),
  'width-384': Preset(LlamaConfig(256, 384, 12, 16, 1024), 64, 32, 64),
  'width-512': Preset(LlamaConfig(256, 512, 16, 16, 1365), 64, 32, 64),
  'llama-72m': Preset(LlamaConfig(50_304, 410, 16, 10, 1036, 'bfloat16'), 150, 240, 64),
  'llama-134m': Preset(
    LlamaConfig(50_304, 768, 6, 12, 3072, 'bfloat16'), 1024, 480, 64, splits=16
  ),
}


def dot_of_rows(
  x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any
) -> jax.Array:
  """`lax.dot_general` of all rows of x at once.

  With more axes than two, the kernel's gradient begins with a transposed copy on CPUs:
  a fifth of a training step.
  """
  del dimensions  # a layer's: the last axis with the first
  rows = x.reshape(-1, x.shape[-1])
  y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _linear(
  inputs: int, outputs: int, config: LlamaConfig, rngs: nnx.Rngs
) -> nnx.Linear:
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=False,
    dtype=jnp.dtype(config.dtype),
    dot_general=dot_of_rows,
    rngs=rngs,
  )


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)


def rotate(x: jax.Array) -> jax.Array:
  """Rotary position embedding of x: (batch, position, head, feature).

  Pairs feature i with feature i + half; of an odd number of features the last stays.
  """
  half = x.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  position = jnp.arange(x.shape[1], dtype=jnp.float32)
  angle = position[:, None, None] * frequency[None, None, :]  # (position, 1, half)
  cos, sin = jnp.cos(angle)[None].astype(x.dtype), jnp.sin(angle)[None].astype(x.dtype)
  first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
  return jnp.concatenate(
    [first * cos - second * sin, first * sin + second * cos, rest], -1
  )


class Attention(nnx.Module):
  """Causal self-attention with rotary positions."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    self.heads = config.heads
    self.query = _linear(config.width, config.width, config, rngs)
    self.key = _linear(config.width, config.width, config, rngs)
    self.value = _linear(config.width, config.width, config, rngs)
    self.output = _linear(config.width, config.width, config, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
    query, key, value = (
      project(x).reshape(split) for project in (self.query, self.key, self.value)
    )
    mixed = jax.nn.dot_product_attention(
      rotate(query), rotate(key), value, is_causal=True
    )
    return self.output(mixed.reshape(x.shape))


class SwiGLU(nnx.Module):
  """Gated feed-forward layer."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    self.gate = _linear(config.width, config.feedforward, config, rngs)
    self.up = _linear(config.width, config.feedforward, config, rngs)
    self.down = _linear(config.feedforward, config.width, config, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
  """One transformer layer."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(config, rngs)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = _norm(config, rngs)
    self.mlp = SwiGLU(config, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.attention_norm(x))
    return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
  """Tokens (batch, position) to logits (batch, position, vocabulary)."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    self.embedding = nnx.Embed(
      config.vocabulary, config.width, dtype=jnp.dtype(config.dtype), rngs=rngs
    )
    self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.layers)])
    self.norm = _norm(config, rngs)
    self.head = _linear(config.width, config.vocabulary, config, rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embedding(tokens)
    for layer in self.layers:
      x = layer(x)
    return self.head(self.norm(x))


def next_token_loss(model: Llama, batch: jax.Array) -> jax.Array:
  """Mean cross entropy in nats; batch: (rows, context + 1) integers."""
  tokens = batch.astype(jnp.int32)
  logits = model(tokens[:, :-1]).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
