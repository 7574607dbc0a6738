"""Updates lower for accelerators that are not here."""

import jax
import jax.numpy as jnp
import pytest

import bsfa_optax
from bsfa_optax import dct, kronecker, pca

ESTIMATORS = {
  'gram': pca(rank=3, history=4, solver='gram'),
  'randomized': pca(rank=3, history=4, solver='randomized'),
  'window': pca(rank=3, history=4, decay=0.0, centered=True, sample_every=2),
  'kronecker': kronecker(),
  'kronecker_axes': kronecker(axes=-1),
  'dct': dct(rank=3),
}
CALLBACKS = ('callback', 'infeed', 'outfeed', 'SendToHost', 'RecvFromHost')


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', ESTIMATORS)
def test_update_lowers_for_accelerators(name, dtype):
  tx = bsfa_optax.bsfa(estimator=ESTIMATORS[name])
  params = {
    'kernel': jax.ShapeDtypeStruct((8, 12), dtype),
    'bias': jax.ShapeDtypeStruct((12,), dtype),
  }
  state = jax.eval_shape(tx.init, params)
  exported = jax.export.export(jax.jit(tx.update), platforms=('cuda', 'tpu'))(
    params, state, params
  )
  assert exported.platforms == ('cuda', 'tpu')
  text = exported.mlir_module()
  assert 'stablehlo.case' in text or name == 'dct'  # the refresh is in it
  assert 'f64' not in text
  assert 'tensor<?' not in text
  assert not [name for name in CALLBACKS if name in text]
  for aval, x in zip(exported.out_avals, jax.tree.leaves((params, state)), strict=True):
    assert (aval.shape, aval.dtype) == (x.shape, x.dtype)
