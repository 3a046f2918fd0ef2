"""Tables and oracles shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

import mpjax as mp

LOSS_SCALES = {
    "noop": mp.NoOpLossScale(),
    "static": mp.StaticLossScale(1024.0),
    "dynamic": mp.DynamicLossScale(2.0**10, period=2),
    "dynamic_all_options": mp.DynamicLossScale(
        2.0**4,
        counter=1,
        period=3,
        factor=4,
        min_loss_scale=0.25,
        max_loss_scale=2.0**8,
        backoff_factor=0.25,
        hysteresis=2,
        hysteresis_refill="growth",
        at_floor=5,
    ),
}


def bits(tree):
    """The tree's leaves as raw bytes beside dtype and shape: equal only when every bit is."""
    leaves = []
    for x in jax.tree.leaves(tree):
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        leaves.append((str(x.dtype), x.shape, x.tobytes()))
    return jax.tree.structure(tree), leaves


def run(state, sequence):
    """Log2 of the scale after each step of a sequence in which '.' is finite and 'X' is not."""
    step = jax.jit(lambda s, finite: s.adjust(finite))
    history = []
    for symbol in sequence:
        state = step(state, jnp.asarray(symbol == "."))
        history.append(int(np.log2(float(state.loss_scale))))
    return history, state


def scale_by_the_rule(overflows, first, period, ceiling):
    """The scale after each step, its clean steps and how often the floor of 1 held it: the rule in plain Python."""
    scale, clean, held = first, 0, 0
    history = []
    for overflow in overflows:
        clean = 0 if overflow else clean + 1
        if overflow:
            held += scale == 1
            scale = max(scale / 2, 1.0)
        elif clean == period:
            scale, clean = min(scale * 2, ceiling), 0
        history.append((scale, clean, held))
    return tuple(map(list, zip(*history, strict=True)))


def total(fn):
    """The mean square of what a function returns, to differentiate."""
    return lambda *args: (fn(*args) ** 2).mean()


def close(got, true, rel=0.04):
    """Within a share of the largest true value."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=rel * float(jnp.abs(b).max()))
