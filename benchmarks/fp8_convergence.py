"""Whether a language model trained in fp8 ends where one in bfloat16 does: real text, several seeds.

    python benchmarks/fp8_convergence.py [--steps 300] [--seeds 3] [--write]

The decoder of `examples/train_lm.py` on the bytes of the standard library, from the same parameters on the same rows in
each precision. fp8 is emulated: each product has the operands that an fp8 unit would have, with float32 sums. All
matrix products of weights but the logits are in fp8, whatever their size. Needs the extra `examples`.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import flax
import jax
import matplotlib.figure
import numpy as np
import optax
import train_lm
from flax import nnx
from results import write_section

import mpjax as mp

SIZES = {"layers": 2, "width": 64, "length": 64}
ROWS = 16
HELD_OUT = 256
RULES = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True))
FIGURE = Path(__file__).parents[1] / "out" / "fp8_convergence.png"


class Head(nnx.Module):
    """The logits layer, with the name by which `Recipe.exclude` knows it: NNX modules have none in a program."""

    def __init__(self, linear: nnx.Linear):
        self.linear = linear

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("head"):
            return self.linear(x)


def variants(loss_fn: Any) -> dict[str, Any]:
    eight = mp.autocast(loss_fn, "mixed_float8", RULES)
    return {
        "float32": loss_fn,
        "bfloat16": mp.autocast(loss_fn, "mixed_bfloat16"),
        "fp8, scales of the moment": eight,
        "fp8, delayed scaling": eight,
    }


def train(name: str, seed: int, steps: int, text: np.ndarray, held_out: np.ndarray) -> tuple[list[float], float]:
    """The loss of each step, and in float32 that of the trained weights on rows that were held out."""
    model = train_lm.Decoder(**SIZES, rngs=nnx.Rngs(seed))
    model.head = Head(model.head)
    graph, params = nnx.split(model)
    in_float32 = train_lm.loss_of(graph)
    grad_fn = jax.value_and_grad(variants(in_float32)[name])
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps), b2=0.99, weight_decay=1e-2),
    )
    reader = train_lm.Reader(text, SIZES["length"], seed)
    is_delayed = name.endswith("delayed scaling")
    scaling = mp.fp8.init(grad_fn, steps=16)(params, reader.batch(0, ROWS)) if is_delayed else None

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, opt_state: Any, scaling: Any, rows: Any) -> Any:
        if is_delayed:
            (loss, grads), scaling = mp.fp8.delayed(grad_fn)(scaling, params, rows)
        else:
            loss, grads = grad_fn(params, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, scaling, loss

    opt_state, losses = tx.init(params), []
    for i in range(steps):
        params, opt_state, scaling, loss = step(params, opt_state, scaling, reader.batch(ROWS * i, ROWS))
        losses.append(loss)
    starts = np.linspace(0, len(held_out) - SIZES["length"] - 2, HELD_OUT).astype(np.int64)
    final = jax.jit(in_float32)(params, train_lm.rows_at(held_out, starts, SIZES["length"]))
    return [float(x) for x in losses], float(final)


def draw(curves: dict[str, list[list[float]]]) -> None:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = ((0, ()), (0, (4, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
    colours = ("#000000", "#0072B2", "#D55E00", "#009E73")
    for (name, runs), style, colour in zip(curves.items(), styles, colours, strict=True):
        mean = np.mean(runs, axis=0)
        window = max(len(mean) // 30, 1)
        smooth = np.convolve(mean, np.ones(window) / window, "valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, linestyle=style, color=colour, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    text, held_out = train_lm.load_text()
    curves: dict[str, list[list[float]]] = {}
    lines = [
        "| precision | held-out loss, mean | standard deviation | by seed | less than bfloat16, mean |",
        "| --- " * 5 + "|",
    ]
    finals: dict[str, list[float]] = {}
    for name in variants(None):
        start, finals[name] = time.perf_counter(), []
        for seed in range(arguments.seeds):
            with jax.set_mesh(train_lm.make_mesh(1, 1)):
                losses, final = train(name, seed, arguments.steps, text, held_out)
            curves.setdefault(name, []).append(losses)
            finals[name].append(final)
        print(name, finals[name], f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for name, found in finals.items():
        gap = statistics.mean(a - b for a, b in zip(finals["bfloat16"], found, strict=True))
        cells = (
            f"{statistics.mean(found):.4f}",
            f"{statistics.stdev(found):.4f}",
            ", ".join(f"{x:.4f}" for x in found),
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {gap:+.4f} |")
    draw(curves)
    text_ = (
        f"A decoder ({', '.join(f'{name} {n}' for name, n in SIZES.items())}) on bytes of the standard library, AdamW, "
        f"{arguments.steps} steps of {ROWS} rows, {arguments.seeds} seeds; fp8 emulated on a CPU. "
        f"jax {jax.__version__}, flax {flax.__version__}, mpjax {mp.__version__}. Command: `python "
        f"benchmarks/fp8_convergence.py --steps {arguments.steps} --seeds {arguments.seeds}`, which draws the curves "
        "too.\n\n" + "\n".join(lines)
    )
    print(text_)
    if arguments.write:
        write_section("fp8_convergence", text_)


if __name__ == "__main__":
    main()
