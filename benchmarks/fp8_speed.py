"""Seconds of products and of a language model's step in fp8 and in bfloat16, on the GPU that is here.

    python benchmarks/fp8_speed.py [--samples 30] [--write]
    python benchmarks/fp8_speed.py --tiny        the same at toy sizes with emulated fp8, anywhere: no figures

Three tables: a linear layer of 15,872 tokens, 4096 to 16,384 features, forward and backward, of which TransformerEngine
and torchao publish figures; products of growing sizes, for the size from which fp8 is faster (`Recipe.min_reuse`); and
a whole step of a decoder with AdamW. Precisions take turns, sample by sample; tables have medians and the middle half.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import flax
import jax
import jax.numpy as jnp
import models
import optax
from results import write_section

import mpjax as mp

CALLS = 10
LINEAR = (15872, 4096, 16384)
SIZES = (512, 1024, 2048, 4096, 8192)
DECODER = {"layers": 6, "width": 4096, "heads": 32, "vocabulary": 256}


def variants(tiny: bool) -> dict[str, tuple[str, mp.Rules, bool]]:
    """Policy, rules and whether scaling is delayed, by the name of a column."""

    def fp8(**options: Any) -> mp.Rules:
        return mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=tiny, **options))

    return {
        "bfloat16": ("mixed_bfloat16", mp.default_rules(), False),
        "fp8": ("mixed_float8", fp8(), False),
        "fp8, weight gradients in bfloat16": ("mixed_float8", fp8(weight_gradient="bfloat16"), False),
        "fp8, delayed": ("mixed_float8", fp8(), True),
    }


def compiled(loss: Callable[..., Any], policy: str, rules: mp.Rules, delayed: bool, tx: Any, *args: Any) -> Any:
    """A call that carries on what it works on, compiled: loss, gradients and, with an optimizer, its step."""
    grad_fn = jax.value_and_grad(mp.autocast(loss, policy, rules))
    params, batch = args
    scaling = mp.fp8.init(grad_fn)(*args) if delayed else None
    moments = tx.init(params) if tx else None

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, moments: Any, scaling: Any, batch: Any) -> Any:
        if delayed:
            (value, grads), scaling = mp.fp8.delayed(grad_fn)(scaling, params, batch)
        else:
            value, grads = grad_fn(params, batch)
        if not tx:
            # Gradients are made, not kept.
            return params, moments, scaling, value + sum(jnp.sum(g) for g in jax.tree.leaves(grads)) * 0
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, scaling, value

    carried = [jax.tree.map(jnp.copy, params), moments, scaling]
    run = step.lower(*carried, batch).compile()

    def sample() -> float:
        jax.block_until_ready(carried)
        start = time.perf_counter()
        for _ in range(CALLS):
            *carried[:], value = run(*carried, batch)
        jax.block_until_ready(value)
        return (time.perf_counter() - start) / CALLS

    return sample


def product(sizes: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    m, k, n = sizes
    weight, x = jax.random.normal(jax.random.key(0), (k, n)), jax.random.normal(jax.random.key(1), (m, k))
    # The backward pass has the gradient by the input too, as that of a layer in the middle has.
    return lambda both, _: jnp.sum(jnp.square(both[1] @ both[0])) * 1e-6, (weight / k**0.5, x), jnp.zeros(())


def decoder(tiny: bool) -> tuple[Any, Any, Any]:
    case = models.case("lm", None, tiny=tiny, batch=None if tiny else 8, sizes=None if tiny else DECODER)
    params, _ = jax.jit(case.init)(jax.random.key(0))
    return lambda p, b: case.loss(p, {}, b)[0], params, jax.jit(case.batch)(jax.random.key(1))


def table(work: dict[str, tuple[Any, Any, Any]], tx: Any, arguments: argparse.Namespace) -> str:
    names = variants(arguments.tiny)
    lines = [f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for label, (loss, *args) in work.items():
        print(f"compiling: {label}", file=sys.stderr, flush=True)
        ready = {name: compiled(loss, *chosen, tx, *args) for name, chosen in names.items()}
        for sample in (*ready.values(), *ready.values()):
            sample()
        taken = [{name: sample() for name, sample in ready.items()} for _ in range(arguments.samples)]
        cells = []
        for name in names:
            seconds = [row[name] for row in taken]
            low, middle, high = statistics.quantiles(seconds, n=4)
            ratio = statistics.median(row["bfloat16"] / row[name] for row in taken)
            cells.append(f"{middle * 1e3:.3f} ms ({low * 1e3:.3f} to {high * 1e3:.3f}), {ratio:.2f}x")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that it runs")
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.tiny:
        raise SystemExit("there is no GPU here; --tiny runs anywhere")
    linear = (64, 32, 128) if arguments.tiny else LINEAR
    sizes = (16, 32) if arguments.tiny else SIZES
    linears = {f"linear {'x'.join(map(str, linear))}": product(linear)}
    squares = {f"{n}x{n}x{n}, reuse {n / 3:.0f}": product((n, n, n)) for n in sizes}
    texts = (
        table(linears, None, arguments),
        table(squares, None, arguments),
        table({"decoder": decoder(arguments.tiny)}, optax.adamw(1e-4), arguments),
    )
    text = (
        f"On {jax.devices()[0].device_kind}; jax {jax.__version__}, flax {flax.__version__}, mpjax {mp.__version__}. "
        f"Command: `python benchmarks/fp8_speed.py`. Medians of {arguments.samples} samples of {CALLS} calls; in "
        "brackets the middle half; how many times faster than bfloat16, the median of the ratios.\n\n"
        + "\n\n".join(texts)
    )
    print(text)
    if arguments.write and not arguments.tiny:
        write_section("fp8_speed", text)


if __name__ == "__main__":
    main()
