"""The plots, by what is drawn."""

import builtins

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from bsfa_optax import diagnostics

mpl.use('Agg')


@pytest.fixture(autouse=True)
def close_figures():
  yield
  plt.close('all')


def legend(ax):
  return [text.get_text() for text in ax.get_legend().get_texts()]


STEPS = [0, 10, 20, 30]


@pytest.mark.parametrize(
  ('plot', 'label'),
  [
    (diagnostics.plot_overlap, 'subspace overlap'),
    (diagnostics.plot_dominant_fraction, 'dominant fraction'),
  ],
)
def test_plots_over_steps_have_a_line_for_each_block(plot, label):
  values = np.random.default_rng(0).uniform(size=(4, 3))
  ax = plot(STEPS, list(values), ['x', 'y', 'z'])
  assert ax.get_xlabel() == 'step'
  assert ax.get_ylabel().startswith(label)
  assert legend(ax) == ['x', 'y', 'z']
  for line, column in zip(ax.lines, values.T, strict=True):
    np.testing.assert_array_equal(line.get_ydata(), column)
    np.testing.assert_array_equal(line.get_xdata(), STEPS)
  many = np.random.default_rng(0).uniform(size=(4, 30))
  assert plot(STEPS, many, ax=ax) is ax
  ax = plot(STEPS, many)
  assert legend(ax) == ['30 blocks', 'median']
  np.testing.assert_array_equal(ax.lines[-1].get_ydata(), np.median(many, 1))


def test_plot_of_dominant_fraction_has_the_overall_one():
  ax = diagnostics.plot_dominant_fraction(
    STEPS, np.zeros((4, 1)), overall=np.arange(4.0)
  )
  assert legend(ax) == ['block 0', 'all parameters']
  np.testing.assert_array_equal(ax.lines[-1].get_ydata(), np.arange(4.0))


def test_plot_of_principal_angles():
  angles = np.random.default_rng(0).uniform(size=(4, 2, 3))
  ax = diagnostics.plot_principal_angles(STEPS, angles, block=1)
  assert legend(ax) == [rf'$\theta_{{{i}}}$' for i in (1, 2, 3)]
  assert 'degrees' in ax.get_ylabel()
  for i, line in enumerate(ax.lines):
    np.testing.assert_allclose(line.get_ydata(), np.rad2deg(angles[:, 1, i]))
  ax = diagnostics.plot_principal_angles(STEPS, np.zeros((4, 1, 20)))
  assert len(ax.lines) == 20
  assert len(legend(ax)) == 2


def test_plot_of_hessian_spectrum():
  values = np.exp(3 * np.random.default_rng(0).normal(size=(4, 2, 3)))
  ax = diagnostics.plot_hessian_spectrum(STEPS, values, block=1)
  assert ax.get_yscale() == 'log'
  assert legend(ax) == [rf'$\lambda_{{{i}}}$' for i in (1, 2, 3)]
  np.testing.assert_array_equal(ax.lines[2].get_ydata(), values[:, 1, 2])
  ax = diagnostics.plot_hessian_spectrum(STEPS, values - 1, block=1)
  assert ax.get_yscale() == 'linear'


@pytest.mark.parametrize('block', [None, 1])
def test_plot_of_curvature_energy(block):
  rng = np.random.default_rng(0)
  names = ('hessian', 'gauss_newton', 'functional')
  split = lambda: diagnostics.CurvatureSplit(*rng.uniform(size=(4, 2)))
  splits = lambda: {name: split() for name in names}
  collected = [diagnostics.CurvatureEnergy(splits(), splits()) for _ in STEPS]
  ax = diagnostics.plot_curvature_energy(STEPS, collected, measure='trace', block=block)
  assert legend(ax) == ['Hessian', 'Gauss-Newton', 'functional Hessian']
  assert ax.get_ylabel() == 'share of trace in the subspace'
  for name, container in zip(names, ax.containers, strict=True):
    line, _, (bars,) = container
    for i, c in enumerate(collected):
      s = c.trace[name]
      pick = sum if block is None else lambda x: x[block]
      share = pick(s.inside) / (pick(s.inside) + pick(s.outside))
      np.testing.assert_allclose(line.get_ydata()[i], share)
      low, high = bars.get_segments()[i][:, 1]
      np.testing.assert_allclose((low + high) / 2, share)
      if block == 1:
        np.testing.assert_allclose((high - low) / 4, s.share_error[1], rtol=1e-6)
  with pytest.raises(ValueError, match="measure must be 'energy' or 'trace', got 'x'"):
    diagnostics.plot_curvature_energy(STEPS, collected, measure='x')


def test_plot_of_spectrum():
  long = np.geomspace(10, 0.01, 5000)
  ax = diagnostics.plot_spectrum([np.array([4.0, 1.0, 0.0]), long], ['x', 'y'])
  assert legend(ax) == ['x', 'y']
  assert (ax.get_xscale(), ax.get_yscale()) == ('log', 'log')
  assert diagnostics.plot_spectrum([[2.0, 1.0]]).get_xscale() == 'linear'
  np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 4], [2, 1]])
  x, y = ax.lines[1].get_xydata().T
  assert len(x) < 520
  assert (x[0], x[-1]) == (1, 5000)
  np.testing.assert_array_equal(y, long[x.astype(int) - 1])
  ax = diagnostics.plot_spectrum([long] * 20)
  assert legend(ax) == ['20 blocks']


def test_plots_without_matplotlib_say_what_to_install(monkeypatch):
  original = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith('matplotlib'):
      raise ImportError(name)
    return original(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(ImportError, match=r"pip install 'bsfa-optax\[plots\]'"):
    diagnostics.plot_overlap(STEPS, np.zeros((4, 1)))
