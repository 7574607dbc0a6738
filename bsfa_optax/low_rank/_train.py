"""Reparametrisations of matrices: made, joined, renewed in rounds, merged."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check
from bsfa_optax._vectors import accumulator
from bsfa_optax.low_rank import _choice, _matrices, _nodes
from bsfa_optax.low_rank._matrices import product
from bsfa_optax.low_rank._nodes import (
  Factors,
  FrozenFactors,
  FrozenSpectrum,
  LowRankArray,
  Spectrum,
)


class _SST(NamedTuple):
  rank: int | float
  draws_per_svd: Any
  enhanced: bool


class _LoRA(NamedTuple):
  rank: int | float
  scale: float
  column_norm: bool
  restart: bool


def sst(
  rank: int | float, *, draws_per_svd: int | None = None, enhanced: bool = True
) -> _SST:
  r"""Sparse Spectral Training: all singular values, and a few vectors at a time.

  A matrix is :math:`USV^T`. All of :math:`S` is trained, and `rank` pairs of vectors,
  drawn without replacement with probabilities in proportion to the singular values'
  magnitudes; `renew` draws others, and after some draws decomposes the matrix anew. All
  vectors are kept, so frozen memory is twice that of a square matrix.

  From the paper: the above, unit vectors, and the enhanced gradient. Ours: its sign, as
  singular values turn negative in training; optimizer states made anew at a draw (and
  those of singular values at a decomposition). Under Adam, which takes no notice of a
  gradient's scale, the enhanced gradient hardly matters.

  Args:
    rank: pairs of vectors trained at a time, or a share of the shorter side.
    draws_per_svd: draws between two decompositions; by default as many as it takes
      to train as many pairs as there are: the most of ``ceil(k / rank)`` over matrices.
    enhanced: whether a vector's gradient leaves out its singular value's magnitude.

  Returns:
    Options for `init`.

  Raises:
    ValueError: for a number of draws out of range.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import low_rank
    >>> params = {'kernel': jnp.ones((6, 4)), 'bias': jnp.zeros(4)}
    >>> trained, _ = low_rank.init(params, jax.random.key(0), low_rank.sst(2))
    >>> jax.tree.map(jnp.shape, trained)
    {'bias': (4,), 'kernel': Spectrum(u=(6, 2), s=(4,), v=(4, 2))}

  References:
    Zhao, Zhang, Li, Liu, Cannistraci, `Sparse Spectral Training and Inference on
    Euclidean and Hyperbolic Neural Networks <https://arxiv.org/abs/2405.15481>`_, 2024
  """
  if draws_per_svd is not None:
    _check.positive_int('draws_per_svd', draws_per_svd)
  return _SST(rank, draws_per_svd, enhanced)


def lora(rank: int | float, *, scale: float = 1.0, column_norm: bool = False) -> _LoRA:
  r"""LoRA: :math:`W_0 + s\,IJ`, with thin factors :math:`I` and :math:`J` trained.

  :math:`I` is normal with variance ``1 / m``, :math:`J` zero. With `column_norm`, the
  matrix is :math:`M (W_0 + s\,IJ) / |W_0 + s\,IJ|`, norms taken of the columns of an
  (inputs, outputs) kernel, and the magnitudes :math:`M` are trained: GradNormLoRP's
  formula. Its released code does something else: it resets the magnitude at each step,
  leaves out the derivative of the norm, and comes close to GaLore; so no claim of
  theirs is made here. Its projection of gradients is an optimizer of the factors in
  `bsfa_optax.projected.projected`, the first argument of `renewable`.

  Args:
    rank: the width of the factors, or a share of the shorter side.
    scale: the factor s; alpha / rank in the usual notation.
    column_norm: whether columns are normed to trained magnitudes.

  Returns:
    Options for `init`.

  Raises:
    ValueError: for a scale out of range.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import low_rank
    >>> trained, _ = low_rank.init(
    ...   {'w': jnp.ones((6, 4))}, jax.random.key(0), low_rank.lora(2, column_norm=True)
    ... )
    >>> jax.tree.map(jnp.shape, trained)
    {'w': Factors(i=(6, 2), j=(2, 4), magnitude=(4,))}

  References:
    Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_, 2021

    Huang, Shen, Zhu, Rudinac, Kanoulas, `Gradient Weight-normalized Low-rank Projection
    for Efficient LLM Training <https://arxiv.org/abs/2412.19616>`_, 2024
  """
  _check.positive('scale', scale)
  return _LoRA(rank, float(scale), column_norm, restart=False)


def relora(
  rank: int | float, *, scale: float = 1.0, column_norm: bool = False
) -> _LoRA:
  """ReLoRA: LoRA whose product `renew` adds to W0, with new factors from then on.

  The authors renew every 5,000 updates or less, warm the rate up again after each time
  (see `rewarmed`) and start from some training at full rank.

  Args:
    rank: as in `lora`.
    scale: as in `lora`.
    column_norm: as in `lora`; the magnitudes are kept when factors are renewed.

  Returns:
    Options for `init`.

  Raises:
    ValueError: as `lora`.

  Examples:
    >>> from bsfa_optax import low_rank
    >>> low_rank.relora(8).restart
    True

  References:
    Lialin, Shivagunde, Muckatira, Rumshisky, `ReLoRA: High-Rank Training Through
    Low-Rank Updates <https://arxiv.org/abs/2307.05695>`_, 2023
  """
  return lora(rank, scale=scale, column_norm=column_norm)._replace(restart=True)


def init(
  params: optax.Params,
  key: jax.Array,
  method: _SST | _LoRA,
  *,
  leaves: Callable[[str, Any], bool] | None = None,
  batch_axes: int | Callable[[str, Any], int] = 0,
) -> tuple[Any, Any]:
  """Splits parameters into a part that is trained and a part that is frozen.

  Args:
    params: any tree of parameters: that of a Flax module, of ``nnx.split``, of Equinox.
    key: a random key, for the vectors drawn and the first factors.
    method: `sst`, `lora` or `relora` of a rank.
    leaves: a function of a leaf's name, such as ``'layers/0/kernel'``, and the leaf,
      that says which are reparametrised; the others are trained as they are. None:
      those that `bsfa_optax.scale_by_whitening` filters, if they are matrices.
    batch_axes: how many leading axes index layers, 1 for layers stacked for a scan; or
      a function of name and leaf.

  Returns:
    ``(trained, frozen)``: trees like `params`, with a `Spectrum` or `Factors` in
    place of each chosen leaf of the first, and a `FrozenSpectrum` or `FrozenFactors` in
    the second, which has `optax.MaskedNode` elsewhere. Dtypes are the parameters'.

  Raises:
    TypeError: if `method` is none of these, or `leaves` no function.
    ValueError: if there is no key, a rank out of range, a chosen leaf that is no
      matrix, or none chosen.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bsfa_optax import low_rank
    >>> params = {'kernel': jnp.ones((6, 4)), 'bias': jnp.zeros(4)}
    >>> trained, frozen = low_rank.init(params, jax.random.key(0), low_rank.sst(2))
    >>> tx = low_rank.renewable(optax.adam(1e-2))
    >>> state = tx.init(trained)
    >>> def loss_fn(trained, frozen):
    ...   params = low_rank.join(trained, frozen)
    ...   return jnp.sum((jnp.ones(6) @ params['kernel'] + params['bias']) ** 2)
    >>> grads = jax.grad(loss_fn)(trained, frozen)
    >>> updates, state = tx.update(grads, state, trained)
    >>> trained = low_rank.retract(optax.apply_updates(trained, updates))
    >>> trained, frozen, state = low_rank.renew(
    ...   tx, trained, frozen, state, jax.random.key(1)
    ... )
    >>> low_rank.merge(trained, frozen)['kernel'].shape
    (6, 4)
  """
  if not isinstance(method, _SST | _LoRA):
    raise TypeError(
      f'method must be sst(...), lora(...) or relora(...), got {method!r}.'
    )
  _choice.check(method.rank, leaves, batch_axes)
  _check_key(key)
  found = _choice.matrices(params, method.rank, leaves, batch_axes)
  chosen = [m for m in found if m is not None]
  given, treedef = jax.tree.flatten(params)
  keys = iter(jax.random.split(key, max(1, len(chosen))))
  if isinstance(method, _SST) and method.draws_per_svd is None:
    per_svd = max(math.ceil(min(m.rows, m.columns) / m.rank) for m in chosen)
    method = method._replace(draws_per_svd=per_svd)
  split: Callable = _decomposed if isinstance(method, _SST) else _factored
  pairs = [
    (w, optax.MaskedNode()) if m is None else split(w, next(keys), m.rank, method)
    for w, m in zip(given, found, strict=True)
  ]
  trained, frozen = zip(*pairs, strict=True)
  return jax.tree.unflatten(treedef, trained), jax.tree.unflatten(treedef, frozen)


def join(trained: Any, frozen: Any) -> Any:
  """Parameters for a model: chosen leaves become dense where they are used.

  Differentiate with respect to `trained`. Inside a block that is scanned and
  rematerialised, no more than one layer's matrices are dense at a time.

  Args:
    trained: from `init`, or its successors.
    frozen: that which belongs to it.

  Returns:
    A tree like the parameters with a `LowRankArray` in place of each chosen leaf.

  Raises:
    ValueError: if the parts do not belong together, as when a checkpoint is of
      another rank or method.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import low_rank
    >>> params = {'kernel': jnp.ones((6, 4)), 'bias': jnp.zeros(4)}
    >>> parts = low_rank.init(params, jax.random.key(0), low_rank.lora(2))
    >>> low_rank.join(*parts)['kernel'].shape
    (6, 4)
  """
  _nodes.known_to_linen()

  def whole(t, f):
    if isinstance(f, FrozenSpectrum):  # the count has no axis for a scan to take
      f = dataclasses.replace(f, draws=None)
    return t if isinstance(f, optax.MaskedNode) else LowRankArray(t, f)

  treedef, pairs = _pairs(trained, frozen)
  return treedef.unflatten([whole(t, f) for t, f in pairs])


def merge(trained: Any, frozen: Any) -> optax.Params:
  """The parameters as plain dense arrays, for export: a checkpoint like any other.

  Args:
    trained: from `init`, or its successors.
    frozen: that which belongs to it.

  Returns:
    A tree like the parameters, of their shapes and dtypes.

  Raises:
    ValueError: as `join`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import low_rank
    >>> params = {'kernel': jnp.arange(24.0).reshape(6, 4)}
    >>> parts = low_rank.init(params, jax.random.key(0), low_rank.sst(2))
    >>> merged = low_rank.merge(*parts)
    >>> bool(jnp.allclose(merged['kernel'], params['kernel'], atol=1e-5))
    True
  """
  return jax.tree.map(
    lambda x: x.dense(lax.Precision.HIGHEST) if isinstance(x, LowRankArray) else x,
    join(trained, frozen),
    is_leaf=lambda x: isinstance(x, LowRankArray),
  )


def retract(trained: Any) -> Any:
  """Singular vectors back to unit length; call it after each update.

  Args:
    trained: from `init`, or its successors.

  Returns:
    The same with vectors of unit length. What has no such vectors is as it was.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import low_rank
    >>> trained, _ = low_rank.init(
    ...   {'w': jnp.ones((6, 4))}, jax.random.key(0), low_rank.sst(2)
    ... )
    >>> longer = jax.tree.map(lambda x: 2 * x, trained)
    >>> bool(jnp.allclose(low_rank.retract(longer)['w'].u, trained['w'].u))
    True
  """

  def unit(x):
    wide = x.astype(accumulator(x.dtype))
    return (wide / _nodes.column_norms(wide)[..., None, :]).astype(x.dtype)

  return jax.tree.map(
    lambda x: Spectrum(unit(x.u), x.s, unit(x.v)) if isinstance(x, Spectrum) else x,
    trained,
    is_leaf=lambda x: isinstance(x, Spectrum),
  )


class RenewableState(NamedTuple):
  """State of `renewable`: one of the optimizer for each part that is renewed apart.

  Attributes:
    vectors_state: for drawn singular vectors and thin factors.
    values_state: for singular values.
    rest_state: for magnitudes and all leaves that are trained as they are.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bsfa_optax import low_rank
    >>> trained, _ = low_rank.init(
    ...   {'w': jnp.ones((6, 4))}, jax.random.key(0), low_rank.sst(2)
    ... )
    >>> state = low_rank.renewable(optax.scale_by_adam()).init(trained)
    >>> state.values_state.mu['w'].s.shape
    (4,)
  """

  vectors_state: Any
  values_state: Any
  rest_state: Any


def renewable(
  tx: optax.GradientTransformation,
  others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer of which `renew` can make one part's state anew, counts and all.

  Zeroing moments while Adam's count is kept makes steps several times too long for a
  hundred updates, so each part has a state, and a count, of its own.

  Args:
    tx: the optimizer. What looks at all leaves at once, such as clipping by the global
      norm, belongs before `renewable` in a chain.
    others: the optimizer of all but vectors and factors: of singular values, magnitudes
      and leaves trained as they are. None: `tx`.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `RenewableState`.

  Raises:
    TypeError: if an optimizer is no transformation, or is given the result of `join`.

  Examples:
    >>> import optax
    >>> from bsfa_optax import low_rank
    >>> tx = optax.chain(
    ...   optax.clip_by_global_norm(1.0), low_rank.renewable(optax.adamw(1e-3))
    ... )
  """
  others = tx if others is None else others
  _check.transformation('tx', tx)
  _check.transformation('others', others)
  optimizers = [optax.with_extra_args_support(x) for x in (tx, others, others)]

  def init(params):
    pairs = zip(optimizers, _parts(params), strict=True)
    return RenewableState(*(tx.init(part) for tx, part in pairs))

  def update(updates, state, params=None, **extra_args):
    of_params = (None,) * 3 if params is None else _parts(params)
    pairs = [
      tx.update(u, s, p, **extra_args)
      for tx, u, s, p in zip(optimizers, _parts(updates), state, of_params, strict=True)
    ]
    missing = lambda x: isinstance(x, optax.MaskedNode)
    return jax.tree.map(
      lambda *xs: next((x for x in xs if not missing(x)), xs[0]),
      *(updates for updates, _ in pairs),
      is_leaf=missing,
    ), RenewableState(*(state for _, state in pairs))

  return optax.GradientTransformationExtraArgs(init, update)


