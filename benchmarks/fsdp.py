"""The decoder over 16 TPU v5e chips, weights and batch sharded: what its collectives carry, and in which dtype."""

from collections.abc import Callable
from typing import Any

import aot
import jax
import numpy as np
from flax import linen as nn
from hlo import Module
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import Case

MODELS = ("lm", "lm-scan", "lm-scan-remat")
BATCH = 128
# Else the gathers of weights are taken apart into permutes, and a table cannot tell them from the gradients' sums.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def _sharded(mesh: Mesh, aval: Any) -> NamedSharding:
    """Over the longest axis that the mesh divides, which a loop over layers does not go along."""
    sizes = [n if n % mesh.size == 0 else 0 for n in aval.shape]
    spec = [None] * len(sizes)
    if any(sizes):
        spec[int(np.argmax(sizes))] = "data"
    return NamedSharding(mesh, PartitionSpec(*spec))


def compile_over_slice(case: Case, loss: Callable[..., Any]) -> aot.Cost:
    mesh = Mesh(np.array(aot.devices("v5e", "4x4")), ("data",))
    params, state, batch = case.avals
    shardings = jax.tree.map(lambda aval: _sharded(mesh, aval), params)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, shardings)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), batch)

    def by_rows(call: Any, args: Any, kwargs: Any, _: Any) -> Any:
        # Without it the partitioner gathers activations, a hundred times the bytes of the weights.
        def of_batch(x: Any) -> bool:
            return isinstance(x, jax.Array) and x.ndim > 1 and x.shape[0] == BATCH

        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, rows) if of_batch(x) else x, call(*args, **kwargs)
        )

    def gradients(params: Any, state: Any, batch: Any) -> Any:
        with nn.intercept_methods(by_rows):
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
        return value, grads

    whole = NamedSharding(mesh, PartitionSpec())
    return aot.compile_sharded(
        "v5e", gradients, params, state, batch, compiler_options=OPTIONS, out_shardings=(whole, shardings)
    )


def table(costs: dict[str, dict[str, aot.Cost]]) -> str:
    """One row a model and precision: bytes by kind of collective and dtype, over a run, on each chip."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    rows = [f"| model | precision | peak memory | {' | '.join(kinds)} |", "| --- " * (len(kinds) + 3) + "|"]
    for model, of_model in costs.items():
        hand = of_model.get("by hand")
        for name, cost in of_model.items():
            factor = f" ({cost.peak_bytes / hand.peak_bytes:.3f}x)" if hand else ""
            cells = [f"{cost.peak_bytes / 1e6:.0f} MB{factor}"]
            found = sorted(Module(cost.hlo).collectives().items())
            for kind in kinds:
                parts = [f"{dtype} {size / 1e6:.1f} MB in {n}" for (k, dtype), (n, size) in found if k == kind]
                cells.append(", ".join(parts) or "none")
            rows.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return "\n".join(rows)
