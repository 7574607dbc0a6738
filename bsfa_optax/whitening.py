"""The whitening: a filter in matrix products alone.

Top to bottom: the transformation, what one refresh and one filtering make of a part,
the arithmetic of one side, and the storage of its two matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _check, _learned, _vectors
from bsfa_optax._vectors import Part


class WhiteningFactors(NamedTuple):
  """Memory of `scale_by_whitening`: a `WhiteningFactors` for each part.

  A part is a leaf, or all leaves that are alike behind a first axis: its batch.

  Attributes:
    packed: for each axis with a covariance an array `(*batch, blocks, n, n + 1)`,
      float32, with the covariance on and below the diagonal and its inverse root
      above: both are symmetric.
    directions: how many carried the updates at the last refresh, float32 `(*batch,)`.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> state = bsfa_optax.scale_by_whitening().init({'kernel': jnp.ones((4, 6))})
    >>> [x.shape for x in state.memory[0].packed]
    [(1, 1, 4, 5), (1, 1, 6, 7)]
  """

  packed: tuple[jax.Array, ...]
  directions: jax.Array


def scale_by_whitening(
  ridge: optax.ScalarOrSchedule = 0.2,
  *,
  decay: float = 0.9,
  refresh_every: _learned.Interval | None = None,
  block_size: int = 1024,
  leaves: _vectors.Predicate = None,
  axes: _vectors.Axes = None,
  batch_axes: _vectors.Axes = None,
  axis_name: str | Sequence[str] | None = None,
  distribute_over: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Whitens each matrix of the updates on both sides, in matrix products alone.

  For a matrix :math:`v` of the updates let :math:`L` and :math:`R` be the moving
  averages of :math:`v v^\top / |v|^2` and :math:`v^\top v / |v|^2` (the covariance of
  its columns and rows), divided by their mean variance, so that their eigenvalues are 1
  on average. The update becomes

  .. math::
    v' = (L + \epsilon I)^{-1/2}\; v\; (R + \epsilon I)^{-1/2}

  with the norm that :math:`v` had. Dominant directions, of more than mean variance, are
  damped and the bulk is amplified, each as its own variance says, with no threshold
  between them. The ridge :math:`\epsilon` limits the amplification to
  :math:`\epsilon^{-1/2}` a side: at 0 the whitening is complete, and a large ridge is
  the identity.

  There is no eigendecomposition. The inverse roots are polynomials of the covariances,
  in three products, for all matrices of one size in one batch. Leaves that are alike
  (the same matrix of every layer) are one array throughout, so that 100 layers are
  traced and compiled as one.

  Of arrays with more than two axes the two longest have a covariance, and those between
  share it: the positions of a convolution's window, the heads of an attention kernel.

  On a mesh covariances and roots are replicated. Along an axis that is not sharded the
  update is multiplied where it is; name these axes in `axes`. Then a step has only
  all-reduces. A product along a sharded axis all-gathers the update along it.

  Args:
    ridge: :math:`\epsilon`, in units of the mean variance; a scalar > 0 or a schedule.
      May be traced.
    decay: weight of the past at a refresh, in [0, 1).
    refresh_every: updates between two refreshes of a matrix, each of which uses one
      update; or a schedule of it, from the number of updates seen before, int32 (),
      rounded down and at least 1. Leaves take turns within an interval, in up to five
      groups of about the same work, so that no step pays for all. By default it grows
      by one every 100 updates, from 1 to 5: the covariance turns fastest at the
      beginning.
    block_size: an axis of more entries is cut into equal diagonal blocks, each with its
      own covariance, of at most so many and at most as many as the other axis has.
    leaves: which leaves are filtered, a function ``(name, leaf) -> bool``, with names
      like ``'layers/0/kernel'``. By default the matrices of the hidden layers and
      the projections of continuous inputs: all arrays with two axes or more but for
      tables of embeddings, output layers, positions, biases, scales, norms, routers and
      convolutions of single channels, told by name, and by the length of the vocabulary
      where a name says nothing. `bsfa_optax.summary` prints what was chosen, and why. A
      network without names (a list of matrices) has no output layer that could be told.
    axes: the axes that may have a covariance: a tree like the parameters (or a prefix
      of it) with leaves None, int or tuple of ints, or a function from parameters to
      such a tree. None stands for all that are no batch axes. A leaf without one is
      left alone.
    batch_axes: axes that index matrices within a leaf, such as the layers of a scan or
      experts: given like `axes`, None for leaves without.
    axis_name: mesh axes of ``jax.shard_map`` that split the parameters (never batch
      axes nor `axes`, which have to be given for each leaf that is split). What is
      summed over a block is then summed over these too. A leaf that does not vary over
      an axis is not split by it; with ``check_vma=False`` every leaf is taken to be
      split. Not for jit, which needs no help.
    distribute_over: an axis of the mesh in use (``jax.set_mesh``). The devices along it
      share out the roots of each size and gather them, instead of each computing all.
      By default none: a refresh then needs no gathering. Not for ``jax.shard_map``.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `FilterState`, with
    `WhiteningFactors` as its `memory`. ``effective_directions`` is for each block the
    square of the covariance's trace over the trace of its square: how many directions
    carry the updates. Updates keep their shapes and dtypes. With the extra argument
    ``history``, a tree like the updates, it learns from that, and filters the updates.
    An update that is not finite in a filtered leaf passes through as it is, leaves no
    trace in `memory` and is counted in ``skipped_updates``.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy, and at
      ``init`` for `axes` or `batch_axes` that a leaf has not.
    TypeError: at ``init`` for filtered leaves that are not real floating-point numbers,
      at ``update`` for the state of another transformation.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = optax.chain(
    ...   optax.scale_by_adam(nesterov=True),
    ...   bsfa_optax.scale_by_whitening(),
    ...   optax.scale_by_learning_rate(1e-3),
    ... )
    >>> params = {'kernel': jnp.diag(jnp.array([4.0, 1.0])), 'bias': jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> print(optax.tree.get(state, 'effective_directions').round(2))
    [4.]

  References:
    Gupta, Koren, Singer, `Shampoo: Preconditioned Stochastic Tensor Optimization
    <https://arxiv.org/abs/1802.09568>`_, 2018

    Amsel, Persson, Musco, Gower, `The Polar Express: Optimal Matrix Sign Methods and
    Their Application to the Muon Algorithm <https://arxiv.org/abs/2505.16932>`_, 2025

    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025
  """
  _check.positive_scalar(ridge=ridge)
  _check.fraction(decay=decay)
  interval = _learned.growing(100) if refresh_every is None else refresh_every
  _check.interval(refresh_every=interval)
  _check.positive_int(block_size=block_size)

  layout_of = _vectors.layouts_with_factors(leaves, axes, batch_axes, axis_name)

  def init(layout, params):
    return _learned.for_each_part(layout, lambda part: _unlearnt(part, block_size))

  def learn(layout, vector, memory, count, params, **extra_args):
    e = _learned.value('ridge', ridge, count)
    memory = list(memory)
    turns = _turns(memory)
    for turn, members in enumerate(turns):
      parts = tuple(layout.parts[i] for i in members)
      own = dataclasses.replace(layout, parts=parts, blocks=())
      # No step pays for all: each group of parts has its own within an interval.
      news = jax.lax.cond(
        _learned.is_due(count, interval, turn / len(turns)),
        functools.partial(refresh, own, e),
        _learned.keep,
        [vector[i] for i in members],
        [memory[i] for i in members],
      )
      for i, new in zip(members, news, strict=True):
        memory[i] = new
    return tuple(memory)

  def refresh(layout, e, vector, memory):
    packed = [factors.packed for factors in memory]
    moments = layout.map(_moments, vector, packed)
    news = jax.tree.map(
      lambda packed, x: decay * _covariance(packed) + (1 - decay) * _relative(x),
      packed,
      layout.sum_over_shards(moments),
    )
    lengths = [part.shape[axis] for part in layout.parts for axis in _sides(part)]
    covariances, structure = jax.tree.flatten(news)
    regular = [_regular(c, n, e) for c, n in zip(covariances, lengths, strict=True)]
    # All sides of one size are one batch.
    roots = _vectors.by_size(inverse_square_root, regular, distribute_over)
    renewed = map(_renewed, jax.tree.leaves(packed), covariances, roots)
    renewed = jax.tree.unflatten(structure, list(renewed))
    # Counted here and kept, as counting costs as much as filtering.
    directions = layout.map(_directions, renewed)
    return [*map(WhiteningFactors, renewed, directions)]

  def apply(layout, vector, memory, count):
    whitened = []
    for part, v, factors in zip(layout.parts, vector, memory, strict=True):
      for axis, packed in zip(_sides(part), factors.packed, strict=True):
        v = _multiplied(v, _root(packed), axis, part)
      whitened.append(v)
    whitened = _vectors.with_norm_of(layout, whitened, vector)
    directions = [factors.directions.reshape(-1) for factors in memory]
    return whitened, jnp.concatenate(directions)

  return _learned.learned(
    layout_of, init, learn, apply, 'effective_directions', interval=interval
  )