def renew(
  tx: optax.GradientTransformation,
  trained: Any,
  frozen: Any,
  state: optax.OptState,
  key: jax.Array,
) -> tuple[Any, Any, optax.OptState]:
  """Ends a round: other vectors for SST, new factors for ReLoRA; LoRA stays as it is.

  The matrices stay what they are, to rounding. State of the optimizer is made anew for
  what is renewed alone, and the counts of its schedules go on.

  Args:
    tx: the optimizer, with `renewable` in it.
    trained: from `init`, or its successors.
    frozen: that which belongs to it.
    state: of `tx`.
    key: a random key, another one each time.

  Returns:
    ``(trained, frozen, state)``, of the same structure, shapes and dtypes.

  Raises:
    TypeError: if there is no `renewable` in the state.
    ValueError: if there is no key, the state is of another optimizer, or the parts do
      not belong together.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bsfa_optax import low_rank
    >>> params = {'kernel': jnp.ones((6, 4)), 'bias': jnp.zeros(4)}
    >>> trained, frozen = low_rank.init(params, jax.random.key(0), low_rank.relora(2))
    >>> tx = low_rank.renewable(optax.adam(1e-2))
    >>> trained, frozen, state = jax.jit(low_rank.renew, static_argnums=0)(
    ...   tx, trained, frozen, tx.init(trained), jax.random.key(1)
    ... )
  """
  _check.transformation('tx', tx)
  _check_key(key)
  is_ours = lambda x: isinstance(x, RenewableState)
  if not any(map(is_ours, jax.tree.leaves(state, is_leaf=is_ours))):
    raise TypeError(
      'renew needs the state of an optimizer wrapped as low_rank.renewable(tx), got'
      f' {type(state).__name__}; wrap it before its init.'
    )
  if _shapes(jax.eval_shape(tx.init, trained)) != _shapes(state):
    raise ValueError(
      'state is not that of tx for these parameters: another structure, shape or dtype;'
      ' give renew the optimizer that made it.'
    )
  decomposed, renewed, restarted = [], [], False
  treedef, pairs = _pairs(trained, frozen)
  for number, (t, f) in enumerate(pairs):
    own = jax.random.fold_in(key, number)
    if isinstance(f, FrozenSpectrum):
      due = f.draws + 1 >= f.draws_per_svd
      decomposed.append(due)
      restarted = True
      t, f = _redrawn(t, f, due, own)
    elif isinstance(f, FrozenFactors) and f.restart:
      restarted = True
      t, f = _restarted(t, f, own)
    renewed.append((t, f))
  new, new_frozen = map(treedef.unflatten, zip(*renewed, strict=True))
  fresh = tx.init(new)

  def choose(old, start):
    if not is_ours(old):
      return old
    start = RenewableState(*map(_choice.restarted, old, start))
    if restarted:
      old = old._replace(vectors_state=start.vectors_state)
    if decomposed:
      choice = lambda a, b: jnp.where(decomposed[0], a, b)
      values = jax.tree.map(choice, start.values_state, old.values_state)
      old = old._replace(values_state=values)
    return old

  return new, new_frozen, jax.tree.map(choose, state, fresh, is_leaf=is_ours)


