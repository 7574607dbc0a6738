"""The references of rivals against their authors' rules, written down in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contenders, rivals, runs, tasks
from benchmarks.soap import scale_by_soap

B1, B2, EPS = 0.95, 0.95, 1e-8


def soaps_rule(gradients, every):
  """As in their code: the mean is kept in the bases, and carried over as they turn."""
  shape = gradients[0].shape
  mean, square = np.zeros(shape), np.zeros(shape)
  left, right = np.zeros((shape[0],) * 2), np.zeros((shape[1],) * 2)
  q_left = q_right = None
  out, step = [], 0

  def learn(g):
    nonlocal left, right
    left, right = B2 * left + (1 - B2) * g @ g.T, B2 * right + (1 - B2) * g.T @ g

  for g in gradients:
    if q_left is None:
      learn(g)
      q_left, q_right = (np.linalg.eigh(c)[1][:, ::-1] for c in (left, right))
      out.append(np.zeros(shape))
      continue
    step += 1
    rotated = q_left.T @ g @ q_right
    mean = B1 * mean + (1 - B1) * rotated
    square = B2 * square + (1 - B2) * rotated**2
    corrected = np.sqrt(1 - B2**step) / (1 - B1**step)
    direction = corrected * mean / (np.sqrt(square) + EPS)
    out.append(q_left @ direction @ q_right.T)
    original = q_left @ mean @ q_right.T
    learn(g)
    if step % every == 0:
      order = np.argsort(-np.diag(q_left.T @ left @ q_left))
      square, q_left = square[order], np.linalg.qr(left @ q_left[:, order])[0]
      order = np.argsort(-np.diag(q_right.T @ right @ q_right))
      square, q_right = square[:, order], np.linalg.qr(right @ q_right[:, order])[0]
    mean = q_left.T @ original @ q_right
  return out


@pytest.mark.parametrize('every', [1, 3])
def test_soap_follows_its_authors_rule(every):
  rng = np.random.default_rng(0)
  gradients = [rng.normal(size=(5, 5)) for _ in range(8)]
  # The first has distinct singular values: else its bases would be arbitrary.
  left, right = (np.linalg.qr(g)[0] for g in gradients[:2])
  gradients[0] = left @ np.diag([5.0, 4.0, 3.0, 2.0, 1.0]) @ right
  tx = scale_by_soap(B1, B2, EPS, refresh_every=every)
  update = jax.jit(tx.update)
  state = tx.init({'w': jnp.zeros((5, 5))})
  for g, expected in zip(gradients, soaps_rule(gradients, every), strict=True):
    out, state = update({'w': jnp.asarray(g, jnp.float32)}, state)
    np.testing.assert_allclose(out['w'], expected, atol=2e-3)


# The rules of the others are for outputs by inputs, our gradients the other way round.


def newton_schulz(x, coefficients, steps):
  a, b, c = coefficients
  x = x / np.linalg.norm(x)
  for _ in range(steps):
    square = x @ x.T
    x = a * x + (b * square + c * square @ square) @ x
  return x


def muons(x):
  return newton_schulz(x, (3.4445, -4.7750, 2.0315), 5)


def of_rms(x, size=0.2):
  return size * x * np.sqrt(x.size) / np.linalg.norm(x)


def normuons_rule(gradients, b1=0.95, b2=0.95):
  """Algorithm 1 of the paper, with the Nesterov momentum of the authors' code."""
  mean, square = np.zeros_like(gradients[0]), np.zeros(len(gradients[0]))
  for g in gradients:
    mean += (1 - b1) * (g - mean)
    x = muons((1 - b1) * g + b1 * mean)
    square += (1 - b2) * ((x**2).mean(1) - square)
    yield of_rms(x / (np.sqrt(square)[:, None] + 1e-10))


