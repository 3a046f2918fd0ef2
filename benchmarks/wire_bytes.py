"""What a training step sends between chips, compiled for slices of TPU v5e that are not there.

    python benchmarks/wire_bytes.py [--slices 4x4 16x16] [--layouts dp fsdp tp] [--write]

A decoder with AdamW and clipping under `jit`, sharded in three ways: batch over all chips (DP), weights and optimizer
state too (FSDP), or the matrices of a layer over 4 chips and the batch over the others (TP). In float32, with
`dtype=bfloat16` in every module, and the float32 model under `mp.autocast`, its gradients summed over chips in float32
or, as the policy asks, in bfloat16.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cpu_only  # noqa: F401 # isort: skip  # before jax

import flax
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kept import kept
from results import write_section

import mpjax as mp

LAYOUTS = {"dp": "DP", "fsdp": "FSDP", "tp": "DP x TP 4"}
POLICIES = {
    "autocast": "mixed_bfloat16",
    "autocast, reduce=bfloat16": "params=float32,compute=bfloat16,output=float32,reduce=bfloat16",
}
VARIANTS = ("float32", "by hand", *POLICIES)
MODEL, MORE = "lm-scan-remat", ("lm", "lm-scan")
SIZES = {"layers": 6, "width": 2048, "heads": 16, "vocabulary": 256}
ROWS_A_CHIP = 8
SHORT = {"float32": "f32", "bfloat16": "bf16", "int32": "s32", "uint32": "u32"}
# Else the gathers of weights are taken apart into permutes, and a table cannot tell them from the gradients' sums.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Of each matrix in a layer, the axis over which Megatron's tensor parallelism shards it, from the end.
TENSOR_PARALLEL = ((r"(query|key|value)/kernel", -2), (r"out/kernel", -3), (r"Layer_0/Dense_0/kernel", -1))
TENSOR_PARALLEL += ((r"Layer_0/Dense_1/kernel", -2), (r"(query|key|value)/bias", -2), (r"Layer_0/Dense_0/bias", -1))


def mesh_of(chips: str, layout: str) -> Mesh:
    devices = np.array(mp.aot.devices("v5e", chips))
    return Mesh(devices.reshape(-1, 4 if layout == "tp" else 1), ("data", "model"))


def spec_of(layout: str, mesh: Mesh, path: Any, aval: Any) -> PartitionSpec:
    """Where a weight lies, and everything of the optimizer's that belongs to it."""
    spec: list[Any] = [None] * aval.ndim
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if layout == "fsdp":
        # The longest axis that the mesh divides, which a loop over layers does not go along.
        sizes = [n if n % mesh.shape["data"] == 0 else 0 for n in aval.shape]
        if any(sizes):
            spec[int(np.argmax(sizes))] = "data"
    elif layout == "tp":
        for pattern, axis in TENSOR_PARALLEL:
            if re.search(pattern, name):
                spec[axis] = "model"
    return PartitionSpec(*spec)


def compile_step(layout: str, chips: str, model: str, variant: str) -> mp.aot.Report:
    mesh = mesh_of(chips, layout)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch_size = ROWS_A_CHIP * mesh.shape["data"]
    case = models.case(model, jnp.bfloat16 if variant == "by hand" else None, batch=batch_size, sizes=SIZES)
    loss = mp.autocast(case.loss, POLICIES[variant]) if variant in POLICIES else case.loss
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))
    tx = mp.loss_scaled(tx, mp.NoOpLossScale()) if variant in POLICIES else tx

    def by_rows(call: Any, args: Any, kwargs: Any, _: Any) -> Any:
        # Without it the partitioner gathers activations, a hundred times the bytes of the weights.
        def one(x: Any) -> Any:
            of_batch = isinstance(x, jax.Array) and x.ndim > 1 and x.shape[0] == batch_size
            return jax.lax.with_sharding_constraint(x, rows) if of_batch else x

        return jax.tree.map(one, call(*args, **kwargs))

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        with nn.intercept_methods(by_rows):
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, {}, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params, _, batch = case.avals
    state = (params, jax.eval_shape(tx.init, params))
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, aval: NamedSharding(mesh, spec_of(layout, mesh, path, aval)), state
    )
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), batch)
    out = (*shardings, NamedSharding(mesh, PartitionSpec()))
    return mp.aot.compile_for(
        "v5e", step, *state, batch, compiler_options=OPTIONS, out_shardings=out, donate_argnums=(0, 1)
    )


def measure(layout: str, chips: str, model: str, variant: str) -> mp.aot.Report:
    names = ("wire", layout, chips, model, variant)
    parts = (versions(), sorted(SIZES.items()), ROWS_A_CHIP, Path(__file__).read_bytes())
    return kept(names, parts, variant in POLICIES, lambda: compile_step(layout, chips, model, variant))


def versions() -> str:
    return (
        f"{mp.aot.compiler_version('v5e')}, jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"
    )


def sent(cost: mp.aot.Report) -> dict[str, dict[str, float]]:
    """Bytes that a chip sends in a step, by kind of collective and dtype."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in cost.collectives:
        found[row.kind][SHORT.get(row.dtype, row.dtype)] += row.bytes_sent
    return found


def table(costs: dict[tuple[str, str, str], dict[str, mp.aot.Report]]) -> str:
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    kinds = tuple(k for k in kinds if any(k in sent(cost) for of in costs.values() for cost in of.values()))
    titles = ("chips", "layout", "model", "precision", "sent by each chip", *kinds, "peak memory")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for (layout, chips, model), of in costs.items():
        totals = {v: sum(sum(d.values()) for d in sent(cost).values()) for v, cost in of.items()}
        for variant, cost in of.items():
            by_kind = sent(cost)
            hand = of.get("by hand")
            factors = [f" ({totals[variant] / totals['by hand']:.3f}x)", f" ({cost.peak_bytes / hand.peak_bytes:.3f}x)"]
            cells = [f"{totals[variant] / 1e6:.1f} MB{factors[0]}"]
            for kind in kinds:
                parts = [f"{d} {size / 1e6:.1f}" for d, size in sorted(by_kind[kind].items()) if size >= 5e4]
                cells.append(", ".join(parts) or "none")
            cells.append(f"{cost.peak_bytes / 1e6:.0f} MB{factors[1]}")
            lines.append(f"| {chips} | {LAYOUTS[layout]} | {model} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", nargs="+", default=["4x4", "16x16"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    configurations = [(layout, chips, MODEL) for chips in arguments.slices for layout in arguments.layouts]
    if "4x4" in arguments.slices and "fsdp" in arguments.layouts:
        configurations += [("fsdp", "4x4", model) for model in MORE]
    costs = {c: {v: measure(*c, v) for v in VARIANTS} for c in configurations}
    command = f"python benchmarks/wire_bytes.py --slices {' '.join(arguments.slices)}"
    text = (
        f"A step of a decoder ({', '.join(f'{name} {n}' for name, n in SIZES.items())}; {ROWS_A_CHIP} rows of 512 "
        f"tokens on each chip along the data axis), compiled for TPU v5e by {versions()}, mpjax {mp.__version__}. "
        f"Command: `{command}`. Columns of collectives: MB sent by each chip, by dtype. The factors are relative "
        "to the model written by hand.\n\n" + table(costs)
    )
    print(text)
    if arguments.write:
        write_section("wire_bytes", text)


if __name__ == "__main__":
    main()