def rewarmed(
  learning_rate: optax.ScalarOrSchedule, every: int, steps: int
) -> optax.Schedule:
  """A learning rate with a linear warm-up at the start of each round.

  Args:
    learning_rate: a scalar or a schedule.
    every: updates between two calls of `renew`.
    steps: updates of each warm-up; SST's authors take 20 of 200.

  Returns:
    A schedule.

  Raises:
    ValueError: if a number is not positive, or the warm-up longer than a round.

  Examples:
    >>> from bsfa_optax import low_rank
    >>> rate = low_rank.rewarmed(1.0, every=200, steps=20)
    >>> [float(rate(step)) for step in (0, 19, 199, 200)]
    [0.05..., 1.0, 1.0, 0.05...]
  """
  _check.multiplier('learning_rate', learning_rate)
  _check.positive_int('every', every)
  _check.positive_int('steps', steps)
  if steps > every:
    raise ValueError(f'steps must be at most every ({every}), got {steps}.')

  def schedule(count):
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    done = (jnp.asarray(count, jnp.int32) % every + 1).astype(jnp.float32)
    return rate * jnp.minimum(1.0, done / steps)

  return schedule


def _shapes(tree: Any) -> tuple[Any, list[Any]]:
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype) for x in leaves]


def _check_key(key: Any) -> None:
  dtype = getattr(key, 'dtype', None)
  if dtype is None or not (
    jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32
  ):
    raise ValueError(f'key must be a random key, got {key!r}; as in jax.random.key(0).')


