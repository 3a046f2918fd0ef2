"""What an AdamW step costs with weights and moments in fewer bits, compiled for TPU v5e or H100 without either.

    python benchmarks/weights_cost.py [--target v5e|h100] [--side 4096] [--write]

One step, clipping included, on eight square matrices; gradients given in the weights' dtype, weights and state donated.
The first row is plain optax in float32; all others are inside `mp.loss_scaled`. --write puts the table into RESULTS.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cpu_only  # noqa: F401 # isort: skip  # before jax

import jax
import jax.numpy as jnp
import optax
from results import write_section

import mpjax as mp
from mpjax.transforms import kahan, master_weights, params_ema, state_dtypes, stochastic_rounding

KEY = jax.random.key(0)
MATRICES = 8
TARGETS = ("v5e", "h100")


def variants() -> dict[str, tuple[Any, optax.GradientTransformation]]:
    """Each: the dtype of the weights, and the transform."""
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))
    bf16_moments = state_dtypes(adamw, {"mu": "bfloat16", "nu": "bfloat16"})
    small_moments = state_dtypes(adamw, {"mu": "float8_e4m3fn", "nu": "float8_e4m3fn"})
    inside = {
        "float32": (jnp.float32, adamw),
        "float32, average of the weights": (jnp.float32, params_ema(adamw, 0.999)),
        "bfloat16, nearest (loses small steps)": (jnp.bfloat16, adamw),
        "bfloat16, float32 masters": (jnp.bfloat16, master_weights(adamw)),
        "bfloat16, 16-bit remainders": (jnp.bfloat16, master_weights(adamw, form="remainder")),
        "bfloat16, Kahan": (jnp.bfloat16, kahan(adamw)),
        "bfloat16, stochastic": (jnp.bfloat16, stochastic_rounding(adamw, KEY)),
        "float32, bfloat16 moments": (jnp.float32, bf16_moments),
        "bfloat16, remainders, bfloat16 moments": (jnp.bfloat16, master_weights(bf16_moments, form="remainder")),
        "bfloat16, stochastic, bfloat16 moments": (jnp.bfloat16, stochastic_rounding(bf16_moments, KEY)),
        "bfloat16, stochastic, 8-bit moments": (jnp.bfloat16, stochastic_rounding(small_moments, KEY)),
    }
    scaled = {name: (dtype, mp.loss_scaled(tx, mp.NoOpLossScale())) for name, (dtype, tx) in inside.items()}
    return {"float32, plain optax": (jnp.float32, adamw), **scaled}


def measure(target: str, side: int) -> dict[str, tuple[int, mp.aot.Report]]:
    """For each variant the bytes of weights and state, and what the compiler says of the step."""
    found = {}
    for name, (dtype, tx) in variants().items():
        print(f"compiling for {target}: {name}", file=sys.stderr, flush=True)
        avals = [jax.ShapeDtypeStruct((side, side), dtype)] * MATRICES
        state = jax.eval_shape(tx.init, avals)

        def step(params: Any, opt_state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, opt_state = tx.update(grads, opt_state, params)
            return mp.transforms.apply_updates(params, updates), opt_state

        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((avals, state)))
        found[name] = kept, mp.aot.compile_for(target, step, avals, state, avals, donate_argnums=(0, 1))
    return found


def table(target: str, found: dict[str, tuple[int, mp.aot.Report]], parameters: int) -> str:
    base = next(iter(found.values()))[1]
    tpu = target == "v5e"
    titles = ["weights and state", "main memory", "peak memory", "temporary", *(["estimated cycles"] if tpu else [])]
    rows = [f"| weights and moments | {' | '.join(titles)} |", "| --- " * (len(titles) + 1) + "|"]
    for name, (kept, cost) in found.items():
        cells = [
            f"{kept / parameters:.2f} B a parameter",
            f"{cost.main_memory_bytes / parameters:.2f} B ({cost.main_memory_bytes / base.main_memory_bytes:.3f}x)",
            f"{cost.peak_bytes / 1e6:.0f} MB ({cost.peak_bytes / base.peak_bytes:.3f}x)",
            f"{cost.temp_bytes / 1e6:.1f} MB",
        ]
        if tpu:
            cells.append(f"{cost.estimated_cycles / 1e6:.2f} M ({cost.estimated_cycles / base.estimated_cycles:.3f}x)")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="v5e")
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of each of the eight matrices")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    target, side = arguments.target, arguments.side
    found = measure(target, side)
    text = (
        f"Compiled for one {mp.aot.TARGETS[target].title} by {mp.aot.compiler_version(target)}, jax {jax.__version__}, "
        f"optax {optax.__version__}, mpjax {mp.__version__}; {MATRICES * side**2 / 1e6:.0f} M parameters. "
        f"Command: `python benchmarks/weights_cost.py --target {target} --side {side}`.\n\n"
        + table(target, found, MATRICES * side**2)
    )
    print(text)
    if arguments.write:
        write_section(f"weights_cost {target}", text)


if __name__ == "__main__":
    main()
