"""Shardings of optimizer state from those of the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax import P
from jax.sharding import AbstractMesh, AxisType, NamedSharding, Sharding
import optax


def abstract_state(
  tx: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> optax.OptState:
  """Shapes, dtypes and shardings of an optimizer's state: a target for Orbax.

  Args:
    tx: any Optax transformation; see `state_shardings`.
    params: the parameters, or anything with their structure, shapes and dtypes.
    shardings: as in `state_shardings`.

  Returns:
    ``tx.init(params)`` with ``jax.ShapeDtypeStruct`` leaves.

  Raises:
    ValueError: as `state_shardings`.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> sharding = jax.NamedSharding(mesh, jax.P('fsdp'))
    >>> kernel = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank=2, history=4))
    >>> target = bsfa_optax.abstract_state(tx, {'kernel': kernel})
    >>> target.estimator_state.basis['kernel'].rows
    ShapeDtypeStruct(shape=(2, 8, 4), dtype=float32, sharding=NamedSharding(...))
  """
  state = jax.eval_shape(tx.init, params)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    state_shardings(tx, params, shardings),
  )


def state_shardings(
  tx: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> optax.OptState:
  """Shardings of an optimizer's state: those of the parameters it is made from.

  A state leaf shaped like a parameter gets the parameter's sharding, a stack of
  rows the same behind an unsharded axis of rows, and what belongs to no parameter is
  replicated. It is worked out by tracing ``tx.init``, so any chain, mask, partition
  or wrapper of transformations will do; nothing is allocated.

  Args:
    tx: any Optax transformation whose `init` keeps shardings, as Optax's own do
      (but for ``optax.lbfgs``, whose memory comes out replicated).
    params: the parameters, or anything with their structure, shapes and dtypes.
    shardings: a tree like the parameters (or a prefix of it) with leaves
      ``jax.sharding.Sharding`` or ``jax.P`` (None: replicated). By default what the
      leaves of `params` have as ``sharding``.

  Returns:
    A tree like ``tx.init(params)`` of shardings: of ``jax.P`` if `shardings` has
    these, else of ``NamedSharding``. It is fit for ``out_shardings`` of a jitted
    `init`, which an auto mesh needs (there a traced value does not know its sharding).
    For parameters on a single device, every leaf is that device's sharding.

  Raises:
    ValueError: if there is no sharding, or shardings of two meshes or kinds.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> params = {'kernel': jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank=2, history=4))
    >>> specs = bsfa_optax.state_shardings(tx, params, {'kernel': jax.P('fsdp')})
    >>> specs.estimator_state.basis['kernel'].rows
    P(None, 'fsdp')
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> with jax.set_mesh(mesh):
    ...   state = jax.jit(tx.init, out_shardings=specs)(
    ...     {'kernel': jnp.ones((8, 4), device=jax.NamedSharding(mesh, jax.P('fsdp')))}
    ...   )
  """
  leaves, structure = jax.tree.flatten(params)
  given = _leaf_shardings(leaves, params, shardings)
  kinds = {_kind(s) for s in given if s is not None}
  meshes = {s.mesh for s in given if isinstance(s, NamedSharding)}
  others = {s for s in given if s is not None and _kind(s) is Sharding}
  if not kinds or len(kinds) > 1 or len(meshes) > 1 or len(others) > 1:
    found = sorted({str(s) for s in given})
    raise ValueError(
      'shardings must be all PartitionSpecs or all NamedShardings of one mesh, got'
      f' {found or None}; put the parameters on a mesh or give `shardings`.'
    )
  if others:
    (sharding,) = others
    return jax.tree.map(lambda _: sharding, jax.eval_shape(tx.init, params))

  specs = [_spec(s) for s in given]
  names = list(dict.fromkeys(name for spec in specs for name in _axis_names(spec)))
  # On explicit axes the trace itself follows shardings. Their size is not needed: with
  # 1, every shape divides.
  mesh = AbstractMesh(
    (1,) * len(names), tuple(names), axis_types=(AxisType.Explicit,) * len(names)
  )
  abstract = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    for x, spec in zip(leaves, specs, strict=True)
  ]
  use, no_mesh = jax.sharding.use_abstract_mesh, AbstractMesh((), ())
  with use(no_mesh), use(mesh):  # one of another size can only be set after none
    state = jax.eval_shape(tx.init, jax.tree.unflatten(structure, abstract))
  (target,) = meshes or (None,)
  explicit = target is not None and AxisType.Explicit in target.axis_types

  def sharding_of(x):
    spec = list(x.sharding.spec) if isinstance(x.sharding, NamedSharding) else []
    while spec and spec[-1] is None and not explicit:
      spec.pop()  # so does jit, and another spelling would compile a second time
    return NamedSharding(target, P(*spec)) if target else P(*spec)

  return jax.tree.map(sharding_of, state)


def _leaf_shardings(leaves: list[Any], params: Any, shardings: Any) -> list[Any]:
  if shardings is None:
    return [getattr(x, 'sharding', None) for x in leaves]
  out: list[Any] = []
  jax.tree.map(
    lambda s, sub: out.extend([s] * len(jax.tree.leaves(sub))),
    shardings,
    params,
    is_leaf=lambda x: x is None,
  )
  return out


def _kind(sharding: Any) -> type:
  kinds = (NamedSharding, P)
  return next((k for k in kinds if isinstance(sharding, k)), Sharding)


def _spec(sharding: NamedSharding | P | None) -> P:
  if isinstance(sharding, NamedSharding):
    return sharding.spec
  return P() if sharding is None else sharding


def _axis_names(spec: P) -> Iterator[str]:
  for entry in spec:
    if isinstance(entry, tuple):
      yield from entry
    elif entry is not None:
      yield entry