def _pairs(trained: Any, frozen: Any) -> tuple[Any, list[tuple[Any, Any]]]:
  """The trained and frozen parts that belong together, and the tree they stand in."""
  is_part = lambda x: isinstance(x, _nodes.Trained)
  treedef: Any
  paths, treedef = jax.tree_util.tree_flatten_with_path(trained, is_leaf=is_part)
  try:
    others = treedef.flatten_up_to(frozen)
  except (ValueError, TypeError) as error:
    raise ValueError(
      'trained and frozen do not have one structure; give the two that `init` or'
      ' `renew` returned together.'
    ) from error
  for (path, t), f in zip(paths, others, strict=True):
    alone = not is_part(t) and isinstance(f, optax.MaskedNode)
    if not alone and not _belong(t, f):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
        f'the trained and the frozen part of {name!r} do not belong together: a'
        ' checkpoint of another rank, method or shape? Restore both from one run, or'
        ' start with `init`.'
      )
  return treedef, [(t, f) for (_, t), f in zip(paths, others, strict=True)]


def _belong(t: Any, f: Any) -> bool:
  if isinstance(t, Spectrum) and isinstance(f, FrozenSpectrum):
    *batch, m, k = f.u.shape
    batch, rank = tuple(batch), f.drawn.shape[-1]
    shapes = (*batch, m, rank), (*batch, k), (*batch, f.v.shape[-2], rank)
    return (t.u.shape, t.s.shape, t.v.shape) == shapes
  if isinstance(t, Factors) and isinstance(f, FrozenFactors):
    *batch, m, n = f.w.shape
    rank = t.i.shape[-1]
    return (t.i.shape, t.j.shape) == ((*batch, m, rank), (*batch, rank, n))
  return False


