"""Autocast: dtypes and values of the rewritten programs, forward and backward."""

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxprs import census, equations, matrix_dtypes

import mpjax as mp
from mpjax._autocast._tables import ROWS, Kind
from mpjax._compat import open_jaxpr


def gradients(fn, *args):
    return jax.grad(lambda *a: fn(*a).astype(jnp.float32).sum(), argnums=tuple(range(len(args))))(*args)


K = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(K[0], (4, 4))
W = jax.random.normal(K[1], (4, 4)) * 0.5


def mlp(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w)


def softmax(x, w):
    return jax.nn.softmax(x @ w) @ w


def layer_norm(x, w):
    h = x @ w
    mean = h.mean(-1, keepdims=True)
    return ((h - mean) * jax.lax.rsqrt(jnp.mean((h - mean) ** 2, -1, keepdims=True) + 1e-6)) @ w


def residual_scan(x, w):
    return jax.lax.scan(lambda c, _: (c + jnp.tanh(c @ w), None), x, length=3)[0] @ w


def remat_scan(x, w):
    return jax.lax.scan(jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), c.sum())), x, length=3, reverse=True)[0] @ w


def fori(x, w):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w), x)


def branches(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda c: c @ w, lambda c: c, x) + jax.lax.switch(
        1, [lambda c: c, lambda c: jnp.exp(c @ w)], x
    )


def nested_jit(x, w):
    layer = jax.jit(lambda c: jnp.tanh(c @ w))
    for _ in range(5):
        x = layer(x)
    return x


def remat(x, w):
    return jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable)(x, w)


def custom_jvp(x, w):
    return jax.nn.relu(x @ w) + jax.nn.silu(x @ w) + jax.nn.logsumexp(x @ w, -1, keepdims=True)


def sharded(x, w):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    body = lambda x, w: jax.lax.pmean(jnp.tanh(x @ w), "d")
    return jax.shard_map(body, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())(x, w)


