"""Operations counted in traced programs."""

import jax
import jax.numpy as jnp

from benchmarks import cost
import bsfa_optax


def counted(function, *arguments):
  return cost.operations(jax.jit(function).trace(*arguments).jaxpr.jaxpr)


def test_products_loops_and_branches():
  a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
  assert counted(jnp.matmul, a, b) == (120, 120)
  square = jnp.ones((4, 4))
  loop = lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y @ square, x)
  assert counted(loop, square) == (3 * 128, 3 * 128)
  branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)
  assert counted(branch, square) == (0, 128)
  assert counted(jnp.linalg.eigh, square).most == 9 * 4**3


def test_whitening_of_one_matrix(standard_promotion):
  m, n = 8, 6
  tx = bsfa_optax.scale_by_whitening()
  params = jnp.ones((m, n))
  found = counted(tx.update, params, tx.init(params), params)
  apply = 2 * m * n * (m + n)
  assert found.least == apply
  # Two moments, and three products for each root.
  assert found.most == 2 * apply + 6 * (m**3 + n**3)


def test_default_costs_at_most_3_percent_of_a_training_step(standard_promotion):
  shape = cost.SHAPES['LLaMA-134M']
  params = shape.params()
  tx = cost.OPTIMIZERS['bsfa']()
  found = counted(tx.update, params, jax.eval_shape(tx.init, params), params)
  assert found.amortised() < 0.03 * shape.training_operations(cost.TOKENS)