def _parts(tree: Any) -> list[Any]:
  """The tree with vectors and factors alone, singular values alone, the rest alone."""
  masked = optax.MaskedNode()

  def split(x):
    if isinstance(x, LowRankArray):
      raise TypeError(
        'an optimizer got the result of `join`; give it `trained` and its gradients. In'
        ' NNX, split the model and merge it inside the loss: nnx.Optimizer, which'
        ' updates a model in place, cannot train parts.'
      )
    if isinstance(x, Spectrum):
      return (
        Spectrum(x.u, masked, x.v),
        Spectrum(masked, x.s, masked),
        Spectrum(masked, masked, masked),
      )
    if isinstance(x, Factors):
      none = None if x.magnitude is None else masked
      return (
        Factors(x.i, x.j, none),
        Factors(masked, masked, none),
        Factors(masked, masked, x.magnitude),
      )
    return masked, masked, x

  is_part = lambda x: isinstance(x, _nodes.Trained | LowRankArray | optax.MaskedNode)
  leaves: list[Any]
  treedef: Any
  leaves, treedef = jax.tree.flatten(tree, is_leaf=is_part)
  split_leaves = [split(x) for x in leaves]
  return [treedef.unflatten([x[part] for x in split_leaves]) for part in range(3)]


def _decomposed(
  w: jax.Array, key: jax.Array, rank: int, method: _SST
) -> tuple[Spectrum, FrozenSpectrum]:
  u, s, v = _svd(w)
  draws = jnp.zeros((), jnp.int32)
  frozen = FrozenSpectrum(
    u, v, _draw(key, s, rank), draws, method.draws_per_svd, method.enhanced
  )
  return _taken(s, frozen), frozen


