"""Bad updates at random steps leave a finite state, and training goes on."""

from collections.abc import Iterator
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bsfa_optax
from bsfa_optax import projected, scale_by_whitening

RATE = 0.05
STEPS, FAULTY = 60, slice(5, 35)  # all steps, and those with faults among them
FAULTS = ('none', 'NaN', 'Inf', 'huge', 'tiny', 'zero', 'rank one')
BATCH = 90  # runs of one transformation in one call
SHAPES = {'layers': {str(i): {'kernel': (6, 4)} for i in range(2)}}
SHAPES |= {'deep': {'kernel': (5, 3, 2)}, 'bias': (4,)}


def tree_of(make):
  """A tree of the task's shapes, of what `make(shape)` gives."""
  return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def filters() -> dict[str, optax.GradientTransformation]:
  """Of updates as they come."""
  bsfa, sgd = bsfa_optax.bsfa, optax.sgd(RATE)
  kronecker, pca, dct = bsfa_optax.kronecker, bsfa_optax.pca, bsfa_optax.dct
  hessian = functools.partial(bsfa_optax.hessian_lanczos, 2, iterations=4)
  graded = {'alpha': 0.1, 'gamma': 4.0, 'exponent': 0.5, 'grafting': True}
  estimators = {
    'kronecker': kronecker(),
    'kronecker, no decay': kronecker(decay=0.0, refresh_every=1),
    'kronecker, bfloat16': kronecker(storage_dtype=jnp.bfloat16),
    'pca, gram': pca(3, 6, solver='gram', storage_dtype=None),
    'pca, randomized': pca(2, 6, solver='randomized', storage_dtype=None),
    'pca, no decay': pca(3, 4, decay=0.0),
    'pca, one block': pca(3, 6, labels='all'),
    'pca, bfloat16': pca(3, 6, storage_dtype=jnp.bfloat16),
    'dct': dct(2),
    'Hessian': hessian(),
    'Gauss-Newton': hessian(curvature='gauss_newton'),
  }
  made = {}
  for name, estimator in estimators.items():
    made[f'bsfa: {name}'] = bsfa(estimator=estimator)
    made[f'bsfa, graded: {name}'] = bsfa(**graded, estimator=estimator)
  del made['bsfa, graded: Gauss-Newton']
  return made | {
    'bsfa, alpha 0, grafting': bsfa(0.0, 1.0, grafting=True),
    'bsfa, no bulk': bsfa(1.0, 0.0),
    'whitening': scale_by_whitening(),
    'whitening, small ridge': scale_by_whitening(1e-3, refresh_every=1),
    'whitening, no memory': scale_by_whitening(decay=0.0),
    'whitening, blocks': scale_by_whitening(block_size=2),
    'interpolated': bsfa_optax.interpolated(sgd, 0.5, 1.0, threshold=0.3),
    'split': bsfa_optax.split_by_subspace(
      pca(3, 6), optax.scale(-RATE / 2), optax.scale(-RATE)
    ),
    'accelerate': bsfa_optax.accelerate(sgd, history=optax.identity()),
  }


def optimizers() -> dict[str, optax.GradientTransformation]:
  """With moments of their own, which no NaN may enter: guarded as Optax has it."""
  made = {
    'bsfa_adamw': bsfa_optax.bsfa_adamw(RATE / 2.8),
    'bsfa_adamw, two levels': bsfa_optax.bsfa_adamw(
      RATE, filter=bsfa_optax.bsfa(), step_length=1.0
    ),
    'adamw, pca': optax.chain(
      optax.adamw(RATE), bsfa_optax.bsfa(estimator=bsfa_optax.pca(3, 6))
    ),
    'galore': projected.galore(4 * RATE, 2, refresh_every=10),
    'fira': projected.fira(4 * RATE, 2, refresh_every=10),
    'frugal': projected.frugal(RATE, 0.5, refresh_every=10),
    'dct_adamw': projected.dct_adamw(RATE, 2),
  }
  return {
    name: optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(10.0), tx), 1000)
    for name, tx in made.items()
  }


def all_finite(tree) -> jax.Array:
  kinds = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.stack([jnp.isfinite(x).all() for x in kinds]).all()


def spoilt(gradient, fault: jax.Array, key: jax.Array):
  """A gradient with one of `FAULTS`."""

  def leaf(g, key):
    entry = jax.random.randint(key, (), 0, g.size)
    one = jnp.arange(g.size).reshape(g.shape) == entry
    rows = g.reshape(g.shape[0], -1)
    rank_one = (rows[:, :1] * rows[:1]).reshape(g.shape)
    rank_one *= optax.safe_norm(g, 0.0) / optax.safe_norm(rank_one, 1e-9)
    return jnp.stack(
      [
        g,
        jnp.where(one, jnp.nan, g),
        jnp.where(one, jnp.inf, g),
        g * 1e30,
        g * 1e-30,
        jnp.zeros_like(g),
        rank_one,
      ]
    )[fault]

  leaves, structure = jax.tree.flatten(gradient)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, map(leaf, leaves, keys))


