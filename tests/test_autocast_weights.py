"""Weight gradients come out of the accumulator in float32; sums over devices are taken in the policy's reduce dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxprs import trace

import mpjax as mp


@pytest.fixture(autouse=True)
def traced_for_a_tpu(monkeypatch):
    """On CPUs, where larger programs with such products fail, weight gradients are low; these here run."""
    monkeypatch.setattr("mpjax._compat.target_platform", lambda: "tpu")


REDUCED_LOW = "params=float32,compute=bfloat16,output=float32,reduce=bfloat16"
K = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(K[0], (64, 4))
W = jax.random.normal(K[1], (4, 3))


def outputs(fn, primitive, *args):
    """The dtypes of the results of a primitive."""
    return [str(eqn.outvars[0].aval.dtype) for eqn in trace(fn, *args) if eqn.primitive.name == primitive]


def loss(w, x):
    return jnp.mean(jnp.exp(0.1 * (x @ w)))


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_the_gradient_is_that_of_the_accumulator(low):
    """The product of low operands with a float32 result, not rounded in between; the order of its sum is free."""
    cast = mp.autocast(lambda w, x: jnp.sum(x @ w * x[:, :3]), f"mixed_{low}")
    got = jax.grad(cast)(W, X)
    expected = jax.lax.dot(X.T.astype(low), X[:, :3].astype(low), preferred_element_type=jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert not np.allclose(got, expected.astype(low).astype(jnp.float32), rtol=1e-5)


def test_dtypes_of_the_products():
    """Forward low; the weight's gradient float32, the activation's low."""
    gradient = jax.grad(mp.autocast(lambda w, x: loss(w, jnp.tanh(x @ w @ w.T)), "mixed_bfloat16"))
    found = outputs(gradient, "dot_general", W, X)
    assert found.count("float32") == 3
    assert found.count("bfloat16") == 5
    assert set(outputs(jax.grad(mp.autocast(loss, REDUCED_LOW)), "dot_general", W, X)) == {"bfloat16"}


@pytest.mark.parametrize(
    "transform",
    [
        jax.grad,
        lambda f: jax.grad(jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)),
        lambda f: jax.jit(jax.grad(f)),
        jax.jacfwd,
        lambda f: jax.jacrev(jax.grad(f)),
        lambda f: jax.jacfwd(jax.grad(f)),
        lambda f: jax.grad(lambda w, x: jnp.sum(jax.grad(f, 1)(w, x) ** 2)),
        lambda f: lambda w, x: jax.vmap(jax.grad(f), (0, None))(jnp.stack([w, 2 * w]), x),
        lambda f: lambda w, x: jax.vmap(jax.grad(f), (None, 0))(w, jnp.stack([x, 2 * x])),
        lambda f: lambda w, x: jax.jvp(jax.grad(f), (w, x), (x[:4, :3], x))[1],
        lambda f: lambda w, x: jax.linearize(f, w, x)[1](w, x),
    ],
    ids=["grad", "remat", "jit", "jacfwd", "twice", "hessian", "penalty", "vmap w", "vmap x", "jvp", "lin"],
)
def test_under_transforms(transform):
    got, true = transform(mp.autocast(loss, "mixed_bfloat16"))(W, X), transform(loss)(W, X)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, true, atol=0.02 * float(jnp.abs(true).max()))


@pytest.mark.parametrize(("policy", "dtype"), [("mixed_bfloat16", "float32"), (REDUCED_LOW, "bfloat16")])
def test_sums_over_devices(policy, dtype):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(w, x):
        return jax.lax.psum(x @ w, "d")

    mapped = jax.shard_map(mp.autocast(fn, policy), mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    found = [d for name in ("psum", "psum_invariant") for d in outputs(mapped, name, W, X)]
    assert found == [dtype]
    np.testing.assert_allclose(mapped(W, X), X.reshape(8, 8, 4).sum(0) @ W, atol=0.2)


def test_gradients_of_replicated_weights_are_summed_in_float32():
    """The sum over the mesh that shard_map's transpose puts in comes before the cast back."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    cast = mp.autocast(loss, "mixed_bfloat16")

    def fn(w, x):
        return jax.grad(lambda w: cast(w, x))(w)

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    found = [d for name in ("psum", "psum_invariant") for d in outputs(mapped, name, W, X)]
    assert found == ["float32"]
