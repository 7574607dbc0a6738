"""Optimizers whose state lives in the coordinates of a subspace of each matrix."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, get_args, Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check, _learned, _matrices, _vectors
from bsfa_optax._vectors import accumulator, product, resharded, spec_of
from bsfa_optax.estimators import _dct

Subspace = Literal['svd', 'random', 'columns', 'dct']
Residual = Literal[None, 'sign', 'scaled']
Carry = Literal['reset', 'keep', 'rotate']

_LIMIT = 1.01  # growth of the scaled residual's norm a step
_FIRST_MOMENTS = ('mu', 'trace')  # may happen to have one sign


class Basis(NamedTuple):
  """Marks a leaf of the state that spans the subspace of a parameter.

  Like `Coordinates`, it keeps `optax.tree.map_params` with a tree of specs from putting
  a parameter's spec on an array of another shape: it raises instead.

  Attributes:
    vectors: orthonormal columns ``(*batch, n, rank)`` in the parameter's dtype, or
      which columns of the identity or the cosine transform they are, int32
      ``(*batch, rank)``.
  """

  vectors: Any


class Coordinates(NamedTuple):
  """Marks a leaf in the coordinates of a subspace, as the inner optimizer sees it.

  Attributes:
    values: ``(*batch, n, rank)`` for a longer side of n entries, in the parameter's
      dtype and with its sharding on that side.
  """

  values: Any


class ProjectedState(NamedTuple):
  """State of `projected`.

  Attributes:
    projection_count: updates so far, int32 ().
    projection_basis: a tree like the parameters with a `Basis` for each matrix.
    residual_norm: a tree like the parameters with the norm of the last scaled residual,
      float32 ``(*batch,)``, for each matrix; all masked without such a residual.
    coordinate_state: the inner optimizer's state for the matrices.
    rest_state: the inner optimizer's state for all other leaves.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax.projected import projected
    >>> tx = projected(optax.scale_by_adam(), rank=2)
    >>> tx.init({'kernel': jnp.ones((8, 4))}).coordinate_state.mu['kernel'].values.shape
    (8, 2)
  """

  projection_count: Any
  projection_basis: Any
  residual_norm: Any
  coordinate_state: Any
  rest_state: Any


def projected(
  inner: optax.GradientTransformation,
  rank: int | float,
  *,
  subspace: Subspace = 'svd',
  residual: Residual = None,
  refresh_every: int = 200,
  carry: Carry = 'rotate',
  scale: float = 1.0,
  leaves: Callable[[str, Any], bool] | None = None,
  batch_axes: int | Callable[[str, Any], int] = 0,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Any optimizer, with its state in a subspace of each matrix's shorter side.

  For a gradient :math:`G` of at least as many rows as columns and an orthonormal
  :math:`P` of `rank` columns, the update is :math:`s\,T(GP)P^T + R`, with :math:`T` the
  optimizer `inner`, which sees the coordinates :math:`GP` alone, :math:`s` the `scale`
  and :math:`R` what `residual` makes of the rest :math:`G - s\,GPP^T`; with the sides
  exchanged for a wide matrix. Leaves that are not chosen go to `inner` as they are.

  Args:
    inner: the optimizer, up to its direction: put weight decay and the learning rate
      behind `projected` in a chain. What looks at parameters sees their coordinates.
      Its `init` must not copy parameters, as that of schedule-free optimizers does.
    rank: dimensions of the subspace, or a float: a share of the shorter side.
    subspace: where :math:`P` comes from at a refresh. ``'svd'``: the gradient's top
      singular vectors, by a randomised method that never gathers the matrix;
      ``'random'``: random orthonormal vectors; ``'columns'``: random columns of the
      identity; ``'dct'``: the columns of the cosine transform on which the gradient's
      coordinates have the largest :math:`\ell_1` norm, for which a mesh has to send all
      of a matrix split along its shorter side. The last two store indices, and the
      state of one passes for that of the other.
    residual: None: the rest is dropped; ``'sign'``: its sign; ``'scaled'``: each of its
      rows (columns of a wide matrix) by the factor by which `inner` scaled that of the
      coordinates, and its norm limited to grow by 1 % a step.
    refresh_every: updates between two subspaces; the first update has one.
    carry: what happens to `inner`'s state when the subspace turns. ``'reset'``: made
      anew, its counts too, but not those of schedules; ``'keep'``: kept, as numbers in
      the new coordinates; ``'rotate'``: arrays of the coordinates' shape are carried
      over by the overlap :math:`P'^T P` of the subspaces; those without a negative
      entry, as second moments are, by its squares, unless named ``mu`` or ``trace``.
      The variance of a centered RMSprop may turn negative by that.
    scale: factor of the part in the subspace.
    leaves: a function of a leaf's name, such as ``'layers/0/kernel'``, and the leaf,
      that says which are projected. None: those that
      `bsfa_optax.scale_by_whitening` filters, if they are matrices.
    batch_axes: how many leading axes index layers, 1 for layers stacked for a scan; or
      a function of name and leaf.
    seed: of the random choices, which depend on it and the count alone.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `ProjectedState`. It
    keeps the dtypes and, on an explicit mesh, the shardings of the updates.

  Raises:
    TypeError: if `inner` is no transformation or `leaves` no function.
    ValueError: for options out of range; from `init`, for a rank above a matrix, a
      chosen leaf that is no matrix, or no matrix at all; from `update`, for a state of
      other shapes than `init` gives.

  Examples:
    Lion in random subspaces of a quarter of each matrix, sign descent outside:

    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax.projected import projected
    >>> tx = optax.chain(
    ...   projected(optax.scale_by_lion(), 0.25, subspace='random', residual='sign'),
    ...   optax.scale_by_learning_rate(1e-3),
    ... )
    >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state[0].coordinate_state.mu['kernel'].values.shape
    (16, 2)

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024; and what is cited in `frugal`, `fira`
    and `dct_adamw`
  """
  _check.transformation(inner=inner)
  _check.one_of(*get_args(Subspace), subspace=subspace)
  _check.one_of(*get_args(Residual), residual=residual)
  _check.one_of(*get_args(Carry), carry=carry)
  _check.positive_int(refresh_every=refresh_every)
  _check.no_schedule(scale=scale)
  _check.multiplier(scale=scale)
  _matrices.check(rank, leaves, batch_axes)
  inner = optax.with_extra_args_support(inner)
  dense = functools.partial(_dense, subspace)

  def init(params):
    ranks = _matrices.ranks(params, rank, leaves, batch_axes)
    zeros = jax.tree.map(jnp.zeros_like, params)
    basis = _each(functools.partial(_zero_basis, subspace), ranks, zeros)
    vectors = _each(dense, ranks, zeros, basis)
    norm = lambda _, x: x.sum((-2, -1)).astype(jnp.float32)
    masked = lambda *_: optax.MaskedNode()
    return ProjectedState(
      jnp.zeros((), jnp.int32),
      basis,
      _each(norm if residual == 'scaled' else masked, ranks, zeros),
      inner.init(_each(_down, ranks, zeros, vectors)),
      inner.init(_rest(ranks, params)),
    )

  def update(updates, state, params=None, **extra_args):
    _learned.check_state(ProjectedState, state)
    _vectors.check_shapes(
      state,
      _vectors.shapes(jax.eval_shape(init, updates)),
      'state must be of the same options and of parameters like the updates',
      '{}',
      'build the transformation as the state was made, or make a new state with init',
    )
    ranks = _matrices.ranks(updates, rank, leaves, batch_axes)
    count, old = state.projection_count, state.projection_basis
    inside = state.coordinate_state
    matrices = jax.tree.leaves(_each(lambda _, g: g, ranks, updates))

    def learnt():
      key = jax.random.fold_in(jax.random.key(seed), count)
      keys = iter(jax.random.split(key, len(matrices)))
      learn = lambda *x: Basis(_new_basis(subspace, next(keys), *x))
      return _each(learn, ranks, updates, old)

    def carried():
      if carry == 'reset':
        zeros = jax.tree.map(jnp.zeros_like, coordinates)
        return _matrices.restarted(inside, inner.init(zeros))
      overlap = lambda _, new, old: Coordinates(product('sn,so->no', new, old))
      overlaps = _each(overlap, ranks, bases, _each(dense, ranks, updates, old))
      return _rotated(inside, coordinates, overlaps)

    # The count stands still otherwise: the next finite gradient makes a subspace.
    finite = jnp.array([jnp.isfinite(g).all() for g in matrices]).all()
    due = (count % refresh_every == 0) & finite
    basis = lax.cond(due, learnt, lambda: old)
    bases = _each(dense, ranks, updates, basis)
    apart = lambda tree: (_each(_down, ranks, tree, bases), _rest(ranks, tree))
    coordinates, rest = apart(updates)
    if carry != 'keep':
      inside = lax.cond(due & (count > 0), carried, lambda: inside)
    seen, rest_seen = (None, None) if params is None else apart(params)
    steps, inside = inner.update(coordinates, inside, seen, **extra_args)
    others, outside = inner.update(rest, state.rest_state, rest_seen, **extra_args)
    whole = _whole(residual, scale, count)
    last = state.residual_norm
    both = _each(whole, ranks, updates, bases, coordinates, steps, last)
    boxed = lambda r, g, new, other: jax.tree.map(lambda _: new[0], g) if r else other
    norms = jax.tree.map(lambda r, new: new[1] if r else new, ranks, both)
    count += finite.astype(jnp.int32)
    state = ProjectedState(count, basis, norms, inside, outside)
    return jax.tree.map(boxed, ranks, updates, both, others), state

  return optax.GradientTransformationExtraArgs(init, update)


