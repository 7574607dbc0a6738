"""The reproductions that measure subspaces and curvature."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import llama, models, tasks
from benchmarks.literature import common, gauss_newton, overlap, subspaces
from benchmarks.literature.subspaces import dct, kronecker, matrices, pca, Watcher

pytestmark = pytest.mark.usefixtures('standard_promotion')


def tiny_mlp(rngs):
  return models.MLP((16, 6), 10, rngs=rngs)


def tiny_problem(folder):
  """Random images of 4 x 4 whose labels a random linear map gives."""
  del folder
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (64, 4, 4), np.uint8)
  scores = images.reshape(64, 16) @ rng.normal(size=(16, 10))
  labels = scores.argmax(1).astype(np.uint8)
  init, module = tasks.functional(tiny_mlp)

  def loss(params, batch):
    outputs = module(params)(tasks.normalized(batch['images']))
    return tasks.squared_error(outputs, batch['labels'])

  def batch(seed, step):
    chosen = np.random.default_rng([seed, step]).integers(0, 64, 8)
    return {'images': images[chosen], 'labels': labels[chosen]}

  return tasks.Problem(init, loss, batch, lambda params: {}, {'images': 64})


# Two chunks of 8 steps of the tiny network.
setting = functools.partial(
  overlap.Setting, build=tiny_problem, steps=(8, 16), batches=2, chunk=8
)


@pytest.mark.slow
def test_overlap_of_every_estimator_is_measured_and_saved_once(store):
  watchers = {
    'pca': Watcher(pca(2, history=8, decay=0.0, leaves=matrices), recent=True),
    'dct': Watcher(dct(2, leaves=matrices), recent=True),
  }
  adam = setting(
    'Adam', optimizer=optax.adam(1e-3), b2=0.999, rank=2, watchers=lambda _: watchers,
    blocks={'leaves': matrices},
  )  # fmt: skip
  settings = {'adam': adam}
  overlap.run(None, [0], store, settings)
  saved = store.load(common.collection('overlap'))
  result = saved['adam-0']
  assert [m['step'] for m in result['measured']] == [8, 16]
  entries = result['measured'][-1]['overlaps']
  assert {(e['source'], e['estimator']) for e in entries} == {
    (None, overlap.MINI_BATCH_HESSIAN),
    *((s, n) for s in overlap.SOURCES for n in ('pca', 'dct')),
  }
  for entry in entries:
    assert all(0 <= x <= 1 for x in entry['overlap'])
    assert len(entry['overlap']) == len(result['blocks']) == 2
    dominant = zip(entry['dominant'], result['sizes'], strict=True)
    assert all(0 < d < size for d, size in dominant)
  overlap.run(None, [0], store, settings)
  assert store.load(common.collection('overlap')) == saved


@pytest.mark.slow
def test_curvature_energy_is_measured(store):
  whole = pca(gauss_newton.RANK, history=8, **subspaces.WHOLE)
  sgd = setting(
    'SGD', optimizer=optax.sgd(0.1), b2=None, rank=10, blocks=subspaces.WHOLE,
    watchers=lambda _: {gauss_newton.GLOBAL_PCA: whole},
  )  # fmt: skip
  meter = functools.partial(gauss_newton.Meter, model=tiny_mlp)
  gauss_newton.run(None, [0], store, {'sgd': sgd}, meter)
  (result,) = store.load(common.collection('gauss-newton')).values()
  top, *others = result['measured'][-1]['subspaces']
  assert top['estimator'] == gauss_newton.HESSIAN
  for space in (top, *others):
    for matrix in gauss_newton.MATRICES:
      assert 0 <= space['energy'][matrix]['share'] <= 1
  # No space of as many dimensions holds more of it than the top one of the Hessian.
  share = lambda space: space['energy']['hessian']['share']
  same = [s for s in others if s['dominant'] <= gauss_newton.RANK]
  assert len(same) == 2
  assert share(top) > max(map(share, same)) - 0.02


@pytest.mark.slow
def test_recording_does_not_change_the_run():
  adam = setting('Adam', optimizer=optax.adam(1e-3), b2=0.999)
  problem = tiny_problem(None)
  chunk, *_ = overlap.chunks(problem, adam)(0)
  params = problem.init(0)
  state = adam.optimizer.init(params)
  for step in range(8):
    gradient = jax.grad(problem.loss)(params, problem.batch(0, step))
    updates, state = adam.optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, chunk.params, params)
  last = jax.tree.map(lambda x: x[-1], chunk.history)
  assert set(last) == set(overlap.SOURCES)
  jax.tree.map(close, last['updates'], updates)
  jax.tree.map(close, last['gradients'], gradient)


def test_what_an_update_chose_is_held():
  # The update has frequency 0 only, the vector to project has another one as well.
  update = jnp.ones((4, 8))
  ripple = jnp.tile(jnp.array([[1.0], [-1.0]]), (2, 8))

  @jax.jit
  def projected():
    project, sizes = subspaces.dominant(dct(1), optax.EmptyState(), update)
    return project(update + 3 * ripple), sizes

  result, sizes = projected()
  np.testing.assert_allclose(result, update, atol=1e-5)
  assert sizes == {'': 8}  # one column of the shorter axis for each of the longer


@pytest.mark.parametrize('estimator', [pca(3, history=4, decay=0.0), kronecker()])
def test_dominant_size_is_the_trace_of_the_projector(estimator):
  state = subspaces.unlearnt(estimator, jnp.zeros((5, 4)))
  updates = np.random.default_rng(0).normal(size=(4, 5, 4)) * [3.0, 2, 1, 0.1]
  updates = updates.astype(np.float32)
  state = subspaces.learner(estimator)(state, updates)
  assert state.count == 4

  @jax.jit
  def traces(memory, update):
    held, sizes = subspaces.dominant(estimator, memory, update)
    unit = np.eye(20, dtype=np.float32).reshape(20, 5, 4)
    return sizes, [
      jax.lax.map(lambda e, project=project: (project(e) * e).sum(), unit).sum()
      for project in (held, subspaces.projector(estimator, memory))
    ]

  sizes, found = traces(state.memory, updates[-1])
  np.testing.assert_allclose(found, sizes[''], rtol=1e-4)


@pytest.mark.slow
def test_sizes_are_by_name_where_leaves_alike_are_stacked():
  # The stack puts the two kernels of one shape side by side, before the third.
  rng = np.random.default_rng(0)
  shapes = {'0': (6, 5), '1': (4, 7), '2': (6, 5)}
  update = {name: {'kernel': rng.normal(size=s)} for name, s in shapes.items()}
  update = jax.tree.map(jnp.float32, update)
  names = [f'{name}/kernel' for name in shapes]
  assert dct(2).layout(update).names != names == pca(2).layout(update).names
  _, sizes = subspaces.dominant(dct(2), optax.EmptyState(), update)
  assert {name: int(sizes[name]) for name in names} == dict(
    zip(names, (12, 14, 12), strict=True)
  )


def test_output_layer_is_no_block_of_the_mlp():
  params = jax.eval_shape(lambda: tasks.functional(tasks.mlp)[0](0))
  blocks = subspaces.layout(params, leaves=subspaces.hidden)
  assert blocks.names == ['layers/0/kernel', 'layers/1/kernel']
  assert blocks.sizes == [784 * 200, 200 * 200]


def test_blocks_of_the_llama():
  make = lambda rngs: llama.Llama(
    llama.PRESETS['toy'].model._replace(layers=2), rngs=rngs
  )
  shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(0)))))
  kronecker_too = kronecker(leaves=subspaces.last_layer).layout(shapes)
  for blocks in subspaces.layout(shapes, leaves=subspaces.last_layer), kronecker_too:
    assert sorted(blocks.names) == [
      'head/kernel',
      'layers/1/attention/output/kernel',
      'layers/1/attention/query/kernel',
      'layers/1/mlp/down/kernel',
      'layers/1/mlp/up/kernel',
    ]
