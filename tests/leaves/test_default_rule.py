"""Which leaves are filtered without being told, in the frameworks' own trees."""

import equinox as eqx
from flax import linen, nnx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest

import bsfa_optax
from bsfa_optax import estimators, state

VOCABULARY, WIDTH, HEADS, FEEDFORWARD = 32, 8, 2, 24


def chosen(params, **options):
  """The names of the filtered leaves."""
  layout = estimators.layout(params, **options)
  return {leaf.name for leaf in layout.leaves if leaf.filtered}


def why(params):
  return {leaf.name: leaf.why for leaf in estimators.layout(params).leaves}


class NNXLlama(nnx.Module):
  def __init__(self, rngs, feedforward=FEEDFORWARD):
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.layers = nnx.List([NNXLayer(rngs, feedforward) for _ in range(2)])
    self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.output = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)


class NNXLayer(nnx.Module):
  def __init__(self, rngs, feedforward):
    self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)
    linear = lambda m, n: nnx.Linear(m, n, use_bias=False, rngs=rngs)
    self.gate, self.up = linear(WIDTH, feedforward), linear(WIDTH, feedforward)
    self.down = linear(feedforward, WIDTH)


def nnx_params(feedforward=FEEDFORWARD):
  """Shapes alone: nothing is compiled."""
  model = nnx.eval_shape(lambda: NNXLlama(nnx.Rngs(0), feedforward))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize('feedforward', [FEEDFORWARD, VOCABULARY])
def test_nnx(feedforward):
  # With a feed-forward width of the vocabulary's length shapes alone would mislead.
  params = nnx_params(feedforward)
  attention = [f'attention/{x}/kernel' for x in ('query', 'key', 'value', 'out')]
  matrices = [*attention, 'gate/kernel', 'up/kernel', 'down/kernel']
  assert chosen(params) == {f'layers/{i}/{m}' for i in range(2) for m in matrices}
  reasons = why(params)
  assert reasons['embed/embedding'] == 'table of embeddings'
  assert reasons['output/kernel'].startswith('output layer')
  # Biases of attention have an axis of heads.
  assert reasons['layers/0/attention/query/bias'] == 'bias or scale'


class LinenLlama(linen.Module):
  @linen.compact
  def __call__(self, tokens):
    x = linen.Embed(VOCABULARY, WIDTH)(tokens)
    for _ in range(2):
      x = LinenLayer()(x, None)[0]
    return linen.Dense(VOCABULARY)(linen.LayerNorm()(x))


class LinenLayer(linen.Module):
  @linen.compact
  def __call__(self, x, _):
    x = x + linen.MultiHeadDotProductAttention(HEADS)(linen.LayerNorm()(x))
    h = linen.Dense(FEEDFORWARD)(x) * linen.Dense(FEEDFORWARD)(x)
    return x + linen.Dense(WIDTH)(h), None


class ScannedLlama(linen.Module):
  @linen.compact
  def __call__(self, tokens):
    x = linen.Embed(VOCABULARY, WIDTH)(tokens)
    layers = linen.scan(
      LinenLayer, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    )
    x, _ = layers(name='layers')(x, None)
    return linen.Dense(VOCABULARY, name='logits')(linen.LayerNorm()(x))


MATRICES = {
  *(
    f'MultiHeadDotProductAttention_0/{x}/kernel'
    for x in ('query', 'key', 'value', 'out')
  ),
  *(f'Dense_{i}/kernel' for i in range(3)),
}


def parameters(model):
  tokens = jnp.zeros((1, 4), int)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))['params']


def test_linen_with_automatic_names():
  params = parameters(LinenLlama())
  expected = {f'LinenLayer_{i}/{m}' for i in range(2) for m in MATRICES}
  assert chosen(params) == expected


def test_linen_scanned():
  params = parameters(ScannedLlama())
  scanned = lambda p: jax.tree.map_with_path(
    lambda path, _: 0 if path[0].key == 'layers' else None, p
  )
  assert chosen(params, batch_axes=scanned) == {f'layers/{m}' for m in MATRICES}


class EquinoxLlama(eqx.Module):
  embedding: eqx.nn.Embedding
  layers: list
  norm: eqx.nn.RMSNorm
  head: eqx.nn.Linear

  def __init__(self, key):
    self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=key)
    self.layers = [EquinoxLayer(key) for _ in range(2)]
    self.norm = eqx.nn.RMSNorm(WIDTH)
    self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=key)


class EquinoxLayer(eqx.Module):
  attention: eqx.nn.MultiheadAttention
  norm: eqx.nn.LayerNorm
  up: eqx.nn.Linear
  down: eqx.nn.Linear

  def __init__(self, key):
    self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key)
    self.norm = eqx.nn.LayerNorm(WIDTH)
    self.up = eqx.nn.Linear(WIDTH, FEEDFORWARD, key=key)
    self.down = eqx.nn.Linear(FEEDFORWARD, WIDTH, key=key)


