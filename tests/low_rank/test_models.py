"""Joined parameters in models: Flax, Equinox, plain products, scan, checkpoint."""

import functools

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsfa_optax import low_rank, projected

METHODS = {'sst': low_rank.sst(2), 'normed': low_rank.lora(2, column_norm=True)}
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)

pytestmark = pytest.mark.usefixtures('standard_promotion')


def same_gradient(model_of, params, method, **options):
  """The model's value and the parts' gradient, from joined and from dense matrices."""
  trained, frozen = low_rank.init(params, KEY, method, **options)

  def loss(trained, make):
    return jnp.sum(jnp.sin(model_of(make(trained, frozen))))

  got, expected = (
    jax.jit(jax.value_and_grad(lambda t, make=make: loss(t, make)))(trained)
    for make in (low_rank.join, low_rank.merge)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(got[1]))
  return trained, frozen


class Model(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(11, 8, rngs=rngs)
    self.first = nnx.Linear(8, 6, rngs=rngs)
    self.second = nnx.LinearGeneral(6, (8,), rngs=rngs)
    self.third = nnx.Einsum('bi,io->bo', (8, 4), rngs=rngs)

  def __call__(self, x):
    x = x + self.embed(jnp.arange(x.shape[0]))
    return self.third(self.second(jax.nn.tanh(self.first(x))))


@pytest.mark.slow
def test_nnx():
  graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
  trained, _ = same_gradient(
    lambda params: nnx.merge(graph, params)(X),
    params,
    METHODS['sst'],
    leaves=lambda name, leaf: leaf.ndim == 2,
  )
  parts = jax.tree.leaves(
    trained, is_leaf=lambda x: isinstance(x, low_rank.Spectrum | low_rank.Factors)
  )
  assert sum(not isinstance(x, jax.Array) for x in parts) == 4


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = jax.nn.tanh(nn.Dense(6)(x))
    return nn.DenseGeneral(4)(x)


@pytest.mark.slow
def test_linen():
  model = Linen()
  params = model.init(KEY, X)
  same_gradient(lambda params: model.apply(params, X), params, METHODS['sst'])


@pytest.mark.slow
def test_equinox():
  model = eqx.nn.MLP(8, 4, 6, 1, key=KEY)
  params, static = eqx.partition(model, eqx.is_inexact_array)
  same_gradient(
    lambda params: jax.vmap(eqx.combine(static, params))(X), params, METHODS['sst']
  )


class Stacked(nn.Module):
  @nn.compact
  def __call__(self, x):
    block = nn.remat(nn.Dense, prevent_cse=False)
    layers = nn.scan(
      lambda dense, x, _: (x + jax.nn.tanh(dense(x)), None),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=3,
    )
    return layers(block(8, name='layer'), x, None)[0]


@pytest.mark.slow
def test_linen_scan():
  model = Stacked()
  params = model.init(KEY, X)
  batch_axes = lambda name, leaf: 1
  same_gradient(
    lambda params: model.apply(params, X),
    params,
    METHODS['normed'],
    batch_axes=batch_axes,
  )


@pytest.mark.slow
def test_linen_in_half_precision():
  model = nn.Dense(6, dtype=jnp.bfloat16)
  trained, frozen = low_rank.init(model.init(KEY, X), KEY, METHODS['sst'])
  assert model.apply(low_rank.join(trained, frozen), X).dtype == jnp.bfloat16


USES = {
  'matmul': lambda w: X @ w,
  'numpy': lambda w: np.asarray(X) @ w,
  'einsum': lambda w: jnp.einsum('bi,io->bo', X, w),
  'dot': lambda w: jnp.dot(X, w),
  'dot_general': lambda w: lax.dot_general(X, w[...], (((1,), (0,)), ((), ()))),
  'transposed': lambda w: w.T @ X.T,
  'left': lambda w: w @ jnp.ones((4, 2)),
  'cast': lambda w: X.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
  'arithmetic': lambda w: 2 * w + w / 3 - (1 - w) * w**2 - (-w),
  'rows': lambda w: w[jnp.array([1, 3])],
  'reshaped': lambda w: w.reshape(2, 16),
  'matrices transposed': lambda w: w.mT,
  'in a loop': lambda w: jnp.stack([*w]),
  'as NumPy has it': lambda w: np.asarray(w),
  'vmap': lambda w: jax.vmap(lambda row: row @ w)(X),
  'checkpoint': lambda w: jax.checkpoint(lambda w: jnp.tanh(X @ w))(w),
}


@functools.cache
def dense_and_joined():
  w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)
  return w, low_rank.join(*low_rank.init({'w': w}, KEY, METHODS['sst']))['w']


