"""The complete loop: a float32 model trained in low precision, with everything that belongs into one training step.

    pip install "mpjax[examples]"
    python examples/complete_loop.py                           # the policy for this machine's hardware
    python examples/complete_loop.py --policy mixed_float16    # any other: mixed_bfloat16, float32 ...

Autocast, accumulation over microbatches, a dynamic loss scale, clipping, AdamW with a warm-up and a cosine decay, and
an average of the weights, which is what is evaluated in the end. What mpjax adds is numbered from 1 to 6; the rest is
what a float32 loop has anyway. The data are scikit-learn's handwritten digits, 8 x 8 pixels.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits

import mpjax as mp

TEST_IMAGES = 360
REPORT_EVERY = 20


class Classifier(nn.Module):
    """An ordinary float32 model: nothing in it knows about precision."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape (batch, 64) to logits of shape (batch, 10)."""
        for _ in range(2):
            images = nn.gelu(nn.LayerNorm()(nn.Dense(128)(images)))
        return nn.Dense(10)(images)


def loss_fn(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The mean cross entropy, and beside it the share of right answers."""
    logits: Any = Classifier().apply(params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), (logits.argmax(-1) == batch["label"]).mean()


def make_optimizer(policy: mp.Policy, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW and the average of the weights, inside the wrapper that owns the loss scale."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=steps // 10, decay_steps=steps)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))
    # 1. The average sees the weights after each step, in float32 whatever they are stored in.
    averaged = mp.transforms.params_ema(chain, decay=0.98)
    # 2. Outermost: unscales the gradients for all that is inside, and skips a step whose gradients overflowed, so that
    #    nothing inside ever notices: no moment, no count, no schedule, no average. float16 needs the scale, bfloat16
    #    and float32 do not; policy.loss_scale() knows.
    return mp.loss_scaled(averaged, policy.loss_scale())


def make_train_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformationExtraArgs, microbatches: int
) -> Callable[..., Any]:
    """The jitted step. It gives up the buffers of the old parameters and state for the new ones."""

    def train_step(params: Any, opt_state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any, dict[str, jax.Array]]:
        # 3. Like jax.value_and_grad: the loss is the true one, the gradients are those of the loss times the scale.
        grad_fn = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state), has_aux=True)
        # 4. Over the batch in pieces, in the memory of one piece; summed in float32. An inf in one piece makes the mean
        #    inf, and the step is skipped. on_overflow="drop" would leave out that piece instead.
        (loss, accuracy), grads = mp.accumulate(grad_fn, microbatches)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": loss, "accuracy": accuracy, "skipped": opt_state.skip_state.skips_total}
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


def load() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The 1,797 images that come with scikit-learn, 360 of them for testing."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = (digits.data[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)
    train, test = slice(TEST_IMAGES, None), slice(TEST_IMAGES)
    return {"image": images[train], "label": labels[train]}, {"image": images[test], "label": labels[test]}


def batches(data: dict[str, np.ndarray], size: int, steps: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `size` rows drawn at random, one a step."""
    random = np.random.default_rng(seed)
    for _ in range(steps):
        rows = random.choice(len(data["label"]), size, replace=False)
        yield {name: values[rows] for name, values in data.items()}


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, evaluates, and returns the accuracy of the averaged weights on the test images."""
    parser = argparse.ArgumentParser(description="The complete mixed-precision loop, on handwritten digits.")
    parser.add_argument("--policy", help='"mixed_bfloat16", "mixed_float16", "float32" ...; default: by hardware')
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--microbatches", type=int, default=4, help="pieces that a batch is worked through in")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    policy = mp.get_policy(args.policy) if args.policy else mp.default_policy()
    train, test = load()
    # Parameters in the policy's dtype: float32 for the mixed policies.
    params = policy.cast_to_param(Classifier().init(jax.random.key(args.seed), train["image"][:1]))
    # 5. The same function with its matrix work in the compute dtype, and losses and statistics in float32.
    low_loss_fn = mp.autocast(loss_fn, policy)
    tx = make_optimizer(policy, args.steps)
    opt_state = tx.init(params)
    train_step = make_train_step(low_loss_fn, tx, args.microbatches)

    console = Console(highlight=False)
    console.print(f"{policy}\n{args.steps} steps of {args.batch} images in {args.microbatches} microbatches")
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=args.steps)
        for i, batch in enumerate(batches(train, args.batch, args.steps, args.seed), start=1):
            params, opt_state, metrics = train_step(params, opt_state, batch)
            if i % REPORT_EVERY == 0 or i == args.steps:  # reading a number waits for the device
                shown = "loss {loss:.3f}, accuracy {accuracy:.3f}, {skipped} skipped".format(**jax.device_get(metrics))
                progress.update(bar, completed=i, description=shown)

    # 6. The averages in the place of the parameters; they are in the optimizer state, and so in its checkpoints.
    averaged = mp.transforms.ema_params(opt_state, params)
    last, ours = (float(jax.jit(low_loss_fn)(weights, test)[1]) for weights in (params, averaged))
    console.print(f"test accuracy {last:.3f} with the last weights, {ours:.3f} with their average")
    return ours


if __name__ == "__main__":
    main()
