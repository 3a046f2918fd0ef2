"""Whether weights in bfloat16 train as well as float32 ones: a small transformer on the standard library's source.

    python benchmarks/half_weights.py [--steps 1500] [--seeds 3] [--write]

Bytes of the `.py` files that come with Python; a byte-level decoder in plain JAX, AdamW with clipping and a cosine
schedule. All arithmetic of the model is float32, so that the rows differ in nothing but how weights and moments are
stored. Initial weights, batches and the held-out text are the same in all rows; the seeds of a row run side by side
under `jax.vmap`. Draws out/benchmarks/half_weights.png (needs `pip install "mpjax[viz]"`); --write puts the table into
RESULTS.md.
"""

import argparse
import platform
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from results import write_section

import mpjax as mp

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 2, 64, 4, 64, 16
CHUNK = 50  # steps in one call of the compiled loop
FIGURE = Path(__file__).parent.parent / "out" / "benchmarks" / "half_weights.png"


def text() -> tuple[np.ndarray, np.ndarray]:
    """The top-level modules of the standard library as bytes, to train on, and every tenth of them, held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 9) == held_out) for held_out in (0, 1)]
    return tuple(np.frombuffer(part, np.uint8) for part in parts)


def init(key: jax.Array) -> Any:
    keys = iter(jax.random.split(key, 32))

    def dense(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        return scale * rows**-0.5 * jax.random.normal(next(keys), (rows, columns))

    def layer() -> Any:
        return {
            "norms": jnp.ones((2, WIDTH)),
            "qkv": dense(WIDTH, 3 * WIDTH),
            "out": dense(WIDTH, WIDTH, 0.5),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH, 0.5),
        }

    return {
        "embed": 0.5 * dense(256, WIDTH, 16.0 * WIDTH**-0.5),
        "positions": 0.1 * dense(LENGTH, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": jnp.ones(WIDTH),
        "head": dense(WIDTH, 256, 0.5),
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
    """The mean cross entropy in nats a byte; parameters in any dtype are widened first."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["embed"][inputs] + params["positions"]
    for layer in params["layers"]:
        h = norm(x, layer["norms"][0]) @ layer["qkv"]
        q, k, v = jnp.split(h.reshape(*h.shape[:2], HEADS, -1), 3, -1)
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + h.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(norm(x, layer["norms"][1]) @ layer["up"]) @ layer["down"]
    logits = norm(x, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


Transform = Callable[[optax.GradientTransformation], optax.GradientTransformation]
T = mp.transforms
# Each: how the weights are stored, and what goes around AdamW for it.
METHODS: dict[str, tuple[Any, Transform]] = {
    "float32": (jnp.float32, lambda tx: tx),
    "bfloat16, nearest": (jnp.bfloat16, lambda tx: tx),
    "bfloat16, float32 masters": (jnp.bfloat16, lambda tx: T.master_weights(tx)),
    "bfloat16, 16-bit remainders": (jnp.bfloat16, lambda tx: T.master_weights(tx, form="remainder")),
    "bfloat16, stochastic": (jnp.bfloat16, lambda tx: T.stochastic_rounding(tx, jax.random.key(7))),
    "bfloat16, Kahan": (jnp.bfloat16, lambda tx: T.kahan(tx)),
}


def train(method: str, steps: int, seeds: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Training losses (seeds, steps / CHUNK), each the mean of CHUNK steps, and held-out losses (seeds,)."""
    dtype, around = METHODS[method]
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))
    tx = mp.loss_scaled(around(adamw), mp.NoOpLossScale())
    train_text, held_out = map(jnp.asarray, text())

    def rows(data: jax.Array, starts: jax.Array) -> jax.Array:
        return data[starts[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = carry
        starts = jax.random.randint(key, (BATCH,), 0, train_text.size - LENGTH)
        loss, grads = jax.value_and_grad(loss_fn)(params, rows(train_text, starts))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (T.apply_updates(params, updates), opt_state), loss

    def start(seed: jax.Array) -> Any:
        params = jax.tree.map(lambda x: x.astype(dtype), init(jax.random.key(seed)))
        return params, tx.init(params)

    @jax.jit
    def chunk(carry: Any, first: jax.Array) -> tuple[Any, jax.Array]:
        def of_one(carry: Any, seed: jax.Array) -> tuple[Any, jax.Array]:
            key = jax.random.fold_in(jax.random.key(1), seed)
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(CHUNK))
            carry, losses = jax.lax.scan(step, carry, keys)
            return carry, losses.mean()

        return jax.vmap(of_one)(carry, jnp.arange(seeds))

    @jax.jit
    def held_out_loss(params: Any) -> jax.Array:
        starts = jax.random.randint(jax.random.key(2), (32, 2 * BATCH), 0, held_out.size - LENGTH)
        return jax.vmap(lambda p: jax.lax.map(lambda s: loss_fn(p, rows(held_out, s)), starts).mean())(params)

    carry, losses = jax.jit(jax.vmap(start))(jnp.arange(seeds)), []
    for first in range(0, steps, CHUNK):
        carry, loss = chunk(carry, first)
        losses.append(loss)
    return np.stack(losses, 1), np.asarray(held_out_loss(carry[0]))


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """The difference from the float32 run of the same seed, mean and range over the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    steps = CHUNK * (1 + np.arange(curves["float32"].shape[1]))
    styles = zip(plt.get_cmap("cividis")(np.linspace(0, 0.9, 4)), ("--", ":", "-.", (0, (1, 3))), strict=True)
    axes.axhline(0, color="0.6", linewidth=0.8)
    for name, losses in curves.items():
        if name == "float32":
            continue
        color, line = ("#c03030", "-") if "nearest" in name else next(styles)
        change = losses - curves["float32"]
        axes.plot(steps, change.mean(0), color=color, linestyle=line, label=name)
        axes.fill_between(steps, change.min(0), change.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="training loss less that of float32 (nats a byte)", xlim=(0, steps[-1]))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def table(held_out: dict[str, np.ndarray]) -> str:
    base = held_out["float32"]
    rows = ["| weights | held-out loss | deviation over seeds | less float32, paired | range |", "| --- " * 5 + "|"]
    for name, losses in held_out.items():
        change = losses - base
        rows.append(
            f"| {name} | {losses.mean():.4f} | {losses.std(ddof=1):.4f} "
            f"| {change.mean():+.4f} | {change.min():+.4f} to {change.max():+.4f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help=f"a multiple of {CHUNK}")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--rate", type=float, default=1e-3, help="the largest learning rate")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="float32 always runs")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    curves, held_out = {}, {}
    for method in dict.fromkeys(("float32", *arguments.methods)):
        print(f"training: {method}", file=sys.stderr, flush=True)
        curves[method], held_out[method] = train(method, arguments.steps, arguments.seeds, arguments.rate)
        print(f"  held out: {held_out[method]}", file=sys.stderr, flush=True)
    draw(curves, FIGURE)
    written = (
        f"{arguments.steps} steps of {BATCH} x {LENGTH} bytes, {arguments.seeds} seeds; text of Python "
        f"{platform.python_version()}, jax {jax.__version__}, optax {optax.__version__}, mpjax {mp.__version__}. "
        f"Command: `python benchmarks/half_weights.py --steps {arguments.steps} --seeds {arguments.seeds} "
        f"--rate {arguments.rate}`.\n\n{table(held_out)}"
    )
    print(written)
    if arguments.write:
        write_section("half_weights", written)


if __name__ == "__main__":
    main()
