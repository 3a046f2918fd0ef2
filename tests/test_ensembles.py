"""Members of an ensemble under vmap, each with a loss scale of its own: one's overflow is nobody else's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits, run

import mpjax as mp

# optax's bias correction relies on JAX's usual promotion.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

MEMBERS, STEPS, ROWS, WIDTH = 8, 12, 16, 8
STRUCK = {3: "..X..X.X....", 6: ".XX........."}
EXPONENTS = range(4, 4 + MEMBERS)
INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, STEPS)))


def loss_fn(params, batch):
    hidden = jax.nn.tanh(batch["x"] @ params["w1"])
    return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)


cast = mp.autocast(loss_fn, "mixed_float16")


def optimizer(scale):
    return mp.loss_scaled(INNER, mp.DynamicLossScale(scale, period=3))


def start(key, scale):
    """A member's parameters and optimizer state."""
    keys = jax.random.split(key)
    params = {"w1": jax.random.normal(keys[0], (WIDTH, WIDTH)), "w2": jax.random.normal(keys[1], (WIDTH, 1))}
    return params, optimizer(scale).init(params)


def step(state, batch):
    params, opt_state = state
    loss, grads = mp.value_and_grad(cast, mp.get_loss_scale(opt_state))(params, batch)
    updates, opt_state = optimizer(1.0).update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), (loss, mp.get_loss_scale(opt_state).loss_scale)


def members():
    scales = 2.0 ** jnp.asarray(EXPONENTS, jnp.float32)
    return jax.random.split(jax.random.key(0), MEMBERS), scales


def batches(struck):
    """Of shape (steps, members, ...). Where a member is struck, one input is past float16 and not past float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, MEMBERS, ROWS, WIDTH)).astype(np.float32)
    y = x.mean(-1, keepdims=True)
    for member, sequence in struck.items():
        x[[symbol == "X" for symbol in sequence], member, 5, 2] = 1e5
    return {"x": x, "y": y}


@functools.cache
def ensemble():
    """The function that trains all members: their last states, and losses and scales of shape (steps, members)."""

    def train(batches):
        return jax.lax.scan(jax.vmap(step), jax.vmap(start)(*members()), batches)

    return jax.jit(train)


@functools.cache
def moves(sequence):
    """How far the scale's exponent is from its first value after each step; no bound is near."""
    return np.array(run(mp.DynamicLossScale(2.0**10, period=3), sequence)[0]) - 10


def of_member(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def test_an_overflow_is_its_members_own():
    clean, (losses, _) = ensemble()(batches({}))
    struck, (_, scales) = ensemble()(batches(STRUCK))
    assert ensemble()._cache_size() == 1
    assert np.all(losses[-1] < losses[0])
    for i, exponent in enumerate(EXPONENTS):
        sequence = STRUCK.get(i, "." * STEPS)
        assert np.log2(scales[:, i]).tolist() == (exponent + moves(sequence)).tolist()
        skip_state = of_member(struck[1].skip_state, i)
        assert int(skip_state.skips_total) == sequence.count("X")
        # Adam's count and the schedule's.
        counts = [int(x) for x in jax.tree.leaves(skip_state.inner_state) if x.dtype == jnp.int32]
        assert counts == [sequence.count(".")] * 2
        same = bits(of_member(struck, i)) == bits(of_member(clean, i))
        assert same == (i not in STRUCK)


def test_members_are_runs_of_their_own():
    """The same scales and counts exactly; floats but for the order of sums."""
    of_all = batches(STRUCK)
    struck, (losses, scales) = ensemble()(of_all)
    alone = jax.jit(lambda key, scale, batches: jax.lax.scan(step, start(key, scale), batches))
    keys, first = members()
    for i in range(MEMBERS):
        state, (own_losses, own_scales) = alone(keys[i], first[i], {name: x[:, i] for name, x in of_all.items()})
        assert bits(own_scales) == bits(scales[:, i])
        np.testing.assert_allclose(own_losses, losses[:, i], rtol=1e-3)
        for own, member in zip(jax.tree.leaves(state), jax.tree.leaves(of_member(struck, i)), strict=True):
            assert own.dtype == member.dtype
            np.testing.assert_allclose(own, member, rtol=1e-3 if own.dtype == jnp.float32 else 0, atol=1e-5)
        assert bits(state[1].loss_scale) == bits(of_member(struck[1].loss_scale, i))
