"""What the diagnostics send over a mesh."""

import functools
import re

import jax
from jax import P
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import pytest

from bsfa_optax import diagnostics, estimators

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

# What goes over the network.
COLLECTIVE = re.compile(
  r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(?:-start)?\('
)


@pytest.mark.slow
def test_only_small_sums_are_sent():
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Explicit,))

  def measure(params, a, b, key):
    layout = estimators.layout(params)
    outputs = lambda p: jnp.stack([jnp.sin(p).sum(), (p**3).sum()])
    loss = lambda z: jnp.sum(z**2)
    hessian = diagnostics.hessian_top_k(lambda p: loss(outputs(p)), params, 2, layout)
    curvature = diagnostics.curvature_energy(
      outputs, loss, params, a, layout, key=key, samples=3
    )
    overlap = diagnostics.subspace_overlap(a, b, layout)
    return overlap, diagnostics.principal_angles(a, b, layout), hessian, curvature

  def collectives(rows):
    with jax.set_mesh(mesh):
      like = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, spec)
      )
      stack = like((3, rows, 6), P(None, 'x'))
      arguments = like((rows, 6), P('x')), stack, stack, jax.random.key(0)
      text = jit(measure).lower(*arguments).compile().as_text()
    return sorted(COLLECTIVE.findall(text))

  found = collectives(8)
  assert {name for _, name in found} == {'all-reduce'}
  assert found == collectives(64)  # no more for a larger block