def _each(f: Callable, ranks: Any, *trees: Any) -> Any:
  """A tree of `f(rank, x, ...)` for the matrices, `optax.MaskedNode` elsewhere."""
  # A leaf of `ranks` may be a box, or one of the markers above, in the other trees.
  bare = lambda node: next(iter(jax.tree.leaves(node)), node)
  own = lambda r, *xs: f(r, *map(bare, xs)) if r else optax.MaskedNode()
  return jax.tree.map(own, ranks, *trees)


def _rest(ranks: Any, tree: Any) -> Any:
  """The tree without the matrices."""
  return jax.tree.map(lambda r, x: optax.MaskedNode() if r else x, ranks, tree)


def _tall(x: jax.Array) -> jax.Array:
  """The matrix with its shorter side last."""
  return jnp.matrix_transpose(x) if x.shape[-2] < x.shape[-1] else x


def _zero_basis(subspace: Subspace, rank: int, zeros: jax.Array) -> Basis:
  # A sum has the sharding that is left of the matrix's.
  if subspace in ('columns', 'dct'):
    one = zeros.sum((-2, -1)).astype(jnp.int32)
  else:
    one = _tall(zeros).sum(-2)
  return Basis(jnp.broadcast_to(one[..., None], (*one.shape, rank)))


def _new_basis(
  subspace: Subspace, key: jax.Array, rank: int, g: jax.Array, old: jax.Array
) -> jax.Array:
  g = _tall(g)
  *batch, _, short = spec_of(g)
  if subspace in ('columns', 'dct'):
    if subspace == 'columns':
      score = jax.random.uniform(key, (*g.shape[:-2], g.shape[-1]))
    else:
      cosines = _dct.cosines(g.shape[-1], np.float32)
      score = jnp.abs(product('ms,ks->mk', g, cosines)).sum(-2)
    score = resharded(score, g, (*batch, None))
    return jnp.sort(_matrices.greatest(score, rank), axis=-1)
  if subspace == 'svd':
    new = _matrices.top_directions(g, rank, key)
  else:
    new = _matrices.orthonormal(_matrices.gaussian(key, g, rank))
  new = resharded(new.astype(old.dtype), g, (*batch, short, None))
  return jnp.where(jnp.isfinite(new).all(), new, old)


