"""The loop in equinox: its own idiom, in mixed precision.

    pip install "mpjax[examples]" equinox
    python examples/equinox_loop.py                           # the policy for this machine's hardware
    python examples/equinox_loop.py --policy mixed_float16    # any other: mixed_bfloat16, float32 ...

A model is a tree, `eqx.filter_jit` and `eqx.apply_updates` are what they are in float32. What mpjax adds is numbered
from 1 to 4. The data are scikit-learn's handwritten digits, 8 x 8 pixels; haiku_loop.py does the same in haiku.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits

import mpjax as mp

TEST_IMAGES = 360
REPORT_EVERY = 20


class Classifier(eqx.Module):
    """An ordinary float32 model of one image: nothing in it knows about precision."""

    hidden: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        first, second, last = jax.random.split(key, 3)
        self.hidden = [eqx.nn.Linear(64, 128, key=first), eqx.nn.Linear(128, 128, key=second)]
        self.norms = [eqx.nn.LayerNorm(128), eqx.nn.LayerNorm(128)]
        self.head = eqx.nn.Linear(128, 10, key=last)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps an image of shape (64,) to logits of shape (10,)."""
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = jax.nn.gelu(norm(linear(x)))
        return self.head(x)


def loss_fn(model: Classifier, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean cross entropy, and the share of right answers."""
    logits = jax.vmap(model)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints, and returns the losses, the accuracy on the test images and how many steps were skipped."""
    parser = argparse.ArgumentParser(description="Handwritten digits in mixed precision, in equinox.")
    parser.add_argument("--policy", help='"mixed_bfloat16", "mixed_float16", "float32" ...; default: by hardware')
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    policy = mp.get_policy(args.policy) if args.policy else mp.default_policy()

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = (digits.data[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)
    # 1. Parameters in the policy's dtype, float32 for the mixed policies; whatever else a model holds is left as it is.
    model = policy.cast_to_param(Classifier(jax.random.key(args.seed)))
    # 2. The same function with its matrix work in the compute dtype, and losses and statistics in float32.
    low_loss_fn = mp.autocast(loss_fn, policy)
    # 3. Outermost: unscales the gradients, and skips a step whose gradients overflowed.
    tx = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), policy.loss_scale())
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def train_step(
        batch: tuple[jax.Array, jax.Array], model: Classifier, opt_state: Any
    ) -> tuple[Classifier, Any, dict[str, jax.Array]]:
        # 4. In the place of eqx.filter_value_and_grad, and like it for the floats of a model alone: the loss is the
        #    true one, the gradients are those of the loss times the scale.
        grad_fn = mp.value_and_grad(low_loss_fn, mp.get_loss_scale(opt_state), has_aux=True)
        (loss, _), grads = grad_fn(model, *batch)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        metrics = {"loss": loss, "skips": opt_state.skip_state.skips_total}
        return eqx.apply_updates(model, updates), opt_state, metrics

    console = Console(highlight=False)
    console.print(f"{policy}\n{args.steps} steps of {args.batch} images")
    random, metrics = np.random.default_rng(args.seed), []
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=args.steps)
        for i in range(1, args.steps + 1):
            rows = random.integers(TEST_IMAGES, len(images), size=args.batch)
            model, opt_state, numbers = train_step((images[rows], labels[rows]), model, opt_state)
            metrics.append(numbers)
            if i % REPORT_EVERY == 0 or i == args.steps:  # reading a number waits for the device
                shown = "loss {loss:.3f}, {skips} skipped".format(**jax.device_get(numbers))
                progress.update(bar, completed=i, description=shown)

    _, accuracy = eqx.filter_jit(low_loss_fn)(model, images[:TEST_IMAGES], labels[:TEST_IMAGES])
    losses, skips = [float(numbers["loss"]) for numbers in jax.device_get(metrics)], int(metrics[-1]["skips"])
    console.print(f"test accuracy {accuracy:.3f}; {skips} steps skipped")
    return {"losses": losses, "accuracy": float(accuracy), "skips": skips}


if __name__ == "__main__":
    main()
