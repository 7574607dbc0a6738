"""A long run of the default on a small tree, and the drift of everything in it."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bsfa_optax
from bsfa_optax.whitening import inverse_square_root

CHUNK = 2500  # steps between two looks
RIDGE = 0.2  # the default
SHAPES = {'layers': {str(i): {'kernel': (12, 8)} for i in range(2)}}
SHAPES |= {'wide': {'kernel': (6, 20)}, 'bias': (8,)}
# What is not drift: rounding of float32.
LIMITS = {'trace': 1e-4, 'negative': 1e-5, 'root': 1e-3, 'norm': 1e-4}


def make_step():
  """Optimizer, parameters to begin with and a step: a noisy bowl that wanders."""
  make = lambda f: jax.tree.map(f, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
  weights = make(lambda s: jnp.logspace(0, -3, int(np.prod(s))).reshape(s))
  tx = bsfa_optax.bsfa_adamw(1e-3)

  def step(carry, number):
    params, state = carry
    gradient = jax.tree.map(
      lambda w, p, n: (
        w * (p - jnp.sin(2e-4 * number + jnp.arange(w.size).reshape(w.shape)) + 0.1 * n)
      ),
      weights,
      params,
      optax.tree.random_like(jax.random.fold_in(jax.random.key(0), number), params),
    )
    updates, state = tx.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), optax.tree.norm(gradient)

  return tx, make(jnp.zeros), step


@jax.jit
def filtered(state, updates):
  """By what the filter has learnt, with nothing added to it."""
  tx = bsfa_optax.scale_by_whitening(refresh_every=2**30)
  return tx.update(updates, state)[0]


def unpacked(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Covariance, below and on the diagonal, and root, above it, as whole matrices."""
  packed = np.asarray(packed, np.float64)
  swap = lambda x: np.swapaxes(x, -1, -2)
  lower, upper = np.tril(packed[..., :-1]), np.triu(packed[..., 1:])
  return lower + swap(np.tril(lower, -1)), upper + swap(np.triu(upper, 1))


def look(state, updates) -> dict[str, float]:
  """What may drift: each figure is 0 where nothing has."""
  found = next(x for x in state if isinstance(x, bsfa_optax.FilterState))
  leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
  figures = {'not finite': sum(not np.isfinite(x).all() for x in leaves)}
  figures |= {'trace': 0.0, 'negative': 0.0, 'root': 0.0}
  for packed in jax.tree.leaves([factors.packed for factors in found.memory]):
    covariance, root = unpacked(packed)
    values, vectors = np.linalg.eigh(covariance)
    mean = values.mean(-1, keepdims=True)
    regular = (values / mean + RIDGE)[..., None] * np.eye(values.shape[-1])
    powers = np.diagonal(inverse_square_root(np.float32(regular)), axis1=-2, axis2=-1)
    exact = (vectors * powers[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    apart = np.linalg.norm(root - exact, 2, axis=(-2, -1))
    trace = values.sum(-1)
    figures['trace'] = max(figures['trace'], float(np.abs(trace - 1).max()))
    figures['negative'] = max(figures['negative'], float(-values.min()))
    figures['root'] = max(figures['root'], float((apart / powers.max(-1)).max()))
  pairs = zip(
    jax.tree.leaves(filtered(found, updates)), jax.tree.leaves(updates), strict=True
  )
  ratios = [np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
  return figures | {'norm': max(abs(float(x) - 1) for x in ratios)}


def trials(count: int, done: list[dict], cache: Path) -> Iterator[dict]:
  """One result for each chunk of one run, which is kept beside the results."""
  path = cache.with_name(f'soak-{count}.npz')
  tx, params, step = make_step()
  carry = params, jax.jit(tx.init)(params)
  reported = number = sum(result['count'] for result in done)
  if number:
    with np.load(path) as saved:
      number = int(saved['number'])
      leaves = [jnp.asarray(saved[f'arr_{i}']) for i in range(len(saved.files) - 1)]
    carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
  chunk = jax.jit(lambda carry, numbers: jax.lax.scan(step, carry, numbers))
  while reported < count:
    size = min(CHUNK, count - number)
    carry, norms = chunk(carry, jnp.arange(number, number + size))
    number += size
    updates = jax.tree.map(jnp.cos, carry[0])
    figures = look(carry[1], updates)
    counts = {
      name: int(optax.tree.get(carry[1], name)) for name in ('count', 'filter_count')
    }
    figures['counters'] = max(abs(x - number) for x in counts.values())
    figures['counters'] += int(optax.tree.get(carry[1], 'skipped_updates'))
    wrong = [name for name, x in figures.items() if not x <= LIMITS.get(name, 0)]
    shown = ', '.join(f'{name} {x:.2g}' for name, x in figures.items())
    new = path.with_suffix('.new.npz')
    np.savez(new, *jax.tree.leaves(carry), number=number)
    new.replace(path)
    yield {
      'count': number - reported,
      'tally': {},
      'lost': len(wrong),
      'why': f'step {number}: {wrong} in {shown}',
      'line': f'step {number}: gradient {float(norms.mean()):.4f}; {shown}',
    }
    reported = number