def _dense(subspace: Subspace, rank: int, g: jax.Array, basis: jax.Array) -> jax.Array:
  """The basis as orthonormal columns (*batch, shorter side, rank)."""
  if subspace in ('svd', 'random'):
    return basis
  *batch, _, short = spec_of(_tall(g))
  columns = jax.nn.one_hot(basis, min(g.shape[-2:]), dtype=np.float32)
  if subspace == 'dct':
    cosines = _dct.cosines(columns.shape[-1], np.float32)
    columns = product('rk,ks->rs', columns, cosines)
  return resharded(jnp.matrix_transpose(columns), g, (*batch, short, None))


def _down(rank: int, x: jax.Array, p: jax.Array) -> Coordinates:
  """Coordinates of a matrix, in its dtype."""
  return Coordinates(product('ms,sr->mr', _tall(x), p).astype(x.dtype))


def _rotated(state: optax.OptState, coordinates: Any, overlaps: Any) -> Any:
  """The inner optimizer's state in the coordinates of the new bases."""
  # Moments, momenta and whatever else of the state ends like a leaf of the coordinates:
  # one by one, as optimizers for some of the leaves have trees of some.
  found = jax.tree.leaves_with_path(coordinates)
  turns = zip(found, jax.tree.leaves(overlaps), strict=True)
  own = {path: (x.shape, by) for (path, x), by in turns}

  def turned(path, x):
    for i in range(len(path)):
      shape, by = own.get(path[i:], (None, None))
      if shape == jnp.shape(x):
        if not any(getattr(key, 'name', None) in _FIRST_MOMENTS for key in path[:i]):
          by = jnp.where((x >= 0).all(), jnp.square(by), by)
        return product('no,mo->mn', by, x).astype(x.dtype)
    return x

  return jax.tree.map_with_path(turned, state)


