"""Matrices trained in few numbers: Sparse Spectral Training, LoRA and ReLoRA.

Top to bottom: the methods, the parts of a matrix, how they become dense, how they are
made, trained, renewed in rounds and merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import sys
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from bsfa_optax import _check, _matrices, _vectors
from bsfa_optax._vectors import accumulator, like, product, resharded, spec_of


class _SST(NamedTuple):
  rank: int | float
  enhanced: bool


class _LoRA(NamedTuple):
  rank: int | float
  scale: float
  column_norm: bool
  restart: bool


def sst(rank: int | float, *, enhanced: bool = True) -> _SST:
  r"""Sparse Spectral Training: all singular values, and a few vectors at a time.

  A matrix is :math:`USV^T`. All of :math:`S` is trained, and `rank` pairs of vectors,
  drawn without replacement with probabilities in proportion to the singular values'
  magnitudes; `renew` draws others, and decomposes the matrix anew after as many draws
  as it takes to train as many pairs as there are: the most of ``ceil(k / rank)`` over
  matrices. All vectors are kept, so frozen memory is twice that of a square matrix.

  From the paper: the above, unit vectors, and the enhanced gradient. Ours: its sign, as
  singular values turn negative in training; optimizer states made anew at a draw (and
  those of singular values at a decomposition). Under Adam, which takes no notice of a
  gradient's scale, the enhanced gradient hardly matters.

  Args:
    rank: pairs of vectors trained at a time, or a share of the shorter side.
    enhanced: whether a vector's gradient leaves out its singular value's magnitude.

  Returns:
    Options for `init`.

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
  return _SST(rank, enhanced)


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
    {'w': NormedFactors(i=(6, 2), j=(2, 4), magnitude=(4,))}

  References:
    Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_, 2021

    Huang, Shen, Zhu, Rudinac, Kanoulas, `Gradient Weight-normalized Low-rank Projection
    for Efficient LLM Training <https://arxiv.org/abs/2412.19616>`_, 2024
  """
  _check.positive(scale=scale)
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


_static = functools.partial(dataclasses.field, metadata={'static': True})
_times = functools.partial(product, precision=None)  # that of the model


class Spectrum(NamedTuple):
  """The trained part of a matrix W = U S V^T (m, n) of k = min(m, n) singular values.

  Attributes:
    u: the drawn left vectors ``(*batch, m, rank)``.
    s: all singular values ``(*batch, k)``.
    v: the drawn right vectors ``(*batch, n, rank)``.
  """

  u: Any
  s: Any
  v: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenSpectrum:
  """What belongs to a `Spectrum` and is not trained.

  Attributes:
    u: all left vectors ``(*batch, m, k)``; the drawn ones are out of date.
    v: all right vectors ``(*batch, n, k)``.
    drawn: which vectors are trained, int32 ``(*batch, rank)``; joined float32.
    draws: draws since the last decomposition, int32 ().
    draws_per_svd: draws between two decompositions.
    enhanced: whether vectors get a gradient without their singular value.
  """

  u: Any
  v: Any
  drawn: Any
  draws: Any
  draws_per_svd: int = _static()
  enhanced: bool = _static()

  shape = property(lambda self: (*self.u.shape[:-1], self.v.shape[-2]))

  def one_hot(self, dtype: Any) -> jax.Array:
    """The drawn columns of the identity as rows, (*batch, rank, k)."""
    return jax.nn.one_hot(self.drawn.astype(int), self.u.shape[-1], dtype=dtype)


class Factors(NamedTuple):
  """The trained part of a matrix W0 + s I J (m, n).

  Attributes:
    i: ``(*batch, m, rank)``.
    j: ``(*batch, rank, n)``.
  """

  i: Any
  j: Any


# Not an attribute that may be None: Orbax would restore one from the other, silently.
class NormedFactors(NamedTuple):
  """`Factors` of a matrix whose columns have trained norms.

  Attributes:
    i: ``(*batch, m, rank)``.
    j: ``(*batch, rank, n)``.
    magnitude: the norms of the columns ``(*batch, n)``.
  """

  i: Any
  j: Any
  magnitude: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenFactors:
  """What belongs to `Factors` or `NormedFactors` and is not trained.

  Attributes:
    w: W0, ``(*batch, m, n)``.
    squares: sums over the columns of W0 of its squares ``(*batch, n)``, or None where
      norms are free.
    scale: what multiplies the columns of I, ``(*batch, rank)``.
    restart: whether `renew` adds the product to W0 and starts the factors anew.
  """

  w: Any
  squares: Any
  scale: Any
  restart: bool = _static()

  shape = property(lambda self: tuple(self.w.shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRankArray(np.lib.mixins.NDArrayOperatorsMixin):
  """A matrix that becomes dense where it is used, and no sooner.

  It stands for an array in ``x @ w``, ``jnp`` functions, arithmetic, ``w[...]``,
  ``w.astype``, ``w.T``, Flax's layers, `jax.lax.scan` over its leading axis and
  `jax.checkpoint`. Functions of `jax.lax` take arrays alone and raise: give them
  ``w[...]``.

  Attributes:
    trained: the trained part.
    frozen: the rest.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import low_rank
    >>> parts = low_rank.init(
    ...   {'kernel': jnp.ones((6, 4))}, jax.random.key(0), low_rank.lora(2)
    ... )
    >>> kernel = low_rank.join(*parts)['kernel']
    >>> kernel
    LowRankArray((6, 4), float32): dense as w[...] or jnp.asarray(w)
    >>> (jnp.ones((3, 6)) @ kernel).shape
    (3, 4)
  """

  trained: Any
  frozen: Any

  shape = property(lambda self: self.frozen.shape)
  dtype = property(lambda self: jax.tree.leaves(self.trained)[0].dtype)
  ndim = property(lambda self: len(self.shape))
  size = property(lambda self: math.prod(self.shape))
  T = property(lambda self: self.dense().T)
  mT = property(lambda self: self.dense().mT)

  def __repr__(self) -> str:
    try:
      about = f'{self.shape}, {self.dtype}'
    except AttributeError:  # leaves that are no arrays, while a tree is handled
      about = '...'
    return f'LowRankArray({about}): dense as w[...] or jnp.asarray(w)'

  def dense(self) -> jax.Array:
    """The matrix as an array of `shape` and `dtype`."""
    return _applied(None, self.trained, self.frozen).astype(self.dtype)

  __jax_array__ = dense

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.dense(), dtype)

  def __len__(self) -> int:
    return self.shape[0]

  def __iter__(self) -> Iterator[jax.Array]:
    return iter(self.dense())

  def __array_ufunc__(self, ufunc, method, *inputs, out=None):
    # Also Python's operators; in place, they give a new array as those of JAX do.
    arrays = [x.dense() if isinstance(x, LowRankArray) else x for x in inputs]
    return getattr(getattr(jnp, ufunc.__name__), method)(*arrays)

  def __getitem__(self, index: Any) -> jax.Array:
    return self.dense()[index]

  def astype(self, dtype: Any) -> jax.Array:
    return self.dense().astype(dtype)

  def reshape(self, *shape: Any) -> jax.Array:
    return self.dense().reshape(*shape)

  # To Flax linen it is one of its boxes, which compares what is inside with the shape
  # that a layer expects, and looks after axes of stacked layers.
  unbox = dense
  add_axis = remove_axis = lambda self, index, params: self


def _applied(x: jax.Array | None, trained: Any, frozen: Any) -> jax.Array:
  """x W for x (..., m), or W if x is None; in float32 or wider."""
  frozen = _constant(frozen)
  if isinstance(trained, Spectrum):
    hot = frozen.one_hot(trained.s.dtype)
    own = product('rk,k->r', hot, trained.s).astype(trained.s.dtype)
    # The stored vectors of what was drawn are out of date: the trained ones count.
    others = trained.s * (1 - hot.sum(-2))
    drawn = _enhanced if frozen.enhanced else _spectral
    rest = _spectral(x, frozen.u, others, frozen.v)
    return rest + drawn(x, trained.u, own, trained.v)
  i, j, *magnitude = trained
  change = _spectral(x, i, frozen.scale, jnp.matrix_transpose(j))
  whole = _left(x, frozen.w).astype(change.dtype) + change
  if not magnitude:
    return whole
  norms = _norms(_squares(whole)) if x is None else _norms_of_sum(trained, frozen)
  return _by_columns(whole, magnitude[0].astype(norms.dtype) / norms)


_INSIDE = (
  'In NNX, split the model and merge it inside the loss: nnx.Optimizer, which updates a'
  ' model in place, cannot train parts.'
)

# Without this, any optimizer would train what is frozen, and say nothing.
_constant = jax.custom_jvp(lambda frozen: frozen)


@_constant.defjvp
def _refused(primals, tangents):
  raise TypeError(
    'a gradient is taken of the frozen part of a LowRankArray: take it with respect to'
    f' `trained`, with `join` inside the loss. {_INSIDE}'
  )


def _left(x: jax.Array | None, w: jax.Array) -> jax.Array:
  """x W, or W if x is None."""
  return w if x is None else _times('m,mn->n', x, w)


def _spectral(
  x: jax.Array | None, u: jax.Array, s: jax.Array, v: jax.Array
) -> jax.Array:
  """x U S V^T, or U S V^T if x is None."""
  left = _by_columns(_left(x, u).astype(u.dtype), s)
  return _times('mk,nk->mn' if x is None else 'k,nk->n', left, v)


# The same with a gradient of the vectors that leaves out the values' magnitudes.
_enhanced = jax.custom_vjp(_spectral)


def _enhanced_backward(given, g):
  x, u, s, v = given
  # Values turn negative in training, and without its sign the gradient would too.
  sign = jnp.where(s < 0, -1, 1).astype(s.dtype)
  # Of both derivatives the compiler keeps what is used, and what they share once.
  of_x, _, of_s, _ = jax.vjp(_spectral, *given)[1](g)
  _, of_u, _, of_v = jax.vjp(_spectral, x, u, sign, v)[1](g)
  return of_x, of_u, of_s, of_v


_enhanced.defvjp(lambda *given: (_spectral(*given), given), _enhanced_backward)


def _by_columns(x: jax.Array, s: jax.Array) -> jax.Array:
  """Columns (*batch, m, n) or rows (..., n) times s (*batch, n)."""
  axes = tuple(range(s.ndim - 1, x.ndim - 1))
  return x * jnp.expand_dims(s, axes).astype(x.dtype)


def _squares(w: jax.Array) -> jax.Array:
  """Sums of squares of the columns (*batch, n), in float32 or wider."""
  return jnp.square(w.astype(accumulator(w.dtype))).sum(-2)


def _norms(squares: jax.Array) -> jax.Array:
  """Norms from their squares, 1 for a zero column."""
  return jnp.sqrt(jnp.where(squares > 0, squares, 1))


def _norms_of_sum(trained: NormedFactors, frozen: FrozenFactors) -> jax.Array:
  """The columns' norms of W0 + scale I J from products no larger than the factors."""
  wide = accumulator(trained.i.dtype)
  scaled = frozen.scale[..., None] * trained.j
  w, i, j = (x.astype(wide) for x in (frozen.w, trained.i, scaled))
  # Kept, as not every compiler sums squares without an array of them.
  squares = frozen.squares.astype(wide) + 2 * (product('mn,mr->rn', w, i) * j).sum(-2)
  squares += (product('rs,sn->rn', product('mr,ms->rs', i, i), j) * j).sum(-2)
  return _norms(squares)