def muon_dimension_numbers(
  params: optax.Params,
  *,
  leaves: _vectors.Predicate = None,
  batch_axes: _vectors.Axes = None,
) -> Any:
  """The same choice of leaves for Muon: its ``muon_weight_dimension_numbers``.

  Args:
    params: the parameters, or anything with their structure and shapes.
    leaves: as in `scale_by_whitening`.
    batch_axes: as in `scale_by_whitening`.

  Returns:
    A tree like the parameters of `optax.contrib.MuonDimensionNumbers`, None for leaves
    that stay with Adam. Of an array with more axes the first or the last is one side,
    whichever makes the squarer matrix.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp, optax
    >>> tx = optax.contrib.muon(
    ...   1e-3, muon_weight_dimension_numbers=bsfa_optax.muon_dimension_numbers
    ... )
    >>> params = {'query': {'kernel': jnp.ones((8, 2, 4)), 'bias': jnp.zeros((2, 4))}}
    >>> bsfa_optax.muon_dimension_numbers(params)['query']['kernel']
    MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
  """
  layout = _vectors.layout(params, leaves=leaves, batch_axes=batch_axes)
  numbers: list[Any] = [None] * len(layout.leaves)
  for part in layout.parts:
    size = lambda axes, part=part: math.prod(part.shape[axis] for axis in axes)
    inner = part.inner_axes
    halves = [(inner[:i], inner[i:]) for i in (1, len(inner) - 1)]
    squarest = min(halves, key=lambda pair: size(pair[0]) + size(pair[1]))
    numbers[part.leaves[0].position] = optax.contrib.MuonDimensionNumbers(*squarest)
  return jax.tree.unflatten(jax.tree.structure(params), numbers)


