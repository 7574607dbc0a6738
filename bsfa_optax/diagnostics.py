"""Diagnostics of dominant subspaces: overlaps, spectra and curvature, with plots.

The functions are pure and may be jitted (inside `jax.shard_map` they see one shard).
Each works block by block on a `Blocks`, which `estimator.blocks(params)` or
`partition` gives, and leaves sharded trees where they are. A basis is a tree of
stacks ``(rank, *shape)`` of orthonormal rows, such as ``PCAState.basis`` or
``HessianTopK.basis``; zero rows stand for absent directions.

The plots take values collected over steps, and need Matplotlib:
``pip install 'bsfa-optax[plots]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _blocks, _check, _curvature, _lanczos, _linalg, _stack, _svd
from bsfa_optax._blocks import Blocks
from bsfa_optax._estimator import Estimator
from bsfa_optax.estimators import HessianState, KroneckerState, PCAState
from bsfa_optax.estimators._hessian import relative_curvature

__all__ = [
  'CurvatureEnergy',
  'CurvatureSplit',
  'HessianTopK',
  'curvature_energy',
  'dominant_fraction',
  'hessian_top_k',
  'partition',
  'plot_curvature_energy',
  'plot_dominant_fraction',
  'plot_hessian_spectrum',
  'plot_overlap',
  'plot_principal_angles',
  'plot_spectrum',
  'principal_angles',
  'projector',
  'spectrum',
  'subspace_overlap',
]

Projector = Callable[[Any], Any]
_MATRICES = {
  'hessian': 'Hessian',
  'gauss_newton': 'Gauss-Newton',
  'functional': 'functional Hessian',
}
MAX_NAMED_LINES = 10  # more lines than this have no legend entry of their own
MAX_TICKS = 50  # more directions than this are drawn on a logarithmic axis


def partition(
  params: optax.Params,
  labels: _blocks.BlockLabels = None,
  batch_axes: _blocks.BatchAxes = None,
) -> Blocks:
  """The blocks of a parameter tree, where no estimator is at hand to give them.

  Args:
    params: the parameters, or anything with their structure, shapes and dtypes.
    labels: labels of the leaves, None for those in no block; by default every leaf
      with two or more axes is a block. See `blocks` of `bsfa_optax.pca`.
    batch_axes: axes that index blocks within a leaf; see `bsfa_optax.pca`.

  Returns:
    The blocks; their attributes ``names``, ``sizes`` (parameters) and ``count`` say
    what the entries of a per-block array stand for.

  Examples:
    All parameters as one block:

    >>> import jax.numpy as jnp
    >>> from bsfa_optax import diagnostics
    >>> params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}
    >>> diagnostics.partition(params, 'all').sizes
    [15]
  """
  return _blocks.resolve(params, labels, batch_axes)


def projector(estimator: Estimator, state: Any) -> Projector:
  """The projector P on the dominant subspace that an estimator has found.

  Args:
    estimator: any estimator.
    state: its state, ``optax.tree.get(opt_state, 'estimator_state')``.

  Returns:
    A function from a tree like the parameters to its dominant part, zero on leaves in
    no block and until the estimator's first full refresh.

  Examples:
    >>> import jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, pca
    >>> estimator = pca(rank=1, history=1, decay=0.0)
    >>> state = estimator.init(jnp.zeros((2, 2)))
    >>> state = estimator.update(jnp.eye(2), state, None)
    >>> print(diagnostics.projector(estimator, state)(jnp.ones((2, 2))).round(2))
    [[1. 0.]
     [0. 1.]]
  """

  def project(tree):
    wide = jax.tree.map(lambda x: x.astype(_stack.accumulator(x.dtype)), tree)
    # The identity until the first refresh whatever f is: P is what doubling the
    # dominant part adds.
    doubled, _ = estimator.apply(_double_dominant, wide, state)
    return jax.tree.map(lambda d, w, x: (d - w).astype(x.dtype), doubled, wide, tree)

  return project


def _double_dominant(variance: jax.Array, dominant: jax.Array) -> jax.Array:
  return jnp.where(dominant, 2, 1).astype(variance.dtype)


def subspace_overlap(
  basis: Any, subspace: Any | Projector, blocks: Blocks
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
    blocks: the blocks of both.

  Returns:
    The overlap of each block, float ``(blocks,)`` in [0, 1]; 0 for a basis without
    directions.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics
    >>> blocks = diagnostics.partition(jnp.zeros((2, 2)))
    >>> rows = jnp.eye(4).reshape(4, 2, 2)
    >>> print(diagnostics.subspace_overlap(rows[:2], rows[1:3], blocks))
    [0.5]

  References:
    Gur-Ari, Roberts, Dyer, `Gradient Descent Happens in a Tiny Subspace
    <https://arxiv.org/abs/1812.04754>`_, 2018
  """
  rows = _orthonormal(basis, blocks)
  if callable(subspace):
    structure = jax.tree.structure(_without_marks(basis))
    project = lambda row: subspace(jax.tree.unflatten(structure, row))
    projected = jax.lax.map(lambda row: jax.tree.leaves(project(row)), rows)
    cosines = _row_norms(blocks, projected)
  else:
    other = _orthonormal(subspace, blocks)
    cosines = jnp.square(_svd.contract(blocks, rows, other)).sum(2)
  present = (_row_norms(blocks, rows) > 0).astype(cosines.dtype).sum(1)
  return jnp.clip(cosines.sum(1) / jnp.maximum(present, 1), 0, 1)