def sharded_scan(x, w):
    """Values that vary over the mesh go through a scan and a remat inside shard_map."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(x, w):
        start = jax.lax.pcast(jnp.zeros((1, 4)), "d", to="varying")
        c, _ = jax.lax.scan(lambda c, row: (c + jnp.tanh(row[None] @ w), None), start, x)
        return jax.lax.pmean(jax.checkpoint(jnp.tanh)(c) @ w, "d")

    return jax.shard_map(body, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())(x, w)


CASES = [
    mlp,
    softmax,
    layer_norm,
    residual_scan,
    remat_scan,
    fori,
    branches,
    nested_jit,
    remat,
    custom_jvp,
    sharded,
    sharded_scan,
]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
class TestEveryCase:
    def test_forward(self, case, policy):
        cast = mp.autocast(case, policy)
        low = str(mp.get_policy(policy).compute_dtype)
        assert matrix_dtypes(case, X, W) == {"float32"}
        assert matrix_dtypes(cast, X, W) == {low}
        for wrap in (lambda f: f, jax.jit):
            out, expected = wrap(cast)(X, W), case(X, W)
            assert out.dtype == expected.dtype
            assert out.shape == expected.shape
            np.testing.assert_allclose(out, expected, rtol=0.05, atol=0.05)

    def test_vmap_jvp_and_nesting(self, case, policy):
        cast = mp.autocast(case, policy)
        batched = jax.vmap(cast, in_axes=(0, None))(jnp.stack([X, X * 0.5]), W)
        np.testing.assert_allclose(batched[1], cast(X * 0.5, W), rtol=0.02, atol=0.02)
        _, tangent = jax.jvp(cast, (X, W), (X, W))
        _, expected = jax.jvp(case, (X, W), (X, W))
        np.testing.assert_allclose(tangent, expected, rtol=0.1, atol=0.05 * float(jnp.abs(expected).max()))
        assert census(mp.autocast(cast, policy), X, W)["dot_general", "float32"] == 0


# JAX has no reverse mode through while.
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("case", [case for case in CASES if case is not fori], ids=lambda f: f.__name__)
def test_backward(case, policy):
    cast = mp.autocast(case, policy)
    low = str(mp.get_policy(policy).compute_dtype)
    assert matrix_dtypes(lambda x, w: gradients(cast, x, w), X, W) == {low}
    for got, true in zip(gradients(cast, X, W), gradients(case, X, W), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, true, rtol=0.1, atol=0.05 * float(jnp.abs(true).max()))


@pytest.mark.parametrize("case", [mlp, softmax, layer_norm, residual_scan], ids=lambda f: f.__name__)
def test_autocast_of_a_gradient(case):
    """Inner gradients, as in force fields."""
    inner = jax.grad(lambda x, w: case(x, w).sum())
    cast = mp.autocast(inner, "mixed_bfloat16")
    assert matrix_dtypes(cast, X, W) == {"bfloat16"}
    true = inner(X, W)
    np.testing.assert_allclose(cast(X, W), true, rtol=0.1, atol=0.05 * float(jnp.abs(true).max()))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_softmax_before_matrix_work_is_kept_once_in_low_precision(platform, monkeypatch):
    """Its float32 exponentials would be kept for the backward pass beside the probabilities."""
    monkeypatch.setattr("mpjax._compat.target_platform", lambda: platform)

    def attention(q, k, v):
        scores = jnp.where(jnp.tri(len(q), dtype=bool), q @ k.T, -1e9)
        return jax.nn.softmax(scores) @ v

    cast = mp.autocast(attention, "mixed_bfloat16")
    q, k, v = jax.random.normal(K[5], (3, 16, 4))
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(cast)(q, k, v))
    exps = [e for e in equations(jaxpr) if e.primitive.name == "exp"]
    assert [str(e.outvars[0].aval.dtype) for e in exps if e.outvars[0].aval.shape == (16, 16)] == ["float32"] * len(
        exps
    )
    np.testing.assert_allclose(cast(q, k, v), attention(q, k, v), atol=0.03)
    for got, true in zip(gradients(cast, q, k, v), gradients(attention, q, k, v), strict=True):
        np.testing.assert_allclose(got, true, atol=0.03 * float(jnp.abs(true).max()))
    # A softmax that a loss reads is not rounded.
    out = mp.autocast(lambda x, w: jax.nn.softmax(x @ w), "mixed_bfloat16")(X, W)
    assert not np.array_equal(out, out.astype(jnp.bfloat16).astype(jnp.float32))


def test_what_looks_like_a_softmax_and_is_none():
    """The sums of one axis under the values of another."""

    def crossed(x, w):
        e = jnp.exp(x @ w)
        return (e / e.sum(0)[:, None]) @ w

    np.testing.assert_allclose(mp.autocast(crossed, "mixed_bfloat16")(X, W), crossed(X, W), rtol=0.05, atol=0.05)


def test_float32_policy_returns_the_function_as_it_is():
    assert str(jax.make_jaxpr(mp.autocast(mlp, "float32"))(X, W)) == str(jax.make_jaxpr(mlp)(X, W))


def test_a_nested_autocast_of_another_dtype():
    """A shared weight in two dtypes: torch's cache serves the wrong one."""

    def fn(x, w):
        return mp.autocast(mlp, "mixed_float16")(x, w) + mlp(x, w)

    found = census(mp.autocast(fn, "mixed_bfloat16"), X, W)
    assert found["dot_general", "float16"] == found["dot_general", "bfloat16"] == 2


def test_twenty_calls_of_one_function_stay_one():
    layer = jax.jit(lambda c, w: jnp.tanh(c @ w))

    def fn(x, w):
        x = x @ w
        for _ in range(20):
            x = layer(x, w)
        return x

    text = jax.jit(mp.autocast(fn, "mixed_bfloat16")).lower(X, W).as_text()
    assert text.count("func.func private @_lambda") + text.count('func.func private @"<lambda>"') <= 1
    assert text.count("stablehlo.dot_general") == 2


