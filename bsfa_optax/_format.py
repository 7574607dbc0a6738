"""What an optimizer's state looks like, to keep beside a checkpoint of it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

# To be raised when the state's leaves change their meaning under the same names.
VERSION = 1


def state_format(state: optax.OptState) -> dict[str, Any]:
  """The layout of an optimizer's state, to be saved beside it.

  Args:
    state: the state, concrete or abstract (as of `abstract_state`); any tree will do.

  Returns:
    A dictionary fit for JSON: the version of the format of this package's states, and
    dtype and shape of each leaf by its path.

  Examples:
    >>> import bsfa_optax, jax.numpy as jnp
    >>> tx = bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank=2, history=4))
    >>> saved = bsfa_optax.state_format(tx.init(jnp.ones((3, 5))))
    >>> saved['leaves']['estimator_state/basis/rows']
    'float32[2,3,5]'
  """
  leaves = {}
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    leaves[name] = f'{np.dtype(x.dtype)}[{",".join(map(str, x.shape))}]'
  return {'version': VERSION, 'leaves': leaves}


def check_state_format(saved: dict[str, Any], state: optax.OptState) -> None:
  """Raises unless a checkpoint's state has the layout of `state`.

  To be called before a checkpoint is read: Orbax casts to the dtype that it is asked
  for without a word, and its error for another shape does not name the leaf.

  Args:
    saved: what `state_format` gave for the saved state.
    state: the state to restore, concrete or abstract (as of `abstract_state`).

  Raises:
    ValueError: naming each leaf that differs, or the version.

  Examples:
    >>> import bsfa_optax, jax, jax.numpy as jnp
    >>> make = lambda rank: bsfa_optax.bsfa(estimator=bsfa_optax.pca(rank, history=4))
    >>> saved = bsfa_optax.state_format(make(2).init(jnp.ones((3, 5))))
    >>> state = jax.eval_shape(make(3).init, jnp.ones((3, 5)))
    >>> bsfa_optax.check_state_format(saved, state)
    Traceback (most recent call last):
    ValueError: the checkpoint is of an optimizer with other options ...
      estimator_state/basis/rows: saved float32[2,3,5], expected float32[3,3,5]
      estimator_state/variance: saved float32[1,2], expected float32[1,3]
  """
  if saved['version'] != VERSION:
    raise ValueError(
      f'the checkpoint has version {saved["version"]} of the state format, and this'
      f' bsfa_optax reads version {VERSION}; restore it with the release that wrote it,'
      ' or restore the parameters alone and initialise the optimizer anew.'
    )
  old, new = saved['leaves'], state_format(state)['leaves']
  differences = [
    f'  {name}: saved {old.get(name, "nothing")}, expected {new.get(name, "nothing")}'
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]
  if differences:
    raise ValueError(
      'the checkpoint is of an optimizer with other options (rank, history, dtypes,'
      ' estimator, blocks, order of the chain); build it as it was saved. What'
      ' differs:\n' + '\n'.join(differences)
    )
