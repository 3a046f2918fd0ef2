"""What a loss-scaled optimizer step costs over a plain one, compiled for TPU v5e.

    make bench          or          python benchmarks/step_cost.py [--sides 2048 4096] [--write]

One AdamW step on eight square float32 matrices (128 MB in all at 2048 rows, 512 MB at 4096), gradients given,
parameters and state donated; with clipping by the global norm and without. Each row is the same step made safe
against overflow in another way; the columns are relative to the plain step, which is not safe at all. --write puts
the tables into RESULTS.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cpu_only  # noqa: F401 # isort: skip  # before jax

import jax
import jax.numpy as jnp
import jmp
import optax
from results import write_section

import mpjax as mp


def optimizer(clip: bool) -> optax.GradientTransformation:
    adamw = optax.adamw(3e-4)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw) if clip else adamw


def transform_step(tx: optax.GradientTransformation, params: Any) -> tuple[Any, Callable[..., Any]]:
    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.eval_shape(tx.init, params), step


def jmp_style(clip: bool, avals: Any) -> tuple[Any, Callable[..., Any]]:
    """Jmp's README: unscale, all_finite, update, select both trees, adjust."""
    tx = optimizer(clip)

    def step(params: Any, state: Any, grads: Any) -> Any:
        opt_state, *scale = state
        loss_scale = jmp.DynamicLossScale(*scale)
        grads = loss_scale.unscale(grads)
        finite = jmp.all_finite(grads)
        updates, new_state = tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        kept = jmp.select_tree(finite, (new_params, new_state), (params, opt_state))
        loss_scale = loss_scale.adjust(finite)
        return kept[0], (kept[1], loss_scale.loss_scale, loss_scale.counter)

    # Its two arrays and not the object: jmp validates on unflatten, which lowering does with other leaves.
    scale, counter = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return (jax.eval_shape(tx.init, avals), scale, counter), step


def cond_style(clip: bool, avals: Any) -> tuple[Any, Callable[..., Any]]:
    """The whole update inside `lax.cond`, as many training loops have it."""
    tx = optimizer(clip)

    def step(params: Any, state: Any, grads: Any) -> Any:
        opt_state, *scale = state
        loss_scale = jmp.DynamicLossScale(*scale)
        grads = loss_scale.unscale(grads)
        finite = jmp.all_finite(grads)

        def take() -> Any:
            updates, new_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), new_state

        params, opt_state = jax.lax.cond(finite, take, lambda: (params, opt_state))
        loss_scale = loss_scale.adjust(finite)
        return params, (opt_state, loss_scale.loss_scale, loss_scale.counter)

    return jmp_style(clip, avals)[0], step


def variants(clip: bool, avals: Any) -> dict[str, tuple[Any, Callable[..., Any]]]:
    tx = optimizer(clip)
    return {
        "plain optax, no scaling": transform_step(tx, avals),
        "mp.loss_scaled, DynamicLossScale": transform_step(mp.loss_scaled(tx, mp.DynamicLossScale()), avals),
        "mp.loss_scaled, NoOpLossScale": transform_step(mp.loss_scaled(tx, mp.NoOpLossScale()), avals),
        "mp.diagnostics.gradient_monitor around it, a step that it measures": transform_step(
            mp.diagnostics.gradient_monitor(mp.loss_scaled(tx, mp.DynamicLossScale())), avals
        ),
        "jmp: all_finite and select_tree": jmp_style(clip, avals),
        "optax.apply_if_finite": transform_step(optax.apply_if_finite(tx, 1000), avals),
        "lax.cond around the update": cond_style(clip, avals),
    }


def measure(clip: bool, side: int) -> dict[str, mp.aot.Report]:
    avals = [jax.ShapeDtypeStruct((side, side), jnp.float32)] * 8
    costs = {}
    for name, (state, step) in variants(clip, avals).items():
        print(f"compiling: {name}{' with clipping' if clip else ''}", file=sys.stderr)
        costs[name] = cost = mp.aot.compile_for("v5e", step, avals, state, avals, donate_argnums=(0, 1))
        if name.startswith("mp.") and cost.host_transfers:
            raise SystemExit(f"{name} leaves the device: {cost.host_transfers}")
    return costs


def table(costs: dict[str, mp.aot.Report], gradient_bytes: int) -> str:
    plain = next(iter(costs.values()))
    rows = ["| step | bytes accessed | main memory | estimated cycles | temporaries |", "| --- " * 5 + "|"]
    for name, cost in costs.items():
        reads = (cost.main_memory_bytes - plain.main_memory_bytes) / gradient_bytes
        rows.append(
            f"| {name} | {cost.bytes_accessed / 1e6:.0f} MB ({cost.bytes_accessed / plain.bytes_accessed:.3f}x) "
            f"| {cost.main_memory_bytes / 1e6:.0f} MB ({reads:+.2f} reads of the gradients) "
            f"| {cost.estimated_cycles / 1e3:.0f} k ({cost.estimated_cycles / plain.estimated_cycles:.3f}x) "
            f"| {cost.temp_bytes / 1e6:.1f} MB |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096], help="rows and columns of the matrices")
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    arguments = parser.parse_args()
    sides = " ".join(map(str, arguments.sides))
    parts = [
        f"Compiled for one TPU v5e chip by {mp.aot.compiler_version('v5e')}; jax {jax.__version__}, "
        f"optax {optax.__version__}, mpjax {mp.__version__}. Command: `python benchmarks/step_cost.py --sides {sides}`."
    ]
    for side in arguments.sides:
        gradient_bytes = 8 * side**2 * 4
        for title, clip in (("with clipping", True), ("without clipping", False)):
            parts.append(f"### AdamW {title}, {gradient_bytes / 2**20:.0f} MB of float32 parameters")
            parts.append(table(measure(clip, side), gradient_bytes))
    text = "\n\n".join(parts)
    print(text)
    if arguments.write:
        write_section("step_cost", text)


if __name__ == "__main__":
    main()
