"""Steps a second and memory of whole training steps on the GPU that is here, beside other libraries and torch.

    python benchmarks/gpu_steps.py [--models resnet50 bert-base] [--batch 64] [--samples 30] [--write]
    python benchmarks/gpu_steps.py --smoke        every method at toy sizes, on whatever is here: says only that it runs

The steps of `training.py`: float32 at 'highest' precision and in TF32, bfloat16 by hand, autocast in bfloat16, float16
with a loss scale and fp8, Flax's DynamicScale, jmp and mpx as their own documentation has it, and where torch is
installed its own models under `torch.compile`. A sample is ten steps enqueued one after the other and waited for at the
end. Methods take turns, sample by sample, so that a clock that drifts drifts for all; ratios are of the same turn.
"""

import argparse
import functools
import importlib.metadata
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory as well

import jax
import jax.numpy as jnp
import models
import training
from results import write_section

try:
    from torch_models import TorchRunner
except ImportError:
    TorchRunner = None

STEPS = 10
MODELS = (*models.PUBLISHED, *(name for name in models.MODELS if name not in models.PUBLISHED))
BATCHES = {"resnet50": 128, "bert-base": 64, "vit-b16": 64, "gpt2-small": 16}
HIGHEST, TF32, HAND = "float32, highest", "float32, TF32", "bfloat16 by hand"
FP8 = "mp.autocast, fp8"
# All that stays float32 is TF32, but in the first row.
JAX_METHODS: dict[str, Callable[..., training.Training]] = {
    HIGHEST: lambda model, **kwargs: training.plain(None, model, **kwargs),
    TF32: lambda model, **kwargs: training.plain(None, model, **kwargs),
    HAND: lambda model, **kwargs: training.plain(jnp.bfloat16, model, **kwargs),
    "mp.autocast, bfloat16": lambda model, **kwargs: training.autocast("mixed_bfloat16", model, **kwargs),
    "mp.autocast, float16, loss scaled": lambda model, **kwargs: training.autocast("mixed_float16", model, **kwargs),
    # At toy sizes emulated, on hardware that has none.
    FP8: lambda model, tiny, **kwargs: training.autocast("mixed_float8", model, tiny=tiny, emulate=tiny, **kwargs),
    "Flax DynamicScale, float16 by hand": training.flax_dynamic_scale,
    "jmp, float16": training.jmp_style,
    "mpx, float16": training.mpx_style,
}
TORCH_METHODS = {
    "torch, TF32": "float32",
    "torch.autocast, bfloat16": "bfloat16",
    "torch.autocast, float16, GradScaler": "float16",
}
TORCH_MODELS = ("lm", *models.PUBLISHED)
METHODS = (*JAX_METHODS, *TORCH_METHODS)
PACKAGES = ("jax", "flax", "optax", "jmp", "mpjax", "mixed-precision-for-jax", "torch")


@functools.cache
def beginning(model: str, tiny: bool, batch: int | None) -> Any:
    """Parameters, model state and batch, the same for all methods."""
    case = models.case(model, None, tiny=tiny, batch=batch)
    return *jax.jit(case.init)(jax.random.key(0)), jax.jit(case.batch)(jax.random.key(1))


class Runner:
    """A step that has been compiled, with what it works on."""

    def __init__(self, model: str, method: str, tiny: bool, batch: int | None):
        made = JAX_METHODS[method](model, tiny=tiny, batch=batch)
        params, state, self.batch = beginning(model, tiny, batch)
        params, state = jax.tree.map(jnp.copy, (params, state))  # which the step is given
        self.carried = (params, state, jax.tree.map(jnp.asarray, made.init(params)))
        precision = "highest" if method == HIGHEST else "tensorfloat32"
        with jax.default_matmul_precision(precision), warnings.catch_warnings():
            # A GPU without fp8 is to have no row of fp8.
            warnings.filterwarnings("error", message=".* is computed in bfloat16")
            lowered = made.jitted().lower(*self.carried, self.batch)
        start = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.peak_bytes = self.step.memory_analysis().peak_memory_in_bytes

    def sample(self, steps: int) -> float:
        """Seconds of one step, the mean of several."""
        jax.block_until_ready(self.carried)
        start = time.perf_counter()
        for _ in range(steps):
            *carried, self.loss = self.step(*self.carried, self.batch)
            self.carried = tuple(carried)
        jax.block_until_ready(self.carried)
        return (time.perf_counter() - start) / steps


