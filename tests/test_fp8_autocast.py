"""`mixed_float8`: which products of any function are in 8 bits, why the others are not, and how exact it is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo_linen
import zoo_nnx
import zoo_other
from flax import nnx
from helpers import bits
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import MATRIX, dtypes, equations, matrix_dtypes, trace

import mpjax as mp
from mpjax import fp8
from mpjax._compat import inner_jaxprs, tracing_for

pytestmark = pytest.mark.usefixtures("quick_compiles")

EIGHT = {"float8_e4m3fn", "float8_e5m2"}
X, W = (np.random.default_rng(i).normal(size=(32, 32)).astype(np.float32) / size for i, size in enumerate((1, 8)))


def rules(**recipe):
    return mp.default_rules().with_fp8(fp8.Recipe(**{"min_reuse": 0, "emulate": True, **recipe}))


def sqnr(got, true):
    """How far the error is below the signal, in dB."""
    got, true = np.asarray(got, np.float64), np.asarray(true, np.float64)
    return 10 * np.log10((true**2).sum() / ((got - true) ** 2).sum())


def on_h100(fn):
    """Traced as for a device that has fp8 units, so that nothing is emulated."""

    def traced(*args):
        with tracing_for("gpu", float8=True):
            return fn(*args)

    return traced


def products(fn, *args, policy="mixed_float8", rules=None):
    """Of each product: the module, whether it is in fp8, and why."""
    found = mp.explain(fn, policy, rules)(*args).operations
    return [(row.path, row.reason) for row in found if row.primitive in MATRIX]


def norm(x, scale):
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def block(p, x):
    """A decoder block with four heads."""
    q, k, v = jnp.split((norm(x, p["norm_1"]) @ p["qkv"]).reshape(*x.shape[:2], 4, -1), 3, -1)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.float32(np.sqrt(q.shape[-1]))
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    x = x + jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(x.shape) @ p["out"]
    return x + jax.nn.silu(norm(x, p["norm_2"]) @ p["up"]) @ p["down"]


def model(params, tokens, *, scanned=False):
    """Logits of a decoder: in a loop of rematerialised blocks, or written out."""
    with jax.named_scope("embed"):
        x = params["embed"][tokens]
    if scanned:
        x, _ = lax.scan(lambda x, p: (jax.checkpoint(block)(p, x), None), x, params["blocks"])
    else:
        for i in range(2):
            with jax.named_scope(f"block_{i}"):
                x = block(jax.tree.map(lambda p, i=i: p[i], params["blocks"]), x)
    with jax.named_scope("head"):
        return x @ params["head"]


def loss_fn(params, tokens, *, scanned=False):
    logits = model(params, tokens[:, :-1], scanned=scanned)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def parameters(width=64, vocabulary=96, seed=0):
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return jnp.asarray(rng.normal(size=shape) / 2 / np.sqrt(shape[-2]), jnp.float32)

    blocks = {
        "qkv": weight(2, width, 3 * width),
        "out": weight(2, width, width),
        "up": weight(2, width, 4 * width),
        "down": weight(2, 4 * width, width),
        "norm_1": jnp.ones((2, width)),
        "norm_2": jnp.ones((2, width)),
    }
    return {"embed": weight(vocabulary, width), "blocks": blocks, "head": weight(width, vocabulary)}


PARAMS = parameters()
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 96, (2, 17)))


class TestNumbers:
    @pytest.mark.parametrize("scanned", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_loss_and_gradients_of_a_decoder(self, scanned):
        fn = functools.partial(loss_fn, scanned=scanned)
        cast = mp.autocast(fn, "mixed_float8", rules())
        loss, grads = jax.jit(jax.value_and_grad(cast))(PARAMS, TOKENS)
        true, true_grads = jax.jit(jax.value_and_grad(fn))(PARAMS, TOKENS)
        assert loss.dtype == jnp.float32
        assert abs(loss - true) < 0.01
        for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True):
            assert got.dtype == jnp.float32
            assert sqnr(got, exact) > 17

    @pytest.mark.slow
    @pytest.mark.parametrize("recipe", [{}, {"scaling": "channel"}, {"gradients": "e4m3"}], ids=str)
    def test_a_transformer_block(self, recipe):
        p = jax.tree.map(lambda p: p[0], parameters(width=128)["blocks"])
        rng = np.random.default_rng(2)
        x, c = (jnp.asarray(rng.normal(size=(2, 128, 128)), jnp.float32) for _ in range(2))

        def run(fn):
            out, back = jax.vjp(fn, p, x)
            return out, back(c)

        got = jax.jit(lambda: run(mp.autocast(block, "mixed_float8", rules(**recipe))))()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(lambda: run(block))()), strict=True):
            assert sqnr(a, b) > 20

    def test_it_is_the_product_in_8_bits(self):
        """An activation is rounded from 16 bits, a weight from the float32 that it is."""
        fn = lambda w, x: jnp.tanh(x @ w) @ w
        cast = jax.jit(mp.autocast(fn, "mixed_float8", rules()))

        def by_hand(w, x):
            dot = lambda x, w: fp8.dot_general(x, w, (((1,), (0,)), ((), ())), None, jnp.bfloat16)
            return dot(jnp.tanh(dot(x, w)), w).astype(jnp.float32)

        assert bits(cast(W, X)) == bits(jax.jit(by_hand)(W, X))

    @pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
    def test_weight_gradients_have_the_digits_of_the_reduce_dtype(self, reduce):
        policy = f"params=float32,compute=float8_e4m3fn,output=float32,reduce={reduce}"
        grad = jax.jit(jax.grad(mp.autocast(lambda w, x: (x @ w).sum(), policy, rules())))(W, X)
        rounded = grad.astype(jnp.bfloat16).astype(jnp.float32)
        assert grad.dtype == jnp.float32
        assert bool((grad == rounded).all()) == (reduce == "bfloat16")

    def test_an_infinite_batch_is_skipped(self):
        loss = mp.autocast(lambda w, x: (x @ w).mean(), "mixed_float8", rules())
        tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
        state = tx.init(W)

        @jax.jit
        def step(state, x):
            _, grads = mp.value_and_grad(loss, mp.get_loss_scale(state))(W, x)
            return tx.update(grads, state, W)

        updates, after = step(state, np.where(np.eye(32) > 0, np.float32(np.inf), X))
        assert not np.any(updates)
        assert mp.get_loss_scale(after).loss_scale == mp.get_loss_scale(state).loss_scale / 2

    @pytest.mark.slow
    @pytest.mark.standard_promotion
    @pytest.mark.parametrize(
        "name",
        ["scan_over_layers_lm", "lstm", "nnx_attention_lm", "wgan_gradient_penalty", "energy_and_forces"],
    )
    def test_models_of_the_zoo(self, name, monkeypatch):
        """Loops over layers and time, modules that change, gradients inside of the loss; products of any size."""
        monkeypatch.setattr(fp8.Recipe, "why_not", lambda self, path, sizes: None)
        case = next(c for c in (*zoo_linen.CASES, *zoo_nnx.CASES, *zoo_other.CASES) if c.name == name)
        fn, params, batch = case.make()
        paired = fn if case.has_aux else lambda params, batch: (fn(params, batch), None)
        step = lambda fn: jax.jit(jax.value_and_grad(fn, has_aux=True))
        (loss, _), grads = step(mp.autocast(paired, "mixed_float8", rules()))(params, batch)
        (true, _), true_grads = step(paired)(params, batch)
        assert abs(loss - true) < 0.1 * abs(true)
        floats = [
            (got, exact)
            for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True)
            if got.dtype == jnp.float32
        ]
        assert sqnr(*(np.concatenate([np.ravel(x) for x in column]) for column in zip(*floats, strict=True))) > 13
        found = products(paired, params, batch, rules=rules())
        assert any(reason.startswith("operands in float8") for _, reason in found)

    @pytest.mark.slow
    def test_training(self):
        """A hundred steps of Adam on sequences that can be learned end where those in bfloat16 end."""
        rng = np.random.default_rng(3)
        starts = rng.integers(0, 96, (100, 8, 1))
        batches = jnp.asarray((starts + 5 * np.arange(17)) % 96)
        optimizer = optax.adam(3e-3)

        def train(fn):
            def step(state, tokens):
                params, moments = state
                loss, grads = jax.value_and_grad(fn)(params, tokens)
                updates, moments = optimizer.update(grads, moments, params)
                return (optax.apply_updates(params, updates), moments), loss

            return jax.jit(lambda: lax.scan(step, (PARAMS, optimizer.init(PARAMS)), batches)[1])()

        with jax.numpy_dtype_promotion("standard"):
            eight, sixteen = (
                train(mp.autocast(functools.partial(loss_fn, scanned=True), policy, rules()))
                for policy in ("mixed_float8", "mixed_bfloat16")
            )
        assert sixteen[-1] < 0.01 * sixteen[0]
        assert abs(eight[-10:].mean() - sixteen[-10:].mean()) < 0.01

    @pytest.mark.parametrize("outer", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)])
    def test_inside_of_another_autocast(self, outer):
        """The float32 products that emulate fp8 are not narrowed: sums of numbers up to 448 squared leave float16."""
        cast = mp.autocast(layer, "mixed_float8", rules())
        assert bits(jax.jit(mp.autocast(cast, outer))(W, X)) == bits(jax.jit(cast)(W, X))


class TestPrograms:
    @pytest.mark.parametrize("scanned", [False, True])
    def test_what_an_h100_is_given(self, scanned):
        """Four products of weights a block, forward and twice backward; attention and logits are in bfloat16."""
        cast = mp.autocast(functools.partial(loss_fn, scanned=scanned), "mixed_float8", rules(emulate=False))
        found = [e for e in trace(on_h100(jax.grad(cast)), PARAMS, TOKENS) if e.primitive.name in MATRIX]
        eight = [dtypes(e.invars[:2]) for e in found if EIGHT & set(dtypes(e.invars[:2]))]
        # A loop's body is written once; the backward pass recomputes all of it but the last product.
        layers, again = (1, 3) if scanned else (2, 0)
        assert eight.count(("float8_e4m3fn", "float8_e4m3fn")) == 4 * layers + again
        assert sum("float8_e5m2" in pair for pair in eight) == 8 * layers
        assert {d for e in found for d in dtypes(e.invars[:2])} == EIGHT | {"bfloat16"}

    def test_without_units_it_is_mixed_bfloat16(self):
        fn = lambda w, x: jnp.tanh(x @ w) @ w
        cast = mp.autocast(fn, "mixed_float8", rules(emulate=False))
        with pytest.warns(UserWarning, match="computed in bfloat16: this device has no fp8 units(.|\n)*emulate=True"):
            got = cast(W, X)
        assert bits(got) == bits(mp.autocast(fn, "mixed_bfloat16")(W, X))
        with pytest.warns(UserWarning, match="no fp8 units"):
            found = products(fn, W, X, rules=rules(emulate=False))
        assert {reason for _, reason in found} == {"bfloat16, not fp8: this device has no fp8 units"}

    @pytest.mark.parametrize("axis_types", [(AxisType.Auto,), (AxisType.Explicit,)])
    def test_sharded(self, axis_types):
        """FSDP under jit: weights in parts, the batch in parts."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=axis_types)
        cast = mp.autocast(lambda w, x: (jnp.tanh(x @ w) ** 2).sum(), "mixed_float8", rules())
        true = jax.jit(jax.grad(cast))(W, X)
        with jax.set_mesh(mesh):
            w = jax.device_put(W, P("data") if axis_types == (AxisType.Auto,) else P())
            got = jax.jit(jax.grad(cast))(w, jax.device_put(X, P("data")))
        np.testing.assert_allclose(got, true, rtol=0.02, atol=0.02 * np.abs(true).max())

    def test_shard_map(self):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        def fn(w, x):
            return lax.pmean((jnp.tanh(x @ w) ** 2).mean(), "data")

        plain = lambda w, x: (jnp.tanh(x @ w) ** 2).mean()
        got = jax.jit(jax.grad(mp.autocast(fn, "mixed_float8", rules())))(W, X)
        assert sqnr(got, jax.grad(plain)(W, X)) > 15

    def test_vmap_on_either_side(self):
        fn = lambda w, x: jnp.tanh(x @ w) @ w
        xs = np.stack([X, 2 * X])
        inside = mp.autocast(lambda w, xs: jax.vmap(fn, (None, 0))(w, xs), "mixed_float8", rules())
        outside = jax.vmap(mp.autocast(fn, "mixed_float8", rules()), (None, 0))
        true = jax.vmap(fn, (None, 0))(W, xs)
        for cast in (inside, outside):
            assert sqnr(jax.jit(cast)(W, xs), true) > 18
            assert matrix_dtypes(on_h100(mp.autocast(cast, "mixed_float8", rules(emulate=False))), W, xs)


