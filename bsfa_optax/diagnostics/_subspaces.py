"""Subspaces of estimators: projectors, overlaps, angles, spectra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _learned, _svd, _vectors
from bsfa_optax._learned import Estimator
from bsfa_optax._vectors import Layout, Vector

Projector = Callable[[Any], Any]


def projector(estimator: Estimator, memory: Any) -> Projector:
  """The projector P on the dominant subspace that an estimator has found.

  Args:
    estimator: any estimator.
    memory: what it has learnt, ``optax.tree.get(opt_state, 'memory')``.

  Returns:
    A function from a tree like the parameters to its dominant part, zero on leaves in
    no block and until the block's directions are known.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, pca
    >>> estimator = pca(rank=1, history=1, decay=0.0)
    >>> tx = bsfa_optax.bsfa(estimator=estimator)
    >>> _, state = tx.update(jnp.eye(2), tx.init(jnp.eye(2)))
    >>> project = diagnostics.projector(estimator, state.memory)
    >>> print(project(jnp.ones((2, 2))).round(2))
    [[1. 0.]
     [0. 1.]]
  """
  _learned.check_estimator(estimator)

  def project(tree):
    layout = estimator.layout(tree)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    if not layout.count:
      return zeros
    vector = layout.select(tree)
    vector = [v.astype(_vectors.accumulator(v.dtype)) for v in vector]
    found = estimator.decompose(layout, vector, memory)
    return layout.replace(zeros, _learned.project(found))

  return project


def dominant_fraction(
  estimator: Estimator, memory: Any, gradients: optax.Updates
) -> tuple[jax.Array, jax.Array]:
  r"""The share of gradients that lies in the dominant subspace, by norm.

  .. math:: \chi = |P g| / |g|

  `optax.tree.get(opt_state, 'dominant_fraction')` is the same for what the filter saw
  in the last step; this is for any other vector, such as the full-batch gradient.

  Args:
    estimator: any estimator.
    memory: what it has learnt, ``optax.tree.get(opt_state, 'memory')``.
    gradients: gradients, or any other tree like the parameters.

  Returns:
    The fraction in each block, float ``(blocks,)``, and that in all leaves taken
    together, those in no block included, float ``()``. 0 for a zero gradient and until
    a block's directions are known.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, pca
    >>> estimator = pca(rank=1, history=1, decay=0.0)
    >>> tx = bsfa_optax.bsfa(estimator=estimator)
    >>> first = jnp.array([[1.0, 0.0], [0.0, 0.0]])
    >>> _, state = tx.update(first, tx.init(first))
    >>> blocks, overall = diagnostics.dominant_fraction(
    ...   estimator, state.memory, jnp.array([[3.0, 4.0], [0, 0]])
    ... )
    >>> print(blocks, overall)
    [0.6] 0.6

  References:
    Song, Ahn, Yun, `Does SGD really happen in tiny subspaces?
    <https://arxiv.org/abs/2405.16002>`_, 2024
  """
  _learned.check_estimator(estimator)
  norms = [_vectors.energy(x) for x in jax.tree.leaves(gradients)]
  layout = estimator.layout(gradients)
  if not layout.count:
    return jnp.zeros((1,), jnp.float32), jnp.zeros((), jnp.float32)
  vector = layout.select(gradients)
  found = estimator.decompose(layout, vector, memory)
  fraction = _learned.dominant_fraction(layout, vector, found)
  total = jnp.stack([x.astype(fraction.dtype) for x in norms]).sum()
  norm = _vectors.squared_norms(layout, vector).astype(fraction.dtype)
  inside = (jnp.square(fraction) * norm).sum()
  return fraction, jnp.sqrt(inside / jnp.where(total > 0, total, 1))


def spectrum(
  estimator: Estimator, memory: Any, updates: optax.Updates
) -> list[np.ndarray]:
  """The spectrum that the filter sees: relative variances of the directions.

  Those of `pca` and `kronecker` are relative to the mean variance of the block, those
  of `hessian_lanczos` (eigenvalues) to the least one that is kept. Not to be traced.

  Args:
    estimator: any estimator.
    memory: what it has learnt, ``optax.tree.get(opt_state, 'memory')``.
    updates: a tree like the parameters; the energies of `dct` are those of its values.

  Returns:
    For each block the relative variances of its directions, descending, float; 0 for
    absent ones. Of `kronecker` all pairs of principal directions, once each, however
    many entries an unfactored axis has.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, pca
    >>> estimator = pca(rank=2, history=2, decay=0.0)
    >>> tx = bsfa_optax.bsfa(estimator=estimator)
    >>> state = tx.init(jnp.zeros((2, 2)))
    >>> for entries in ([1.0, 0.0], [0.0, 1.0]):
    ...   _, state = tx.update(jnp.diag(jnp.array(entries)), state)
    >>> print(diagnostics.spectrum(estimator, state.memory, jnp.zeros((2, 2))))
    [array([2., 2.], dtype=float32)]
  """
  _learned.check_estimator(estimator)
  layout = estimator.layout(updates)
  if not layout.count:
    return []
  found = estimator.decompose(layout, layout.select(updates), memory)
  owners = found.spread(jnp.arange(layout.count))
  values: list[list[np.ndarray]] = [[] for _ in range(layout.count)]
  for variance, owner in zip(found.variance, owners, strict=True):
    both = np.broadcast_arrays(np.asarray(variance), np.asarray(owner))
    for block in np.unique(both[1]):
      values[block].append(both[0][both[1] == block])
  return [-np.sort(-np.concatenate(v)) for v in values]


def subspace_overlap(
  basis: Any, subspace: Any | Projector, layout: Layout
) -> jax.Array:
  r"""Overlap of two subspaces: the mean squared cosine between them.

  .. math::
    \frac{1}{k} \| V W^\top \|_F^2 = \frac{1}{k} \sum_i |P v_i|^2

  for the `k` rows :math:`v_i` of `basis` and the projector :math:`P = W^\top W` on the
  other subspace: 1 if the one holds the other, 0 if they are orthogonal, and about
  (dimension of the subspace) / (size of the block) by chance.

  Args:
    basis: a tree of stacks ``(rank, *shape)``.
    subspace: another such tree, of any rank, or the `projector` of any estimator.
    layout: the layout of both.

  Returns:
    The overlap of each block, float ``(blocks,)`` in [0, 1]; 0 for a basis without
    directions.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, estimators
    >>> layout = estimators.layout(jnp.zeros((2, 2)))
    >>> rows = jnp.eye(4).reshape(4, 2, 2)
    >>> print(diagnostics.subspace_overlap(rows[:2], rows[1:3], layout))
    [0.5]

  References:
    Gur-Ari, Roberts, Dyer, `Gradient Descent Happens in a Tiny Subspace
    <https://arxiv.org/abs/1812.04754>`_, 2018
  """
  rows = orthonormal(basis, layout)
  if callable(subspace):
    structure = jax.tree.structure(_without_marks(basis))
    project = lambda row: subspace(jax.tree.unflatten(structure, row))
    projected = jax.lax.map(lambda row: jax.tree.leaves(project(row)), rows)
    cosines = stack_norms(layout, projected)
  else:
    other = orthonormal(subspace, layout)
    cosines = jnp.square(_vectors.inner(layout, rows, other)).sum(2)
  present = (stack_norms(layout, rows) > 0).astype(cosines.dtype).sum(1)
  return jnp.clip(cosines.sum(1) / jnp.maximum(present, 1), 0, 1)


def principal_angles(a: Any, b: Any, layout: Layout) -> jax.Array:
  """The principal angles between two subspaces, block by block.

  From cosines and sines both, so that small angles are as accurate as large ones: an
  error of about 1e-6 in float32.

  Args:
    a: a tree of stacks ``(rank, *shape)``.
    b: another such tree; the ranks may differ.
    layout: the layout of both.

  Returns:
    Angles in radians, ascending, float ``(blocks, k)`` with k the lower rank; NaN where
    a block has fewer directions than k in either basis.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, estimators
    >>> layout = estimators.layout(jnp.zeros((2, 2)))
    >>> rows = jnp.eye(4).reshape(4, 2, 2)
    >>> angles = diagnostics.principal_angles(rows[:2], rows[1:3], layout)
    >>> print(jnp.rad2deg(angles))
    [[ 0. 90.]]

  References:
    Björck, Golub, `Numerical Methods for Computing Angles Between Linear Subspaces
    <https://doi.org/10.1090/S0025-5718-1973-0348991-3>`_, 1973
  """
  wide, narrow = orthonormal(a, layout), orthonormal(b, layout)
  if wide[0].shape[0] < narrow[0].shape[0]:
    wide, narrow = narrow, wide
  present = [stack_norms(layout, x) > 0 for x in (wide, narrow)]
  count = jnp.minimum(present[0].sum(1), present[1].sum(1))
  dot = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

  # Principal vectors of the narrow space; those of absent rows come last.
  cosines = _vectors.inner(layout, narrow, wide)
  gram = dot(cosines, jnp.matrix_transpose(cosines))
  _, turn = _vectors.eigh(gram - diagonal(~present[1], gram.dtype))
  order = jnp.arange(gram.shape[1])[None]
  absent = order >= present[1].sum(1, keepdims=True)
  cosines = dot(turn, cosines)  # of each principal vector with the wide space
  inside = _vectors.mix(layout, cosines, wide)
  outside = [
    x - y for x, y in zip(_vectors.mix(layout, turn, narrow), inside, strict=True)
  ]
  cosine = jnp.sqrt(jnp.square(cosines).sum(2))
  sine = jnp.sqrt(stack_norms(layout, outside))
  angles = jnp.arctan2(sine, cosine)

  # Principal vectors whose cosines all round to 1 are mixed. The Gram matrix of what is
  # left of them, small itself, has the sines.
  limit = 16 * jnp.sqrt(jnp.finfo(angles.dtype).eps)
  small = (angles < limit) & ~absent
  both = (small[:, :, None] & small[:, None, :]).astype(angles.dtype)
  gram = both * _vectors.inner(layout, outside, outside)
  squares, _ = _vectors.eigh(gram + limit**2 * diagonal(~small, gram.dtype))
  sine = jnp.sqrt(jnp.clip(squares[:, ::-1], 0, 1))
  angles = jnp.sort(jnp.where(absent, jnp.inf, angles), axis=1)
  angles = jnp.where(order < small.sum(1, keepdims=True), jnp.arcsin(sine), angles)
  return jnp.where(order < count[:, None], angles, jnp.nan)


# Shared with the curvature.


def _without_marks(basis: Any) -> Any:
  """The tree of stacks without the `Stack` markers of a state, and without metadata."""
  is_stack = lambda x: isinstance(x, _vectors.Stack)
  strip = lambda x: x.rows if is_stack(x) else x
  return jax.tree.map(strip, _vectors.unbox(basis), is_leaf=is_stack)


def as_stacks(params: Any, layout: Layout, stacks: Vector) -> Any:
  """A tree like `params` with a `Stack` for each leaf in a block."""
  leaves, structure = jax.tree.flatten(_vectors.unbox(params))
  out: list[Any] = [optax.MaskedNode()] * len(leaves)
  for part, stack in zip(layout.parts, stacks, strict=True):
    out[part.leaves[0].position] = _vectors.Stack(stack)
  return jax.tree.unflatten(structure, out)


def orthonormal(basis: Any, layout: Layout) -> Vector:
  """The stacks of a basis, orthonormal to rounding, whatever they were stored in."""
  if not isinstance(layout, Layout):
    raise TypeError(
      f'layout must be a Layout, got {type(layout).__name__}; give that of the'
      ' basis, as of estimator.layout(params).'
    )
  rows = [jnp.asarray(x) for x in jax.tree.leaves(basis)]
  if len(rows) != len(layout.parts):
    raise ValueError(
      f'a basis must have a stack for each of the {len(layout.parts)} leaves in a'
      f' block, got {len(rows)}; give the layout that it was made with, as of'
      ' estimator.layout(params).'
    )
  rows = [x.astype(_vectors.accumulator(x.dtype)) for x in rows]
  return _svd.orthonormalize(layout, rows)


def diagonal(values: jax.Array, dtype: Any = None) -> jax.Array:
  """Diagonal matrices: `(blocks, n) -> (blocks, n, n)`."""
  dtype = values.dtype if dtype is None else dtype
  return values.astype(dtype)[:, :, None] * jnp.eye(values.shape[1], dtype=dtype)[None]


def stack_norms(layout: Layout, stacks: Vector) -> jax.Array:
  """Squared norms of the rows of a stack in every block, `(blocks, rows)`."""

  def norms(part, x):
    energy = _vectors.energy(x, tuple(1 + axis for axis in part.inner_axes))
    return jnp.moveaxis(energy, 0, -1)

  return layout.gather(layout.map(norms, stacks))
