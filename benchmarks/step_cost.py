"""What a loss-scaled optimizer step costs over a plain one, compiled for TPU v5e.

    make bench          or          python benchmarks/step_cost.py [--json FILE]

One AdamW step on 128 MB of float32 parameters (8 matrices of 2048 x 2048), gradients given, parameters and state
donated; with clipping by the global norm and without. Each row is the same step made safe against overflow in
another way; the columns are relative to the plain step, which is not safe at all.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from aot import Cost, compile_for_v5e  # isort: skip  # before jax: it sets what libtpu reads

import jax
import jax.numpy as jnp
import jmp
import optax

import mpjax as mp

PARAMS = [jax.ShapeDtypeStruct((2048, 2048), jnp.float32)] * 8
GRADS_BYTES = 8 * 2048 * 2048 * 4


def optimizer(clip: bool) -> optax.GradientTransformation:
    adamw = optax.adamw(3e-4)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw) if clip else adamw


def transform_step(tx: optax.GradientTransformation) -> tuple[Any, Callable[..., Any]]:
    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.eval_shape(tx.init, PARAMS), step


def jmp_style(clip: bool) -> tuple[Any, Callable[..., Any]]:
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
    return (jax.eval_shape(tx.init, PARAMS), scale, counter), step


def cond_style(clip: bool) -> tuple[Any, Callable[..., Any]]:
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

    return jmp_style(clip)[0], step


def variants(clip: bool) -> dict[str, tuple[Any, Callable[..., Any]]]:
    tx = optimizer(clip)
    return {
        "plain optax, no scaling": transform_step(tx),
        "mp.loss_scaled, DynamicLossScale": transform_step(mp.loss_scaled(tx, mp.DynamicLossScale())),
        "mp.loss_scaled, NoOpLossScale": transform_step(mp.loss_scaled(tx, mp.NoOpLossScale())),
        "jmp: all_finite and select_tree": jmp_style(clip),
        "optax.apply_if_finite": transform_step(optax.apply_if_finite(tx, 1000)),
        "lax.cond around the update": cond_style(clip),
    }


def measure(clip: bool) -> dict[str, Cost]:
    costs = {}
    for name, (state, step) in variants(clip).items():
        print(f"compiling: {name}{' with clipping' if clip else ''}", file=sys.stderr)
        costs[name] = compile_for_v5e(step, PARAMS, state, PARAMS, donate=(0, 1))
    return costs


def table(costs: dict[str, Cost]) -> str:
    plain = next(iter(costs.values()))
    rows = ["| step | bytes accessed | of main memory | estimated cycles | temporaries |", "| --- " * 5 + "|"]
    for name, cost in costs.items():
        reads = (cost.hbm_bytes - plain.hbm_bytes) / GRADS_BYTES
        rows.append(
            f"| {name} | {cost.bytes_accessed / 1e6:.0f} MB ({cost.bytes_accessed / plain.bytes_accessed:.3f}x) "
            f"| {cost.hbm_bytes / 1e6:.0f} MB ({reads:+.2f} reads of the gradients) "
            f"| {cost.estimated_cycles / 1e3:.0f} k ({cost.estimated_cycles / plain.estimated_cycles:.3f}x) "
            f"| {cost.temp_bytes / 1e6:.1f} MB |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    results = {"with clipping": measure(True), "without clipping": measure(False)}
    for title, costs in results.items():
        print(f"\n{title}\n\n{table(costs)}")
        for name, cost in costs.items():
            if name.startswith("mp.") and cost.leaves_the_device:
                raise SystemExit(f"{name} leaves the device: {cost.leaves_the_device}")
    print(f"\njax {jax.__version__}, optax {optax.__version__}, mpjax {mp.__version__}")
    if arguments.json:
        figures = {t: {n: c._asdict() | {"hlo": None} for n, c in costs.items()} for t, costs in results.items()}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
