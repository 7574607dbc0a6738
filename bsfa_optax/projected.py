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

from bsfa_optax import _check
from bsfa_optax._vectors import accumulator
from bsfa_optax.estimators import _dct
from bsfa_optax.low_rank import _choice, _matrices
from bsfa_optax.low_rank._choice import Matrix
from bsfa_optax.low_rank._matrices import product

Subspace = Literal['svd', 'random', 'columns', 'dct']
Residual = Literal[None, 'sign', 'scaled']
Carry = Literal['reset', 'keep', 'rotate']

_LIMIT = 1.01  # growth of the scaled residual's norm a step
_SECOND_MOMENTS = ('nu', 'nu_max', 'sum_of_squares')


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
    values: ``(*batch, m, rank)``, or ``(*batch, rank, n)`` if the rows are the shorter
      side, in the parameter's dtype and with its sharding on the longer side.
  """

  values: Any


class ProjectedState(NamedTuple):
  """State of `projected`.

  Attributes:
    projection_count: updates so far, int32 ().
    projection_basis: a tree like the parameters with a `Basis` for each matrix.
    residual_norm: norms of the last scaled residuals, float32 ``(*batch,)`` for each
      matrix; `optax.MaskedNode` without such a residual.
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
      coordinates have the largest :math:`\ell_1` norm. The last two store indices.
    residual: None: the rest is dropped; ``'sign'``: its sign; ``'scaled'``: each of its
      rows (columns of a wide matrix) by the factor by which `inner` scaled that of the
      coordinates, and its norm limited to grow by 1 % a step.
    refresh_every: updates between two subspaces; the first update has one.
    carry: what happens to `inner`'s state when the subspace turns. ``'reset'``: made
      anew, its counts too, but not those of schedules; ``'keep'``: kept, as numbers in
      the new coordinates; ``'rotate'``: arrays of the coordinates' shape are carried
      over by the overlap :math:`P'^T P` of the subspaces, those of second moments
      (``nu``, ``nu_max``, ``sum_of_squares``) by its square.
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
    ValueError: for options out of range, a rank above a matrix, a chosen leaf that is
      no matrix, or no matrix at all (both from `init`).

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
    (2, 16)

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024; and what is cited in `frugal`, `fira`
    and `dct_adamw`
  """
  _check.transformation('inner', inner)
  _one_of('subspace', subspace, get_args(Subspace))
  _one_of('residual', residual, get_args(Residual))
  _one_of('carry', carry, get_args(Carry))
  _check.positive_int('refresh_every', refresh_every)
  _check.multiplier('scale', scale)
  _choice.check(rank, leaves, batch_axes)
  inner = optax.with_extra_args_support(inner)
  find = lambda tree: _Plan(tree, _choice.matrices(tree, rank, leaves, batch_axes))

  def init(params):
    plan = find(params)
    norms = optax.MaskedNode()
    if residual == 'scaled':
      zeros = lambda p, m: _matrices.zeros(p, p.shape[:-2], _specs(p, m)[0])
      norms = plan.each(lambda p, m: zeros(p, m).astype(jnp.float32))
    return ProjectedState(
      jnp.zeros((), jnp.int32),
      plan.each(lambda p, m: Basis(_zero_basis(p, m, subspace))),
      norms,
      inner.init(plan.each(_zero_coordinates)),
      inner.init(plan.rest()),
    )

  def update(updates, state, params=None, **extra_args):
    _check.is_state('ProjectedState', ProjectedState, state)
    plan = find(updates)
    count, old = state.projection_count, plan.values(state.projection_basis)

    def refresh():
      key = jax.random.fold_in(jax.random.key(seed), count)
      keys = iter(jax.random.split(key, max(1, len(old))))
      learn = lambda g, m, b: _new_basis(g, m, subspace, next(keys), b)
      new = plan.values(plan.each(learn, old))
      carried = lambda: _carried(
        inner, carry, plan, subspace, state.coordinate_state, old, new
      )
      return new, lax.cond(count > 0, carried, lambda: state.coordinate_state)

    leaves = jax.tree.leaves(plan.values(updates))
    finite = jnp.array([jnp.isfinite(g).all() for g in leaves]).all()
    bases, inside = lax.cond(
      (count % refresh_every == 0) & finite,
      refresh,
      lambda: (old, state.coordinate_state),
    )
    dense = plan.values(plan.each(lambda g, m, b: _dense(b, m, subspace, g), bases))
    down = plan.each(_down, dense)
    values = rest_values = None
    if params is not None:
      of_params = _Plan(params, plan.found)
      values, rest_values = of_params.each(_down, dense), of_params.rest()
    steps, inside = inner.update(down, inside, values, **extra_args)
    others, outside = inner.update(
      plan.rest(), state.rest_state, rest_values, **extra_args
    )
    lasts = plan.values(state.residual_norm) if residual == 'scaled' else dense
    whole = functools.partial(_whole, residual, scale, count)
    both = plan.values(
      plan.each(whole, dense, plan.values(down), plan.values(steps), lasts)
    )
    return plan.merge([x for x, _ in both], others), ProjectedState(
      count + finite.astype(jnp.int32),
      plan.tree([Basis(b) for b in bases]),
      plan.tree([norm for _, norm in both])
      if residual == 'scaled'
      else state.residual_norm,
      inside,
      outside,
    )

  return optax.GradientTransformationExtraArgs(init, update)


class _Plan:
  """The matrices among the leaves of a tree, and trees of what belongs to them."""

  def __init__(self, tree: Any, found: list[Matrix | None]):
    self.given: list[Any]
    self.treedef: Any
    # Boxes of Flax are leaves here: the state of a matrix is no box around one.
    self.given, self.treedef = jax.tree.flatten(tree, is_leaf=_choice.is_box)
    self.found = found
    self.matrices = [m for m in found if m is not None]

  def each(self, f: Callable, *more: list[Any]) -> Any:
    """A tree of `f(leaf, matrix, *more)` for the matrices."""
    leaves = self.values(self.treedef.unflatten(self.given))
    leaves = [jax.tree.leaves(x)[0] for x in leaves]
    return self.tree([f(*x) for x in zip(leaves, self.matrices, *more, strict=True)])

  def tree(self, values: list[Any]) -> Any:
    """`values` for the matrices, `optax.MaskedNode` elsewhere."""
    rest = iter(values)
    return self.treedef.unflatten(
      [optax.MaskedNode() if m is None else next(rest) for m in self.found]
    )

  def values(self, tree: Any) -> list[Any]:
    nodes = self.treedef.flatten_up_to(tree)
    nodes = [x for x, m in zip(nodes, self.found, strict=True) if m is not None]
    return [x[0] if isinstance(x, Basis | Coordinates) else x for x in nodes]

  def rest(self) -> Any:
    return self.treedef.unflatten(
      [
        x if m is None else optax.MaskedNode()
        for x, m in zip(self.given, self.found, strict=True)
      ]
    )

  def merge(self, values: list[Any], others: Any) -> Any:
    """`values` for the matrices, in their boxes, and `others` (or own) elsewhere."""
    rest = iter(values)
    others = self.given if others is None else self.treedef.flatten_up_to(others)
    boxed = lambda node, x: jax.tree.map(lambda _: x, node)
    return self.treedef.unflatten(
      [
        other if m is None else boxed(given, next(rest))
        for given, other, m in zip(self.given, others, self.found, strict=True)
      ]
    )


def _specs(x: Any, m: Matrix) -> tuple[tuple[Any, ...], Any, Any]:
  """The partition of the batch axes, of the longer and of the shorter side."""
  *batch, rows, columns = _matrices.spec_of(x)
  return (tuple(batch), columns, rows) if m.wide else (tuple(batch), rows, columns)


def _zero_basis(x: Any, m: Matrix, subspace: Subspace) -> jax.Array:
  batch, _, short = _specs(x, m)
  if subspace in ('columns', 'dct'):
    zeros = _matrices.zeros(x, (*x.shape[:-2], m.rank), (*batch, None))
    return zeros.astype(jnp.int32)
  shape = (*x.shape[:-2], min(m.rows, m.columns), m.rank)
  return _matrices.zeros(x, shape, (*batch, short, None))


def _zero_coordinates(x: Any, m: Matrix) -> Coordinates:
  batch, long, _ = _specs(x, m)
  shape, spec = (m.rows, m.rank), (long, None)
  if m.wide:
    shape, spec = (m.rank, m.columns), (None, long)
  return Coordinates(_matrices.zeros(x, (*x.shape[:-2], *shape), (*batch, *spec)))


def _new_basis(
  g: jax.Array, m: Matrix, subspace: Subspace, key: jax.Array, old: jax.Array
) -> jax.Array:
  tall = jnp.swapaxes(g, -1, -2) if m.wide else g
  batch, _, short = _specs(g, m)
  if subspace == 'svd':
    new = _matrices.top_directions(tall, m.rank, key)
  elif subspace == 'random':
    new = _matrices.orthonormal(_matrices.gaussian(key, tall, m.rank))
  else:
    if subspace == 'columns':
      score = jax.random.uniform(key, (*tall.shape[:-2], tall.shape[-1]))
    else:
      spread = product('ms,ks->mk', tall, _dct.cosines(tall.shape[-1], np.float32))
      score = jnp.abs(spread).sum(-2)
    score = _matrices.place(score, g, (*batch, None))
    return jnp.sort(_matrices.greatest(score, m.rank), axis=-1)
  new = _matrices.place(new.astype(g.dtype), g, (*batch, short, None))
  return jnp.where(jnp.isfinite(new).all(), new, old)


def _dense(basis: jax.Array, m: Matrix, subspace: Subspace, like: Any) -> jax.Array:
  """The basis as orthonormal columns (*batch, shorter side, rank)."""
  if subspace in ('svd', 'random'):
    return basis
  batch, _, short = _specs(like, m)
  columns = _matrices.one_hot(basis, min(m.rows, m.columns), np.float32)
  if subspace == 'dct':
    cosines = _dct.cosines(columns.shape[-1], np.float32)
    columns = product('rk,ks->rs', columns, cosines)
  return _matrices.place(jnp.swapaxes(columns, -1, -2), like, (*batch, short, None))


def _down(g: jax.Array, m: Matrix, p: jax.Array) -> Coordinates:
  """Coordinates of a matrix, in its dtype."""
  out = product('ms,mr->rs' if m.wide else 'ms,sr->mr', g, p)
  return Coordinates(out.astype(g.dtype))


def _up(c: jax.Array, m: Matrix, p: jax.Array) -> jax.Array:
  """The matrix with these coordinates, in float32 or wider."""
  return product('rs,mr->ms' if m.wide else 'mr,sr->ms', c, p)


def _carried(
  inner: optax.GradientTransformation,
  carry: Carry,
  plan: _Plan,
  subspace: Subspace,
  state: optax.OptState,
  old: list[jax.Array],
  new: list[jax.Array],
) -> optax.OptState:
  """The state in the coordinates of the new bases."""
  if carry == 'keep':
    return state
  zeros = plan.each(_zero_coordinates)
  if carry == 'reset':
    return _choice.restarted(state, inner.init(zeros))
  structure: Any = jax.tree.structure(zeros)
  shapes = [x.shape for x in jax.tree.leaves(zeros)]
  overlap = lambda g, m, *bases: product(
    'sn,so->no', *(_dense(b, m, subspace, g) for b in bases)
  )
  overlaps = plan.values(plan.each(overlap, new, old))

  def of_coordinates(x):
    leaves, treedef = jax.tree.flatten(x)
    return treedef == structure and [leaf.shape for leaf in leaves] == shapes

  def turn(path, node):
    if not of_coordinates(node):
      return node
    second = any(getattr(key, 'name', None) in _SECOND_MOMENTS for key in path)
    square = jnp.square if second else lambda x: x
    carry_over = lambda _, m, x, overlap: Coordinates(
      product('no,om->nm' if m.wide else 'no,mo->mn', square(overlap), x).astype(
        x.dtype
      )
    )
    return plan.each(carry_over, plan.values(node), overlaps)

  return jax.tree_util.tree_map_with_path(turn, state, is_leaf=of_coordinates)


def _whole(
  residual: Residual,
  scale: Any,
  count: jax.Array,
  g: jax.Array,
  m: Matrix,
  p: jax.Array,
  c: jax.Array,
  step: jax.Array,
  last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The update of a whole matrix, and the norm of its rest if that is scaled."""
  scale = jnp.asarray(scale, accumulator(g.dtype))
  inside = _up(step, m, p) * scale
  if residual is None:
    return inside.astype(g.dtype), last
  rest = g.astype(inside.dtype) - _up(c, m, p) * scale
  if residual == 'sign':
    return (inside + jnp.sign(rest)).astype(g.dtype), last
  rest, norm = _limited(rest, step, c, m, last, count)
  return (inside + rest).astype(g.dtype), norm