def layer(w, x):
    return jnp.tanh(jnp.tanh(x @ w) @ w)


def recurrent(ws, x):
    return lax.scan(lambda x, _: (layer(ws[0], x), None), x, None, length=3)[0]


def repeated(ws, x):
    return lax.scan(lambda x, w: (jax.checkpoint(layer)(w, x), None), x, ws)[0]


class TestWeights:
    """A step brings each into 8 bits once: not in loops that use it again, nor in what a checkpoint makes again."""

    def made(self, eqns):
        """How often weights are brought into 8 bits."""
        return sum(e.primitive.name == "fp8_quantize" and e.params["weight"] for e in eqns)

    @pytest.mark.parametrize("fn", [repeated, pytest.param(recurrent, marks=pytest.mark.slow)])
    def test_in_a_step_and_for_all_microbatches(self, fn):
        loss = lambda ws, x: jnp.mean(fn(ws, x) ** 2)
        grad = jax.value_and_grad(mp.autocast(loss, "mixed_float8", rules()))
        step = mp.accumulate(grad, 2, batch_argnums=1)
        backward = [e for e in trace(grad, W[None], X) if e.primitive.name == "scan"][-1]
        microbatches = [e for e in jax.make_jaxpr(step)(W[None], X).eqns if e.primitive.name == "scan"][-1]
        for loop in (backward, microbatches):
            assert not self.made(equations(inner_jaxprs(loop)[0]))
        # Both products of the layer have the one weight, which the compiler finds out.
        for eqns in (trace(grad, W[None], X), trace(step, W[None], X)):
            assert self.made(eqns) == 2
        assert sqnr(jax.jit(step)(W[None], X)[1], jax.jit(jax.grad(loss))(W[None], X)) > 15


