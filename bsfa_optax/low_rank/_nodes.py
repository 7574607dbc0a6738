"""Matrices in parts: what is trained, what is frozen, and how they become dense."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsfa_optax._vectors import accumulator
from bsfa_optax.low_rank import _matrices
from bsfa_optax.low_rank._matrices import product

_static = functools.partial(dataclasses.field, metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
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
    drawn: which vectors are trained, int32 ``(*batch, rank)``.
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

  def one_hot(self, dtype: Any) -> jax.Array:
    """The drawn columns of the identity as rows, (*batch, rank, k)."""
    return _matrices.one_hot(self.drawn, self.u.shape[-1], dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
  """The trained part of a matrix W0 + I J (m, n).

  Attributes:
    i: ``(*batch, m, rank)``.
    j: ``(*batch, rank, n)``.
    magnitude: the norms of the columns ``(*batch, n)``, or None where they are free.
  """

  i: Any
  j: Any
  magnitude: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenFactors:
  """What belongs to `Factors` and is not trained.

  Attributes:
    w: W0, ``(*batch, m, n)``.
    scale: what multiplies the product of the factors.
    restart: whether `renew` adds the product to W0 and starts the factors anew.
  """

  w: Any
  scale: float = _static()
  restart: bool = _static()


Trained = Spectrum | Factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRankArray:
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

  @property
  def shape(self) -> tuple[int, ...]:
    if isinstance(self.trained, Spectrum):
      return (*self.trained.u.shape[:-1], self.trained.v.shape[-2])
    return tuple(self.frozen.w.shape)

  @property
  def dtype(self) -> Any:
    part = self.trained.u if isinstance(self.trained, Spectrum) else self.frozen.w
    return part.dtype

  ndim = property(lambda self: len(self.shape))
  size = property(lambda self: int(np.prod(self.shape)))
  T = property(lambda self: self.dense().T)
  mT = property(lambda self: self.dense().mT)

  def __repr__(self) -> str:
    try:
      about = f'{self.shape}, {self.dtype}'
    except AttributeError:  # leaves that are no arrays, while a tree is handled
      about = '...'
    return f'LowRankArray({about}): dense as w[...] or jnp.asarray(w)'

  def dense(self, precision: Any = None) -> jax.Array:
    """The matrix as an array of `shape` and `dtype`."""
    trained, frozen = self.trained, self.frozen
    if isinstance(trained, Spectrum):
      others, own = _split_values(trained, frozen)
      whole = _spectral(None, frozen.u, others, frozen.v, False, precision)
      whole += _spectral(None, trained.u, own, trained.v, frozen.enhanced, precision)
      return whole.astype(self.dtype)
    change = product('mr,rn->mn', trained.i, trained.j, precision=precision)
    whole = frozen.w.astype(change.dtype) + frozen.scale * change
    if trained.magnitude is not None:
      ratio = trained.magnitude.astype(whole.dtype) / column_norms(whole)
      whole *= ratio[..., None, :]
    return whole.astype(self.dtype)

  __jax_array__ = dense
  __array_ufunc__ = None  # so that NumPy leaves its operators to this class

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


def _defer(name: str) -> None:
  def method(self, *others):
    others = tuple(x.dense() if isinstance(x, LowRankArray) else x for x in others)
    return getattr(operator, name)(self.dense(), *others)

  def reflected(self, other):
    return getattr(operator, name)(other, self.dense())

  setattr(LowRankArray, f'__{name}__', method)
  if name != 'neg':
    setattr(LowRankArray, f'__r{name}__', reflected)


for _name in ('add', 'sub', 'mul', 'truediv', 'matmul', 'pow', 'neg'):
  _defer(_name)


def known_to_linen() -> None:
  """Tells Flax linen, where it is in use, that a `LowRankArray` is a box."""
  if (meta := sys.modules.get('flax.core.meta')) is not None:
    meta.AxisMetadata.register(LowRankArray)


def column_norms(w: jax.Array) -> jax.Array:
  """Norms of columns (*batch, n), 1 for a zero column."""
  square = jnp.square(w).sum(-2)
  return jnp.sqrt(jnp.where(square > 0, square, 1))


def _split_values(
  trained: Spectrum, frozen: FrozenSpectrum
) -> tuple[jax.Array, jax.Array]:
  """Singular values with 0 for the drawn ones (*batch, k), and those (*batch, rank)."""
  hot = frozen.one_hot(trained.s.dtype)
  own = product('rk,k->r', hot, trained.s).astype(trained.s.dtype)
  return trained.s * (1 - hot.sum(-2)), own


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _spectral(
  x: jax.Array | None,
  u: jax.Array,
  s: jax.Array,
  v: jax.Array,
  enhanced: bool,
  precision: Any = None,
) -> jax.Array:
  """x U S V^T for x (..., m), or U S V^T if it is None; in float32 or wider."""
  return _spectral_forward(x, u, s, v, enhanced, precision)[0]


def _spectral_forward(x, u, s, v, enhanced, precision):
  lead = _lead(x)
  left = u
  if x is not None:
    left = product(f'{lead}m,mk->{lead}k', x, u, precision=precision).astype(u.dtype)
  out = _columns_times(left, s, lead)
  out = product(f'{lead}k,nk->{lead}n', out, v, precision=precision)
  return out, (x, u, s, v, left)


def _spectral_backward(enhanced, precision, kept, g):
  x, u, s, v, left = kept
  lead = _lead(x)
  multiply = functools.partial(product, precision=precision)
  g = g if precision is not None else g.astype(u.dtype)
  right = multiply(f'{lead}n,nk->{lead}k', g, v)
  over = tuple(range(-1 - len(lead), -1))
  values = (left.astype(right.dtype) * right).sum(over).astype(s.dtype)
  right = right if precision is not None else right.astype(u.dtype)
  # Values turn negative in training, and without its sign the gradient would too.
  weight = jnp.where(s < 0, -1, 1).astype(s.dtype) if enhanced else s
  of_u = _columns_times(right, weight, lead)
  of_v = multiply(f'{lead}n,{lead}k->nk', g, _columns_times(left, weight, lead))
  of_x = None
  if x is not None:
    of_u = multiply(f'{lead}m,{lead}k->mk', x, of_u)
    of_x = multiply(f'{lead}k,mk->{lead}m', _columns_times(right, s, lead), u)
    of_x = of_x.astype(x.dtype)
  return of_x, of_u.astype(u.dtype), values, of_v.astype(v.dtype)


def _lead(x: jax.Array | None) -> str:
  """Letters of all axes but the last; of a matrix for None."""
  return 'm' if x is None else 'abcdefgh'[: x.ndim - 1]


def _columns_times(x: jax.Array, s: jax.Array, lead: str) -> jax.Array:
  return x * jnp.expand_dims(s.astype(x.dtype), tuple(range(-1 - len(lead), -1)))


_spectral.defvjp(_spectral_forward, _spectral_backward)


def dot(x: jax.Array, w: Any) -> jax.Array:
  """``x @ w`` without the dense matrix, forwards or backwards.

  A matrix of SST is applied as three factors, one of `LoRA` as W0 and two thin factors.
  The derivative is written by hand, so that there is no dense gradient either; it is
  that of ``x @ w``, with the enhanced gradient of SST. Where the number of rows of `x`
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
  trained, frozen = jax.tree.map(
    lambda y: y.astype(x.dtype) if jnp.issubdtype(y.dtype, jnp.floating) else y,
    (w.trained, w.frozen),
  )
  if isinstance(trained, Spectrum):
    others, own = _split_values(trained, frozen)
    out = _spectral(x, frozen.u, others, frozen.v, False)
    out += _spectral(x, trained.u, own, trained.v, frozen.enhanced)
    return out.astype(x.dtype)
  lead = _lead(x)
  times = lambda y, z: product(f'{lead}m,mn->{lead}n', y, z, precision=None).astype(
    x.dtype
  )
  out = times(x, frozen.w) + frozen.scale * times(times(x, trained.i), trained.j)
  if trained.magnitude is not None:
    norms = _norms_of_sum(trained, frozen)
    out = _columns_times(out, trained.magnitude.astype(norms.dtype) / norms, lead)
  return out


def _norms_of_sum(trained: Factors, frozen: FrozenFactors) -> jax.Array:
  """The columns' norms of W0 + scale I J from products no larger than the factors."""
  wide = accumulator(trained.i.dtype)
  w, i, j = (x.astype(wide) for x in (frozen.w, trained.i, frozen.scale * trained.j))
  square = jnp.square(w).sum(-2) + 2 * (product('mn,mr->rn', w, i) * j).sum(-2)
  square += (product('rs,sn->rn', product('mr,ms->rs', i, i), j) * j).sum(-2)
  return jnp.sqrt(jnp.where(square > 0, square, 1))