def _whole(residual: Residual, scale: Any, count: jax.Array) -> Callable:
  """A function that puts the update of a whole matrix together."""

  def whole(rank, g, p, c, step, last):
    """The update, and the norm (*batch,) of a scaled residual."""
    wide = accumulator(g.dtype)
    up = lambda x: product('mr,sr->ms', x, p) * jnp.asarray(scale, wide)
    out = up(step)
    if residual is not None:
      rest = _tall(g).astype(wide) - up(c)
      if residual == 'sign':
        rest = jnp.sign(rest)
      else:
        # Of each row: how much longer the inner optimizer made its coordinates.
        norm = lambda x: jnp.linalg.norm(x.astype(wide), axis=-1, keepdims=True)
        rest *= norm(step) / (norm(c) + 1e-8)
        size = jnp.sqrt(jnp.square(rest).sum((-2, -1)))
        growth = jnp.maximum(size / (last.astype(wide) + 1e-8), _LIMIT) / _LIMIT
        growth = jnp.where(count > 0, growth, 1)
        rest /= growth[..., None, None]
        last = (size / growth).astype(jnp.float32)
      out += rest
    is_wide = g.shape[-2] < g.shape[-1]
    return (jnp.matrix_transpose(out) if is_wide else out).astype(g.dtype), last

  return whole


