"""How figures look: one colour for each optimizer, readable on white and on black."""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

# The examples draw AdamW, BSFA and Muon in the first three colours too.
COLOURS = {
  'adamw': '#1f77b4',
  'bsfa': '#ff7f0e',
  'muon': '#2ca02c',
  'adamw-tuned': '#3182bd',
  'muon-tuned': '#31a354',
  'soap-tuned': '#006d2c',
  'soap-muon-tuned': '#00c9a7',
  'nadamw': '#9ecae1',
  'sgdm': '#969696',
  'galore': '#bcbd22',
  'kron': '#9467bd',
  'soap': '#1b7837',
  'soap-10': '#a6dba0',
  'kl-shampoo': '#08519c',
  'kl-soap': '#4292c6',
  'asgo': '#6a51a3',
  'soap-muon': '#00a087',
  'normuon': '#a1d99b',
  'cosmos': '#b8860b',
  'ademamix': '#f781bf',
  'schedule-free': '#cab2d6',
  'bsfa-adafactor': '#fdae6b',
  'bsfa-kronecker': '#d62728',
  'bsfa-adam': '#e7969c',
  'bsfa-two-level': '#8c564b',
  'bsfa-pca': '#e377c2',
  'bsfa-dct': '#c5b0d5',
  'bsfa-hessian': '#17becf',
  'bsfa-gradients': '#c49c94',
  'bsfa-metric': '#dbdb8d',
  'bsfa-muon': '#74c476',
}
INK = '#808080'  # legible on the site's white and on its black

TEXT = ('text.color', 'axes.labelcolor', 'axes.titlecolor', 'xtick.color')
plt.rcParams |= dict.fromkeys((*TEXT, 'ytick.color', 'axes.edgecolor'), INK)
plt.rcParams |= {
  'font.size': 11,
  'legend.frameon': False,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'savefig.transparent': True,
  'svg.hashsalt': 'bsfa_optax',  # the same results give the same bytes
}
# For `legend`, where no data can be.
BELOW = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.14), 'fontsize': 'small'}


def save(figure: plt.Figure, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, metadata={'Creator': None, 'Date': None})
  plt.close(figure)