class TestChoice:
    """Which products are in 8 bits."""

    def test_a_decoder(self):
        found = dict(products(loss_fn, PARAMS, TOKENS, rules=rules(exclude=(*fp8.Recipe().exclude, "block_1"))))
        assert "operands in float8_e4m3fn, emulated in float32, incoming gradients in float8_e5m2" in found["block_0"]
        assert found["block_1"] == "bfloat16, not fp8: excluded: block_1"
        assert found["head"] == "bfloat16, not fp8: an embedding, router or logits by its name"
        assert {v for k, v in found.items() if "->" in k and "block_0" in k} == {
            "bfloat16, not fp8: no weight among its operands, as in attention"
        }

    @pytest.mark.parametrize(
        ("path", "is_excluded"),
        [
            *(
                (p, True)
                for p in ("Embed_0", "token_embedding", "unembed", "router", "moe_router_2", "gate", "LM/head")
            ),
            *((p, True) for p in ("lm_head", "logits", "to_logits", "LM/logits_dense", "classifier", "head_1")),
            *((p, False) for p in ("gate_proj", "MultiHeadAttention_0", "heads", "Block_0/Dense_0", "header", "mlp")),
        ],
    )
    def test_names_that_are_excluded(self, path, is_excluded):
        why = fp8.Recipe(min_reuse=0).why_not((*path.split("/"), "Dense_0"), (16, 16, 16))
        assert why == ("an embedding, router or logits by its name" if is_excluded else None)

    def test_include(self):
        def fn(w, x):
            with jax.named_scope("a"):
                x = x @ w
            with jax.named_scope("b"):
                return jnp.tanh(x) @ w

        found = dict(products(fn, W, X, rules=rules(include=("b",))))
        assert found["a"] == "bfloat16, not fp8: in no module of b"
        assert found["b"].startswith("operands in float8")

    @pytest.mark.parametrize(
        ("sizes", "min_reuse", "reason"),
        [
            ((32, 48, 16), 0, None),
            ((32, 40, 16), 0, "(m, k, n) = (32, 40, 16): fp8 units take multiples of 16"),
            ((0, 16, 16), 0, "(m, k, n) = (0, 16, 16): nothing to compute"),
            ((2048, 2048, 2048), 500, None),
            ((1024, 1024, 1024), 500, "341 multiplications for each number to bring into 8 bits, fewer than min_reuse"),
        ],
    )
    def test_sizes(self, sizes, min_reuse, reason):
        found = fp8.Recipe(min_reuse=min_reuse).why_not((), sizes)
        assert found is None if reason is None else reason in found

    def test_sizes_are_those_of_one_product_of_a_batch(self):
        fn = lambda w, x: jnp.einsum("bij,bjk->bik", x, w)
        w, x = np.ones((3, 16, 32), np.float32), np.ones((3, 10, 16), np.float32)
        assert "(m, k, n) = (10, 16, 32)" in products(fn, w, x, rules=rules())[0][1]

    @pytest.mark.parametrize(
        ("fn", "reason"),
        [
            (lambda w, x: (x @ w) @ (x @ w), "no weight among its operands"),
            (lambda w, x: jnp.dot(x, w, precision="highest"), "written with a precision"),
            (lambda w, x: lax.conv(x[None, None], w[None, None, :4, :4], (1, 1), "SAME"), "only dot_general"),
            (lambda w, x: jax.grad(lambda w: jnp.tanh(x @ w).sum())(w), "a gradient that is taken inside of autocast"),
            (lambda w, x: mp.full_precision(jnp.matmul)(x, w), "inside mpjax.full_precision"),
        ],
        ids=["activations", "precision", "convolution", "gradient", "region"],
    )
    def test_what_stays(self, fn, reason):
        assert reason in products(fn, W, X, rules=rules())[-1][1]

    def test_a_function_that_is_called_under_two_names(self):
        layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

        def fn(w, x):
            with jax.named_scope("head"):
                x = layer(w, x)
            with jax.named_scope("body"):
                return layer(w, x)

        found = dict(products(fn, W, X, rules=rules()))
        assert "logits by its name" in found["head"]
        assert found["body"].startswith("operands in float8")

    def test_rules_of_derivatives_are_in_16_bits(self):
        """What is linear in a tangent stays linear, and no gradient is taken for an activation."""

        @jax.custom_jvp
        def forward(w, x):
            return x @ w

        forward.defjvp(lambda xs, ts: (xs[1] @ xs[0], xs[1] @ ts[0] + ts[1] @ xs[0]))

        @jax.custom_vjp
        def backward(w, x):
            return x @ w

        backward.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
        plain = jax.grad(lambda w: jnp.tanh(jnp.tanh(X @ w) @ w).sum())(W)
        for fn in (forward, backward):
            loss = lambda w, x, fn=fn: jnp.tanh(fn(w, jnp.tanh(x @ w))).sum()
            cast = mp.autocast(loss, "mixed_float8", rules())
            assert sqnr(jax.jit(jax.grad(cast))(W, X), plain) > 15
            forward_only = matrix_dtypes(on_h100(mp.autocast(loss, "mixed_float8", rules(emulate=False))), W, X)
            assert forward_only == {"float8_e4m3fn"}

    def test_flax(self):
        """The names of Linen's modules."""

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.relu(nn.Dense(32, name="up")(x))
                return nn.Dense(32, name="lm_head")(x)

        params = Net().init(jax.random.key(0), X)
        found = dict(products(Net().apply, params, X, rules=rules()))
        assert found["Net/up"].startswith("operands in float8")
        assert "logits" in found["Net/lm_head"]

    def test_layers_that_take_a_dot_general(self):
        layer = nn.Dense(32, dtype=jnp.bfloat16, dot_general=fp8.dot_general)
        params = layer.init(jax.random.key(0), X)
        other = nnx.Linear(32, 32, dtype=jnp.bfloat16, dot_general=fp8.dot_general, rngs=nnx.Rngs(0))
        other.kernel[...] = params["params"]["kernel"]
        got = layer.apply(params, X)
        assert bits(got) == bits(other(X))
        assert 20 < sqnr(got, X @ params["params"]["kernel"]) < 40

    def test_it_is_a_value(self):
        assert rules() == rules()
        assert hash(rules()) == hash(rules()) != hash(mp.default_rules())
        assert mp.default_rules().fp8 == fp8.Recipe()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mp.default_rules().with_fp8({"emulate": True}), TypeError, "expected: a mpjax.fp8.Recipe"),
        (lambda: fp8.Recipe(exclude=".*head"), TypeError, r"exclude is '.\*head'.\n  expected: a tuple of patterns"),
        (lambda: fp8.Recipe(include=("(",)), ValueError, "is not a regular expression"),
        (lambda: fp8.Recipe(min_reuse=-1), ValueError, "min_reuse is -1.\n  expected: a number from 0 up"),
        (lambda: fp8.Recipe(weight_gradient="half"), ValueError, "weight_gradient is 'half'"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