def dot(x: jax.Array, w: Any) -> jax.Array:
  """``x @ w`` without the dense matrix, forwards or backwards.

  A matrix of SST is applied as three factors, one of `LoRA` as W0 and two thin factors.
  There is no dense gradient either; the derivative is that of ``x @ w``, with the
  enhanced gradient of SST. Where the number of rows of `x`
  is below the matrix's sides, this is cheaper than the dense form too.

  Args:
    x: an array (..., m).
    w: a `LowRankArray` without batch axes, as in the body of a scan, or an array.

  Returns:
    An array (..., n) in the dtype of `x`, in which all is computed.

  Raises:
    ValueError: if `w` has batch axes or another number of rows.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bsfa_optax import low_rank
    >>> parts = low_rank.init(
    ...   {'kernel': jnp.ones((6, 4))}, jax.random.key(0), low_rank.sst(2)
    ... )
    >>> low_rank.dot(jnp.ones((3, 6)), low_rank.join(*parts)['kernel']).shape
    (3, 4)
  """
  if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
    raise ValueError(
      f'dot takes x (..., m) and a matrix w (m, n), got {x.shape} and {w.shape}; scan'
      ' over the layers of a stack, or use jnp.einsum, which makes it dense.'
    )
  if not isinstance(w, LowRankArray):
    return x @ w.astype(x.dtype)
  real = lambda y: jnp.issubdtype(y.dtype, jnp.floating)
  own = jax.tree.map(lambda y: y.astype(x.dtype) if real(y) else y, w)
  frozen = own.frozen
  if isinstance(frozen, FrozenSpectrum):  # half precision has few whole numbers
    frozen = dataclasses.replace(frozen, drawn=w.frozen.drawn)
  return _applied(x, own.trained, frozen).astype(x.dtype)


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
    ``(trained, frozen)``: trees like `params`, with a `Spectrum`, `Factors` or
    `NormedFactors` in place of each chosen leaf of the first, and a `FrozenSpectrum` or
    `FrozenFactors` in the second, which has `optax.MaskedNode` elsewhere. Dtypes are
    the parameters'.

  Raises:
    TypeError: if `method` is none of these, `leaves` no function, a parameter neither
      an array nor a number, or split already.
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
  _matrices.check(method.rank, leaves, batch_axes)
  _check_key(key)
  if any(map(_is_part, jax.tree.leaves(params, is_leaf=_is_part))):
    raise TypeError('params are split already; give those of `merge` to split anew.')
  ranks = jax.tree.leaves(_matrices.ranks(params, method.rank, leaves, batch_axes))
  if not ranks:
    raise ValueError(f'params must have a matrix, got {params!r}.')
  _, given, treedef = _vectors.flatten(params)
  pairs = list(zip(given, ranks, strict=True))
  draws = max(math.ceil(min(w.shape[-2:]) / rank) for w, rank in pairs if rank)
  keys = iter(jax.random.split(key, sum(rank > 0 for rank in ranks)))

  def split(w, rank):
    if not rank:
      return w, optax.MaskedNode()
    if isinstance(method, _LoRA):
      squares = _squares(w) if method.column_norm else None
      norms = [] if squares is None else [_norms(squares).astype(w.dtype)]
      scale = jnp.full((*w.shape[:-2], rank), method.scale, w.dtype)
      scale = resharded(scale, w, (*spec_of(w)[:-2], None))
      kept = FrozenFactors(w, squares, scale, method.restart)
      return _factors(w, rank, next(keys), *norms), kept
    u, s, v = _svd(w)
    none = jnp.zeros((), jnp.int32)
    frozen = FrozenSpectrum(u, v, None, none, draws, method.enhanced)
    return _drawn(s, frozen, rank, next(keys))

  parts = [split(w, rank) for w, rank in pairs]
  trained, frozen = map(treedef.unflatten, zip(*parts, strict=True))
  return trained, frozen


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
  # Flax linen, where it is in use, is told that a `LowRankArray` is one of its boxes.
  if (meta := sys.modules.get('flax.core.meta')) is not None:
    meta.AxisMetadata.register(LowRankArray)

  def whole(t, f):
    if isinstance(f, FrozenSpectrum):
      # The count has no axis for a scan to take; whoever differentiates with respect to
      # all should get as far as the error that says what to do.
      f = dataclasses.replace(f, draws=None, drawn=f.drawn.astype(jnp.float32))
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
  return jax.tree.map(_exact, join(trained, frozen), is_leaf=_is_part)


