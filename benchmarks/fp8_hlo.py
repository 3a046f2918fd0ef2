"""Whether the matrix products of a decoder take 8-bit operands, forward and backward, compiled for H100s.

    python benchmarks/fp8_hlo.py [--write]

Loss and gradients under `mp.autocast(loss, "mixed_float8")` with the default recipe but no least size: the layers
written out, as a loop, and as a loop that recomputes them; on one GPU, and on eight under FSDP. What is counted are the
floating-point operations of products in the program that XLA made, by the dtype of their operands.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cpu_only  # noqa: F401 # isort: skip  # before jax

import flax
import jax
import models
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from results import write_section
from wire_bytes import spec_of

import mpjax as mp

SIZES = {"layers": 4, "width": 1024, "heads": 16, "vocabulary": 256}
MODELS = ("lm", "lm-scan", "lm-scan-remat")
RULES = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0))


def compile_step(model: str, policy: str, chips: int) -> mp.aot.Report:
    case = models.case(model, None, batch=8 * chips, sizes=SIZES)
    loss = mp.autocast(case.loss, policy, RULES)
    params, _, batch = case.avals

    def step(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: loss(p, {}, batch)[0])(params)

    if chips == 1:
        return mp.aot.compile_for("h100", step, params, batch)
    mesh = Mesh(np.array(mp.aot.devices("h100", str(chips))).reshape(chips, 1), ("data", "model"))
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, aval: NamedSharding(mesh, spec_of("fsdp", mesh, path, aval)), params
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, shardings)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), batch)
    out = (NamedSharding(mesh, PartitionSpec()), shardings)
    return mp.aot.compile_for("h100", step, params, batch, out_shardings=out)


def row(model: str, policy: str, chips: int) -> str:
    print(f"compiling: {model}, {policy}, {chips}", file=sys.stderr, flush=True)
    report = compile_step(model, policy, chips)
    total = sum(report.flops.values())
    shares = ", ".join(f"{d} {n / total:.1%}" for d, n in sorted(report.flops.items(), key=lambda x: -x[1]) if n)
    gathered = sorted({c.dtype for c in report.collectives if c.kind == "all-gather"})
    cells = (f"{report.peak_bytes / 1e6:.0f} MB", f"{report.bytes_sent / 1e6:.0f} MB", ", ".join(gathered) or "none")
    return f"| {model} | {chips} | {policy} | {shares} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    titles = "model | GPUs | policy | FLOPs of products by dtype | peak memory of a GPU | sent by each | all-gathers"
    rows = [f"| {titles} |", "| --- " * 7 + "|"]
    for chips in (1, 8):
        for model in MODELS:
            rows += [row(model, policy, chips) for policy in ("mixed_bfloat16", "mixed_float8")]
    text = (
        f"Loss and gradients of a decoder ({', '.join(f'{name} {n}' for name, n in SIZES.items())}; 8 rows of 512 "
        f"tokens on each GPU), compiled for H100 by {mp.aot.compiler_version('h100')}, jax {jax.__version__}, flax "
        f"{flax.__version__}, mpjax {mp.__version__}. Command: `python benchmarks/fp8_hlo.py`.\n\n" + "\n".join(rows)
    )
    print(text)
    if arguments.write:
        write_section("fp8_hlo", text)


if __name__ == "__main__":
    main()
