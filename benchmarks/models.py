"""The small models beside the LLaMA: masked-token encoder, ViT, CNN and MLP.

In each of them the hidden layers are in `layers`, apart from what reads the input and
what gives the output, so that one rule tells the contenders which matrices are hidden.
"""

import functools
import itertools

from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks.llama import dot_of_rows, rotate


class EncoderLayer(nnx.Module):
  """One pre-norm transformer layer without a causal mask."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    self.heads = heads
    linear = functools.partial(nnx.Linear, dot_general=dot_of_rows, rngs=rngs)
    self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
    self.query = linear(width, width)
    self.key = linear(width, width)
    self.value = linear(width, width)
    self.output = linear(width, width)
    self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
    self.up = linear(width, 4 * width)
    self.down = linear(4 * width, width)

  def __call__(self, x: jax.Array) -> jax.Array:
    normed = self.attention_norm(x)
    split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
    query, key, value = (
      project(normed).reshape(split) for project in (self.query, self.key, self.value)
    )
    mixed = jax.nn.dot_product_attention(rotate(query), rotate(key), value)
    x = x + self.output(mixed.reshape(x.shape))
    return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Encoder(nnx.Module):
  """Inputs that `embedding` takes to logits (batch, position, outputs)."""

  def __init__(
    self,
    embedding: nnx.Module,
    positions: int,
    outputs: int,
    *,
    width: int,
    layers: int,
    heads: int,
    rngs: nnx.Rngs,
  ):
    self.embedding = embedding
    self.position = nnx.Param(0.02 * rngs.params.normal((1, positions, width)))
    self.layers = nnx.List(
      [EncoderLayer(width, heads, rngs=rngs) for _ in range(layers)]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, outputs, rngs=rngs)

  def __call__(self, inputs: jax.Array) -> jax.Array:
    x = self.embedding(inputs) + self.position[...]
    for layer in self.layers:
      x = layer(x)
    return self.head(self.norm(x))


class ViT(Encoder):
  """Images (batch, side, side) to logits (batch, classes), the mean over patches."""

  def __init__(
    self, side: int, patch: int, classes: int, *, width: int, rngs: nnx.Rngs, **sizes
  ):
    self.patch = patch
    embedding = nnx.Linear(patch * patch, width, rngs=rngs)
    positions = (side // patch) ** 2
    super().__init__(embedding, positions, classes, width=width, rngs=rngs, **sizes)

  def __call__(self, images: jax.Array) -> jax.Array:
    rows, count = len(images), images.shape[1] // self.patch
    patches = images.reshape(rows, count, self.patch, count, self.patch)
    patches = patches.swapaxes(2, 3).reshape(rows, count * count, -1)
    return super().__call__(patches).mean(axis=1)


class CNN(nnx.Module):
  """Images (batch, side, side) to logits (batch, classes); strides of 2, mean pool."""

  def __init__(self, channels: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
    def convolution(inputs, outputs, size):
      return nnx.Conv(inputs, outputs, (size, size), strides=2, rngs=rngs)

    first, *_ = channels
    self.stem = convolution(1, first, 5)
    self.layers = nnx.List(
      [
        convolution(inputs, outputs, 3)
        for inputs, outputs in itertools.pairwise(channels)
      ]
    )
    self.head = nnx.Linear(channels[-1], classes, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    x = nnx.relu(self.stem(images[..., None]))
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return self.head(x.mean(axis=(1, 2)))


class MLP(nnx.Module):
  """Images (batch, side, side) to outputs (batch, classes); tanh, as in the sources."""

  def __init__(self, sizes: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
    self.layers = nnx.List(
      [
        nnx.Linear(inputs, outputs, rngs=rngs)
        for inputs, outputs in itertools.pairwise(sizes)
      ]
    )
    self.head = nnx.Linear(sizes[-1], classes, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    x = images.reshape(len(images), -1)
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.head(x)
