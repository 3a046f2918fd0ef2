"""What whole training steps cost, compiled for TPUs or H100 without either, of four models at their published sizes.

    python benchmarks/model_costs.py --target v5e|v6e|h100 [--models ...] [--variants ...] [--search] [--write]

The steps of `training.py` in float32, with `dtype=bfloat16` in every module, and the float32 model under autocast in
bfloat16, in float16 with a dynamic loss scale, and in fp8. --search looks for the largest batch that fits a chip of
16 GB: a few compilations, of which the last two are of the batch that fits and of the next one, which does not. --write
merges the figures into benchmarks/raw and puts all that are there into RESULTS.md, so that a run may be of some models.
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
import optax
import training
from kept import kept
from results import write_section

import mpjax as mp

RAW = Path(__file__).parent / "raw"
SOURCE = Path(training.__file__).read_bytes()
TARGETS = ("v5e", "v6e", "h100")
VARIANTS: dict[str, Callable[..., training.Training]] = {
    "float32": lambda *args, **kwargs: training.plain(None, *args, **kwargs),
    "bfloat16 by hand": lambda *args, **kwargs: training.plain(jnp.bfloat16, *args, **kwargs),
    "autocast, bfloat16": lambda *args, **kwargs: training.autocast("mixed_bfloat16", *args, **kwargs),
    "autocast, float16": lambda *args, **kwargs: training.autocast("mixed_float16", *args, **kwargs),
    "autocast, fp8": lambda *args, **kwargs: training.autocast("mixed_float8", *args, **kwargs),
}
# The batch of the table, and the step of the search. Half of ResNet-50's where 256 do not fit in float32.
BATCHES = {"resnet50": (256, 16), "bert-base": (64, 8), "vit-b16": (32, 4), "gpt2-small": (8, 1)}
SMALL_BATCHES = {("v5e", "resnet50"): 128}
LIMIT = mp.aot.TARGETS["v5e"].memory  # what programs may use of a chip of 16 GB
# XLA finds no Triton tiles for 197 tokens where it cannot try them out on a GPU: cuBLAS, for all alike.
OPTIONS = {("h100", "vit-b16"): {"xla_gpu_enable_triton_gemm": False}}


def batch_of(target: str, model: str) -> int:
    return SMALL_BATCHES.get((target, model), BATCHES[model][0])


def reason_against(target: str, model: str, variant: str) -> str:
    """Why there is nothing to compile."""
    if variant != "autocast, fp8":
        return ""
    if target != "h100":
        return "the chip multiplies no 8-bit floats: autocast takes bfloat16 and warns"
    return training.NO_FP8.get(model, "")


def measure(target: str, model: str, variant: str, batch: int) -> mp.aot.Report:
    options = OPTIONS.get((target, model), {})

    def compiled() -> mp.aot.Report:
        made = VARIANTS[variant](model, batch=batch)
        return mp.aot.compile_for(target, made.step, *made.avals, donate_argnums=(0, 1, 2), compiler_options=options)

    names = ("step", target, model, variant, str(batch))
    return kept(names, (versions(target), SOURCE, *options.items()), variant.startswith("autocast"), compiled)


def versions(target: str) -> str:
    return (
        f"{mp.aot.compiler_version(target)}, jax {jax.__version__}, flax {flax.__version__}, "
        f"optax {optax.__version__}, mpjax {mp.__version__}"
    )


def largest_batch(needed: Callable[[int], int], limit: int, start: int, step: int, fixed: int) -> int:
    """The largest multiple of `step` of which a program needs at most `limit` bytes; 0 if there is none.

    Follows the line through the two tries nearest to the limit, since memory nearly grows with the batch alone; where
    it does not, strides double and brackets are halved. The answer and the next batch were both tried.

    Args:
      needed: bytes of a batch.
      limit: bytes that there are.
      start: the batch to try first, a multiple of `step`.
      step: what a batch is a multiple of.
      fixed: about what no batch at all would need: the first line goes through it.
    """
    tried = {0: fixed}
    low, high, guess, stride = 0, 0, start, step
    while True:
        tried[guess] = needed(guess)
        low, high = (guess, high) if tried[guess] <= limit else (low, guess)
        if high == low + step:
            return low
        (x, of_x), (y, of_y) = sorted(tried.items(), key=lambda point: abs(point[1] - limit))[:2]
        slope = (of_y - of_x) / (y - x)
        line = int((x + (limit - of_x) / slope) // step * step) if slope > 0 else low
        if line <= low:
            guess, stride = low + stride, 2 * stride
        elif high and line >= high:
            guess, stride = high - stride, 2 * stride
        else:
            guess = line
        if high and (not low < guess < high or len(tried) > 6):
            guess = (low + high) // (2 * step) * step


def search(target: str, model: str, variant: str) -> int:
    """The largest batch of a model that fits `LIMIT`."""
    carried = VARIANTS[variant](model, batch=1).avals[:3]  # weights and the optimizer's state

    def needed(batch: int) -> int:
        found = measure(target, model, variant, batch)
        return max(found.needed_bytes, LIMIT + 1) if found.refusal else found.needed_bytes

    fixed = sum(aval.size * aval.dtype.itemsize for aval in jax.tree.leaves(carried))
    return largest_batch(needed, LIMIT, batch_of(target, model), BATCHES[model][1], fixed)


def figures(report: mp.aot.Report) -> dict[str, Any]:
    names = ("peak_bytes", "temp_bytes", "bytes_accessed", "main_memory_bytes", "estimated_cycles", "flops", "refusal")
    return {name: getattr(report, name) for name in names}


def table(target: str, found: dict[str, Any]) -> str:
    tpu = target != "h100"
    columns = [("peak memory", "peak_bytes", 1e9, " GB"), ("temporary", "temp_bytes", 1e9, " GB")]
    columns += [("bytes accessed", "bytes_accessed", 1e9, " GB")] if tpu else []  # not said of a GPU
    columns += [("main memory", "main_memory_bytes", 1e9, " GB")]
    columns += [("estimated cycles", "estimated_cycles", 1e6, " M")] if tpu else []
    titles = ["model, batch", "precision", *(title for title, *_ in columns), "FLOPs by dtype", "largest batch, 16 GB"]
    rows = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for model in models.PUBLISHED:
        of_model = found.get(model, {})
        for variant in VARIANTS:
            row = of_model.get(variant)
            missing = reason_against(target, model, variant) or "not measured"
            cells = [f"{model}, {batch_of(target, model)}", variant]
            for _, field, unit, label in columns:
                value, base = (of.get(field) if of else None for of in (row, of_model.get("float32")))
                factor = f" ({value / base:.2f}x)" if value and base else ""
                cells.append(f"{value / unit:.2f}{label}{factor}" if value is not None else "")
            if row:
                cells += [flops(row["flops"]) or row["refusal"], str(row.get("largest_batch", "not searched"))]
            else:
                cells[2:] = [missing, *[""] * (len(titles) - 3)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def flops(by_dtype: dict[str, int]) -> str:
    total = sum(by_dtype.values())
    parts = sorted(((n / total, dtype) for dtype, n in by_dtype.items() if n), reverse=True)
    return ", ".join(f"{dtype} {share:.0%}" for share, dtype in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--models", nargs="*", choices=models.PUBLISHED, default=models.PUBLISHED)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--search", action="store_true", help="look for the largest batch that fits 16 GB")
    parser.add_argument("--write", action="store_true", help="merge the figures into raw/ and RESULTS.md")
    arguments = parser.parse_args()
    target = arguments.target
    file = RAW / f"model_costs-{target}.json"
    kept_before = json.loads(file.read_text()) if file.exists() else {}
    # Figures of other versions are not to stand in one table with these.
    found = kept_before.get("figures", {}) if kept_before.get("versions") == versions(target) else {}
    for model in arguments.models:
        for variant in arguments.variants:
            if reason_against(target, model, variant):
                continue
            report = measure(target, model, variant, batch_of(target, model))
            before, row = found.get(model, {}).get(variant, {}), figures(report)
            # A batch that was looked for stays where the program has not changed.
            row = before if before.items() >= row.items() else row
            found.setdefault(model, {})[variant] = row
            if arguments.search:
                row["largest_batch"] = search(target, model, variant)
            if arguments.write:
                write(target, found)
    print(section(target, found))
    if arguments.write:
        write(target, found)


def section(target: str, found: dict[str, Any]) -> str:
    searched = any("largest_batch" in row for of_model in found.values() for row in of_model.values())
    return (
        f"Compiled for one {mp.aot.TARGETS[target].title} by {versions(target)}. Command: `python "
        f"benchmarks/model_costs.py --target {target}{' --search' * searched}`. Factors are relative to float32.\n\n"
        + table(target, found)
    )


def write(target: str, found: dict[str, Any]) -> None:
    """After each figure, so that a run that is stopped loses nothing and leaves the page as the raw figures are."""
    RAW.mkdir(exist_ok=True)
    kept = {"versions": versions(target), "figures": found}
    (RAW / f"model_costs-{target}.json").write_text(json.dumps(kept, indent=1) + "\n")
    write_section(f"model_costs {target}", section(target, found))


if __name__ == "__main__":
    main()