def test_equinox():
  # It calls tables and projections alike `weight`.
  model = eqx.filter_eval_shape(EquinoxLlama, jax.random.key(0))
  params = eqx.filter(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
  parts = [f'attention/{x}_proj' for x in ('query', 'key', 'value', 'output')]
  matrices = [*parts, 'up', 'down']
  expected = {f'layers/{i}/{m}/weight' for i in range(2) for m in matrices}
  assert chosen(params) == expected


class Scaled(eqx.Module):
  weight: jax.Array
  scale: float


@pytest.mark.usefixtures('standard_promotion')
def test_equinox_model_given_whole():
  model = Scaled(jnp.ones((8, 8)), 0.5)
  assert chosen(model) == {'weight'}
  tx = bsfa_optax.bsfa_adamw(1e-3)
  updates, _ = jax.jit(tx.update)(model, tx.init(model), model)
  assert optax.apply_updates(model, updates).scale < 0.5
  # Of this one the activation is no parameter.
  network = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
  for tx in bsfa_optax.scale_by_whitening(), bsfa_optax.bsfa_adamw(1e-3):
    with pytest.raises(TypeError, match=r"'activation'; .* equinox\.filter\(model"):
      tx.init(network)


def test_haiku():
  def forward(tokens):
    start = hk.initializers.VarianceScaling()
    x = hk.Embed(VOCABULARY, WIDTH)(tokens)
    for _ in range(2):
      x = x + hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=start)(x, x, x)
      x = x + hk.Linear(WIDTH)(hk.Linear(FEEDFORWARD)(x))
    return hk.Linear(VOCABULARY, name='logits')(x)

  tokens = jnp.zeros((1, 4), int)
  params = jax.eval_shape(hk.transform(forward).init, jax.random.key(0), tokens)
  found = chosen(params)
  assert all(name.endswith('/w') for name in found)
  assert len(found) == 2 * 6
  assert not any('logits' in name or 'embed' in name for name in found)


def test_gpt2_in_a_plain_dict():
  layer = {
    'attn': {'c_attn': {'w': jnp.ones((8, 24)), 'b': jnp.ones(24)}},
    'mlp': {'c_fc': {'w': jnp.ones((8, 32)), 'b': jnp.ones(32)}},
    'ln_1': {'g': jnp.ones(8), 'b': jnp.ones(8)},
  }
  params = {'wte': jnp.ones((32, 8)), 'wpe': jnp.ones((16, 8)), 'h': [layer] * 2}
  expected = {f'h/{i}/{m}/w' for i in range(2) for m in ('attn/c_attn', 'mlp/c_fc')}
  assert chosen(params) == expected
  assert why(params)['wpe'] == 'positions'


@pytest.mark.parametrize(
  ('name', 'shape', 'filtered'),
  [
    ('embed/kernel', (48, 8), True),  # a projection of patches, not a table
    ('embed/embedding', (48, 8), False),
    ('patch_embed/weight', (8, 48), True),
    ('embed/weight', (48, 8), False),
    ('pos_embedding', (1, 16, 8), False),
    ('attention/output/kernel', (8, 8), True),
    ('head/kernel', (8, 10), False),
    ('lm_head/weight', (32, 8), False),
    ('router/kernel', (8, 4), False),
    ('layers/moe/gate/kernel', (64, 4), False),
    ('layers/mlp/gate/kernel', (8, 24), True),
    ('conv/kernel', (3, 3, 1, 16), False),  # a channel each
    ('conv/kernel', (3, 3, 8, 16), True),
    ('query/kernel', (64, 1, 32), True),  # one head
    ('stacked/bias', (4, 8), False),
    ('norm/scale', (4, 8), False),
    ('w', (8, 1), False),
  ],
)
def test_traps_of_names(name, shape, filtered):
  tree = jnp.ones(shape)
  for part in reversed(name.split('/')):
    tree = {part: tree}
  assert chosen(tree) == ({name} if filtered else set())


def test_nameless_networks_have_no_output_layer_that_could_be_told():
  # Documented: name the leaves instead.
  params = [jnp.ones((8, 8)), jnp.ones(8), jnp.ones((8, 4))]
  assert chosen(params) == {'0', '2'}
  assert chosen(params, leaves=lambda name, _: name == '0') == {'0'}


def test_the_default_equals_the_labelled_run():
  params = nnx_params()
  labelled = bsfa_optax.scale_by_whitening(
    leaves=lambda name, leaf: 'layers' in name and name.endswith('kernel')
  )

  def program(**options):
    tx = bsfa_optax.bsfa_adamw(1e-3, **options)
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update).lower(params, state, params).as_text()

  assert program() == program(filter=labelled)


def test_summary_says_what_is_filtered_and_why():
  params = nnx_params()
  tx = bsfa_optax.bsfa_adamw(1e-3)
  table = bsfa_optax.summary(tx, params)
  rows = {row.name: row for row in table.leaves}
  assert rows['embed/embedding'].why == 'table of embeddings'
  assert rows['layers/0/up/kernel'].memory == ((1, 8, 9), (1, 24, 25))
  assert rows['layers/0/up/kernel'].memory_bytes == 4 * (8 * 9 + 24 * 25 + 1)
  assert table.state_bytes == state.state_bytes(tx, params)
  assert 'layers/1/down/kernel' in str(table)
