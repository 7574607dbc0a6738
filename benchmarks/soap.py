"""SOAP, the nearest relative: Adam in the eigenbasis of Shampoo's covariances.

A reference to compare with, as its authors' code does it with its defaults: every axis
has a basis, the first update is left out, and from then on a basis takes one step of
orthogonal iteration, by QR, at a refresh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SoapState(NamedTuple):
  """State of `scale_by_soap`.

  Attributes:
    count: updates so far, int32 ().
    mean: moving average of the updates, like the parameters.
    square: moving average of the squares in the bases, like the parameters.
    covariances: for each leaf those of its axes, `(n, n)`.
    bases: for each leaf those of its axes, as columns.
  """

  count: jax.Array
  mean: list[jax.Array]
  square: list[jax.Array]
  covariances: list[list[jax.Array]]
  bases: list[list[jax.Array]]


def scale_by_soap(
  b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, *, refresh_every: int = 10
) -> optax.GradientTransformation:
  """Adam in slowly turning bases, for leaves of at least two axes.

  References:
    Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, `SOAP: Improving
    and Stabilizing Shampoo using Adam <https://arxiv.org/abs/2409.11321>`_, 2025
  """

  def init(params):
    leaves = jax.tree.leaves(params)
    zeros = [jnp.zeros_like(x) for x in leaves]
    square = lambda make: [[make(n) for n in x.shape] for x in leaves]
    return SoapState(
      jnp.zeros((), jnp.int32),
      zeros,
      zeros,
      square(lambda n: jnp.zeros((n, n))),
      square(jnp.eye),
    )

  def update(updates, state, params=None):
    del params
    leaves, structure = jax.tree.flatten(updates)
    first = state.count == 0
    step = jnp.maximum(state.count, 1).astype(jnp.float32)
    out, mean, square, covariances, bases = [], [], [], [], []
    for g, m, s, covariance, basis in zip(leaves, *state[1:], strict=True):
      m = jnp.where(first, m, b1 * m + (1 - b1) * g)
      s = jnp.where(first, s, b2 * s + (1 - b2) * jnp.square(rotated(g, basis)))
      corrected = jnp.sqrt(1 - b2**step) / (1 - b1**step)
      direction = corrected * rotated(m, basis) / (jnp.sqrt(s) + eps)
      out.append(jnp.where(first, 0, rotated(direction, basis, back=True)))
      covariance = [
        b2 * c + (1 - b2) * _second_moment(g, a) for a, c in enumerate(covariance)
      ]
      basis, s = turned(state.count, refresh_every, covariance, basis, s)
      mean.append(m)
      square.append(s)
      covariances.append(covariance)
      bases.append(basis)
    state = SoapState(state.count + 1, mean, square, covariances, bases)
    return jax.tree.unflatten(structure, out), state

  return optax.GradientTransformation(init, update)


def rotated(x: jax.Array, bases: list[jax.Array], back: bool = False) -> jax.Array:
  """In the bases of its axes, or from there."""
  for basis in bases:  # each product moves the next axis to the front
    x = jnp.tensordot(x, basis, ((0,), (int(back),)))
  return x


def turned(
  count: jax.Array,
  refresh_every: int,
  covariances: list[jax.Array],
  bases: list[jax.Array],
  square: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
  """Bases after an update, and the squares in their new order."""
  due = count % refresh_every == 0
  return jax.lax.switch(
    jnp.where(count == 0, 0, jnp.where(due, 1, 2)),
    [_decomposed, _iterated, lambda covariances, bases, square: (bases, square)],
    covariances,
    bases,
    square,
  )


def _second_moment(x: jax.Array, axis: int) -> jax.Array:
  others = [a for a in range(x.ndim) if a != axis]
  return jnp.tensordot(x, x, (others, others))


def _decomposed(covariances: list[jax.Array], bases: Any, square: jax.Array) -> Any:
  del bases
  return [jnp.linalg.eigh(c)[1][:, ::-1] for c in covariances], square


def _iterated(covariances: list[jax.Array], bases: Any, square: jax.Array) -> Any:
  news = []
  for axis, (covariance, basis) in enumerate(zip(covariances, bases, strict=True)):
    order = jnp.argsort(-jnp.diagonal(basis.T @ covariance @ basis))
    square = jnp.take(square, order, axis)
    news.append(jnp.linalg.qr(covariance @ basis[:, order])[0])
  return news, square