def _limited(
  rest: jax.Array,
  step: jax.Array,
  c: jax.Array,
  m: Matrix,
  last: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The rest with the scale of the steps, and its norm (*batch,) within the limit."""
  axis = -2 if m.wide else -1
  norm = lambda x: jnp.sqrt(jnp.square(x.astype(rest.dtype)).sum(axis))
  factors = norm(step) / (norm(c) + 1e-8)  # of each column, or row
  rest = product('ms,s->ms' if m.wide else 'ms,m->ms', rest, factors)
  size = jnp.sqrt(jnp.square(rest).sum((-2, -1)))
  last = last.astype(size.dtype)
  growth = jnp.where(count > 0, jnp.maximum(size / (last + 1e-8), _LIMIT) / _LIMIT, 1)
  rest = rest / growth[..., None, None]
  return rest, (size / growth).astype(jnp.float32)


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
  if value not in choices:
    raise ValueError(f'{name} must be one of {choices}, got {value!r}.')


def _adam_without_correction(
  b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
  """Adam as in the authors' code, which corrects the bias in the step size alone."""

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

  def update(updates, state, params=None):
    del params
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment(updates, state.nu, b2, 2)
    steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
    return steps, optax.ScaleByAdamState(state.count + 1, mu, nu)

  return optax.GradientTransformation(init, update)


def _correction(b1: float, b2: float) -> optax.GradientTransformation:
  def factor(count):
    power = lambda b: jnp.asarray(b, jnp.float32) ** (count + 1).astype(jnp.float32)
    return jnp.sqrt(1 - power(b2)) / (1 - power(b1))

  return optax.scale_by_schedule(factor)


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
  _check.multiplier('learning_rate', learning_rate)
  return optax.chain(
    projected(
      _adam_without_correction(b1, b2, eps),
      rank,
      scale=scale,
      **{'carry': 'keep', **options},
    ),
    _correction(b1, b2),
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
  _check.multiplier('learning_rate', learning_rate)
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
  _check.multiplier('learning_rate', learning_rate)
  by_cosines: dict[str, Any] = {'subspace': 'dct', 'residual': None, 'carry': 'rotate'}
  by_cosines |= {'refresh_every': 1, 'weight_decay': 0.0}
  return frugal(learning_rate, rank, **{**by_cosines, **options})