def _svd(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U, S, V, each matrix whole on its device, then split as its sides are."""
  u, s, vt = _matrices.each_matrix(_matrices.svd, w.astype(accumulator(w.dtype)))
  *batch, rows, columns = _matrices.spec_of(w)
  u = _matrices.place(u.astype(w.dtype), w, (*batch, rows, None))
  v = jnp.swapaxes(vt, -1, -2).astype(w.dtype)
  return u, s.astype(w.dtype), _matrices.place(v, w, (*batch, columns, None))


def _draw(key: jax.Array, s: jax.Array, rank: int) -> jax.Array:
  """Indices drawn without replacement in proportion to |s|, (*batch, rank)."""
  spec = _matrices.spec_of(s)
  noise = _matrices.place(jax.random.gumbel(key, s.shape, jnp.float32), s, spec)
  score = jnp.log(jnp.abs(s.astype(jnp.float32))) + noise
  return _matrices.greatest(score, rank)


def _taken(s: jax.Array, frozen: FrozenSpectrum) -> Spectrum:
  hot = frozen.one_hot(frozen.u.dtype)
  take = lambda x: product('mk,rk->mr', x, hot).astype(x.dtype)
  return Spectrum(take(frozen.u), s, take(frozen.v))


def _redrawn(
  t: Spectrum, f: FrozenSpectrum, due: jax.Array, key: jax.Array
) -> tuple[Spectrum, FrozenSpectrum]:
  """The trained vectors put back, decomposed anew if `due`, and others drawn."""
  hot = f.one_hot(t.u.dtype)
  others = (1 - hot.sum(-2))[..., None, :]
  put = lambda whole, part: (
    whole * others + product('mr,rk->mk', part, hot).astype(whole.dtype)
  )
  whole = put(f.u, t.u), t.s, put(f.v, t.v)
  dense = LowRankArray(t, f).dense
  u, s, v = lax.cond(due, lambda: _svd(dense(lax.Precision.HIGHEST)), lambda: whole)
  drawn = _draw(key, s, f.drawn.shape[-1])
  draws = jnp.where(due, 0, f.draws + 1)
  frozen = dataclasses.replace(f, u=u, v=v, drawn=drawn, draws=draws)
  return _taken(s, frozen), frozen


def _factored(
  w: jax.Array, key: jax.Array, rank: int, method: _LoRA
) -> tuple[Factors, FrozenFactors]:
  *batch, _, columns = _matrices.spec_of(w)
  shape = (*w.shape[:-2], rank, w.shape[-1])
  magnitude = None
  if method.column_norm:
    norms = _nodes.column_norms(w.astype(accumulator(w.dtype)))
    magnitude = norms.astype(w.dtype)
  second = _matrices.zeros(w, shape, (*batch, None, columns))
  factors = Factors(_first_factor(w, key, rank), second, magnitude)
  return factors, FrozenFactors(w, method.scale, method.restart)


def _first_factor(w: jax.Array, key: jax.Array, rank: int) -> jax.Array:
  factor = _matrices.gaussian(key, jnp.swapaxes(w, -1, -2), rank)
  return (factor / math.sqrt(w.shape[-2])).astype(w.dtype)


def _restarted(
  t: Factors, f: FrozenFactors, key: jax.Array
) -> tuple[Factors, FrozenFactors]:
  without_norm = LowRankArray(dataclasses.replace(t, magnitude=None), f)
  whole = without_norm.dense(lax.Precision.HIGHEST)
  first = _first_factor(f.w, key, t.i.shape[-1])
  factors = Factors(first, jnp.zeros_like(t.j), t.magnitude)
  return factors, dataclasses.replace(f, w=whole)
