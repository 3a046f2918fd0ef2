"""Policies end to end: the same as casts by hand, sums over devices in the dtype asked for, exemptions that hold."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import bits
from jax.sharding import PartitionSpec as P

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def loss_fn(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return (h @ params["down"]["kernel"]).astype(jnp.float32).var()


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (6, 8)), "bias": jnp.ones(8)},
        "down": {"kernel": jax.random.normal(keys[1], (8, 4))},
    }


@pytest.mark.parametrize(
    ("param", "compute", "output"),
    [
        *((param, compute, "float32") for param in DTYPES for compute in DTYPES),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float16", "float16"),
    ],
)
def test_a_policy_is_casts_by_hand(param, compute, output):
    """Scenario 27: three steps of momentum, bit for bit."""
    policy = mp.get_policy(f"params={param},compute={compute},output={output}")
    tx = mp.loss_scaled(optax.sgd(0.1, momentum=0.9), mp.StaticLossScale(2.0**4))
    x = jax.random.normal(jax.random.key(1), (5, 6))

    def by_policy(params, x):
        return policy.cast_to_output(loss_fn(policy.cast_to_compute(params), policy.cast_to_compute(x)))

    def by_hand(params, x):
        low = DTYPES[compute]
        return loss_fn(jax.tree.map(lambda p: p.astype(low), params), x.astype(low)).astype(DTYPES[output])

    def run(fn, weights):
        state, losses = tx.init(weights), []
        for _ in range(3):
            loss, grads = mp.value_and_grad(fn, mp.get_loss_scale(state))(weights, x)
            updates, state = tx.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
            losses.append(loss)
        return weights, state, losses

    got = run(by_policy, policy.cast_to_param(params()))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got[0])} == {param}
    assert bits(got) == bits(run(by_hand, jax.tree.map(lambda p: p.astype(DTYPES[param]), params())))


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_gradients_are_summed_over_devices_in_the_reduce_dtype(reduce):
    """Scenario 27: eight gradients whose sum needs more digits than bfloat16 has."""
    x = jnp.where(jnp.arange(8) == 0, 1.0, 2.0**-9)[:, None]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def summed(w, x):
        grads = jax.grad(lambda w: (x @ w).sum())(jax.lax.pcast(w, "d", to="varying"))
        return jax.lax.psum(grads, "d")

    low = mp.autocast(summed, f"params=float32,compute=bfloat16,output=float32,reduce={reduce}")
    got = jax.jit(jax.shard_map(low, mesh=mesh, in_specs=(P(), P("d")), out_specs=P()))(jnp.ones((1, 1)), x)
    assert got.dtype == jnp.float32
    exact = 1 + 7 * 2.0**-9
    assert (float(got[0, 0]) == exact) == (reduce == "float32")
    assert abs(float(got[0, 0]) - exact) <= 2.0**-6


def test_accumulation_without_a_sum_over_devices_is_float32():
    """Scenario 27. FSDP2 adds up in its reduce dtype; here it is float32 whatever that is."""
    x = jnp.where(jnp.arange(8) == 0, 1.0, 2.0**-9)[:, None].astype(jnp.bfloat16)
    grad_fn = jax.value_and_grad(lambda w, x: (x @ w).astype(jnp.float32).sum())
    _, grads = mp.accumulate(grad_fn, microbatches=8)(jnp.ones((1, 1), jnp.bfloat16), x)
    assert grads.dtype == jnp.float32
    assert float(grads[0, 0]) * 8 == 1 + 7 * 2.0**-9


def test_tables_that_are_not_cast_stay_float32():
    """Scenario 27, `cast_inputs=False`: rotary tables beside low-precision activations keep their digits."""
    angles = jnp.outer(jnp.arange(300.0), 10_000.0 ** -jnp.linspace(0.0, 1.0, 4))

    def rotated(q, angles):
        a, b = jnp.split(q, 2, -1)
        return jnp.concatenate(
            [a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1
        )

    q = jnp.ones((300, 8))
    wide = rotated(q, angles)
    np.testing.assert_array_equal(mp.autocast(rotated, "mixed_bfloat16")(q, angles), wide)
    policy = mp.get_policy("mixed_bfloat16")
    assert jnp.abs(rotated(q, policy.cast_to_compute(angles).astype(jnp.float32)) - wide).max() > 0.1


class Transformer(nn.Module):
    """With everything that is usually exempt: norms, a router, a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        for i in range(2):
            h = nn.LayerNorm(name=f"norm_{i}")(x)
            scores = nn.softmax(nn.Dense(2, name=f"router_{i}")(h))
            x = x + scores[..., :1] * nn.Dense(8, name=f"mlp_{i}")(h)
        return nn.Dense(11, name="lm_head")(nn.LayerNorm(name="final_norm")(x))


@pytest.mark.slow
def test_exemptions_hold_for_every_leaf():
    """Scenario 29: norms, router and last layer, in one report of parameter and compute dtypes."""
    weights = Transformer().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    policy = mp.get_policy("bfloat16").with_overrides(mp.default_overrides())
    stored, computed = policy.cast_to_param(weights), policy.cast_to_compute(weights)
    report = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (x.dtype.name, y.dtype.name)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(stored), jax.tree.leaves(computed), strict=True)
    }
    low, full = ("bfloat16", "bfloat16"), ("float32", "float32")
    assert report == {
        "embed/embedding": low,
        **{f"norm_{i}/{name}": full for i in range(2) for name in ("scale", "bias")},
        **{f"router_{i}/{name}": full for i in range(2) for name in ("kernel", "bias")},
        **{f"mlp_{i}/{name}": low for i in range(2) for name in ("kernel", "bias")},
        "final_norm/scale": full,
        "final_norm/bias": full,
        "lm_head/kernel": full,
        "lm_head/bias": full,
    }
    # They survive one step of training, and the policy a round trip through JSON (scenario 28).
    tx = mp.loss_scaled(mp.transforms.master_weights(optax.adam(1e-2)), mp.NoOpLossScale())
    grads = jax.tree.map(jnp.ones_like, stored)
    updates, _ = tx.update(grads, tx.init(stored), stored)
    stepped = mp.transforms.apply_updates(stored, updates)
    assert jax.tree.map(lambda x: x.dtype, stepped) == jax.tree.map(lambda x: x.dtype, stored)
    again = mp.get_policy(json.loads(json.dumps({"policy": str(policy)}))["policy"])
    assert again == policy
    assert bits(again.cast_to_param(weights)) == bits(stored)
