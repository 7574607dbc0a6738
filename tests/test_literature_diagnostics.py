"""The reproductions of benchmarks/literature/ that measure subspaces and curvature."""

import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import models, tasks
from benchmarks.literature import gauss_newton, overlap
from bsfa_optax import dct, diagnostics, kronecker, pca

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


@pytest.fixture
def small(monkeypatch):
  """Two chunks of 8 steps of a tiny network, and few estimators."""
  monkeypatch.setattr(overlap, 'CHUNK', 8)
  monkeypatch.setattr(tasks, 'mlp', tiny_mlp)
  chosen = {
    'pca': overlap.Watcher(pca(2, history=8, decay=0.0), recent=True),
    'dct': overlap.Watcher(dct(2), recent=True),
  }
  monkeypatch.setattr(overlap, 'watchers', lambda blocks: chosen)
  whole = pca(gauss_newton.RANK, history=8, blocks='all')
  monkeypatch.setattr(gauss_newton, 'WATCHERS', {gauss_newton.GLOBAL_PCA: whole})
  make = functools.partial(
    overlap.Setting, build=tiny_problem, steps=(8, 16), batches=2
  )
  adam = make('Adam', optimizer=optax.adam(1e-3), b2=0.999, rank=2)
  monkeypatch.setattr(overlap, 'SETTINGS', {'adam': adam})
  sgd = make('SGD', optimizer=optax.sgd(0.1), b2=None, rank=10, blocks='all')
  monkeypatch.setattr(gauss_newton, 'SETTINGS', {'sgd': sgd})


def test_overlap_of_every_estimator_is_measured_and_saved_once(small, tmp_path):
  overlap.run(tmp_path, [0], tmp_path)
  path = tmp_path / 'overlap' / 'adam-0.json'
  result, before = json.loads(path.read_text()), path.stat().st_mtime_ns
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
  overlap.run(tmp_path, [0], tmp_path)
  assert path.stat().st_mtime_ns == before


def test_curvature_energy_is_measured_and_drawn(small, tmp_path):
  gauss_newton.run(tmp_path, [0], tmp_path)
  result = json.loads((tmp_path / 'gauss-newton' / 'sgd-0.json').read_text())
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
  gauss_newton.plot(tmp_path, tmp_path)
  assert (tmp_path / 'literature-gauss-newton.png').stat().st_size > 10_000


def test_held_projector_projects_on_what_the_update_chose():
  # The update has frequency 0 only, the vector to project has another one as well.
  estimator = dct(1)
  update = jnp.ones((4, 8))
  ripple = jnp.tile(jnp.array([[1.0], [-1.0]]), (2, 8))

  @jax.jit
  def projected():
    state = optax.EmptyState()
    masks = overlap.dominant_masks(estimator, state, update)
    project = overlap.held_projector(estimator, masks, state)
    size = overlap.dominant_size(estimator, masks, state, update)
    return project(update + 3 * ripple), size

  result, size = projected()
  np.testing.assert_allclose(result, update, atol=1e-5)
  assert size.tolist() == [8]  # one column of the shorter axis for each of the longer


@pytest.mark.parametrize('estimator', [pca(3, history=4, decay=0.0), kronecker()])
def test_dominant_size_is_the_trace_of_the_projector(estimator):
  state = estimator.init(jnp.zeros((5, 4)))
  updates = np.random.default_rng(0).normal(size=(4, 5, 4)) * [3.0, 2, 1, 0.1]
  updates = updates.astype(np.float32)
  state = overlap.learner(estimator)(state, updates)

  @jax.jit
  def traces(state, update):
    masks = overlap.dominant_masks(estimator, state, update)
    held = overlap.held_projector(estimator, masks, state)
    unit = np.eye(20, dtype=np.float32).reshape(20, 5, 4)
    return overlap.dominant_size(estimator, masks, state, update), [
      jax.lax.map(lambda e, project=project: (project(e) * e).sum(), unit).sum()
      for project in (held, diagnostics.projector(estimator, state))
    ]

  (size,), found = traces(state, updates[-1])
  np.testing.assert_allclose(found, size, rtol=1e-4)


def test_output_layer_is_no_block_of_the_mlp():
  params = jax.eval_shape(lambda: tasks.functional(tasks.mlp)[0](0))
  blocks = diagnostics.partition(params, overlap.hidden)
  assert blocks.names == ['hidden layer 0', 'hidden layer 1']
  assert blocks.sizes == [784 * 200, 200 * 200]


def test_blocks_of_the_llama():
  make = lambda rngs: overlap.Llama(
    overlap.PRESETS['toy'].model._replace(layers=2), rngs=rngs
  )
  shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(0)))))
  names = diagnostics.partition(shapes, overlap.last_layer).names
  assert sorted(names) == [
    'attention.output', 'attention.query', 'head', 'mlp.down', 'mlp.up',
  ]  # fmt: skip
