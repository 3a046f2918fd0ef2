"""What autocast costs against a model written in bfloat16 by hand, compiled for TPU v5e or H100 without either.

    python benchmarks/autocast_cost.py [--target v5e|h100] [--models lm vit] [--variants autocast] [--write]
    python benchmarks/autocast_cost.py --fsdp [--write]          weights and batch sharded over 16 v5e chips

Each model of `models.py`, loss and gradients: in float32, with `dtype=bfloat16` in every module, and the float32 model
under `mp.autocast`. What the compiler said is kept in out/benchmarks, by versions and sources, so that a second run
compiles only what has changed. --write puts the table into its section of RESULTS.md; --json writes all figures.
"""

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import aot  # isort: skip  # before jax: it sets what libtpu reads

import flax
import fsdp
import jax
import jax.numpy as jnp
import models
from results import write_section

import mpjax as mp
from mpjax import _compat

VARIANTS = ("float32", "by hand", "autocast")
# XLA finds no Triton tiles for 197 tokens where it cannot try them out on a GPU: cuBLAS, for all three alike.
OPTIONS = {("h100", "vit"): {"xla_gpu_enable_triton_gemm": False}}
HERE = Path(__file__).parent
KEPT = HERE.parent / "out" / "benchmarks"
# Read as they are imported: a run of many minutes is of one version, whatever is edited meanwhile.
SOURCES = {
    "models": (HERE / "models.py").read_bytes(),
    "fsdp": (HERE / "fsdp.py").read_bytes(),
    "mpjax": b"".join(file.read_bytes() for file in sorted(Path(mp.__file__).parent.rglob("*.py"))),
}


def variant(model: str, name: str, **sizes: Any) -> tuple[models.Case, Callable[..., Any]]:
    """A model, and its loss in one of the three precisions."""
    case = models.case(model, jnp.bfloat16 if name == "by hand" else None, **sizes)
    return case, mp.autocast(case.loss, "mixed_bfloat16") if name == "autocast" else case.loss


def measure(target: str, model: str, name: str) -> aot.Cost:
    """Compiles, or reads what the compiler said when versions and sources were the same."""
    sources = [SOURCES["models"], *([SOURCES["fsdp"]] if target == "fsdp" else [])]
    sources += [SOURCES["mpjax"]] if name == "autocast" else []
    options = OPTIONS.get((target, model), {})
    key = hashlib.sha256(repr((versions(target), aot.H100, target, model, name, *options.items())).encode())
    for source in sources:
        key.update(source)
    kept = KEPT / f"{target}-{model}-{name.replace(' ', '-')}-{key.hexdigest()[:12]}.json.gz"
    if not kept.exists():
        print(f"compiling for {target}: {model}, {name}", file=sys.stderr, flush=True)
        case, loss = variant(model, name, **({"batch": fsdp.BATCH} if target == "fsdp" else {}))
        if target == "fsdp":
            cost = fsdp.compile_over_slice(case, loss)
        else:
            gradients = jax.value_and_grad(loss, has_aux=True)
            cost = aot.compile_for(target, gradients, *case.avals, compiler_options=options)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(gzip.compress(json.dumps(cost._asdict()).encode()))
        jax.clear_caches()
    return aot.Cost(**json.loads(gzip.decompress(kept.read_bytes())))


def versions(target: str) -> str:
    compiler = aot.compiler_version("v5e" if target == "fsdp" else target)
    return f"{compiler}, jax {jax.__version__}, flax {flax.__version__}"


def table(target: str, costs: dict[str, dict[str, aot.Cost]]) -> str:
    columns = [("peak memory", "peak_bytes", 1e6, "MB"), ("temporary", "temp_bytes", 1e6, "MB")]
    columns += [("bytes accessed", "bytes_accessed", 1e9, "GB")] if target == "v5e" else []  # not said of a GPU
    columns += [("main memory", "hbm_bytes", 1e9, "GB")]
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
    parser.add_argument("--target", choices=aot.TARGETS, default="v5e")
    parser.add_argument("--models", nargs="+", choices=(*models.MODELS, "lm-shared"), default=models.MODELS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--fsdp", action="store_true", help="the decoder over 16 v5e chips, and its collectives")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    target = "fsdp" if arguments.fsdp else arguments.target
    # Traced here for a device that this process does not have.
    _compat.target_platform = lambda: "gpu" if target == "h100" else "tpu"
    names = [m for m in arguments.models if m in fsdp.MODELS] if arguments.fsdp else arguments.models
    costs = {m: {v: measure(target, m, v) for v in arguments.variants} for m in names}
    if arguments.json:
        fields = [field for field in aot.Cost._fields if field != "hlo"] + ["hbm_bytes", "estimated_cycles"]
        figures = {m: {v: {f: getattr(c, f) for f in fields} for v, c in of.items()} for m, of in costs.items()}
        arguments.json.write_text(json.dumps(figures, indent=1))
    place = "16 TPU v5e chips" if arguments.fsdp else aot.TARGETS[target].title
    command = "python benchmarks/autocast_cost.py " + ("--fsdp" if arguments.fsdp else f"--target {target}")
    text = (
        f"Compiled for {place} by {versions(target)}, mpjax {mp.__version__}. Command: `{command}`. "
        "The factors are relative to the model written by hand.\n\n"
        + (fsdp.table(costs) if arguments.fsdp else table(target, costs))
    )
    print(text)
    if arguments.write:
        write_section(f"autocast_cost {target}", text)


if __name__ == "__main__":
    main()