def _exact(w: Any) -> Any:
  """A `LowRankArray` as an array, in full precision; all else as it is."""
  with jax.default_matmul_precision('highest'):
    return w.dense() if isinstance(w, LowRankArray) else w


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
  is_spectrum = lambda x: isinstance(x, Spectrum)

  def unit(x):
    norms = _norms(_squares(x))[..., None, :]
    return (x.astype(norms.dtype) / norms).astype(x.dtype)

  retracted = lambda x: Spectrum(unit(x.u), x.s, unit(x.v)) if is_spectrum(x) else x
  return jax.tree.map(retracted, trained, is_leaf=is_spectrum)


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
    An `optax.GradientTransformationExtraArgs` whose state is an `optax.PartitionState`:
    ``'vectors'`` has that for drawn singular vectors and thin factors, ``'values'`` for
    singular values, and ``'rest'`` for magnitudes and leaves that are trained as they
    are.

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
  _check.transformation(tx=tx, others=others)
  return optax.partition({'vectors': tx, 'values': others, 'rest': others}, _labels)


def _labels(params: Any) -> Any:
  """For each array which state of `renewable` it belongs to."""

  def label(x):
    if isinstance(x, LowRankArray):
      raise TypeError(
        'an optimizer got the result of `join`; give it `trained` and its gradients.'
        f' {_INSIDE}'
      )
    if isinstance(x, Spectrum):
      return Spectrum('vectors', 'values', 'vectors')
    if isinstance(x, Factors):
      return Factors('vectors', 'vectors')
    if isinstance(x, NormedFactors):
      return NormedFactors('vectors', 'vectors', 'rest')
    return 'rest'

  return jax.tree.map(label, params, is_leaf=_is_part)


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
  _check.transformation(tx=tx)
  _check_key(key)
  ours = lambda x: isinstance(x, optax.PartitionState) and 'vectors' in x.inner_states
  if not any(map(ours, jax.tree.leaves(state, is_leaf=ours))):
    raise TypeError(
      'renew needs the state of an optimizer wrapped as low_rank.renewable(tx), got'
      f' {type(state).__name__}; wrap it before its init.'
    )
  if _shapes(jax.eval_shape(tx.init, trained)) != _shapes(state):
    raise ValueError(
      'state is not that of tx for these parameters: another structure, shape or dtype;'
      ' give renew the optimizer that made it.'
    )
  due: dict[str, Any] = {'vectors': False, 'values': False}  # states to make anew
  treedef, pairs = _pairs(trained, frozen)
  renewed = []
  for number, (t, f) in enumerate(pairs):
    own = jax.random.fold_in(key, number)
    if isinstance(f, FrozenSpectrum):
      t, f = _redrawn(t, f, own)
      due = {'vectors': True, 'values': f.draws == 0}  # all have had as many draws
    elif isinstance(f, FrozenFactors) and f.restart:
      # Without the magnitudes, which are trained on: they norm the new W0 again.
      i, j, *magnitude = t
      dense = _exact(LowRankArray(Factors(i, j), f))
      squares = _squares(dense) if magnitude else None
      f = dataclasses.replace(f, w=dense, squares=squares)
      t = _factors(f.w, i.shape[-1], own, *magnitude)
      due |= {'vectors': True}
    renewed.append((t, f))
  new, new_frozen = map(treedef.unflatten, zip(*renewed, strict=True))

  def choose(old, start):
    if not ours(old):
      return old
    states = dict(old.inner_states)
    for name, now in due.items():
      fresh = _matrices.restarted(states[name], start.inner_states[name])
      if_due = functools.partial(jnp.where, now)
      states[name] = jax.tree.map(if_due, fresh, states[name])
    return optax.PartitionState(states)

  state = jax.tree.map(choose, state, tx.init(new), is_leaf=ours)
  return new, new_frozen, state


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
  _check.multiplier(learning_rate=learning_rate)
  _check.positive_int(every=every, steps=steps)
  if steps > every:
    raise ValueError(f'steps must be at most every ({every}), got {steps}.')

  rate = learning_rate if callable(learning_rate) else lambda count: learning_rate
  warm_up = optax.linear_schedule(1 / steps, 1.0, steps - 1)
  return lambda count: rate(count) * warm_up(jnp.mod(count, every))