# A part and its sides.


def _sides(part: Part) -> tuple[int, ...]:
  """The two longest of the axes that may have a covariance."""
  fit = sorted((a for a in part.axes if part.shape[a] > 1), key=part.shape.__getitem__)
  return tuple(sorted(fit[-2:]))


def _unlearnt(part: Part, block_size: int) -> WhiteningFactors:
  """No covariance, and the identity for each root."""
  sides = _sides(part)

  def packed(axis):
    length, others = part.shape[axis], [part.shape[a] for a in sides if a != axis]
    whole = length <= block_size
    blocks = 1 if whole else -(-length // min([block_size, *others]))
    size = -(-length // blocks)  # the last block may be filled up with zeros
    root = jnp.eye(size, size + 1, k=1, dtype=jnp.float32)
    return jnp.tile(root, (*part.batch_shape, blocks, 1, 1))

  directions = jnp.zeros(part.batch_shape, jnp.float32)
  return WhiteningFactors(tuple(map(packed, sides)), directions)


def _turns(memory: Sequence[WhiteningFactors]) -> list[list[int]]:
  """The parts, by position, in at most five groups of about the same work."""
  cost = lambda packed: math.prod(packed.shape[:-1]) * packed.shape[-2] ** 2
  costs = [sum(map(cost, factors.packed)) for factors in memory]
  total = lambda turn: sum(costs[i] for i in turn)
  turns: list[list[int]] = [[] for _ in range(min(5, len(costs)))]
  for i in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
    min(turns, key=total).append(i)
  return turns


def _relative(moment: jax.Array) -> jax.Array:
  """A second moment over its trace, `(*batch, blocks, n, n)`."""
  trace = _trace(moment)
  return (moment / jnp.where(trace > 0, trace, 1)).astype(jnp.float32)


def _regular(covariance: jax.Array, length: int, ridge: Any) -> jax.Array:
  """The covariance of an axis in units of its mean variance, with the ridge."""
  mean = _trace(covariance) / length
  eye = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)
  eye = jnp.broadcast_to(eye, covariance.shape)
  ridge = jnp.asarray(ridge, covariance.dtype)
  return covariance / jnp.where(mean > 0, mean, 1) + ridge * eye


def _directions(part: Part, packed: Sequence[jax.Array]) -> jax.Array:
  """The effective directions of each block, `(*batch,)`; 0 without a covariance."""
  directions = jnp.full(part.batch_shape, float(bool(packed)), jnp.float32)
  for covariance in map(_covariance, packed):
    squares = jnp.square(covariance).sum((-3, -2, -1))
    trace = _trace(covariance)[..., 0, 0, 0]
    directions *= jnp.square(trace) / jnp.where(squares > 0, squares, 1)
  return directions


def _trace(x: jax.Array) -> jax.Array:
  """The trace of all blocks together, `-> (*batch, 1, 1, 1)`."""
  return jnp.trace(x, axis1=-2, axis2=-1).sum(-1)[..., None, None, None]


# The arithmetic of one side.


def _in_blocks(
  x: jax.Array, axis: int, blocks: int, part: Part
) -> tuple[jax.Array, int, tuple[int, ...]]:
  """Cuts an axis in two: blocks, which are one more batch axis, and their entries.

  Returns:
    The array, the axis of the entries, and the batch axes.
  """
  if blocks > 1:  # an explicit mesh reshapes no axis that is split over it
    x = _vectors.whole(x, axis)
  size = -(-x.shape[axis] // blocks)
  missing = blocks * size - x.shape[axis]
  if missing:
    x = jnp.pad(x, [(0, missing * (a == axis)) for a in range(x.ndim)])
  batch_axes = tuple(a + (a > axis) for a in part.batch_axes)
  cut = x.reshape((*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]))
  return cut, axis + 1, (*batch_axes, axis)


def _moments(
  part: Part, x: jax.Array, packed: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
  """Sums of outer products of the fibres along each side, `(*batch, blocks, n, n)`."""
  sides = zip(_sides(part), packed, strict=True)
  cuts = [_in_blocks(x, axis, old.shape[-3], part) for axis, old in sides]
  # At full precision: its rounding is the floor of the root's error.
  return tuple(_vectors.second_moment(*cut) for cut in cuts)


def _multiplied(x: jax.Array, root: jax.Array, axis: int, part: Part) -> jax.Array:
  """The product of each block of a side with its root, in the shape of `x`."""
  cut, entries, batch_axes = _in_blocks(x, axis, root.shape[-3], part)
  cut = _vectors.multiply(cut, root, entries, batch_axes, precision=None)
  whitened = cut.reshape((*x.shape[:axis], -1, *x.shape[axis + 1 :]))
  whitened = jax.lax.slice_in_dim(whitened, 0, x.shape[axis], axis=axis)
  return _vectors.like(whitened, x)


# From scripts/root_coefficients.py --condition 400: at most 28 % from the root for
# condition numbers up to 400, and beyond too small in the flattest directions, as by a
# larger ridge. More products are nearer to it and train no better, two (degree 4, 49 %)
# train worse (docs/experiments.md, 67 and 75).
INNER = (-0.3123, -0.8801)
OUTER = ((1.6598, 1.8745, 3.4403), (15.1260, 26.2696, 3.8910, 81.5642))


def inverse_square_root(a: jax.Array) -> jax.Array:
  """A^(-1/2) for positive definite matrices, `(..., n, n) -> (..., n, n)`.

  A polynomial of degree 8 in T = 2 A / bound - I in three products, 6 n^3 operations:
  with S = T^2 and M = S (S + g T + h I) it is
  c0 I + c1 T + c2 S + d0 M + M (d1 T + d2 S + d3 M).

  The first product squares A, whose rounding is the floor of the error: it is made at
  full precision. The others have the platform's default, which is TF32 on GPUs and one
  pass of bfloat16 on TPUs; on CPU all is float32. T, S and M have norms of at most 1,
  so that rounding adds up to a few per cent of the least eigenvalue of the root even in
  bfloat16. In powers of A, with coefficients of 20,000, nothing would be left.

  References:
    Higham, `Functions of Matrices <https://doi.org/10.1137/1.9780898717778>`_,
    chapter 6, 2008

    Sastre, `Efficient evaluation of matrix polynomials
    <https://doi.org/10.1016/j.laa.2017.11.010>`_, 2018

    Amsel, Persson, Musco, Gower, `The Polar Express: Optimal Matrix Sign Methods and
    Their Application to the Muon Algorithm <https://arxiv.org/abs/2505.16932>`_, 2025

    Grishina, Smirnov, Rakhuba, `Accelerating Newton-Schulz Iteration for
    Orthogonalization via Chebyshev-type Polynomials
    <https://arxiv.org/abs/2506.10935>`_, 2025
  """
  (g, h), ((c0, c1, c2), (d0, d1, d2, d3)) = INNER, OUTER
  eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
  square = jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST)
  # The fourth root of the sum of all eigenvalues' fourth powers: at least the greatest.
  bound = jnp.sqrt(jnp.linalg.norm(square, axis=(-2, -1), keepdims=True))
  a, square = 2 * a / bound, 4 * square / bound**2
  t, s = a - eye, square - 2 * a + eye
  m = jnp.matmul(s, s + g * t + h * eye)
  high = jnp.matmul(m, d1 * t + d2 * s + d3 * m)
  return (c0 * eye + c1 * t + c2 * s + d0 * m + high) / jnp.sqrt(bound)


# Two symmetric matrices in one array.


def _renewed(old: jax.Array, covariance: jax.Array, root: jax.Array) -> jax.Array:
  """`(..., n, n)` twice `-> (..., n, n + 1)`: below, and above the diagonal.

  The old pair is kept where the root is not finite.
  """
  pad = lambda x, *columns: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [columns])
  packed = jnp.tril(pad(covariance, 0, 1)) + jnp.triu(pad(root, 1, 0), 1)
  finite = jnp.isfinite(root).all((-2, -1), keepdims=True)
  return jnp.where(finite, packed, old)


def _covariance(packed: jax.Array) -> jax.Array:
  lower = jnp.tril(packed[..., :-1])
  return lower + jnp.matrix_transpose(jnp.tril(lower, -1))


def _root(packed: jax.Array) -> jax.Array:
  upper = jnp.triu(packed[..., 1:])
  return upper + jnp.matrix_transpose(jnp.triu(upper, 1))
