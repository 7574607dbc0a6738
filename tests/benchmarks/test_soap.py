"""The reference of SOAP against its authors' rule, written down in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.soap import scale_by_soap

B1, B2, EPS = 0.95, 0.95, 1e-8


def authors_rule(gradients, every):
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
  for g, expected in zip(gradients, authors_rule(gradients, every), strict=True):
    out, state = update({'w': jnp.asarray(g, jnp.float32)}, state)
    np.testing.assert_allclose(out['w'], expected, atol=2e-3)
