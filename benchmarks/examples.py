"""What the benchmarks share with examples/, whose files are scripts, not a package."""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))

from checkpoints import StopSignals
from llama import Llama, next_token_loss, rotate
from report import adamw_steps_worth
from text import (
  standard_library,
  Text,
  training_batch,
  validation_batches,
)
from train_llama import Preset, PRESETS

__all__ = [
  'PRESETS',
  'Llama',
  'Preset',
  'StopSignals',
  'Text',
  'adamw_steps_worth',
  'next_token_loss',
  'rotate',
  'standard_library',
  'training_batch',
  'validation_batches',
]