@pytest.mark.parametrize('use', USES.values(), ids=USES)
def test_uses(use):
  w, joined = dense_and_joined()
  np.testing.assert_allclose(use(joined), use(w), rtol=0.02, atol=1e-4)
  assert (joined.shape, joined.ndim, joined.size, len(joined)) == ((8, 4), 2, 32, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'product'),
  [('sst', low_rank.dot), ('normed', jnp.matmul)],
)
def test_scanned_and_rematerialised_layers(name, product):
  params = {'layers': jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 8)))}
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)

  def model(params):
    block = jax.checkpoint(lambda x, w: (x + jnp.tanh(product(x, w)), None))
    return lax.scan(block, X, params['layers'])[0]

  same_gradient(model, params, METHODS[name], batch_axes=1)


def test_functions_of_lax_name_the_remedy():
  parts = low_rank.init({'w': jnp.ones((8, 4))}, KEY, METHODS['sst'])
  w = low_rank.join(*parts)['w']
  with pytest.raises(ValueError, match=r'explicitly convert your object'):
    lax.dot_general(X, w, (((1,), (0,)), ((), ())))


@pytest.mark.parametrize('name', METHODS)
def test_an_optimizer_in_place_names_the_remedy(name):
  graph, params = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param)
  parts = low_rank.init(params, KEY, METHODS[name])
  model = nnx.merge(graph, low_rank.join(*parts))
  tx = low_rank.renewable(optax.adam(0.1))
  remedy = 'split the model and merge it inside the loss'
  with pytest.raises(TypeError, match=remedy):
    nnx.Optimizer(model, tx, wrt=nnx.Param)
  nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)  # knows nothing of parts
  with pytest.raises(TypeError, match=f'with respect to `trained`.*{remedy}'):
    nnx.grad(lambda model: model(X).sum())(model)


@pytest.mark.slow
def test_projected_in_an_nnx_optimizer():
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, projected.galore(0.01, 2), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: jnp.square(m(X) - 1).sum())(model)
    optimizer.update(model, grads)
    return loss

  losses = [step(model, optimizer) for _ in range(8)]
  assert losses[-1] < losses[0]
  state = jax.tree.leaves(nnx.state(optimizer))
  assert sum(x.size for x in state) < 3 * sum(
    x.size for x in jax.tree.leaves(nnx.state(model))
  )


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    lambda tx: optax.masked(tx, {'layer': True, 'bias': False}),
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.partition(
      {'a': tx, 'b': optax.sgd(0.1)}, {'layer': 'a', 'bias': 'b'}
    ),
  ],
  ids=['MultiSteps', 'masked', 'apply_if_finite', 'partition'],
)
def test_projected_in_wrappers(wrap):
  params = {'layer': {'kernel': jnp.ones((8, 4))}, 'bias': jnp.ones(4)}
  tx = wrap(projected.frugal(0.1, 2, refresh_every=2))
  state = tx.init(params)
  step = jax.jit(tx.update, donate_argnums=1)
  for i in range(4):
    grads = jax.tree.map(lambda x, i=i: x * jnp.cos(i + jnp.arange(4.0)), params)
    updates, state = step(grads, state, params)
    params = optax.apply_updates(params, updates)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
  assert np.abs(params['layer']['kernel'] - 1).max() > 0.01