def _shapes(tree: Any) -> tuple[Any, list[Any]]:
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype) for x in leaves]


def _check_key(key: Any) -> None:
  dtype: Any = getattr(key, 'dtype', None)
  if not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32):
    raise ValueError(f'key must be a random key, got {key!r}; as in jax.random.key(0).')


def _is_part(x: Any) -> bool:
  return isinstance(x, Spectrum | Factors | NormedFactors | LowRankArray)


def _pairs(trained: Any, frozen: Any) -> tuple[Any, list[tuple[Any, Any]]]:
  """The trained and frozen parts that belong together, and the tree they stand in."""
  names, parts, treedef = _vectors.flatten(trained, _is_part)
  try:
    others = treedef.flatten_up_to(frozen)
  except (ValueError, TypeError) as error:
    raise ValueError(
      'trained and frozen do not have one structure; give the two that `init` or'
      ' `renew` returned together.'
    ) from error
  for name, t, f in zip(names, parts, others, strict=True):
    if not _belong(t, f):
      raise ValueError(
        f'the trained and the frozen part of {name!r} do not belong together: a'
        ' checkpoint of another rank, method or shape? Restore both from one run, or'
        ' start with `init`.'
      )
  return treedef, list(zip(parts, others, strict=True))


def _belong(t: Any, f: Any) -> bool:
  if isinstance(t, Spectrum) and isinstance(f, FrozenSpectrum):
    (*batch, m, k), n, rank = f.u.shape, f.v.shape[-2], f.drawn.shape[-1]
    shapes = (*batch, m, rank), (*batch, k), (*batch, n, rank)
    return (t.u.shape, t.s.shape, t.v.shape) == shapes
  if isinstance(t, Factors | NormedFactors) and isinstance(f, FrozenFactors):
    (*batch, m, n), rank = f.w.shape, f.scale.shape[-1]
    norms = [(*batch, n)] * (f.squares is not None)
    return [x.shape for x in t] == [(*batch, m, rank), (*batch, rank, n), *norms]
  return not _is_part(t) and isinstance(f, optax.MaskedNode)