def asgos_rule(gradients, b1=0.9, b2=0.8, eps=1e-10):
  """`optimizers/asgo.py` of the authors, with the exact root."""
  mean = np.zeros_like(gradients[0])
  rows, columns = mean.shape
  covariance = np.zeros((min(rows, columns),) * 2)
  for g in gradients:
    mean = b1 * mean + (1 - b1) * g
    product = g @ g.T if rows < columns else g.T @ g
    covariance = b2 * covariance + (1 - b2) * product
    left, values, _ = np.linalg.svd(covariance + eps * np.eye(len(covariance)))
    root = left @ np.diag(values**-0.5) @ left.T
    yield of_rms(root @ mean if rows < columns else mean @ root)


def soap_muons_rule(gradients, b1=0.95, b2=0.9, eps=1e-8):
  """The description of pull request 278, with new bases at every step as in 321."""
  mean, square = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
  rows, columns = 0, 0
  q_rows = q_columns = None
  for g in gradients:
    mean = b1 * mean + (1 - b1) * g
    u = (1 - b1) * g + b1 * mean
    if q_rows is not None:
      inner = q_rows.T @ u @ q_columns
      square = b2 * square + (1 - b2) * inner**2
      scaled = q_rows @ (inner / (np.sqrt(square) + eps)) @ q_columns.T
      u = scaled * np.linalg.norm(u) / np.linalg.norm(scaled)
    yield of_rms(newton_schulz(u, (2, -1.5, 0.5), 12))
    rows = b2 * rows + (1 - b2) * g @ g.T
    columns = b2 * columns + (1 - b2) * g.T @ g
    if q_rows is None:
      q_rows, q_columns = (np.linalg.eigh(c)[1][:, ::-1] for c in (rows, columns))
      continue
    order = np.argsort(-np.diag(q_rows.T @ rows @ q_rows))
    square, q_rows = square[order], np.linalg.qr(rows @ q_rows[:, order])[0]
    order = np.argsort(-np.diag(q_columns.T @ columns @ q_columns))
    square = square[:, order]
    q_columns = np.linalg.qr(columns @ q_columns[:, order])[0]


def kls_rule(gradients, adam, b1=0.95, b2=0.95, eps=1e-8):
  """`optim/kl_opt.py` of the authors: it keeps the inverse roots of the eigenvalues."""
  g = gradients[0]
  m, n = g.shape
  left, right = (1 - b2) * g @ g.T / n, (1 - b2) * g.T @ g / m
  q_left, q_right = (np.linalg.eigh(c)[1][:, ::-1] for c in (left, right))
  size = np.sqrt((g**2).mean())  # the authors': 0.1
  d_left, d_right = size**-0.5 * np.ones(m), size**-0.5 * np.ones(n)
  mean, square = np.zeros((m, n)), np.zeros((m, n))  # KL-SOAP's are in the bases
  yield np.zeros((m, n))
  clamp = lambda d: np.minimum(d, max(10, min(len(d), 4000)))
  for g in gradients[1:]:
    inner = q_left.T @ g @ q_right
    if adam:
      mean = b1 * mean + (1 - b1) * inner
      square = b2 * square + (1 - b2) * inner**2
      yield q_left @ (mean / (np.sqrt(square) + eps)) @ q_right.T
      original = q_left @ mean @ q_right.T
    else:
      mean = b1 * mean + (1 - b1) * g
      scale = d_left[:, None] * d_right
      scale = scale / (1 + scale * eps)
      yield q_left @ (q_left.T @ mean @ q_right * scale) @ q_right.T
    half = g @ q_right * d_right
    left = b2 * left + (1 - b2) * half @ half.T / n
    half = d_left[:, None] * (q_left.T @ g)
    right = b2 * right + (1 - b2) * half.T @ half / m
    of_left, of_right = (
      ((inner * d_right) ** 2).mean(1),
      ((inner * d_left[:, None]) ** 2).mean(0),
    )
    d_left = clamp((b2 * d_left**-2 + (1 - b2) * of_left) ** -0.5)
    d_right = clamp((b2 * d_right**-2 + (1 - b2) * of_right) ** -0.5)
    q_left, q_right = np.linalg.qr(left @ q_left)[0], np.linalg.qr(right @ q_right)[0]
    if adam:
      mean = q_left.T @ original @ q_right