def reason_against(model: str, method: str) -> str:
    """Why there is nothing to run."""
    if method == "mpx, float16" and training.mpx is None:
        return "mpx is not installed"
    if method == FP8 and model in training.NO_FP8:
        return training.NO_FP8[model]
    if method in TORCH_METHODS:
        return "torch is not installed" if TorchRunner is None else "" if model in TORCH_MODELS else "not written"
    return ""


def made(model: str, method: str, tiny: bool, batch: int | None) -> Any:
    print(f"compiling: {model}, {method}", file=sys.stderr, flush=True)
    if method in TORCH_METHODS:
        return TorchRunner(model, TORCH_METHODS[method], tiny, batch)
    return Runner(model, method, tiny, batch)


def smoke(model: str, methods: list[str]) -> list[str]:
    """A few steps of each method at toy size. Says what ran and no seconds: on a CPU they are no speeds."""
    rows = []
    for method in methods:
        outcome = reason_against(model, method)
        if not outcome:
            runner = made(model, method, True, None)
            runner.sample(2)
            if not math.isfinite(float(runner.loss)):
                raise SystemExit(f"{model}, {method}: the loss is {float(runner.loss)}")
            outcome = f"ran, loss {float(runner.loss):.3f}"
        rows.append(f"| {model} | {method} | {outcome} |")
    return rows


def measured(model: str, methods: list[str], batch: int, samples: int) -> list[str]:
    ready: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for method in methods:
        if reason := reason_against(model, method):
            missing[method] = reason
            continue
        try:
            ready[method] = made(model, method, False, batch)
            for _ in range(2):
                ready[method].sample(STEPS)
        except Exception as error:  # another library's, or out of memory: the others go on
            ready.pop(method, None)
            missing[method] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    turns = [{method: runner.sample(STEPS) for method, runner in ready.items()} for _ in range(samples)]
    rows = []
    for method in methods:
        head = f"| {model}, {batch} | {method} |"
        if method in missing:
            rows.append(f"{head} {missing[method]} |{' |' * 6}")
            continue
        low, middle, high = statistics.quantiles([1 / turn[method] for turn in turns], n=4)
        cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        for base in (HIGHEST, TF32, HAND):
            cells.append(ratio([turn[base] / turn[method] for turn in turns]) if base in ready else "")
        runner = ready[method]
        cells += [f"{runner.peak_bytes / 1e6:.0f} MB", f"{runner.compile_seconds:.0f} s", f"{float(runner.loss):.3f}"]
        rows.append(f"{head} {' | '.join(cells)} |")
    return rows


def ratio(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models.PUBLISHED)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--batch", type=int, help="instead of each model's own")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="toy sizes: shows that all of it runs")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    if arguments.smoke:
        rows = [row for model in arguments.models for row in smoke(model, list(arguments.methods))]
        print("\n".join(["| model | method | smoke test, no figures |", "| --- | --- | --- |", *rows]))
        return
    if jax.default_backend() != "gpu":
        raise SystemExit("there is no GPU here, and seconds of a CPU are no speeds; --smoke runs anywhere")
    titles = "model, batch | method | steps a second | faster than highest | than TF32 | than by hand | peak memory"
    rows = [f"| {titles} | compile | loss |", "| --- " * 9 + "|"]
    for model in arguments.models:
        batch = arguments.batch or BATCHES.get(model, 32)
        rows += measured(model, list(arguments.methods), batch, arguments.samples)
        beginning.cache_clear()
        jax.clear_caches()
    text = (
        f"On {jax.devices()[0].device_kind}; {versions()}. Command: `python benchmarks/gpu_steps.py`. Medians of "
        f"{arguments.samples} samples of {STEPS} steps, and of the ratios within a turn; in brackets the middle half. "
        "Peak memory is the compiler's, torch's that of its allocator.\n\n" + "\n".join(rows)
    )
    print(text)
    if arguments.write:
        write_section("gpu_steps", text)


if __name__ == "__main__":
    main()