def runner(tx, ascends: bool):
  """`faults (runs, STEPS), keys (runs,) -> ` figures of each run, each `(runs,)`.

  The task: a noisy parabola, steepest along the first coordinates.
  """
  tx = optax.with_extra_args_support(tx)
  target = tree_of(lambda shape: jnp.sin(jnp.arange(np.prod(shape))).reshape(shape))
  scale = tree_of(
    lambda shape: (1 + 3.0 * (jnp.arange(np.prod(shape)) < 3)).reshape(shape)
  )

  def outputs(params):
    return jax.tree.map(lambda p, t, s: s**0.5 * (p - t), params, target, scale)

  def loss(params):
    return 0.5 * optax.tree.norm(outputs(params), squared=True)

  def one(faults, key):
    params = tree_of(jnp.zeros)

    def step(carry, now):
      params, state, finite = carry
      fault, key = now
      first, second = jax.random.split(key)
      gradient = jax.tree.map(
        lambda g, n: g + 0.1 * n,
        jax.grad(loss)(params),
        optax.tree.random_like(first, params),
      )
      bad = spoilt(gradient, fault, second)
      updates, state = tx.update(
        bad,
        state,
        params,
        value_fn=loss,
        output_fn=outputs,
        loss_fn=lambda outputs: 0.5 * optax.tree.norm(outputs, squared=True),
      )
      fine = all_finite(updates) & (optax.tree.norm(updates) < 1e3)
      # What is finite and of an ordinary size must not become anything else.
      promised = jnp.isin(fault, jnp.array([0, 4, 5, 6]))
      finite &= all_finite(state) & (fine | ~promised)
      sign = -RATE if ascends else 1.0
      params = jax.tree.map(
        lambda p, u: p + sign * jnp.where(fine, u, 0), params, updates
      )
      return (params, state, finite), loss(params)

    carry = params, tx.init(params), jnp.array(True)
    keys = jax.random.split(key, STEPS)
    (_, _, finite), losses = jax.lax.scan(step, carry, (faults, keys))
    return {'finite': finite, 'middle': losses[FAULTY.stop - 1], 'end': losses[-1]}

  return jax.jit(lambda *schedules: jax.lax.map(lambda x: one(*x), schedules))


def trials(count: int, done: list[dict], cache: Path) -> Iterator[dict]:
  """One result for each batch of runs, the transformations in turn."""
  del cache
  # Optax's sign: these descend by themselves, a filter of gradients does not.
  descends = ('interpolated', 'split', 'accelerate')
  made = [(name, tx, name not in descends) for name, tx in filters().items()]
  made += [(name, tx, False) for name, tx in optimizers().items()]
  number = sum(result['count'] for result in done)
  for position, (name, tx, ascends) in enumerate(made, start=1):
    end = count * position // len(made)
    run = runner(tx, ascends)
    while number < end:
      size = min(BATCH, end - number)
      yield batch(name, run, number, size)
      number += size


def batch(name: str, run, seed: int, size: int) -> dict:
  """A run without a fault, which others are measured by, and `size` runs with."""
  rng = np.random.default_rng(seed)
  faults = np.zeros((BATCH + 1, STEPS), np.int32)
  hit = rng.random((BATCH, STEPS)) < rng.choice([0.05, 0.3, 1.0], (BATCH, 1))
  drawn = rng.integers(1, len(FAULTS), (BATCH, STEPS))
  faults[1:, FAULTY] = np.where(hit, drawn, 0)[:, FAULTY]
  keys = jax.random.split(jax.random.key(seed), BATCH + 1)
  figures = jax.device_get(run(faults, keys))
  clean = figures['end'][0]
  end, middle = figures['end'][1 : size + 1], figures['middle'][1 : size + 1]
  # The noise has a floor: where it is reached, nothing is left to be gained.
  goes_on = (end < 0.9 * middle) | (end < 2 * clean)
  finite = figures['finite'][1 : size + 1]
  lost = ~(finite & goes_on)
  return {
    'count': size,
    'tally': {name: size},
    'lost': int(lost.sum()),
    'why': f'{name}, batch {seed}: {int((~finite).sum())} not finite,'
    f' {int((~goes_on).sum())} do not go on',
    'figures': [float(x) for x in (clean, np.median(middle), end.max())],
  }
