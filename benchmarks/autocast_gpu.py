"""Seconds of a training step on the GPU that is here: float32, TF32, bfloat16 by hand, autocast, and torch.

    python benchmarks/autocast_gpu.py [--models resnet50 lm] [--batch 64] [--samples 30] [--write]
    python benchmarks/autocast_gpu.py --tiny          the same at toy sizes, on whatever is here: figures of nothing

A step is loss, gradients and AdamW on the models of `models.py`, parameters and state donated. A sample is ten steps
enqueued one after the other and waited for at the end; the table has the median sample, and the spread of the middle
half. The precisions take turns, sample by sample, so that a clock that drifts drifts for all. Where torch is installed,
its own decoder and ResNet-50 run beside them, under `torch.compile`: in TF32 and under `torch.autocast`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory as well

import flax
import jax
import jax.numpy as jnp
import models
import optax
from results import write_section

import mpjax as mp

STEPS = 10
TORCH_MODELS = ("resnet50", "lm")
PRECISIONS = {
    # the precision of what stays float32; "high" is TF32
    "float32": "highest",
    "TF32": "high",
    "bfloat16 by hand": "high",
    "mp.autocast": "high",
}


class Runner:
    """A step that has been compiled, with what it works on."""

    def __init__(self, model: str, precision: str, tiny: bool, batch: int | None):
        by_hand = precision == "bfloat16 by hand"
        case = models.case(model, jnp.bfloat16 if by_hand else None, tiny=tiny, batch=batch)
        loss = mp.autocast(case.loss, "mixed_bfloat16") if precision == "mp.autocast" else case.loss
        tx = optax.adamw(1e-4)

        def step(params: Any, state: Any, moments: Any, batch: Any) -> Any:
            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
            updates, moments = tx.update(grads, moments, params)
            return optax.apply_updates(params, updates), state, moments, value

        params, state = jax.jit(case.init)(jax.random.key(0))
        self.batch = jax.jit(case.batch)(jax.random.key(1))
        self.carried = (params, state, tx.init(params))
        with jax.default_matmul_precision(PRECISIONS[precision]):
            lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*self.carried, self.batch)
        start = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.peak_bytes = self.step.memory_analysis().peak_memory_in_bytes

    def sample(self) -> float:
        """Seconds of one step, the mean of ten."""
        jax.block_until_ready(self.carried)
        start = time.perf_counter()
        for _ in range(STEPS):
            *carried, self.loss = self.step(*self.carried, self.batch)
            self.carried = tuple(carried)
        jax.block_until_ready(self.carried)
        return (time.perf_counter() - start) / STEPS


def runners(model: str, tiny: bool, batch: int | None) -> dict[str, Callable[[], Any]]:
    """How to make each runner of a model, by the name of its row."""
    made: dict[str, Callable[[], Any]] = {p: lambda p=p: Runner(model, p, tiny, batch) for p in PRECISIONS}
    if model in TORCH_MODELS:
        try:
            from torch_models import TorchRunner
        except ImportError:
            print("torch is not installed: its rows are left out", file=sys.stderr)
            return made
        for name, low in (("torch, TF32", False), ("torch.autocast", True)):
            made[name] = lambda low=low: TorchRunner(model, low, tiny, batch, STEPS)
    return made


def rows_of(model: str, arguments: argparse.Namespace) -> list[str]:
    ready: dict[str, Any] = {}
    for name, make in runners(model, arguments.tiny, arguments.batch).items():
        print(f"compiling: {model}, {name}", file=sys.stderr, flush=True)
        ready[name] = make()
        for _ in range(2):
            ready[name].sample()
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(arguments.samples):
        for name, runner in ready.items():
            samples[name].append(runner.sample())
    medians = {name: statistics.median(of) for name, of in samples.items()}
    hand = medians["bfloat16 by hand"]
    rows = []
    for name, seconds in medians.items():
        low, _, high = statistics.quantiles(samples[name], n=4)
        runner = ready[name]
        rows.append(
            f"| {model} | {name} | {seconds * 1e3:.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f}) "
            f"| {seconds / hand:.3f}x | {medians['float32'] / seconds:.2f}x | {medians['TF32'] / seconds:.2f}x "
            f"| {runner.peak_bytes / 1e6:.0f} MB | {runner.compile_seconds:.0f} s | {float(runner.loss):.3f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=models.MODELS, default=models.MODELS)
    parser.add_argument("--batch", type=int, help="instead of each model's own")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that it runs")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.tiny:
        raise SystemExit("there is no GPU here; --tiny runs anywhere")
    titles = "model | precision | step | / by hand | faster than float32 | than TF32 | peak memory | compile | loss"
    rows = [f"| {titles} |", "| --- " * 9 + "|"]
    for model in arguments.models:
        rows += rows_of(model, arguments)
        jax.clear_caches()
    versions = f"jax {jax.__version__}, flax {flax.__version__}, mpjax {mp.__version__}"
    if torch := sys.modules.get("torch"):
        versions += f", torch {torch.__version__}"
    text = (
        f"On {jax.devices()[0].device_kind}; {versions}. Command: `python benchmarks/autocast_gpu.py`. Medians of "
        f"{arguments.samples} samples of {STEPS} steps; in brackets the middle half. Torch's peak is its allocator's."
        "\n\n" + "\n".join(rows)
    )
    print(text)
    if arguments.write and not arguments.tiny:
        write_section("autocast_gpu", text)


if __name__ == "__main__":
    main()
