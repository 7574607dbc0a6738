"""The estimator protocol, and what every filter makes of a decomposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _vectors
from bsfa_optax._vectors import Layout, Vector


class Decomposition(NamedTuple):
  """A vector in the principal directions of the covariance, block by block.

  Coefficients may be laid out as the estimator likes, in any number of arrays; the
  three functions say how they belong together.

  Attributes:
    coefficients: of the vector along the principal directions, a list of arrays.
    variance: relative variances of these directions (over the block's mean), to
      broadcast to the coefficients; 0 where there is no direction.
    dominant: booleans, likewise.
    rest: relative variance that stands for all directions without a coefficient, float
      (blocks,); 1, the mean, where every direction has one.
    ready: whether the block's directions are known, bool (blocks,). Until then the
      projector on the dominant directions is 0, and the filter the identity.
    spread: numbers of blocks, (blocks,), to a list that broadcasts to the coefficients.
    collect: arrays like the coefficients to their sums within blocks, (blocks,).
    synthesize: arrays like the coefficients to the vector that has them.
  """

  coefficients: list[jax.Array]
  variance: list[jax.Array]
  dominant: list[jax.Array]
  rest: jax.Array
  ready: jax.Array
  spread: Callable[[jax.Array], list[jax.Array]]
  collect: Callable[[list[jax.Array]], jax.Array]
  synthesize: Callable[[list[jax.Array]], Vector]


class Estimator(NamedTuple):
  """Where the covariance of past updates comes from, as four pure functions.

  Vectors are lists of arrays, one for each part of the layout. Write your own by
  filling in the fields.

  Attributes:
    layout: ``layout(params) -> Layout``, which leaves are filtered and what makes up a
      block; `bsfa_optax.estimators.layout`. Must accept abstract parameters.
    init: ``init(layout, params) -> memory``.
    learn: ``learn(layout, vector, memory, count, params, **extra_args) -> memory``
      learns from one vector, which is finite; `count` others were before it, int32 ().
    decompose: ``decompose(layout, vector, memory) -> Decomposition``.

  Examples:
    The one dominant direction of a block is that of its average update:

    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> from bsfa_optax import estimators
    >>> def init(layout, params):
    ...   return [jnp.zeros_like(x) for x in layout.select(params)]
    >>> def learn(layout, vector, memory, count, params):
    ...   return [0.9 * m + 0.1 * v for m, v in zip(memory, vector)]
    >>> def decompose(layout, vector, memory):
    ...   rows = [m[None] for m in memory]
    ...   norm = jnp.sqrt(estimators.inner(layout, rows, rows)[:, :, 0])
    ...   rows = [r / norm[i, 0] for i, r in enumerate(rows)]  # a block a leaf
    ...   one = jnp.ones_like(norm)
    ...   return estimators.from_rows(layout, vector, rows, one, 0 * one[:, 0], True)
    >>> average = estimators.Estimator(estimators.layout, init, learn, decompose)
    >>> tx = bsfa_optax.bsfa(alpha=0.5, gamma=2.0, estimator=average)
    >>> updates = {'kernel': jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    >>> filtered, state = tx.update(updates, tx.init(updates))
    >>> print(filtered['kernel'])
    [[1.5 0. ]
     [0.  2. ]]
  """

  layout: Callable[[optax.Params], Layout]
  init: Callable[[Layout, optax.Params], Any]
  learn: Callable[..., Any]
  decompose: Callable[[Layout, Vector, Any], Decomposition]


def check_estimator(estimator: Any) -> None:
  """Raises unless `estimator` is an `Estimator`."""
  if not isinstance(estimator, Estimator):
    raise TypeError(
      f'estimator must be an Estimator, got {estimator!r}; call the factory, as in'
      ' estimator=pca().'
    )


# What filters make of a decomposition.


def filtered(
  f: Callable[..., jax.Array], layout: Layout, vector: Vector, found: Decomposition
) -> Vector:
  """f(C) v, in the accumulators' dtypes.

  Args:
    f: from relative variances of directions, and whether they are dominant, to
      multipliers of the same shape.
    layout: the layout.
    vector: the vector.
    found: its decomposition.
  """
  # Written as a change of what f makes of the rest, so that f = 1 gives back the
  # vector to the last bit.
  base = f(found.rest, jnp.zeros(found.rest.shape, bool))
  base = jnp.where(found.ready, base, 1)

  def change(c, variance, dominant, ready, b):
    multiplier = f(variance, dominant)
    excess = jnp.where(ready, multiplier - b.astype(multiplier.dtype), 0)
    return excess.astype(c.dtype) * c

  ready, rest = found.spread(found.ready), found.spread(base)
  changes = jax.tree.map(
    change, found.coefficients, found.variance, found.dominant, ready, rest
  )
  # Filtered in the accumulators' dtype: half precision is rounded once, at the end.
  wide = [v.astype(_vectors.accumulator(v.dtype)) for v in vector]
  scaled = _vectors.scale(layout, wide, base)
  return jax.tree.map(
    lambda v, change: v + change.astype(v.dtype), scaled, found.synthesize(changes)
  )


def project(found: Decomposition) -> Vector:
  """The dominant part P v; 0 in blocks that are not ready."""
  return found.synthesize(_inside(found))


def dominant_fraction(
  layout: Layout, vector: Vector, found: Decomposition
) -> jax.Array:
  """|P v| / |v| of each block, (blocks,); 0 for a zero vector."""
  inside = found.collect([jnp.square(c) for c in _inside(found)])
  norm = _vectors.squared_norms(layout, vector).astype(inside.dtype)
  return jnp.sqrt(inside / jnp.where(norm > 0, norm, 1))


def _inside(found: Decomposition) -> list[jax.Array]:
  return jax.tree.map(
    lambda c, dominant, ready: jnp.where(dominant & ready, c, 0),
    found.coefficients,
    found.dominant,
    found.spread(found.ready),
  )


# The two kinds of decompositions of this package.


def from_rows(
  layout: Layout,
  vector: Vector,
  rows: Vector,
  variance: jax.Array,
  rest: jax.Array,
  ready: jax.Array | bool,
) -> Decomposition:
  """The decomposition along a few orthonormal directions, all of them dominant.

  Args:
    layout: the layout.
    vector: the vector.
    rows: orthonormal rows of each block, stacks ``(rank, *shape)``.
    variance: relative variance along each row, (blocks, rank); 0 for absent ones.
    rest: relative variance along all other directions, (blocks,).
    ready: whether the rows are known, bool (blocks,) or ().

  Returns:
    The `Decomposition`.
  """
  along = _vectors.inner(layout, rows, [v[None] for v in vector])[:, :, 0]

  def synthesize(coefficients):
    mixed = _vectors.mix(layout, coefficients[0][:, None, :], rows)
    return [x[0] for x in mixed]

  return Decomposition(
    [along],
    [variance.astype(along.dtype)],
    [variance > 0],
    rest,
    jnp.broadcast_to(ready, (layout.count,)),
    spread=lambda values: [values[:, None]],
    collect=lambda arrays: arrays[0].sum(1),
    synthesize=synthesize,
  )


def from_axes(
  layout: Layout,
  vector: Vector,
  bases: Sequence[Sequence[jax.Array]],
  axes: Sequence[tuple[int, ...]],
  variance: list[jax.Array],
  dominant: list[jax.Array],
  *,
  shared: bool = False,
) -> Decomposition:
  """The decomposition along products of basis vectors of some axes of each part.

  Args:
    layout: the layout; every part is one block for each batch index.
    vector: the vector.
    bases: for each part its bases as columns, (*batch, n, n), one for each axis.
    axes: for each part the axes with a basis.
    variance: for each part relative variances, to broadcast to it.
    dominant: booleans, likewise.
    shared: whether the bases are the same for the whole batch, (n, n).

  Returns:
    The `Decomposition`. A block is ready once any direction has variance; without an
    axis it has no directions, and is left alone for ever.
  """

  def known(part, x, own):
    some = bool(own) & (x > 0).any(part.inner_axes)
    return jnp.broadcast_to(some, part.batch_shape).reshape(-1)

  rotated = functools.partial(
    _vectors.rotate, layout, bases=bases, axes=axes, shared=shared
  )
  return Decomposition(
    rotated(vector),
    variance,
    dominant,
    # Every direction has a coefficient; the mean stands for the rest, which is empty.
    jnp.ones((layout.count,), np.result_type(*[x.dtype for x in variance])),
    jnp.concatenate(layout.map(known, variance, axes)),
    spread=functools.partial(_vectors.spread, layout, like=vector),
    collect=functools.partial(_vectors.sums, layout),
    synthesize=functools.partial(rotated, inverse=True),
  )
