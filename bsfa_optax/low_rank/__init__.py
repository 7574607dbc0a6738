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
  LoRA,
  lora,
  merge,
  relora,
  renew,
  renewable,
  RenewableState,
  retract,
  rewarmed,
  SST,
  sst,
)

__all__ = [
  'SST',
  'Factors',
  'FrozenFactors',
  'FrozenSpectrum',
  'LoRA',
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
