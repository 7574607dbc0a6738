"""Optimizers that a sceptic asks for and that no package has in JAX.

References to compare with: each is its authors' rule for one matrix of inputs by
outputs, with their defaults, and gives a direction of about Adam's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.soap import rotated, turned

MUONS_NUMBERS = (3.4445, -4.7750, 2.0315), 5
POLAR = (2.0, -1.5, 0.5), 12  # nearly exact
RMS = 0.2  # of Adam's updates, and of Muon's with `consistent_rms`


class RivalState(NamedTuple):
  """State of a rule that is applied to leaves.

  Attributes:
    count: updates so far, int32 ().
    leaves: the rule's state for each leaf.
  """

  count: jax.Array
  leaves: list[Any]


def _of_leaves(
  init: Callable[[jax.Array], Any],
  step: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]],
) -> optax.GradientTransformation:
  """A rule for matrices, for all leaves; of a convolution the last axis is the output.

  Args:
    init: zeros like a matrix to the first state.
    step: gradient, state and the number of updates so far to a direction and the state.
  """
  matrix = lambda x: x.reshape(-1, x.shape[-1])

  def of_params(params):
    zeros = [jnp.zeros_like(matrix(x)) for x in jax.tree.leaves(params)]
    return RivalState(jnp.zeros((), jnp.int32), [init(x) for x in zeros])

  def update(updates, state, params=None):
    del params
    leaves, structure = jax.tree.flatten(updates)
    steps = [
      step(matrix(g), old, state.count)
      for g, old in zip(leaves, state.leaves, strict=True)
    ]
    out = [x.reshape(g.shape) for g, (x, _) in zip(leaves, steps, strict=True)]
    state = RivalState(state.count + 1, [new for _, new in steps])
    return jax.tree.unflatten(structure, out), state

  return optax.GradientTransformation(of_params, update)


def _averaged(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
  return decay * old + (1 - decay) * new


def _orthogonal(
  x: jax.Array, coefficients: tuple[float, float, float], steps: int
) -> jax.Array:
  """By Newton-Schulz."""
  if x.shape[0] > x.shape[1]:
    return _orthogonal(x.T, coefficients, steps).T
  a, b, c = coefficients
  x = x / (jnp.linalg.norm(x) + 1e-10)
  for _ in range(steps):
    square = x @ x.T
    x = a * x + (b * square + c * square @ square) @ x
  return x


def _sized(x: jax.Array, size: float = RMS) -> jax.Array:
  """With this root mean square."""
  return size * x.size**0.5 * x / (jnp.linalg.norm(x) + 1e-10)


def normuon(b1: float = 0.95, b2: float = 0.95) -> optax.GradientTransformation:
  """Muon, then every neuron over its own root mean square.

  References:
    Li, Liu, Liang, Chen, Zhao, `NorMuon: Making Muon more efficient and scalable
    <https://arxiv.org/abs/2510.05491>`_, 2025
  """

  def step(g, state, count):
    del count
    mean, square = state
    mean = _averaged(mean, g, b1)
    x = _orthogonal(_averaged(g, mean, 1 - b1), *MUONS_NUMBERS)
    square = _averaged(square, jnp.mean(x**2, 0, keepdims=True), b2)
    return _sized(x / (jnp.sqrt(square) + 1e-10)), (mean, square)

  return _of_leaves(lambda zeros: (zeros, zeros[:1]), step)


def asgo(
  b1: float = 0.9, b2: float = 0.8, eps: float = 1e-10
) -> optax.GradientTransformation:
  """One-sided Shampoo: the mean over the root of the shorter side's covariance.

  The root is by eigenvalues, where the authors take ten steps of Polar Express; both
  end at what the precision can tell from zero.

  References:
    An, Liu, Pan, Ren, Ma, Goldfarb, Zhang, `ASGO: Adaptive Structured Gradient
    Optimization <https://arxiv.org/abs/2503.20762>`_, 2025
  """

  def init(zeros):
    return zeros, jnp.zeros((min(zeros.shape),) * 2)

  def step(g, state, count):
    del count
    mean, covariance = state
    wide = g.shape[0] <= g.shape[1]
    mean = _averaged(mean, g, b1)
    covariance = _averaged(covariance, g @ g.T if wide else g.T @ g, b2)
    values, basis = jnp.linalg.eigh(covariance)
    least = jnp.finfo(values.dtype).eps * values[-1]
    root = basis / jnp.sqrt(jnp.maximum(values, least) + eps)[None] @ basis.T
    return _sized(root @ mean if wide else mean @ root), (mean, covariance)

  return _of_leaves(init, step)


def soap_muon(
  b1: float = 0.95, b2: float = 0.9, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Nesterov's momentum, over its root mean square in SOAP's bases, orthogonalized.

  References:
    samacqua, `Contra Muon + SOAP MLP pre-conditioning
    <https://github.com/KellerJordan/modded-nanogpt/pull/278>`_, 2026; for all hidden
    matrices and with new bases at every step as in `pull request 321
    <https://github.com/KellerJordan/modded-nanogpt/pull/321>`_, without the contest's
    other parts
  """

  def init(zeros):
    return zeros, zeros, *_eyes(zeros)

  def step(g, state, count):
    mean, square, covariances, bases = state
    mean = _averaged(mean, g, b1)
    nesterov = _averaged(g, mean, 1 - b1)
    first = count == 0
    inner = rotated(nesterov, bases)
    square = jnp.where(first, 0, _averaged(square, inner**2, b2))
    scaled = rotated(inner / (jnp.sqrt(square) + eps), bases, back=True)
    out = _orthogonal(jnp.where(first, nesterov, scaled), *POLAR)
    covariances = [
      _averaged(c, x, b2) for c, x in zip(covariances, (g @ g.T, g.T @ g), strict=True)
    ]
    bases, square = turned(count, 1, covariances, bases, square)
    return _sized(out), (mean, square, covariances, bases)

  return _of_leaves(init, step)