def principal_angles(a: Any, b: Any, blocks: Blocks) -> jax.Array:
  """The principal angles between two subspaces, block by block.

  From cosines and sines both, so that small angles are as accurate as large ones: an
  error of about 1e-6 in float32.

  Args:
    a: a tree of stacks ``(rank, *shape)``.
    b: another such tree; the ranks may differ.
    blocks: the blocks of both.

  Returns:
    Angles in radians, ascending, float ``(blocks, k)`` with k the lower rank; NaN where
    a block has fewer directions than k in either basis.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics
    >>> blocks = diagnostics.partition(jnp.zeros((2, 2)))
    >>> rows = jnp.eye(4).reshape(4, 2, 2)
    >>> angles = diagnostics.principal_angles(rows[:2], rows[1:3], blocks)
    >>> print(jnp.rad2deg(angles))
    [[ 0. 90.]]

  References:
    Björck, Golub, `Numerical Methods for Computing Angles Between Linear Subspaces
    <https://doi.org/10.1090/S0025-5718-1973-0348991-3>`_, 1973
  """
  wide, narrow = _orthonormal(a, blocks), _orthonormal(b, blocks)
  if wide[0].shape[0] < narrow[0].shape[0]:
    wide, narrow = narrow, wide
  present = [_row_norms(blocks, x) > 0 for x in (wide, narrow)]
  count = jnp.minimum(present[0].sum(1), present[1].sum(1))
  dot = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

  # Principal vectors of the narrow space; those of absent rows come last.
  cosines = _svd.contract(blocks, narrow, wide)
  gram = dot(cosines, jnp.matrix_transpose(cosines))
  _, turn = _linalg.eigh(gram - _diagonal(~present[1], gram.dtype))
  cosines = dot(turn, cosines)  # of each principal vector with the wide space
  inside = _svd.combine(blocks, cosines, wide)
  outside = [
    x - y for x, y in zip(_svd.combine(blocks, turn, narrow), inside, strict=True)
  ]
  cosine = jnp.sqrt(jnp.square(cosines).sum(2))
  sine = jnp.sqrt(_row_norms(blocks, outside))
  absent = (sine == 0) & (cosine == 0)
  angles = jnp.arctan2(sine, cosine)

  # Principal vectors whose cosines all round to 1 are mixed. The Gram matrix of what is
  # left of them, small itself, has the sines.
  limit = 16 * jnp.sqrt(jnp.finfo(angles.dtype).eps)
  small = (angles < limit) & (cosine > 0)
  both = (small[:, :, None] & small[:, None, :]).astype(angles.dtype)
  gram = both * _svd.contract(blocks, outside, outside)
  squares, _ = _linalg.eigh(gram + limit**2 * _diagonal(~small, gram.dtype))
  sine = jnp.sqrt(jnp.clip(squares[:, ::-1], 0, 1))
  order = jnp.arange(angles.shape[1])[None]
  angles = jnp.sort(jnp.where(absent, jnp.inf, angles), axis=1)
  angles = jnp.where(order < small.sum(1, keepdims=True), jnp.arcsin(sine), angles)
  return jnp.where(order < count[:, None], angles, jnp.nan)