class TestUntouched:
    def test_the_users_half_precision(self):
        fn = lambda x, w: (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32)
        assert matrix_dtypes(mp.autocast(fn, "mixed_bfloat16"), X, W) == {"float16"}

    def test_the_users_accumulator(self, x64):
        fn = lambda x, w: jax.lax.dot(x, w, preferred_element_type=jnp.float64)
        assert matrix_dtypes(mp.autocast(fn, "mixed_bfloat16"), X, W) == {"float32"}

    def test_float64_and_complex(self, x64):
        for dtype in (jnp.float64, jnp.complex64):
            fn = mp.autocast(lambda x: x @ x, "mixed_bfloat16")
            x = jnp.eye(3, dtype=dtype) * 3
            assert np.array_equal(fn(x), x @ x)
            assert fn(x).dtype == dtype

    def test_integers_keys_and_other_arguments(self):
        def fn(n, key, name, *, scale):
            noise = jax.random.normal(key, (2, 2))
            return {"n": n * 2, "y": noise @ noise * scale, "name": name}

        out = mp.autocast(fn, "mixed_bfloat16")(jnp.arange(3), jax.random.key(0), "kept", scale=2.0)
        assert out["n"].tolist() == [0, 2, 4]
        assert out["name"] == "kept"
        assert out["y"].dtype == jnp.float32

    def test_a_kernel_is_left_and_reported(self):
        product = jax.lax.composite(lambda x, w: x @ w, name="my.product")
        with pytest.warns(UserWarning, match=r"leaves composite at .*test_autocast\.py.* as written"):
            out = mp.autocast(lambda x, w: product(x, w), "mixed_bfloat16")(X, W)
        np.testing.assert_array_equal(out, X @ W)


class TestFloat16:
    """Constants, masks and squares that float16 cannot hold (jaxamp S1 to S2d)."""

    cast = staticmethod(lambda fn: mp.autocast(fn, "mixed_float16"))

    def test_masks(self):
        def fn(x, w):
            return jax.nn.softmax(jnp.where(jnp.tri(4, dtype=bool), x @ w, -1e9))

        np.testing.assert_allclose(self.cast(fn)(X, W), fn(X, W), atol=5e-3)

    def test_a_row_that_is_masked_entirely(self):
        fn = lambda x, w: jax.nn.softmax(x @ w + jnp.full(4, jnp.finfo(jnp.float32).min))
        np.testing.assert_allclose(self.cast(fn)(X, W), fn(X, W), atol=5e-3)

    def test_epsilons(self):
        fn = lambda x, w: jnp.sqrt((x @ w) ** 2 + 1e-8)
        assert float(self.cast(fn)(jnp.zeros((2, 4)), W)[0, 0]) == pytest.approx(1e-4)

    def test_layer_norm_of_a_constant_row(self):
        assert np.array_equal(self.cast(layer_norm)(jnp.zeros((2, 4)), W), np.zeros((2, 4)))

    def test_squares_that_are_summed(self):
        fn = lambda x: jnp.sum((x @ jnp.eye(4)) ** 2)
        assert float(self.cast(fn)(jnp.full((2, 4), 300.0))) == 720000.0


class TestNothingThatAccumulatesLosesDigits:
    cast = staticmethod(lambda fn: mp.autocast(fn, "mixed_bfloat16"))

    def test_a_running_sum(self):
        def fn(x):
            terms = x @ jnp.eye(1)
            return jax.lax.scan(lambda c, t: (c + t, None), jnp.zeros(1), terms)[0]

        assert float(self.cast(fn)(jnp.full((10_000, 1), 0.125))[0]) == 1250.0

    def test_a_running_average(self):
        def fn(x):
            return jax.lax.scan(lambda c, t: (0.999 * c + 0.001 * t, None), jnp.zeros(1), x @ jnp.eye(1))[0]

        # The terms are products of bfloat16 numbers; given those, no digit is lost in adding them.
        term = float(jnp.bfloat16(0.001))
        expected = term / 0.001 * (1 - 0.999**4096)
        np.testing.assert_allclose(self.cast(fn)(jnp.ones((4096, 1)))[0], expected, rtol=1e-4)

    def test_a_while_loop_sum(self):
        def fn(x):
            y = (x @ jnp.eye(1))[0]
            return jax.lax.fori_loop(0, 5000, lambda i, c: c + y, jnp.zeros(1))

        assert float(self.cast(fn)(jnp.ones((1, 1)))[0]) == 5000.0

    def test_segment_sums(self):
        def fn(x):
            return jax.ops.segment_sum((x @ jnp.eye(1))[:, 0], jnp.zeros(len(x), jnp.int32), 1)

        assert float(self.cast(fn)(jnp.ones((100_000, 1)))[0]) == 100_000.0

    def test_bias_and_embedding_gradients(self):
        def loss(params, ids):
            return jnp.sum(params["table"][ids] @ jnp.eye(4) + params["bias"])

        params = {"table": jnp.ones((2, 4)), "bias": jnp.zeros(4)}
        grads = jax.grad(self.cast(loss))(params, jnp.zeros(5000, jnp.int32))
        assert grads["bias"].tolist() == [5000.0] * 4
        assert grads["table"][0].tolist() == [5000.0] * 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16)(tokens)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(11)(nn.LayerNorm()(x))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            h = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3))(x)))
            x = x + h
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("model", "batch"),
    [(LanguageModel(), jnp.arange(24).reshape(2, 12) % 11), (ResNet(), jax.random.normal(K[2], (2, 8, 8, 3)))],
    ids=["language model", "ResNet"],
)
def test_flax_models(model, batch, policy):
    """Unmodified float32 models, mutable collections included: every dot and convolution low, gradients float32."""
    variables = model.init(K[3], batch)

    def loss_fn(params, batch):
        out, updated = model.apply({**variables, "params": params}, batch, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(out)[..., 0]), updated

    cast = mp.autocast(loss_fn, policy)
    params = variables["params"]
    (loss, stats), grads = jax.value_and_grad(cast, has_aux=True)(params, batch)
    (true_loss, true_stats), true = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
    assert float(loss) == pytest.approx(float(true_loss), rel=0.02)
    assert matrix_dtypes(jax.value_and_grad(cast, has_aux=True), params, batch) == {
        str(mp.get_policy(policy).compute_dtype)
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02), stats, true_stats)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(true))
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(true), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=0.05 * scale)


