"""Matrices trained in few numbers: Sparse Spectral Training, LoRA and ReLoRA."""

from bsfa_optax.low_rank._nodes import (
  dot,
  Factors,
  FrozenFactors,
  FrozenSpectrum,
  LowRankArray,
  Spectrum,
)
from bsfa_optax.low_rank._train import (
  init,
  join,
  lora,
  merge,
  relora,
  renew,
  renewable,
  RenewableState,
  retract,
  rewarmed,
  sst,
)

__all__ = [
  'Factors',
  'FrozenFactors',
  'FrozenSpectrum',
  'LowRankArray',
  'RenewableState',
  'Spectrum',
  'dot',
  'init',
  'join',
  'lora',
  'merge',
  'relora',
  'renew',
  'renewable',
  'retract',
  'rewarmed',
  'sst',
]
