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


@pytest.mark.parametrize(("policy", "dtype"), [("mixed_bfloat16", "float32"), (REDUCED_LOW, "bfloat16")])
def test_gradients_of_replicated_weights(policy, dtype):
    """The sums over the mesh that shard_map's transpose puts in, of a bias as of a matrix."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    cast = mp.autocast(lambda params, x: loss(params["w"], x) + jnp.mean((x @ params["w"] + params["b"]) ** 2), policy)
    params = {"w": W, "b": jnp.ones(3)}

    def fn(params, x):
        return jax.tree.map(lambda g: g / 8, jax.grad(lambda p: cast(p, x))(params))

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    found = [d for name in ("psum", "psum_invariant") for d in outputs(mapped, name, params, X)]
    assert len(found) >= 2
    assert set(found) == {dtype}
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=0.05), mapped(params, X), jax.grad(cast)(params, X))


def fsdp(fn, policy, **options):
    """The gradient of `fn`, whose weight lies in parts on eight devices, under autocast."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    gradient = jax.grad(mp.autocast(fn, policy))
    return jax.shard_map(gradient, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"), **options)


SHARDED = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("within", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
@pytest.mark.parametrize(
    ("policy", "low", "reduced"),
    [
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("mixed_float16", "float16", "float32"),
        (REDUCED_LOW, "bfloat16", "bfloat16"),
    ],
    ids=["bfloat16", "float16", "reduced low"],
)
def test_sharded_weights_are_gathered_low(policy, low, reduced, within, check_vma):
    """Written out by hand, in float32: an all-gather in the compute dtype, its transpose in the reduce dtype."""

    def fn(w, x):
        full = jax.lax.all_gather(w, "d", tiled=True)
        return within(lambda w, x: loss(w.T, x))(full, x)

    mapped = fsdp(fn, policy, check_vma=check_vma)
    assert set(outputs(mapped, "all_gather", SHARDED, X)) == {low}
    assert outputs(mapped, "reduce_scatter", SHARDED, X) == [reduced]
    expected = jax.grad(lambda w, x: 8 * loss(w.T, x))(SHARDED, X)
    np.testing.assert_allclose(mapped(SHARDED, X), expected, atol=0.02)


@pytest.mark.parametrize(
    "reader",
    [
        lambda full, x: jnp.mean(jnp.exp(x @ full.T)) + 1e-3 * jnp.sum(full**2),
        lambda full, x: jnp.mean(jnp.exp(x @ (full / jnp.linalg.norm(full)).T)),
        lambda full, x: jnp.mean(x @ mp.full_precision(lambda a: a.T)(full)),
    ],
    ids=["decay", "normalised", "region"],
)
def test_a_gathered_weight_that_something_else_reads_stays_float32(reader):
    mapped = fsdp(lambda w, x: reader(jax.lax.all_gather(w, "d", tiled=True), x), "mixed_bfloat16")
    assert set(outputs(mapped, "all_gather", SHARDED, X)) == {"float32"}


def test_the_rules_decide_about_gathers():
    rules = mp.default_rules().with_rule("all_gather", "full", reason="ours")

    def fn(w, x):
        return loss(jax.lax.all_gather(w, "d", tiled=True).T, x)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    cast = mp.autocast(fn, "mixed_bfloat16", rules)
    mapped = jax.shard_map(jax.grad(cast), mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))
    assert set(outputs(mapped, "all_gather", SHARDED, X)) == {"float32"}


@pytest.mark.parametrize(("platform", "dtype"), [("tpu", "float32"), ("gpu", "bfloat16"), ("cpu", "bfloat16")])
def test_convolutions(platform, dtype, monkeypatch):
    """On TPUs their weight gradients are float32 too; cuDNN has no such convolution."""
    monkeypatch.setattr("mpjax._compat.target_platform", lambda: platform)
    kernel, images = jnp.ones((3, 3, 2, 4)), jnp.linspace(-1.0, 1.0, 2 * 8 * 8 * 2).reshape(2, 8, 8, 2)

    def fn(kernel, images):
        out = jax.lax.conv_general_dilated(
            images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=1
        )
        return jnp.mean(out**2)

    gradient = jax.grad(mp.autocast(fn, "mixed_bfloat16"))
    assert sorted(outputs(gradient, "conv_general_dilated", kernel, images)) == sorted(["bfloat16", dtype])
    expected = jax.grad(fn)(kernel, images)
    np.testing.assert_allclose(gradient(kernel, images), expected, atol=0.02 * float(jnp.abs(expected).max()))


REDUCED_16 = "params=float32,compute=float16,output=float32,reduce=float16"


def test_losses_and_counts_are_summed_in_float32():
    """Whatever the reduce dtype, which is that of gradients: 80,000 rows are inf in float16, and 8,024 no bfloat16."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(w, x):
        errors = (x @ w)[:, 0] ** 2
        rows = jax.lax.psum(jnp.sum(jnp.ones_like(errors)), "d")
        return jax.lax.psum(jnp.sum(errors), "d") / rows, rows

    x = jnp.ones((80_000, 4))
    mapped = jax.shard_map(mp.autocast(fn, REDUCED_16), mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    loss, rows = mapped(W, x)
    assert rows == 80_000
    np.testing.assert_allclose(loss, jnp.sum(W[:, 0]) ** 2, rtol=1e-2)


@pytest.mark.parametrize("region", ["full_precision", "path"])
def test_gradients_of_exempt_weights_are_summed_in_float32(region):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = mp.default_rules()
    rules = rules.with_path("router", "full", "picks experts") if region == "path" else rules

    def fn(w, x):
        if region == "path":
            with jax.named_scope("router"):
                return jnp.mean((x @ w) ** 2)
        return jnp.mean(mp.full_precision(jnp.matmul)(x, w) ** 2)

    gradient = jax.grad(mp.autocast(fn, REDUCED_LOW, rules))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    assert {d for name in ("psum", "psum_invariant") for d in outputs(mapped, name, W, X)} == {"float32"}


def test_a_gathered_weight_that_a_custom_rule_reads_stays_float32():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda saved, ct: (ct @ saved[1].T, saved[0].T @ ct + jnp.sum(saved[1]))
    )
    mapped = fsdp(lambda w, x: jnp.mean(product(x, jax.lax.all_gather(w, "d", tiled=True).T)), "mixed_bfloat16")
    assert set(outputs(mapped, "all_gather", SHARDED, X)) == {"float32"}