@pytest.mark.standard_promotion
def test_equinox_model():
    model = eqx.nn.MLP(4, 2, 8, 2, key=K[4])
    cast = mp.autocast(lambda model, x: jax.vmap(model)(x).sum(), "mixed_bfloat16")
    assert matrix_dtypes(lambda x: cast(model, x), X) == {"bfloat16"}


def test_residual_stream_stays_low_and_norms_come_back():
    """The carry of a scan over layers is bfloat16, and so is what a normalisation hands to a loop."""

    def fn(x, w):
        return jax.lax.scan(lambda c, _: (c + layer_norm(c, w), None), x @ w, length=3)[0]

    jaxpr, _ = open_jaxpr(jax.make_jaxpr(mp.autocast(fn, "mixed_bfloat16"))(X, W))
    scan = next(e for e in equations(jaxpr) if e.primitive.name == "scan")
    assert str(scan.outvars[0].aval.dtype) == "bfloat16"


class TestRules:
    def test_every_primitive_that_jax_exports_is_classified(self):
        """A new JAX release shows here, not in a user's program."""
        from mpjax._autocast._autocast import _HIGHER_ORDER

        rules = mp.default_rules()
        modules = (jax.extend.core.primitives, jax.lax)
        found = {getattr(m, n) for m in modules for n in dir(m) if n.endswith("_p")}
        names = {p.name for p in found if hasattr(p, "bind")}
        assert len(names) > 150
        assert {n for n in names if n not in rules and n not in _HIGHER_ORDER} == set()

    def test_every_row_has_a_reason_and_no_primitive_two(self):
        names = [name for row in ROWS for name in row.primitives]
        assert len(names) == len(set(names))
        assert all(row.reason for row in ROWS)

    def test_a_rule_can_be_changed(self):
        rules = mp.default_rules().with_rule("dot_general", "full", "this model needs it")
        assert matrix_dtypes(mp.autocast(mlp, "mixed_bfloat16", rules), X, W) == {"float32"}
        assert mp.default_rules().of("dot_general").kind is Kind.LOW
        assert rules.of("dot_general").reason == "this model needs it"
        assert rules == mp.default_rules().with_rule(jax.lax.dot_general_p, "full", "this model needs it")

    def test_bad_kinds(self):
        with pytest.raises(ValueError, match="one of low, full, sum, follow, pass, opaque"):
            mp.default_rules().with_rule("tanh", "half", "?")

    def test_a_format_for_gradients_is_refused(self):
        with pytest.raises(ValueError, match="float8_e5m2, a format for gradients"):
            mp.autocast(mlp, "compute=float8_e5m2,output=float32")
