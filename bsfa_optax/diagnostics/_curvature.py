"""Curvature of the loss, and how much of it a subspace holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check, _curvature, _vectors
from bsfa_optax._vectors import Layout
from bsfa_optax.diagnostics._subspaces import (
  as_stacks,
  diagonal,
  orthonormal,
  Projector,
  stack_norms,
)

MATRICES = {
  'hessian': 'Hessian',
  'gauss_newton': 'Gauss-Newton',
  'functional': 'functional Hessian',
}


class HessianTopK(NamedTuple):
  """The greatest eigenvalues of the Hessian of each block.

  Attributes:
    eigenvalues: float (blocks, rank), descending.
    basis: their eigenvectors, a tree of stacks ``(rank, *shape)``.
    residuals: the norms ``|H v - lambda v|``, float (blocks, rank): some eigenvalue of
      H is no further than this from lambda.
  """

  eigenvalues: jax.Array
  basis: Any
  residuals: jax.Array


def hessian_top_k(
  value_fn: Callable[[optax.Params], jax.Array],
  params: optax.Params,
  rank: int,
  layout: Layout | None = None,
  *,
  iterations: int | None = None,
  key: jax.Array | None = None,
) -> HessianTopK:
  """The greatest eigenvalues and eigenvectors of the Hessian, by Lanczos iteration.

  The Hessian of a block is that of the loss as a function of the block alone. For that
  of all parameters make them one block, ``estimators.layout(params, labels='all')``.
  Every iteration takes a Hessian-vector product for each block, and so does every
  residual. An eigenvalue that is there several times, as in the output layer under a
  squared error, may be found fewer times, with small residuals all the same.

  Args:
    value_fn: the loss, a function of the parameters alone.
    params: the parameters.
    rank: eigenvalues wanted in each block.
    layout: the layout; by default every leaf that is filtered by default is a block.
    iterations: dimension of the Krylov space, more than `rank`. Defaults to
      ``4 * rank``; raise it if the residuals are too large. A block with no more
      entries than that is decomposed exactly.
    key: a random key for the first vector; the same in every call by default.

  Returns:
    A `HessianTopK`.

  Raises:
    ValueError: if `rank` or `iterations` is no positive integer, or `iterations` does
      not exceed `rank`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, estimators
    >>> loss = lambda w: 0.5 * (3 * w[0, 0] ** 2 + w[1, 1] ** 2)
    >>> found = diagnostics.hessian_top_k(loss, jnp.ones((2, 2)), rank=2)
    >>> jnp.allclose(found.eigenvalues, jnp.array([[3.0, 1.0]]))
    Array(True, dtype=bool)
  """
  _check.positive_int(rank=rank)
  layout = _vectors.layout(params) if layout is None else layout
  if iterations is None:
    iterations = 4 * rank
  _check.positive_int(iterations=iterations)
  if iterations <= rank:
    raise ValueError(
      f'iterations must exceed rank, got iterations={iterations} and rank={rank};'
      ' leave it out for 4 * rank.'
    )
  leaves = layout.select(params)
  product = _curvature.hessian(layout, params, value_fn)
  cold_start = [
    jnp.broadcast_to(jnp.zeros_like(x, _vectors.accumulator(x.dtype)), (rank, *x.shape))
    for x in leaves
  ]
  eigenvalues, basis = _curvature.top_eigenpairs(
    layout,
    product,
    cold_start,
    iterations,
    jax.random.key(0) if key is None else key,
    tolerance=max(float(jnp.finfo(x.dtype).eps) for x in leaves),
  )
  images = jax.lax.map(product, basis)
  scaled = _vectors.mix(layout, diagonal(eigenvalues), basis)
  errors = [x - y for x, y in zip(images, scaled, strict=True)]
  return HessianTopK(
    eigenvalues,
    as_stacks(params, layout, basis),
    jnp.sqrt(stack_norms(layout, errors)),
  )


class CurvatureSplit(NamedTuple):
  """A measure of curvature inside and outside a subspace, with standard errors.

  Attributes:
    inside: float (blocks,).
    outside: float (blocks,).
    inside_error: standard error of `inside`, 0 where it is exact.
    outside_error: standard error of `outside`.
  """

  inside: jax.Array
  outside: jax.Array
  inside_error: jax.Array
  outside_error: jax.Array

  @property
  def share(self) -> jax.Array:
    """inside / (inside + outside)."""
    return self.inside / (self.inside + self.outside)

  @property
  def share_error(self) -> jax.Array:
    """Standard error of `share`, to first order."""
    total = self.inside + self.outside
    return jnp.hypot(
      self.inside * self.outside_error, self.outside * self.inside_error
    ) / jnp.square(total)


class CurvatureEnergy(NamedTuple):
  """How much of the curvature lies in a subspace, for each of three matrices.

  Each attribute is a dictionary of a `CurvatureSplit` for ``'hessian'``,
  ``'gauss_newton'`` and ``'functional'``.

  Attributes:
    energy: splits of the squared Frobenius norm, ``|C P|^2`` and ``|C (I - P)|^2``.
    trace: splits of the trace, ``tr(P C P)`` and ``tr((I - P) C (I - P))``. The
      functional Hessian, and so the Hessian, may be indefinite: then shares of it need
      not lie in [0, 1].
  """

  energy: dict[str, CurvatureSplit]
  trace: dict[str, CurvatureSplit]


def curvature_energy(
  output_fn: Callable[[optax.Params], Any],
  loss_fn: Callable[[Any], jax.Array],
  params: optax.Params,
  subspace: Any | Projector,
  layout: Layout,
  *,
  key: jax.Array,
  samples: int = 16,
) -> CurvatureEnergy:
  r"""Splits the curvature into the part inside a subspace and that outside.

  For the loss :math:`\ell(z(\theta))` of outputs :math:`z` the Hessian is

  .. math::
    H = \underbrace{J^\top (\nabla^2_z \ell) J}_{G} +
        \underbrace{\sum_i \frac{\partial \ell}{\partial z_i} \nabla^2 z_i}_{F}

  with the Gauss-Newton matrix :math:`G` and the functional Hessian :math:`F`. For each
  matrix C of the three and the projector P on the subspace, the energy
  :math:`|C|_F^2 = |C P|_F^2 + |C (I - P)|_F^2` and the trace
  :math:`\mathrm{tr}\, C = \mathrm{tr}\, P C P + \mathrm{tr}\, (I - P) C (I - P)` are
  split. The matrices of a block are those of the block alone: of a large matrix its
  diagonal block.

  A basis of k rows gives the part inside exactly, by k products with the matrices; the
  part outside is estimated from random vectors (Hutchinson), and with a `projector` so
  is the part inside. A product is taken for each block. Nothing larger than the basis
  is stored.

  Args:
    output_fn: outputs of the model as a function of the parameters.
    loss_fn: the loss as a function of the outputs.
    params: the parameters.
    subspace: a tree of stacks ``(rank, *shape)``, or the `projector` of any estimator.
    layout: the layout of the subspace.
    key: a random key.
    samples: random vectors, at least 2.

  Returns:
    A `CurvatureEnergy`.

  Raises:
    ValueError: if `samples` is less than 2.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, estimators
    >>> scales = jnp.array([[3.0, 1.0], [1.0, 1.0]])
    >>> first = jnp.eye(4)[:1].reshape(1, 2, 2)
    >>> split = diagnostics.curvature_energy(
    ...   lambda w: scales * w,
    ...   lambda outputs: 0.5 * (outputs**2).sum(),
    ...   jnp.ones((2, 2)),
    ...   first,
    ...   estimators.layout(jnp.ones((2, 2))),
    ...   key=jax.random.key(0),
    ... )
    >>> print(split.trace['gauss_newton'].share, split.energy['hessian'].inside)
    [0.75] [81.]

  References:
    Zakarin, Singh, `Accelerating Neural Network Training Along Sharp and Flat
    Directions <https://arxiv.org/abs/2505.11972>`_, 2025

    Meyer, Musco, Musco, Woodruff, `Hutch++: Optimal Stochastic Trace Estimation
    <https://arxiv.org/abs/2010.09649>`_, 2021
  """
  _check.positive_int(samples=samples)
  if samples < 2:
    raise ValueError(
      f'samples must be at least 2 for a standard error, got {samples}; raise it.'
    )
  value_fn = lambda params: loss_fn(output_fn(params))
  hessian = _curvature.hessian(layout, params, value_fn)
  gauss_newton = _curvature.gauss_newton(layout, params, output_fn, loss_fn)

  def measure(x):
    """|C x|^2 and x^T C x for the three matrices, (2, 3, blocks)."""
    h, g = hessian(x), gauss_newton(x)
    f = [a - b for a, b in zip(h, g, strict=True)]
    energy = [_vectors.squared_norms(layout, c) for c in (h, g, f)]
    trace = [
      _vectors.inner(layout, [v[None] for v in x], [v[None] for v in c])[:, 0, 0]
      for c in (h, g, f)
    ]
    return jnp.stack([jnp.stack(energy), jnp.stack(trace)])

  if callable(subspace):
    zeros = jax.tree.map(jnp.zeros_like, params)
    project = lambda x: layout.select(subspace(layout.replace(zeros, x)))
    inside = None
  else:
    rows = orthonormal(subspace, layout)
    inside = jax.lax.map(measure, rows).sum(0)

    def project(x):
      along = _vectors.inner(layout, [v[None] for v in x], rows)
      return [v[0] for v in _vectors.mix(layout, along, rows)]

  def sample(key):
    x = _vectors.random(_signs, layout.select(params), key)
    dominant = project(x)
    bulk = measure([v - p for v, p in zip(x, dominant, strict=True)])
    return bulk if inside is not None else jnp.stack([bulk, measure(dominant)])

  drawn = jax.lax.map(sample, jax.random.split(key, samples))
  mean, error = drawn.mean(0), drawn.std(0, ddof=1) / np.sqrt(samples).item()
  if inside is None:
    fields = (mean[1], mean[0], error[1], error[0])
  else:
    fields = (inside, mean, jnp.zeros_like(mean), error)
  energy, trace = (
    {
      name: CurvatureSplit(*(x[i, j] for x in fields))
      for j, name in enumerate(MATRICES)
    }
    for i in range(2)
  )
  return CurvatureEnergy(energy, trace)


def _signs(key: jax.Array, shape: Any, dtype: Any, out_sharding: Any) -> jax.Array:
  """`jax.random.rademacher`, which takes no sharding before JAX 0.10.1."""
  drawn = jax.random.bernoulli(key, shape=shape, out_sharding=out_sharding)
  return jnp.where(drawn, 1, -1).astype(dtype)
