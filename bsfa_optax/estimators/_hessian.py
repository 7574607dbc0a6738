"""Top eigenvectors of the loss's Hessian, block by block."""

from __future__ import annotations

from collections.abc import Callable
import functools
import inspect
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsfa_optax import _check, _curvature, _vectors
from bsfa_optax._learned import Decomposition, Estimator, from_rows, is_due, keep
from bsfa_optax._vectors import Layout, Vector


class HessianState(NamedTuple):
  """Memory of the `hessian_lanczos` estimator.

  Attributes:
    basis: orthonormal eigenvectors of each block, stacks (rank, *shape), in the storage
      dtype; zero rows where there is no direction.
    curvature: eigenvalue of each row of the basis, float (blocks, rank), descending; 0
      where there is no further positive one.
    is_known: whether there was a refresh, bool ().
  """

  basis: Any
  curvature: jax.Array
  is_known: jax.Array


def hessian_lanczos(
  rank: int = 10,
  *,
  iterations: int | None = None,
  refresh_every: int = 10,
  curvature: Literal['hessian', 'gauss_newton'] = 'hessian',
  storage_dtype: Any = None,
  leaves: _vectors.Predicate = None,
  labels: _vectors.Labels = None,
  batch_axes: _vectors.Axes = None,
) -> Estimator:
  r"""Eigenvectors of the loss's Hessian by the Lanczos method: the paper's LPE.

  The dominant directions of a block are the eigenvectors of the `rank` greatest
  positive eigenvalues of its diagonal block of the Hessian :math:`H` at the current
  parameters, or of the Gauss-Newton matrix
  :math:`G = J^\top \nabla^2_z \ell(z)\, J` for outputs :math:`z` with Jacobian
  :math:`J`. The loss comes with every update:

  * ``tx.update(grads, state, params, value_fn=value_fn)`` for the Hessian, where
    ``value_fn(params)`` is the loss;
  * ``tx.update(grads, state, params, output_fn=output_fn, loss_fn=loss_fn)`` for
    Gauss-Newton, where ``output_fn(params)`` are the outputs (any tree) and
    ``loss_fn(outputs)`` is the loss.

  As in `optax.scale_by_backtracking_linesearch`, further extra arguments that these
  functions have by name are handed to them. Update inside ``jax.jit``: an eager
  update compiles anew for every new function.

  The basis is refreshed at the first update and at every `refresh_every`-th after
  it. A refresh costs `iterations` Hessian-vector products, of about two gradients each,
  times the number of blocks, as each block's product is taken on its own; so the
  whole model as one block, ``labels='all'`` (any single label), is the cheapest form.
  Memory is `rank` rows of each block's size, and `iterations` more during a refresh,
  besides what one Hessian-vector product takes.

  The searched space holds the last eigenvectors and ``iterations - rank`` new
  directions, so the error shrinks from refresh to refresh as long as the Hessian moves
  slowly. The first one starts from a random vector, the same in every run; if the
  eigenvalues have no gap at `rank`, it takes some refreshes to settle. A Hessian that
  is not finite leaves the block's basis as it was.

  The graded filter is given eigenvalues relative to the least one that is kept, and 0
  for the rest: nothing is known of these but that they are less. So the least kept
  direction is scaled by 1, steeper ones by less, and the rest by gamma.

  In ``jax.shard_map`` parameters must be the same on all devices (data parallelism),
  and the loss must be averaged over them with ``jax.lax.pmean``. On the meshes of jit
  there is no restriction.

  Args:
    rank: directions to keep in each block (k).
    iterations: dimensions of the space searched at a refresh, more than `rank`; ``2 *
      rank`` by default. A block with no more entries than that is decomposed exactly.
    refresh_every: updates between two refreshes.
    curvature: ``'hessian'``, or ``'gauss_newton'``, which is never negative for a
      convex loss.
    storage_dtype: dtype of the stored rows; the parameters' own by default.
      Hessian-vector products are always in the dtype of the parameters.
    leaves: as in `bsfa_optax.pca`, like `labels` and `batch_axes`.
    labels: labels that group leaves into blocks.
    batch_axes: axes that index blocks within a leaf.

  Returns:
    An `Estimator`. It filters from the first update on.

  Raises:
    ValueError: for an option out of range, with its name, value and remedy; at
      ``update``, without parameters or the extra arguments above.

  Examples:
    Bulk-SGD, with the projector of the whole model's Hessian:

    >>> import jax, jax.numpy as jnp, optax
    >>> from bsfa_optax import bsfa, hessian_lanczos
    >>> estimator = hessian_lanczos(rank=1, labels='all')
    >>> tx = optax.chain(optax.sgd(1.0), bsfa(0.0, 1.0, estimator=estimator))
    >>> value_fn = lambda params: 0.5 * (4 * params['x'] ** 2 + params['y'] ** 2).sum()
    >>> @jax.jit
    ... def step(params, state):
    ...   grads = jax.grad(value_fn)(params)
    ...   updates, state = tx.update(grads, state, params, value_fn=value_fn)
    ...   return optax.apply_updates(params, updates), state
    >>> params = {'x': jnp.ones(1), 'y': jnp.ones(1)}
    >>> params, state = step(params, tx.init(params))
    >>> print(params['x'].round(3), abs(params['y']).round(3))
    [1.] [0.]
    >>> print(optax.tree.get(state, 'curvature').round(3))
    [[4.]]

  References:
    Zhou, Wang, Chen, Cheng, `BSFA: Leveraging the Subspace Dichotomy to Accelerate
    Neural Network Training <https://arxiv.org/abs/2510.25244>`_, 2025

    Song, Ahn, Yun, `Does SGD really happen in tiny subspaces?
    <https://arxiv.org/abs/2405.16002>`_, 2025

    Lanczos, `An iteration method for the solution of the eigenvalue problem of linear
    differential and integral operators <https://doi.org/10.6028/jres.045.026>`_, 1950
  """
  _check.positive_int(rank=rank)
  if iterations is None:
    iterations = 2 * rank
  _check.positive_int(iterations=iterations, refresh_every=refresh_every)
  _check.floating(storage_dtype=storage_dtype)
  if iterations <= rank:
    raise ValueError(
      f'iterations must exceed rank, got iterations={iterations} and rank={rank}; leave'
      ' it out for 2 * rank.'
    )
  _check.one_of('hessian', 'gauss_newton', curvature=curvature)
  names = ('value_fn',) if curvature == 'hessian' else ('output_fn', 'loss_fn')
  matrix = getattr(_curvature, curvature)

  layout_of = functools.partial(
    _vectors.layout, leaves=leaves, labels=labels, batch_axes=batch_axes
  )

  def init(layout, params):
    return HessianState(
      basis=_vectors.zeros(params, layout, rank, storage_dtype),
      curvature=_vectors.block_zeros(layout, rank, dtype=layout.dtype),
      is_known=jnp.zeros((), bool),
    )

  def learn(layout, vector, memory, count, params, **extra_args):
    functions = _functions(names, params, extra_args)

    def refresh(vector, memory, params):
      values = layout.select(params)
      old, structure = jax.tree.flatten(memory.basis)
      widened = lambda x, p: x.astype(_vectors.accumulator(p.dtype))
      found, basis = _curvature.top_eigenpairs(
        layout,
        matrix(layout, params, *functions),
        jax.tree.map(widened, old, values),
        iterations,
        jax.random.fold_in(jax.random.key(0), count),  # the same in every run
        # A product is as inexact as the parameters, whatever dtype it is stored in.
        tolerance=max(float(jnp.finfo(x.dtype).eps) for x in values),
      )
      # A block whose products are not finite keeps what it had; the others go on.
      finite = jnp.isfinite(found).all(1)
      found = jnp.where(finite[:, None], jnp.maximum(found, 0), memory.curvature)
      kept = jax.tree.map(
        lambda ok, new, x: jnp.where(ok[None], new.astype(x.dtype), x),
        _vectors.spread(layout, finite),
        basis,
        old,
      )
      return HessianState(
        basis=jax.tree.unflatten(structure, kept),
        curvature=found.astype(memory.curvature.dtype),
        is_known=jnp.ones((), bool),
      )

    due = is_due(count - 1, refresh_every)  # the first update is one
    return jax.lax.cond(due, refresh, keep, vector, memory, params)

  return Estimator(layout_of, init, learn, _decompose)


