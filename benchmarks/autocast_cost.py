"""What autocast costs against a model written in bfloat16 by hand, compiled for TPU v5e or H100 without either.

    python benchmarks/autocast_cost.py [--target v5e|h100] [--models lm vit] [--variants autocast] [--write]

Each model of `models.py`, loss and gradients: in float32, with `dtype=bfloat16` in every module, and the float32 model
under `mp.autocast`. What the compiler said is kept in out/benchmarks, by versions and sources, so that a second run
compiles only what has changed. --write puts the table into its section of RESULTS.md; --json writes all figures.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cpu_only  # noqa: F401 # isort: skip  # before jax

import flax
import jax
import jax.numpy as jnp
import models
from kept import kept
from results import write_section

import mpjax as mp

VARIANTS = ("float32", "by hand", "autocast")
# XLA finds no Triton tiles for 197 tokens where it cannot try them out on a GPU: cuBLAS, for all three alike.
OPTIONS = {("h100", "vit"): {"xla_gpu_enable_triton_gemm": False}}


def variant(model: str, name: str) -> tuple[models.Case, Callable[..., Any]]:
    """A model, and its loss in one of the three precisions."""
    case = models.case(model, jnp.bfloat16 if name == "by hand" else None)
    return case, mp.autocast(case.loss, "mixed_bfloat16") if name == "autocast" else case.loss


def measure(target: str, model: str, name: str) -> mp.aot.Report:
    options = OPTIONS.get((target, model), {})

    def compiled() -> mp.aot.Report:
        case, loss = variant(model, name)
        gradients = jax.value_and_grad(loss, has_aux=True)
        return mp.aot.compile_for(target, gradients, *case.avals, compiler_options=options)

    uses_mpjax = name == "autocast"
    return kept((target, model, name), (versions(target), *options.items()), uses_mpjax, compiled)


def versions(target: str) -> str:
    return f"{mp.aot.compiler_version(target)}, jax {jax.__version__}, flax {flax.__version__}"


def table(target: str, costs: dict[str, dict[str, mp.aot.Report]]) -> str:
    columns = [("peak memory", "peak_bytes", 1e6, "MB"), ("temporary", "temp_bytes", 1e6, "MB")]
    columns += [("bytes accessed", "bytes_accessed", 1e9, "GB")] if target == "v5e" else []  # not said of a GPU
    columns += [("main memory", "main_memory_bytes", 1e9, "GB")]
    columns += [("estimated cycles", "estimated_cycles", 1e6, "M")] if target == "v5e" else []
    rows = [
        f"| model | precision | {' | '.join(title for title, *_ in columns)} |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for model, of_model in costs.items():
        for name, cost in of_model.items():
            cells = []
            for _, field, unit, label in columns:
                value, hand = getattr(cost, field), getattr(of_model.get("by hand"), field, 0)
                factor = f" ({value / hand:.3f}x)" if hand else ""
                cells.append(f"{value / unit:.{0 if label == 'MB' else 2}f} {label}{factor}")
            rows.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=("v5e", "h100"), default="v5e")
    parser.add_argument("--models", nargs="+", choices=(*models.MODELS, "lm-shared"), default=models.MODELS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    target = arguments.target
    costs = {m: {v: measure(target, m, v) for v in arguments.variants} for m in arguments.models}
    if arguments.json:
        figures = {m: {v: cost.to_dict() for v, cost in of.items()} for m, of in costs.items()}
        arguments.json.write_text(json.dumps(figures, indent=1))
    text = (
        f"Compiled for one {mp.aot.TARGETS[target].title} by {versions(target)}, mpjax {mp.__version__}. Command: "
        f"`python benchmarks/autocast_cost.py --target {target}`. The factors are relative to the "
        "model written by hand.\n\n" + table(target, costs)
    )
    print(text)
    if arguments.write:
        write_section(f"autocast_cost {target}", text)


if __name__ == "__main__":
    main()