def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int | float = 128,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  *,
  scale: float = 0.25,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore: Adam in the top singular subspace of a gradient 200 updates old at most.

  With the authors' defaults and, as in their code, moments that are kept as they are
  when the subspace turns, and `eps` under the uncorrected second moment.

  Args:
    learning_rate: a scalar or a schedule; the authors' is 0.01.
    rank: as in `projected`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: term added to the denominator.
    weight_decay: strength of the decoupled weight decay.
    scale: factor of the projected update.
    **options: what else `projected` takes, such as `leaves` and ``carry='rotate'``.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: as `projected`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax.projected import galore
    >>> tx = galore(0.01, rank=4)
    >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zhao, Zhang, Chen, Wang, Anandkumar, Tian, `GaLore: Memory-Efficient LLM Training by
    Gradient Low-Rank Projection <https://arxiv.org/abs/2403.03507>`_, 2024
  """
  _check.multiplier(learning_rate=learning_rate)
  adam = optax.scale_by_adam(b1, b2)

  # As in the authors' code, the bias is corrected in the step size alone.
  def uncorrected(updates, state, params=None):
    _, state = adam.update(updates, state, params)
    step = lambda m, v: m / (jnp.sqrt(v) + eps)
    return jax.tree.map(step, state.mu, state.nu), state

  def correction(count):
    steps = (count + 1).astype(jnp.float32)
    return jnp.sqrt(1 - b2**steps) / (1 - b1**steps)

  inner = optax.GradientTransformation(adam.init, uncorrected)
  return optax.chain(
    projected(inner, rank, scale=scale, **{'carry': 'keep', **options}),
    optax.scale_by_schedule(correction),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )


def fira(
  learning_rate: optax.ScalarOrSchedule, rank: int | float = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """Fira: GaLore, with what lies outside the subspace scaled as Adam scales inside.

  With the authors' defaults for pre-training. As in their code, the rest is what
  `scale` (0.25) times the projection leaves; in the paper's formula, all of the
  complement.

  Args:
    learning_rate: a scalar or a schedule.
    rank: as in `projected`.
    **options: what else `galore` takes.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: as `projected`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax.projected import fira
    >>> tx = fira(0.01, rank=4, leaves=lambda name, leaf: name == 'kernel')
    >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Chen, Feng, Li, Lai, Yue, Yuan, Wang, `Fira: Can We Achieve Full-rank Training of
    LLMs Under Low-rank Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
  """
  return galore(learning_rate, rank, **{'residual': 'scaled', **options})


def frugal(
  learning_rate: optax.ScalarOrSchedule,
  rank: int | float = 0.25,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """FRUGAL: Adam on random columns, sign descent with the same rate on the others.

  With the defaults of the authors' code: Adam is started anew every 200 updates, when
  other columns are drawn. They take columns of the stored matrix; here they are those
  of its shorter side. Their other subspaces are ``subspace='svd'`` and ``'random'``.

  Args:
    learning_rate: a scalar or a schedule.
    rank: as in `projected`; the authors' density.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: term added to the denominator.
    weight_decay: strength of the decoupled weight decay.
    **options: what else `projected` takes.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: as `projected`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax.projected import frugal
    >>> tx = frugal(1e-3, subspace='svd')
    >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zmushko, Beznosikov, Takáč, Horváth, `FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training
    <https://arxiv.org/abs/2411.07837>`_, 2024
  """
  _check.multiplier(learning_rate=learning_rate)
  frugally = {'subspace': 'columns', 'residual': 'sign', 'carry': 'reset'}
  return optax.chain(
    projected(optax.scale_by_adam(b1, b2, eps), rank, **{**frugally, **options}),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )


def dct_adamw(
  learning_rate: optax.ScalarOrSchedule, rank: int | float = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """DCT-AdamW: Adam in columns of a cosine transform, chosen anew at every update.

  As in the paper, moments are carried from one choice to the next (in the authors' code
  that is an option); their quantised buffer of what was left out, which takes as much
  as a parameter in 4 or 8 bits, is not here.

  Args:
    learning_rate: a scalar or a schedule.
    rank: as in `projected`; the authors give no default.
    **options: what else `frugal` takes; `weight_decay` is 0, for which the authors give
      no default.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: as `projected`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bsfa_optax.projected import dct_adamw
    >>> tx = dct_adamw(1e-3, rank=4)
    >>> params = {'kernel': jnp.ones((8, 16)), 'bias': jnp.zeros(16)}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Modoranu, Safaryan, Schultheis, Ryabinin, Chumachenko, Alistarh, `FFT-based Dynamic
    Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models
    <https://arxiv.org/abs/2505.17967>`_, 2025
  """
  by_cosines: dict[str, Any] = {'subspace': 'dct', 'residual': None, 'carry': 'rotate'}
  by_cosines |= {'refresh_every': 1, 'weight_decay': 0.0}
  return frugal(learning_rate, rank, **{**by_cosines, **options})
