"""Handwritten digits in mixed precision, in 40 lines; what mpjax adds is numbered. Needs `mpjax[examples]`."""

import argparse

import jax
import optax
import rich.progress
from flax import linen as nn
from sklearn.datasets import load_digits

import mpjax as mp


def main(argv=None):
    """Trains, prints and returns the accuracy on 360 images that are held out."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, default in {"--policy": str(mp.default_policy()), "--steps": 300, "--batch": 64, "--seed": 0}.items():
        parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    args = parser.parse_args(argv)
    (images, labels), model = load_digits(return_X_y=True), nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
    policy = mp.get_policy(args.policy)  # 1. Which dtypes: "mixed_bfloat16", "mixed_float16", "float32" ...
    loss_fn = mp.autocast(lambda p, x, y: optax.softmax_cross_entropy(model.apply(p, x), y).mean(), policy)  # 2. Casts.
    tx = mp.loss_scaled(optax.adam(3e-3), policy.loss_scale())  # 3. Unscales, and skips steps that overflowed.
    state = tx.init(params := policy.cast_to_param(model.init(jax.random.key(args.seed), images[:1])))

    @jax.jit
    def step(params, state, x, y):
        loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(params, x, y)  # 4. The true loss.
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for rows in rich.progress.track(jax.random.randint(jax.random.key(args.seed), (args.steps, args.batch), 360, 1797)):
        params, state, loss = step(params, state, images[rows] / 16, jax.nn.one_hot(labels[rows], 10))
    accuracy = float((model.apply(params, images[:360] / 16).argmax(-1) == labels[:360]).mean())
    rich.print(f"{policy}: loss {loss:.3f}, {state.skip_state.skips_total} steps skipped, accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