def _svd(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U, S, V, each matrix whole on its device, then split as its sides are."""
  u, s, vt = _matrices.each_matrix(_vectors.svd, w.astype(accumulator(w.dtype)))
  *batch, rows, columns = spec_of(w)
  u = resharded(u.astype(w.dtype), w, (*batch, rows, None))
  v = jnp.matrix_transpose(vt).astype(w.dtype)
  return u, s.astype(w.dtype), resharded(v, w, (*batch, columns, None))


def _drawn(
  s: jax.Array, frozen: FrozenSpectrum, rank: int, key: jax.Array
) -> tuple[Spectrum, FrozenSpectrum]:
  """Vectors drawn without replacement, with probabilities in proportion to |s|."""
  # The greatest of Gumbel noise plus log weights are a draw without replacement.
  noise = like(jax.random.gumbel(key, s.shape, jnp.float32), s)
  score = jnp.log(jnp.abs(s.astype(jnp.float32))) + noise
  frozen = dataclasses.replace(frozen, drawn=_matrices.greatest(score, rank))
  hot = frozen.one_hot(frozen.u.dtype)
  take = lambda x: product('mk,rk->mr', x, hot).astype(x.dtype)
  return Spectrum(take(frozen.u), s, take(frozen.v)), frozen


def _redrawn(
  t: Spectrum, f: FrozenSpectrum, key: jax.Array
) -> tuple[Spectrum, FrozenSpectrum]:
  """The trained vectors put back, decomposed anew if it is time, and others drawn."""
  hot = f.one_hot(t.u.dtype)
  others = (1 - hot.sum(-2))[..., None, :]
  put = lambda x, part: x * others + product('mr,rk->mk', part, hot).astype(x.dtype)
  as_it_is = lambda: (put(f.u, t.u), t.s, put(f.v, t.v))
  anew = lambda: _svd(_exact(LowRankArray(t, f)))
  draws = (f.draws + 1) % f.draws_per_svd
  u, s, v = lax.cond(draws == 0, anew, as_it_is)
  frozen = dataclasses.replace(f, u=u, v=v, draws=draws)
  return _drawn(s, frozen, f.drawn.shape[-1], key)


def _factors(w: jax.Array, rank: int, key: jax.Array, *magnitude: jax.Array) -> Any:
  """Those of a start: the second is zero, and so their product is."""
  i = _matrices.gaussian(key, jnp.matrix_transpose(w), rank)
  i = (i / math.sqrt(w.shape[-2])).astype(w.dtype)
  j = jnp.zeros_like(product('mr,mn->rn', i, w), w.dtype)  # split as a product is
  return NormedFactors(i, j, *magnitude) if magnitude else Factors(i, j)