def dominant_fraction(
  estimator: Estimator, state: Any, gradients: optax.Updates
) -> tuple[jax.Array, jax.Array]:
  r"""The share of gradients that lies in the dominant subspace, by norm.

  .. math:: \chi = |P g| / |g|

  `optax.tree.get(opt_state, 'dominant_fraction')` is the same for what the filter saw
  in the last step; this is for any other vector, such as the full-batch gradient.

  Args:
    estimator: any estimator.
    state: its state, ``optax.tree.get(opt_state, 'estimator_state')``.
    gradients: gradients, or any other tree like the parameters.

  Returns:
    The fraction in each block, float ``(blocks,)``, and that in all leaves taken
    together, those in no block included, float ``()``. 0 for a zero gradient and until
    the first full refresh.

  Examples:
    >>> import jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, pca
    >>> estimator = pca(rank=1, history=1, decay=0.0)
    >>> state = estimator.init(jnp.zeros((2, 2)))
    >>> state = estimator.update(jnp.array([[1.0, 0], [0, 0]]), state, None)
    >>> blocks, overall = diagnostics.dominant_fraction(
    ...   estimator, state, jnp.array([[3.0, 4.0], [0, 0]])
    ... )
    >>> print(blocks, overall)
    [0.6] 0.6

  References:
    Song, Ahn, Yun, `Does SGD really happen in tiny subspaces?
    <https://arxiv.org/abs/2405.16002>`_, 2024
  """
  blocks = estimator.blocks(gradients)
  _, fraction = estimator.apply(_double_dominant, gradients, state)
  norms = [_stack.squared_norm(x, ()) for x in jax.tree.leaves(gradients)]
  total = jnp.stack([x.astype(fraction.dtype) for x in norms]).sum()
  inside = jnp.zeros((), fraction.dtype)
  if blocks.count:
    norm = _stack.block_squared_norm(blocks, blocks.select(gradients))
    inside = (jnp.square(fraction) * norm.astype(fraction.dtype)).sum()
  overall = jnp.sqrt(inside / jnp.where(total > 0, total, 1))
  return fraction, overall


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
  blocks: Blocks | None = None,
  *,
  iterations: int | None = None,
  key: jax.Array | None = None,
) -> HessianTopK:
  """The greatest eigenvalues and eigenvectors of the Hessian, by Lanczos iteration.

  The Hessian of a block is that of the loss as a function of the block alone. For that
  of all parameters make them one block (see `partition`). Every iteration takes a
  Hessian-vector product for each block. An eigenvalue that is there several times, as
  in the output layer under a squared error, may be found fewer times, with small
  residuals all the same.

  Args:
    value_fn: the loss, a function of the parameters alone.
    params: the parameters.
    rank: eigenvalues wanted in each block.
    blocks: the blocks; by default every leaf with two or more axes.
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
    >>> from bsfa_optax import diagnostics
    >>> loss = lambda w: 0.5 * (3 * w[0, 0] ** 2 + w[1, 1] ** 2)
    >>> found = diagnostics.hessian_top_k(loss, jnp.ones((2, 2)), rank=2)
    >>> jnp.allclose(found.eigenvalues, jnp.array([[3.0, 1.0]]))
    Array(True, dtype=bool)
  """
  _check.positive_int('rank', rank)
  blocks = _blocks.resolve(params) if blocks is None else blocks
  if iterations is None:
    iterations = 4 * rank
  _check.positive_int('iterations', iterations)
  if iterations <= rank:
    raise ValueError(
      f'iterations must exceed rank, got iterations={iterations} and rank={rank};'
      ' leave it out for 4 * rank.'
    )
  leaves = blocks.select(params)
  product = _curvature.hessian(blocks, params, value_fn)
  cold_start = [
    jnp.broadcast_to(jnp.zeros_like(x, _stack.accumulator(x.dtype)), (rank, *x.shape))
    for x in leaves
  ]
  eigenvalues, basis = _lanczos.top_eigenpairs(
    blocks,
    product,
    cold_start,
    iterations,
    jax.random.key(0) if key is None else key,
    tolerance=max(float(jnp.finfo(x.dtype).eps) for x in leaves),
  )
  images = jax.lax.map(product, basis)
  scaled = _svd.combine(blocks, _diagonal(eigenvalues), basis)
  errors = [x - y for x, y in zip(images, scaled, strict=True)]
  return HessianTopK(
    eigenvalues,
    _as_stacks(params, blocks, basis),
    jnp.sqrt(_row_norms(blocks, errors)),
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
  blocks: Blocks,
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
    blocks: the blocks of the subspace.
    key: a random key.
    samples: random vectors, at least 2.

  Returns:
    A `CurvatureEnergy`.

  Raises:
    ValueError: if `samples` is less than 2.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import diagnostics
    >>> scales = jnp.array([[3.0, 1.0], [1.0, 1.0]])
    >>> first = jnp.eye(4)[:1].reshape(1, 2, 2)
    >>> split = diagnostics.curvature_energy(
    ...   lambda w: scales * w,
    ...   lambda outputs: 0.5 * (outputs**2).sum(),
    ...   jnp.ones((2, 2)),
    ...   first,
    ...   diagnostics.partition(jnp.ones((2, 2))),
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
  _check.positive_int('samples', samples)
  if samples < 2:
    raise ValueError(
      f'samples must be at least 2 for a standard error, got {samples}; raise it.'
    )
  value_fn = lambda params: loss_fn(output_fn(params))
  hessian = _curvature.hessian(blocks, params, value_fn)
  gauss_newton = _curvature.gauss_newton(blocks, params, output_fn, loss_fn)

  def measure(x):
    """|C x|^2 and x^T C x for the three matrices, (2, 3, blocks)."""
    h, g = hessian(x), gauss_newton(x)
    f = [a - b for a, b in zip(h, g, strict=True)]
    energy = [_stack.block_squared_norm(blocks, c) for c in (h, g, f)]
    trace = [_inner(blocks, x, c) for c in (h, g, f)]
    return jnp.stack([jnp.stack(energy), jnp.stack(trace)])

  if callable(subspace):
    zeros = jax.tree.map(jnp.zeros_like, params)
    project = lambda x: blocks.select(subspace(blocks.replace(zeros, x)))
    inside = None
  else:
    rows = _orthonormal(subspace, blocks)
    inside = jax.lax.map(measure, rows).sum(0)

    def project(x):
      along = _svd.contract(blocks, [v[None] for v in x], rows)
      return [v[0] for v in _svd.combine(blocks, along, rows)]

  def sample(key):
    x = _random_signs(key, blocks.select(params))
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
      for j, name in enumerate(_MATRICES)
    }
    for i in range(2)
  )
  return CurvatureEnergy(energy, trace)


