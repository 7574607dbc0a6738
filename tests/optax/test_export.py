"""Updates lower for accelerators that are not here."""

import jax
import jax.numpy as jnp
import pytest

from bsfa_optax import bsfa, dct, kronecker, pca, scale_by_whitening

FILTERS = {
  'whitening': scale_by_whitening(),
  'whitening_blocks': scale_by_whitening(block_size=5, axes=-1),
  'gram': bsfa(estimator=pca(rank=3, history=4, solver='gram')),
  'randomized': bsfa(estimator=pca(rank=3, history=4, solver='randomized')),
  'window': bsfa(
    estimator=pca(rank=3, history=4, decay=0.0, refresh_every=2), grafting=True
  ),
  'kronecker': bsfa(),
  'kronecker_axes': bsfa(0.1, 4.0, exponent=0.5, estimator=kronecker(axes=-1)),
  'dct': bsfa(estimator=dct(rank=3)),
}
CALLBACKS = ('callback', 'infeed', 'outfeed', 'SendToHost', 'RecvFromHost')


@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('name', FILTERS)
def test_update_lowers_for_accelerators(name, dtype):
  tx = FILTERS[name]
  params = {
    'kernel': jax.ShapeDtypeStruct((8, 12), dtype),
    'bias': jax.ShapeDtypeStruct((12,), dtype),
    'layers': [{'w': jax.ShapeDtypeStruct((8, 12), dtype)}] * 2,
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