def _decompose(layout: Layout, vector: Vector, memory: HessianState) -> Decomposition:
  kept = memory.curvature > 0
  least = jnp.where(kept, memory.curvature, jnp.inf).min(1, keepdims=True)
  relative = jnp.where(kept, memory.curvature / least, 0)
  none = jnp.zeros_like(relative[:, 0])
  basis = jax.tree.leaves(memory.basis)
  return from_rows(layout, vector, basis, relative, none, memory.is_known)


def _functions(
  names: tuple[str, ...], params: Any, extra_args: dict[str, Any]
) -> list[Callable[..., Any]]:
  """The named extra arguments, each given those others that it has by name."""
  call = ', '.join(f'{name}={name}' for name in names)
  missing = [name for name in names if not callable(extra_args.get(name))]
  missing += ['params'] if params is None else []
  if missing:
    raise ValueError(
      f'hessian_lanczos needs {" and ".join(missing)} in every update, got'
      f' {extra_args.get(missing[0])!r}; call tx.update(grads, state, params, {call}).'
    )
  masked = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(masked, jax.tree.leaves(params, is_leaf=masked))):
    raise ValueError(
      f'hessian_lanczos needs all parameters to call {" and ".join(names)}, got some'
      ' masked; instead of optax.masked or optax.partition, name the leaves to be'
      ' filtered with leaves=lambda name, leaf: ....'
    )
  functions: list[Callable[..., Any]] = []
  for name in names:
    known = inspect.signature(extra_args[name]).parameters
    own = {k: v for k, v in extra_args.items() if k in known}
    functions.append(functools.partial(extra_args[name], **own))
  return functions