def cosmos_rule(gradients, b1=0.95, b2=0.95, eps=1e-8, rank=64, gamma=0.2):
  """`COSMOS_optim.py` of the authors: its mean is a sum."""
  m, n = gradients[0].shape
  total, square = np.zeros((m, n)), 0
  for t, g in enumerate(gradients, 1):
    total = b1 * total + g
    if t == 1:
      p = np.linalg.svd(g.T @ g)[0][:, : min(rank, n // 2)]
      s = (1 - b2) * p.T @ g.T @ g @ p
    else:
      old = p
      p = np.linalg.qr(b2 * p @ s + (1 - b2) * g.T @ g @ p)[0]
      turn = old.T @ p
      s = b2 * turn.T @ s @ turn + (1 - b2) * (g @ p).T @ (g @ p)
    square = b2 * square + (1 - b2) * (g @ p) ** 2
    u = (g + b1 * total) / (1 + b1 * (1 - b1**t) / (1 - b1))
    leading = u @ p
    adam = leading / (np.sqrt(square) / np.sqrt(1 - b2**t) + eps) @ p.T
    yield of_rms(adam + gamma * of_rms(muons(u - leading @ p.T), 1))


RULES = {
  'normuon': (normuons_rule, rivals.normuon()),
  'asgo': (asgos_rule, rivals.asgo()),
  'soap-muon': (soap_muons_rule, rivals.soap_muon()),
  'kl-shampoo': (lambda g: kls_rule(g, False), rivals.kl_shampoo()),
  'kl-soap': (lambda g: kls_rule(g, True), rivals.kl_shampoo(adam=True)),
  'cosmos': (cosmos_rule, rivals.cosmos()),
}


# One more row or column: of a first gradient with more, eigenvectors are arbitrary.
@pytest.mark.parametrize('shape', [(5, 4), (4, 5)])
@pytest.mark.parametrize('name', RULES)
def test_rival_follows_its_authors_rule(name, shape):
  rng = np.random.default_rng(0)
  gradients = [0.01 * rng.normal(size=shape) for _ in range(8)]
  rule, tx = RULES[name]
  update = jax.jit(tx.update)
  state = tx.init({'w': jnp.zeros(shape)})
  expected = rule([g.T for g in gradients])
  for g, direction in zip(gradients, expected, strict=True):
    out, state = update({'w': jnp.asarray(g, jnp.float32)}, state)
    np.testing.assert_allclose(out['w'], direction.T, atol=2e-3)


def test_schedule_free_is_evaluated_at_its_mean(tiny):
  """The rule of the paper, with the rate that stays after its warm-up."""
  task = tasks.TASKS[tiny]._replace(clip=None)
  problem = task.build(None)
  trainer = runs.TaskTrainer(task, problem, contenders.find('schedule-free'))
  rate, steps, b1, b2 = 0.1, 20, 0.9, task.b2
  options = {'rate': jnp.float32(rate), 'steps': jnp.float32(steps)}
  carry = trainer.start(0, options)
  x = z = np.eye(4)
  target, square, total = np.linspace(-1, 1, 16).reshape(4, 4), 0, 0
  for k in range(steps):
    batch = problem.batch(0, k)
    carry, _ = trainer.step(carry, batch, options)
    y = b1 * x + (1 - b1) * z
    g = 2 / batch.size * batch.T @ batch @ (y - target)
    square = b2 * square + (1 - b2) * g**2
    adam = g / np.sqrt(square / (1 - b2 ** (k + 1)))
    z = z - rate * min(1, k / 2) * (adam + task.weight_decay * y)
    weight = (rate * min(1, (k + 1) / 2)) ** 2
    total += weight
    x = x + weight / total * (z - x)
  (evaluated,) = jax.tree.leaves(trainer.params(carry))
  np.testing.assert_allclose(evaluated, x, atol=1e-4)