def spectrum(state: Any, blocks: Blocks) -> list[jax.Array]:
  """The spectrum that the filter sees: relative variances of the directions.

  Those of `pca` and `kronecker` are relative to the mean variance of the block, those
  of `hessian_lanczos` (eigenvalues) to the least one that is kept.

  Args:
    state: the state of `pca`, `kronecker` or `hessian_lanczos`.
    blocks: its blocks, ``estimator.blocks(params)``.

  Returns:
    For each block the relative variances of its directions, descending, float; 0 for
    absent ones. Of `kronecker` all pairs of principal directions, once each, however
    many entries an unfactored axis has.

  Raises:
    TypeError: for another state.

  Examples:
    >>> import jax.numpy as jnp
    >>> from bsfa_optax import diagnostics, pca
    >>> estimator = pca(rank=2, history=2, decay=0.0)
    >>> state = estimator.init(jnp.zeros((2, 2)))
    >>> for entries in ([1.0, 0.0], [0.0, 1.0]):
    ...   state = estimator.update(jnp.diag(jnp.array(entries)), state, None)
    >>> print(diagnostics.spectrum(state, estimator.blocks(jnp.zeros((2, 2)))))
    [Array([2., 2.], dtype=float32)]
  """
  if isinstance(state, PCAState):
    mean = state.total_variance / jnp.array(blocks.sizes, state.variance.dtype)
    relative = state.variance / jnp.where(mean > 0, mean, 1)[:, None]
    return list(relative)
  if isinstance(state, HessianState):
    return list(relative_curvature(state.curvature))
  if isinstance(state, KroneckerState):
    is_factors = lambda x: hasattr(x, 'spectrum')
    found: list[jax.Array] = []
    for factor in jax.tree.leaves(state.factors, is_leaf=is_factors):
      product = jnp.ones((1, 1), jnp.float32)
      for values in factor.spectrum:
        values = values.reshape(-1, values.shape[-1])
        mean = values.mean(1, keepdims=True)
        values = values / jnp.where(mean > 0, mean, 1)
        product = (product[:, :, None] * values[:, None, :]).reshape(len(values), -1)
      found.extend(-jnp.sort(-product))
    return found
  raise TypeError(
    f'state must be that of pca, kronecker or hessian_lanczos, got {type(state)}; take'
    " it from the optimizer with optax.tree.get(opt_state, 'estimator_state')."
  )


