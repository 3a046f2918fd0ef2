"""Training on data of which a part is broken: no step of it ever reaches a parameter, and the rest trains on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import scale_by_the_rule

import mpjax as mp

# optax's bias correction relies on JAX's usual promotion.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

# 1000 steps with faults among them, then 200 without.
FAULTY, CLEAN, ROWS, WIDTH = 1000, 200, 16, 8
FIRST, PERIOD, CEILING = 2.0**8, 10, 2.0**12
# Where in a batch, and what; the last is finite until it is float16, and even in float32 until it is squared.
FAULTS = [("x", np.nan), ("x", np.inf), ("y", -np.inf), ("y", np.nan), ("x", 1e30)]


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["w1"] + params["b"])
    return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)


@functools.cache
def training():
    """The jitted run over stacked batches: its last state, and what was seen on the device after each step."""
    cast = mp.autocast(loss_fn, "mixed_float16")
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    tx = mp.loss_scaled(inner, mp.DynamicLossScale(FIRST, period=PERIOD, max_loss_scale=CEILING))

    def step(state, batch):
        params, opt_state = state
        loss, grads = mp.value_and_grad(cast, mp.get_loss_scale(opt_state))(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        scale, skip_state = mp.get_loss_scale(opt_state), opt_state.skip_state
        before, after = (state[0], state[1].skip_state.inner_state), (params, skip_state.inner_state)
        kept = jax.tree.map(lambda a, b: jnp.all(a == b), before, after)
        seen = {
            "loss": loss,
            "finite": mp.all_finite((params, opt_state)),
            "kept": jnp.stack(jax.tree.leaves(kept)),
            "skips": skip_state.skips_total,
            "scale": scale.loss_scale,
            "at_floor": scale.at_floor,
        }
        return (params, opt_state), seen

    def train(batches):
        keys = jax.random.split(jax.random.key(0))
        params = {
            "w1": jax.random.normal(keys[0], (WIDTH, 2 * WIDTH)) / 3,
            "b": jnp.zeros(2 * WIDTH),
            "w2": jax.random.normal(keys[1], (2 * WIDTH, 1)) / 4,
        }
        return jax.lax.scan(step, (params, tx.init(params)), batches)

    return jax.jit(train)


def batches(faults):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(FAULTY + CLEAN, ROWS, WIDTH)).astype(np.float32)
    found = {"x": x, "y": np.abs(x).mean(-1, keepdims=True)}
    for i, step in enumerate(faults):
        name, value = FAULTS[i % len(FAULTS)]
        found[name][step, rng.integers(ROWS), -1] = value
    return found


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_broken_batches(share, record_property):
    count = round(share * FAULTY)
    faults = np.random.default_rng(0).permutation(FAULTY)[:count]
    faulty = np.isin(np.arange(FAULTY + CLEAN), faults)
    _, seen = jax.device_get(training()(batches(faults)))

    assert seen["finite"].all()
    assert (seen["skips"] == np.cumsum(faulty)).all()
    # A skipped step keeps all, and any other moves all.
    assert (seen["kept"] == faulty[:, None]).all()
    scales, _, at_floor = scale_by_the_rule(faulty, FIRST, PERIOD, CEILING)
    assert seen["scale"].tolist() == scales
    assert seen["at_floor"].tolist() == at_floor
    counts = f"{count} of {FAULTY} batches broken, {seen['skips'][-1]} skipped, the floor held {at_floor[-1]} times"
    record_property("counts", counts)
    # To the floor from one broken batch in ten on, and back again after them; and it learns all the while.
    assert min(scales) == {0.01: 2.0**8, 0.1: 1.0, 0.5: 1.0}[share]
    assert scales[-1] == CEILING
    losses = np.where(faulty, np.inf, seen["loss"])
    assert np.sort(losses)[: FAULTY // 4].max() < 0.1
    assert losses[-CLEAN:].mean() < 0.02 * losses[~faulty][0]
