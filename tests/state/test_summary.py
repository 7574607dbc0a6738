"""What is said of an optimizer's state before there is one."""

import jax
import jax.numpy as jnp

import bsfa_optax
from bsfa_optax.state import block_names


def test_names_are_found_however_often_init_was_traced():
  params = {'dense': {'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3))}}
  tx = bsfa_optax.bsfa_adamw(1e-3)
  jax.jit(tx.init)(params)  # JAX does not trace it again
  for _ in range(2):
    assert block_names(tx, params) == ['dense/kernel']
    assert len(bsfa_optax.summary(tx, params).leaves) == 2