def _without_marks(basis: Any) -> Any:
  """The tree of stacks without the `Stack` markers of a state, and without metadata."""
  is_stack = lambda x: isinstance(x, _stack.Stack)
  strip = lambda x: x.rows if is_stack(x) else x
  return jax.tree.map(strip, _blocks.unbox(basis), is_leaf=is_stack)


def _as_stacks(params: Any, blocks: Blocks, stacks: _svd.Leaves) -> Any:
  """A tree like `params` with a `Stack` for each leaf in a block."""
  leaves, structure = jax.tree.flatten(_blocks.unbox(params))
  out: list[Any] = [optax.MaskedNode()] * len(leaves)
  for i, stack in zip(blocks.leaves, stacks, strict=True):
    out[i] = _stack.Stack(stack)
  return jax.tree.unflatten(structure, out)


def _orthonormal(basis: Any, blocks: Blocks) -> _svd.Leaves:
  """The stacks of a basis, orthonormal to rounding, whatever they were stored in."""
  rows = [jnp.asarray(x) for x in jax.tree.leaves(basis)]
  if len(rows) != len(blocks.leaves):
    raise ValueError(
      f'a basis must have a stack for each of the {len(blocks.leaves)} leaves in a'
      f' block, got {len(rows)}; give the blocks that it was made with, as of'
      ' estimator.blocks(params).'
    )
  rows = [x.astype(_stack.accumulator(x.dtype)) for x in rows]
  return _svd.orthonormalize(blocks, rows)


def _row_norms(blocks: Blocks, rows: _svd.Leaves) -> jax.Array:
  """Squared norms of the rows of a stack in every block, (blocks, rows)."""
  norms = [_stack.row_norms(*x) for x in zip(rows, blocks.batch_axes, strict=True)]
  return blocks.gather(norms, 1)