def _eyes(x: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
  """Covariances and bases before the first gradient."""
  return [jnp.zeros((n, n)) for n in x.shape], [jnp.eye(n) for n in x.shape]


def kl_shampoo(
  b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, *, adam: bool = False
) -> optax.GradientTransformation:
  """Shampoo whose covariances are each of what the other has whitened; or KL-SOAP.

  Bases take a step of orthogonal iteration at every update (the authors': at every
  tenth). The eigenvalues start at the size of the first gradient instead of 0.1, from
  where they would need most of a run of some hundred steps.

  References:
    Lin, Lowe, Dangel, Eschenhagen, Xu, Grosse, `Understanding and Improving Shampoo and
    SOAP via Kullback-Leibler Minimization <https://arxiv.org/abs/2509.03378>`_, 2025

  Args:
    b1: decay of the mean.
    b2: decay of all else.
    eps: added to the roots.
    adam: KL-SOAP: the second moment in the bases is Adam's, not the eigenvalues'.
  """

  def init(zeros):
    square = zeros if adam else None
    return zeros, square, *_eyes(zeros), [jnp.zeros(n) for n in zeros.shape]

  def start(g, state):
    mean, square, *_ = state
    rows, columns = g.shape
    covariances = [(1 - b2) * g @ g.T / columns, (1 - b2) * g.T @ g / rows]
    bases = [jnp.linalg.eigh(c)[1][:, ::-1] for c in covariances]
    size = jnp.sqrt(jnp.mean(g**2))
    values = [jnp.full(n, size) for n in g.shape]
    return jnp.zeros_like(g), (mean, square, covariances, bases, values)

  def go_on(g, state):
    mean, square, covariances, bases, values = state
    mean, inner = _averaged(mean, g, b1), rotated(g, bases)
    square = _averaged(square, inner**2, b2) if adam else square
    left, right = values
    root = jnp.sqrt(square if adam else jnp.outer(left, right))
    out = rotated(rotated(mean, bases) / (root + eps), bases, back=True)
    whitened = inner / jnp.sqrt(right)[None], inner.T / jnp.sqrt(left)[None]
    new = [x @ x.T / x.shape[1] for x in whitened]  # in the bases
    covariances = [
      _averaged(c, q @ x @ q.T, b2)
      for c, q, x in zip(covariances, bases, new, strict=True)
    ]
    least = [max(10, min(n, 4000)) ** -2 for n in g.shape]
    values = [
      jnp.maximum(_averaged(v, jnp.diagonal(x), b2), floor)
      for v, x, floor in zip(values, new, least, strict=True)
    ]
    turn = lambda c, q: jnp.linalg.qr(c @ q)[0]
    bases = [turn(c, q) for c, q in zip(covariances, bases, strict=True)]
    return out, (mean, square, covariances, bases, values)

  def step(g, state, count):
    return jax.lax.cond(count == 0, start, go_on, g, state)

  return _of_leaves(init, step)


def cosmos(
  b1: float = 0.95,
  b2: float = 0.95,
  eps: float = 1e-8,
  *,
  rank: int = 64,
  gamma: float = 0.2,
) -> optax.GradientTransformation:
  """Adam in the leading directions of the inputs, and Muon in the others.

  The leading ones are at most half of the inputs, as many as `rank`.

  References:
    Liu, Xu, Zhang, Kang, Li, Liang, Chen, Zhao, `COSMOS: A Hybrid Adaptive Optimizer
    for Memory-Efficient Training of LLMs <https://arxiv.org/abs/2502.17410>`_, 2025
  """

  def init(zeros):
    inputs, outputs = zeros.shape
    few = min(rank, inputs // 2)
    basis = jnp.zeros((inputs, few))
    return zeros, jnp.zeros((outputs, few)), basis, jnp.zeros((few, few))

  def first_basis(g, basis, covariance):
    del covariance
    return jnp.linalg.eigh(g.T @ g)[1][:, ::-1][:, : basis.shape[1]]

  def next_basis(g, basis, covariance):
    new = _averaged(basis @ covariance, g.T @ (g @ basis), b2)
    return jnp.linalg.qr(new)[0]

  def step(g, state, count):
    g = g.T  # outputs by inputs, as the authors have it
    mean, square, old, covariance = state
    mean = _averaged(mean, g.T, b1)
    basis = jax.lax.cond(count == 0, first_basis, next_basis, g, old, covariance)
    turn, inner = old.T @ basis, g @ basis
    covariance = _averaged(turn.T @ covariance @ turn, inner.T @ inner, b2)
    square = _averaged(square, inner**2, b2)
    now = (count + 1).astype(jnp.float32)
    share = 1 - b1**now
    nesterov = ((1 - b1) * g + b1 * mean.T) / (1 - b1 + b1 * share)
    leading = nesterov @ basis
    adam = leading / (jnp.sqrt(square / (1 - b2**now)) + eps) @ basis.T
    rest = _orthogonal(nesterov - leading @ basis.T, *MUONS_NUMBERS)
    out = _sized(adam + gamma * _sized(rest, 1.0))
    return out.T, (mean, square, basis, covariance)

  return _of_leaves(init, step)