def _inner(blocks: Blocks, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
  """Inner products of two vectors in every block, (blocks,)."""
  return _svd.contract(blocks, [x[None] for x in a], [x[None] for x in b])[:, 0, 0]


def _diagonal(values: jax.Array, dtype: Any = None) -> jax.Array:
  """Diagonal matrices: `(blocks, n) -> (blocks, n, n)`."""
  dtype = values.dtype if dtype is None else dtype
  return values.astype(dtype)[:, :, None] * jnp.eye(values.shape[1], dtype=dtype)[None]


def _random_signs(key: jax.Array, leaves: _svd.Leaves) -> _svd.Leaves:
  """Arrays like `leaves` of random signs, in the accumulator's dtype."""
  return [
    jax.random.rademacher(
      jax.random.fold_in(key, i),
      x.shape,
      _stack.accumulator(x.dtype),
      out_sharding=_stack.sharding_of(x, _stack.spec_of(x)),
    )
    for i, x in enumerate(leaves)
  ]


def plot_overlap(
  steps: Sequence[int],
  overlaps: Any,
  names: Sequence[str] | None = None,
  *,
  ax: Any = None,
) -> Any:
  """Plots overlaps of subspaces over steps, a line for each block.

  Args:
    steps: the steps, ``(steps,)``.
    overlaps: what `subspace_overlap` gave at each, ``(steps, blocks)``.
    names: names of the blocks, as of `bsfa_optax.block_names`. More than ten are drawn
      alike, with their median.
    ax: Matplotlib axes to draw on; new ones by default.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_overlap([0, 10], [[0.1], [0.8]], ['dense/kernel'])
    >>> ax.get_ylabel()
    'subspace overlap'
  """
  ax = _block_lines(steps, overlaps, names, ax)
  ax.set(ylabel='subspace overlap', ylim=(-0.02, 1.02))
  return ax


def plot_dominant_fraction(
  steps: Sequence[int],
  fractions: Any,
  names: Sequence[str] | None = None,
  *,
  overall: Any = None,
  ax: Any = None,
) -> Any:
  """Plots the dominant fractions of gradients over steps, a line for each block.

  Args:
    steps: the steps, ``(steps,)``.
    fractions: the first result of `dominant_fraction` at each, or what
      ``optax.tree.get(opt_state, 'dominant_fraction')`` gave, ``(steps, blocks)``.
    names: as in `plot_overlap`.
    overall: the second result of `dominant_fraction` at each step, ``(steps,)``.
    ax: as in `plot_overlap`.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_dominant_fraction([0, 10], [[0.1], [0.8]])
    >>> ax.get_xlabel()
    'step'
  """
  ax = _block_lines(steps, fractions, names, ax)
  if overall is not None:
    ax.plot(steps, np.asarray(overall), 'k--', linewidth=2, label='all parameters')
    _legend(ax)
  ax.set(ylabel=r'dominant fraction $|Pg|\,/\,|g|$', ylim=(-0.02, 1.02))
  return ax


def plot_principal_angles(
  steps: Sequence[int], angles: Any, *, block: int = 0, ax: Any = None
) -> Any:
  """Plots the principal angles of one block over steps, a line for each angle.

  Args:
    steps: the steps, ``(steps,)``.
    angles: what `principal_angles` gave at each, ``(steps, blocks, k)``.
    block: which block.
    ax: as in `plot_overlap`.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_principal_angles([0, 10], [[[0.1, 1.2]], [[0.2, 1.5]]])
    >>> len(ax.lines)
    2
  """
  degrees = np.rad2deg(np.asarray(angles, float)[:, block])
  ax = _ordered_lines(steps, degrees, r'$\theta_{%d}$', ax)
  ax.set(ylabel='principal angle (degrees)', ylim=(-2, 92), yticks=range(0, 91, 15))
  return ax


def plot_hessian_spectrum(
  steps: Sequence[int], eigenvalues: Any, *, block: int = 0, ax: Any = None
) -> Any:
  """Plots the top eigenvalues of one block's Hessian over steps, a line for each.

  Args:
    steps: the steps, ``(steps,)``.
    eigenvalues: ``HessianTopK.eigenvalues`` of each, ``(steps, blocks, rank)``.
    block: which block.
    ax: as in `plot_overlap`. The scale is logarithmic if all values are positive
      and span a factor of ten.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_hessian_spectrum([0, 10], [[[30.0, 2.0]], [[50.0, 3.0]]])
    >>> ax.get_yscale()
    'log'
  """
  values = np.asarray(eigenvalues, float)[:, block]
  ax = _ordered_lines(steps, values, r'$\lambda_{%d}$', ax)
  ax.set(ylabel='eigenvalue of the Hessian')
  if (values > 0).all() and values.max() > 10 * values.min():
    ax.set_yscale('log')
  return ax


def plot_curvature_energy(
  steps: Sequence[int],
  curvature: Sequence[CurvatureEnergy],
  *,
  measure: str = 'energy',
  block: int | None = None,
  ax: Any = None,
) -> Any:
  """Plots the share of curvature in a subspace over steps, a line for each matrix.

  Args:
    steps: the steps, ``(steps,)``.
    curvature: what `curvature_energy` gave at each.
    measure: ``'energy'`` or ``'trace'``.
    block: which block; by default the sums over all blocks.
    ax: as in `plot_overlap`. Error bars are two standard errors.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.
    ValueError: for another `measure`.

  Examples:
    >>> import numpy as np
    >>> from bsfa_optax import diagnostics
    >>> split = diagnostics.CurvatureSplit(*np.array([[3.0], [1.0], [0.0], [0.1]]))
    >>> splits = {k: split for k in ('hessian', 'gauss_newton', 'functional')}
    >>> energy = diagnostics.CurvatureEnergy(splits, splits)
    >>> ax = diagnostics.plot_curvature_energy([0], [energy])
    >>> ax.get_ylabel()
    'share of curvature energy in the subspace'
  """
  if measure not in CurvatureEnergy._fields:
    raise ValueError(f"measure must be 'energy' or 'trace', got {measure!r}.")
  ax = _axes(ax)
  chosen = [getattr(c, measure) for c in curvature]
  pick = lambda x: x.sum(1) if block is None else x[:, block]
  root = lambda x: np.sqrt(pick(x**2))  # errors of blocks are independent
  for name, label in _MATRICES.items():
    inside, outside, inside_error, outside_error = np.moveaxis(
      np.asarray([c[name] for c in chosen], float), 1, 0
    )  # (steps, blocks) each
    split = CurvatureSplit(
      pick(inside), pick(outside), root(inside_error), root(outside_error)
    )
    ax.errorbar(
      steps,
      split.share,
      yerr=2 * np.asarray(split.share_error),
      marker=_marker(steps),
      capsize=3,
      label=label,
    )
  quantity = 'curvature energy' if measure == 'energy' else 'trace'
  ax.set(xlabel='step', ylabel=f'share of {quantity} in the subspace')
  if measure == 'energy':  # a share of the trace may be negative
    ax.set_ylim(bottom=0)
  _legend(ax)
  return ax


def plot_spectrum(
  spectra: Sequence[Any], names: Sequence[str] | None = None, *, ax: Any = None
) -> Any:
  """Plots the relative spectra of the blocks at one step, a line for each block.

  Args:
    spectra: what `spectrum` gave.
    names: as in `plot_overlap`.
    ax: as in `plot_overlap`.

  Returns:
    The axes.

  Raises:
    ImportError: without Matplotlib.

  Examples:
    >>> from bsfa_optax import diagnostics
    >>> ax = diagnostics.plot_spectrum([[4.0, 2.0, 0.5]], ['dense/kernel'])
    >>> ax.get_yscale()
    'log'
  """
  ax = _axes(ax)
  names = [f'block {i}' for i in range(len(spectra))] if names is None else names
  named = len(spectra) <= MAX_NAMED_LINES
  for i, values in enumerate(spectra):
    values = np.asarray(values, float)
    index = np.unique(np.geomspace(1, max(len(values), 1), 512).astype(int))
    index = index[values[index - 1] > 0]
    style = {} if named else {'color': '0.6', 'linewidth': 0.8}
    label = names[i] if named else f'{len(spectra)} blocks' if i == 0 else None
    ax.plot(index, values[index - 1], marker=_marker(index), label=label, **style)
  ax.axhline(1, color='k', linestyle=':', linewidth=1, zorder=0)
  ax.set(xlabel='direction', ylabel='relative variance')
  if max(map(len, spectra), default=0) > MAX_TICKS:
    ax.set_xscale('log')
  else:
    ax.xaxis.get_major_locator().set_params(integer=True)
  ax.set_yscale('log')
  _legend(ax)
  return ax


def _axes(ax: Any) -> Any:
  if ax is not None:
    return ax
  try:
    import matplotlib.pyplot as plt
  except ImportError as e:
    raise ImportError(
      "the plots need Matplotlib; install it with pip install 'bsfa-optax[plots]'."
    ) from e
  return plt.subplots(layout='constrained')[1]


def _legend(ax: Any) -> None:
  # Beside the axes, as names may be long and lines anywhere.
  ax.legend(loc='upper left', bbox_to_anchor=(1, 1), frameon=False)


def _marker(points: Sequence[Any] | np.ndarray) -> str:
  return '.' if len(points) <= 50 else ''


def _block_lines(
  steps: Sequence[int], values: Any, names: Sequence[str] | None, ax: Any
) -> Any:
  """A line for each column of `(steps, blocks)`; of many, grey ones and the median."""
  ax = _axes(ax)
  values = np.asarray(values, float)
  count = values.shape[1]
  names = [f'block {i}' for i in range(count)] if names is None else names
  marker = _marker(steps)
  if count <= MAX_NAMED_LINES:
    for column, name in zip(values.T, names, strict=True):
      ax.plot(steps, column, marker=marker, label=name)
  else:
    lines = ax.plot(steps, values, color='0.75', linewidth=0.8)
    lines[0].set_label(f'{count} blocks')
    median = np.median(values, 1)
    ax.plot(steps, median, color='k', marker=marker, label='median')
  ax.set_xlabel('step')
  _legend(ax)
  return ax


def _ordered_lines(
  steps: Sequence[int], values: np.ndarray, label: str, ax: Any
) -> Any:
  """Lines for the columns of `(steps, k)`, from dark to light."""
  ax = _axes(ax)
  count = values.shape[1]
  for i, column in enumerate(values.T):
    # A legend of more lines than this names the first and the last alone.
    named = count <= MAX_NAMED_LINES or i in (0, count - 1)
    ax.plot(
      steps,
      column,
      color=_shade(i / max(count - 1, 1)),
      marker=_marker(steps),
      label=label % (i + 1) if named else None,
    )
  ax.set_xlabel('step')
  _legend(ax)
  return ax


def _shade(x: float) -> tuple[float, float, float]:
  """From dark blue at 0 to light orange at 1."""
  dark, light = np.array([0.05, 0.15, 0.4]), np.array([1.0, 0.7, 0.35])
  red, green, blue = (dark + x * (light - dark)).tolist()
  return red, green, blue
