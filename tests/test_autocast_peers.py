"""Autocast against the scenarios of torch's and TensorFlow's own suites."""

import collections
import concurrent.futures
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits
from jax import lax
from jaxprs import census, dtypes_of, equations

import mpjax as mp
from mpjax._compat import open_jaxpr

# optax's losses promote as JAX does by default.
pytestmark = pytest.mark.standard_promotion

LOW = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
by_policy = pytest.mark.parametrize("policy", LOW)

K = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(K[0], (4, 4))
W = jax.random.normal(K[1], (4, 4)) * 0.5
Y = jax.random.uniform(K[2], (4, 4), minval=0.1, maxval=0.9)


def trace(fn, *args):
    return open_jaxpr(jax.make_jaxpr(fn)(*args))[0]


def casts(fn, *args):
    """The values that are cast, and to what: one entry for a value that is cast to one dtype twice."""
    found = [e for e in equations(trace(fn, *args)) if e.primitive.name == "convert_element_type"]
    return {(e.invars[0], str(e.params["new_dtype"])) for e in found if e.invars[0].aval.dtype != e.params["new_dtype"]}


def result_dtype(fn, *args):
    """The dtype that a result has before it is brought to the one which the function has by itself."""
    jaxpr = trace(fn, *args)
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    eqn = made[jaxpr.outvars[0]]
    widened = eqn.primitive.name == "convert_element_type" and eqn.invars[0].aval.dtype.itemsize == 2
    return str((eqn.invars if widened else eqn.outvars)[0].aval.dtype)


class Op(NamedTuple):
    """One operation of torch's lists.

    Attributes:
      name: torch's.
      theirs: the list that it is on: "low", "full", "promote" or "untouched".
      ours: the dtype of the result for an activation in the compute dtype: "low" or "full".
      fn: the JAX counterpart, of an activation and of a parameter beside it.
    """

    name: str
    theirs: str
    ours: str
    fn: object


def conv(x, spatial, transposed=False):
    image = jnp.broadcast_to(x, (1, *(4,) * (spatial - 1), 4, 4)) if spatial > 1 else x[None]
    kernel = jnp.full((*(2,) * spatial, 4, 3), 0.3, x.dtype)
    names = ("N" + "HWD"[:spatial] + "C", "HWD"[:spatial] + "IO", "N" + "HWD"[:spatial] + "C")
    if transposed:
        return lax.conv_transpose(image, kernel, (1,) * spatial, "SAME", dimension_numbers=names)
    return lax.conv_general_dilated(image, kernel, (1,) * spatial, "SAME", dimension_numbers=names)


def layer_norm(h, scale=1.0):
    mean = h.mean(-1, keepdims=True)
    return (h - mean) * lax.rsqrt(jnp.mean((h - mean) ** 2, -1, keepdims=True) + 1e-6) * scale


def lstm(h, c, w):
    i, f, g, o = jnp.split(jnp.concatenate([h, h], 1) @ w, 4, 1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c)


def cosine_similarity(h, y):
    return jnp.sum(h * y, -1) / (jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(y, axis=-1))


def distances(h, y):
    return jnp.linalg.norm(h[:, None] - y[None], axis=-1)


LABELS = np.array([0, 1, 2, 3])

TORCH = [
    Op("conv1d", "low", "low", lambda h, y: conv(h, 1)),
    Op("conv2d", "low", "low", lambda h, y: conv(h, 2)),
    Op("conv3d", "low", "low", lambda h, y: conv(h, 3)),
    Op("conv_transpose1d", "low", "low", lambda h, y: conv(h, 1, True)),
    Op("conv_transpose2d", "low", "low", lambda h, y: conv(h, 2, True)),
    Op("prelu", "low", "low", lambda h, y: jnp.where(h > 0, h, y[0] * h)),
    Op("matmul", "low", "low", lambda h, y: h @ y),
    Op("mv", "low", "low", lambda h, y: h @ y[0]),
    Op("bmm", "low", "low", lambda h, y: h[None] @ y[None]),
    Op("einsum", "low", "low", lambda h, y: jnp.einsum("ij,kj->ik", h, y)),
    Op("linear", "low", "low", lambda h, y: h @ y + y[0]),
    Op("addmm", "low", "low", lambda h, y: y + h @ y),
    Op("addbmm", "low", "full", lambda h, y: y + (h[None] @ y[None]).sum(0)),  # the sum over the batch is a sum
    Op("addr", "low", "low", lambda h, y: y + jnp.outer(h[0], y[0])),
    Op("linalg_vecdot", "low", "low", lambda h, y: jnp.vecdot(h, y)),
    Op("linalg_multi_dot", "low", "low", lambda h, y: jnp.linalg.multi_dot([h, y, y])),
    Op("lstm_cell", "low", "low", lambda h, y: lstm(h, y, jnp.full((8, 16), 0.1, h.dtype))),
    Op("rnn_tanh_cell", "low", "low", lambda h, y: jnp.tanh(h @ y + h @ y.T)),
    Op("scaled_dot_product_attention", "low", "low", lambda h, y: jax.nn.softmax(h @ h.T * 0.5) @ y),
    Op("acos", "full", "full", lambda h, y: jnp.acos(jnp.clip(h, -0.75, 0.75))),
    Op("asin", "full", "full", lambda h, y: jnp.asin(jnp.clip(h, -0.75, 0.75))),
    Op("cosh", "full", "full", lambda h, y: jnp.cosh(h)),
    Op("sinh", "full", "full", lambda h, y: jnp.sinh(h)),
    Op("tan", "full", "full", lambda h, y: jnp.tan(h)),
    Op("erfinv", "full", "full", lambda h, y: jax.scipy.special.erfinv(jnp.clip(h, -0.75, 0.75))),
    Op("exp", "full", "full", lambda h, y: jnp.exp(h)),
    Op("expm1", "full", "full", lambda h, y: jnp.expm1(h)),
    Op("log", "full", "full", lambda h, y: jnp.log(jnp.abs(h))),
    Op("log10", "full", "full", lambda h, y: jnp.log10(jnp.abs(h))),
    Op("log2", "full", "full", lambda h, y: jnp.log2(jnp.abs(h))),
    Op("log1p", "full", "full", lambda h, y: jnp.log1p(jnp.abs(h))),
    # An element-wise quotient: no further from the true one than its argument was; torch's CPU list has it low too.
    Op("reciprocal", "full", "low", lambda h, y: jnp.reciprocal(h)),
    Op("rsqrt", "full", "full", lambda h, y: lax.rsqrt(jnp.abs(h))),
    Op("pow", "full", "full", lambda h, y: jnp.power(jnp.abs(h), y)),
    # A product of two or three factors, as in a gelu by hand; where a sum reads it, it is float32.
    Op("pow_integer", "full", "low", lambda h, y: h**3),
    Op("softplus", "full", "full", lambda h, y: jax.nn.softplus(h)),
    Op("layer_norm", "full", "full", lambda h, y: layer_norm(h)),
    Op("rms_norm", "full", "full", lambda h, y: h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)),
    Op("frobenius_norm", "full", "full", lambda h, y: jnp.linalg.norm(h)),
    Op("nuclear_norm", "full", "full", lambda h, y: jnp.linalg.norm(h, "nuc")),
    Op("cosine_similarity", "full", "full", cosine_similarity),
    Op("nll_loss", "full", "full", lambda h, y: -jax.nn.log_softmax(h)[jnp.arange(4), LABELS].mean()),
    Op(
        "cross_entropy",
        "full",
        "full",
        lambda h, y: optax.softmax_cross_entropy_with_integer_labels(h, LABELS).mean(),
    ),
    Op("poisson_nll_loss", "full", "full", lambda h, y: jnp.mean(jnp.exp(h) - y * h)),
    Op("kl_div", "full", "full", lambda h, y: optax.kl_divergence(jax.nn.log_softmax(h), y).mean()),
    Op("l1_loss", "full", "full", lambda h, y: jnp.abs(h - y).mean()),
    Op("mse_loss", "full", "full", lambda h, y: optax.squared_error(h, y).mean()),
    Op("huber_loss", "full", "full", lambda h, y: optax.huber_loss(h, y).mean()),
    Op("hinge_embedding_loss", "full", "full", lambda h, y: optax.hinge_loss(h, jnp.sign(y - 0.5)).mean()),
    Op("bce_with_logits", "full", "full", lambda h, y: optax.sigmoid_binary_cross_entropy(h, y).mean()),
    Op("cosine_embedding_loss", "full", "full", lambda h, y: jnp.mean(1 - cosine_similarity(h, y))),
    Op("triplet_margin_loss", "full", "full", lambda h, y: jax.nn.relu(distances(h, y) - 0.1).mean()),
    Op("cdist", "full", "full", distances),
    Op("renorm", "full", "full", lambda h, y: h / jnp.linalg.norm(h, axis=-1, keepdims=True)),
    Op("logsumexp", "full", "full", lambda h, y: jax.nn.logsumexp(h, -1)),
    # jax.image interpolates with matrix products.
    Op("upsample_bilinear2d", "full", "low", lambda h, y: jax.image.resize(h, (8, 8), "bilinear")),
    Op("prod", "full", "full", lambda h, y: h.prod(-1)),
    Op("softmax", "full", "full", lambda h, y: jax.nn.softmax(h)),
    Op("log_softmax", "full", "full", lambda h, y: jax.nn.log_softmax(h)),
    Op("cumprod", "full", "full", lambda h, y: jnp.cumprod(h, -1)),
    Op("cumsum", "full", "full", lambda h, y: jnp.cumsum(h, -1)),
    Op("linalg_vector_norm", "full", "full", lambda h, y: jnp.linalg.vector_norm(h, axis=-1)),
    Op("linalg_matrix_norm", "full", "full", lambda h, y: jnp.linalg.matrix_norm(h, ord=1)),
    Op("sum", "full", "full", lambda h, y: h.sum(-1)),
    # "promote" is the widest of the operands. Here a parameter beside an activation is cast down: a bias or a scale
    # that nothing else needs wider must not widen the residual stream.
    Op("addcmul", "promote", "low", lambda h, y: h + 0.5 * y * y),
    Op("addcdiv", "promote", "low", lambda h, y: h + 0.5 * y / y),
    Op("atan2", "promote", "low", lambda h, y: jnp.atan2(h, y)),
    Op("cross", "promote", "low", lambda h, y: jnp.cross(h[:, :3], y[:, :3])),
    Op("index_put", "promote", "low", lambda h, y: h.at[LABELS[:2]].set(y[:2])),
    Op("stack", "promote", "low", lambda h, y: jnp.stack([h, y])),
    Op("cat", "promote", "low", lambda h, y: jnp.concatenate([h, y])),
    # Matrix work, whatever it is called.
    Op("bilinear", "promote", "low", lambda h, y: jnp.einsum("bi,ij,bj->b", h, y, h)),
    Op("dot", "promote", "low", lambda h, y: jnp.dot(h[0], y[0])),
    Op("vdot", "promote", "low", lambda h, y: jnp.vdot(h[0], y[0])),
    Op("tensordot", "promote", "low", lambda h, y: jnp.tensordot(h, y, 1)),
    Op("scatter_add", "promote", "full", lambda h, y: y.at[LABELS].add(h)),
    Op("gelu", "untouched", "low", lambda h, y: jax.nn.gelu(h)),
    Op("relu", "untouched", "low", lambda h, y: jax.nn.relu(h)),
    Op("tanh", "untouched", "low", lambda h, y: jnp.tanh(h)),
    Op("sigmoid", "untouched", "low", lambda h, y: jax.nn.sigmoid(h)),
    Op("sqrt", "untouched", "low", lambda h, y: jnp.sqrt(jnp.abs(h))),
    Op("erf", "untouched", "low", lambda h, y: lax.erf(h)),
    Op("max", "untouched", "low", lambda h, y: h.max(-1)),
    Op("where", "untouched", "low", lambda h, y: jnp.where(y > 0.5, h, 0.0)),
    Op("dropout", "untouched", "low", lambda h, y: jnp.where(y > 0.5, h / 0.9, 0.0)),
    # bfloat16 is 64 apart at 8192: the positions of a rotary embedding.
    Op("sin", "untouched", "full", lambda h, y: jnp.sin(h)),
    Op("cos", "untouched", "full", lambda h, y: jnp.cos(h)),
    # A mean is a sum, and its divisor may be the size of a data set.
    Op("mean", "untouched", "full", lambda h, y: h.mean(-1)),
    Op("batch_norm", "untouched", "full", lambda h, y: (h - h.mean(0)) * lax.rsqrt(h.var(0) + 1e-5)),
]


# Compared within the rounding of the compute dtype, and not to the last bit of a few casts by hand.
CLOSE = {
    "addbmm": "the products are matrix work and low, their sum is float32",
    "scaled_dot_product_attention": "matrix work on both sides of a softmax",
    "addcmul": "what is made of parameters alone is float32 until it meets the activation",
    # A target beside an activation is cast down as a parameter is: the difference is low, what is made of it is not.
    # torch takes the difference in float32.
    **dict.fromkeys(["l1_loss", "mse_loss", "huber_loss", "hinge_embedding_loss"], "h - y is low"),
    **dict.fromkeys(["poisson_nll_loss", "kl_div", "cosine_embedding_loss", "cosine_similarity"], "y * h is low"),
    **dict.fromkeys(["cdist", "triplet_margin_loss"], "h - y is low"),
}


@by_policy
@pytest.mark.parametrize("op", TORCH, ids=[op.name for op in TORCH])
class TestEveryOperationOfTorchsLists:
    """Scenario 18."""

    def test_of_an_activation(self, op, policy):
        low = LOW[policy]
        cast = mp.autocast(lambda x, w, y: op.fn(x @ w, y), policy)
        # A power overflows float16 soon: 257**2 is infinite there.
        powers = ("reciprocal", "pow_integer") if policy == "mixed_float16" else ()
        assert result_dtype(cast, X, W, Y) == (low if op.ours == "low" and op.name not in powers else "float32")
        if policy == "mixed_float16":
            return  # the values of one policy say what those of the other would
        got = cast(X, W, Y)
        assert got.dtype == jnp.float32
        h = lax.dot(X.astype(low), W.astype(low))
        by_hand = op.fn(h.astype(jnp.float32), Y) if op.ours == "full" else op.fn(h, Y.astype(low))
        by_hand = by_hand.astype(jnp.float32)
        if op.name in CLOSE:
            atol = 2**-7 * float(jnp.abs(by_hand).max())
            np.testing.assert_allclose(got, by_hand, rtol=2**-7, atol=atol)
        else:
            assert bits(got) == bits(by_hand)

    def test_of_what_must_not_be_touched(self, op, policy, x64):
        """The same equations for float64."""
        args = [np.asarray(v, np.float64) for v in (X, W, Y)]

        def fn(x, w, y):
            return op.fn(x @ w, y)

        def dtypes(fn):
            return [(e.primitive.name, [str(v.aval.dtype) for v in e.outvars]) for e in equations(trace(fn, *args))]

        assert dtypes(mp.autocast(fn, policy)) == dtypes(fn)


@by_policy
class TestPromotion:
    """Scenario 19: what torch and JAX promote by themselves."""

    MIXED = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "concatenate": lambda a, b: jnp.concatenate([a, b]),
        "stack": lambda a, b: jnp.stack([a, b]),
        "where": lambda a, b: jnp.where(MASK, a, b),
        "max": lambda a, b: jnp.maximum(a, b),
        "power": lambda a, b: jnp.atan2(a, b),
    }

    @pytest.mark.parametrize("name", MIXED)
    @pytest.mark.parametrize("swapped", [False, True], ids=["low first", "low last"])
    def test_of_float32_and_low_is_float32(self, name, swapped, policy):
        """float32 because it needs to be, after an exponential."""
        fn = self.MIXED[name]

        def mixed(x, w, y):
            pair = (jnp.exp(y), x @ w) if swapped else (x @ w, jnp.exp(y))
            return fn(*pair)

        cast = mp.autocast(mixed, policy)
        assert result_dtype(cast, X, W, Y) == "float32"
        h, e = lax.dot(X.astype(LOW[policy]), W.astype(LOW[policy])).astype(jnp.float32), jnp.exp(Y)
        assert bits(cast(X, W, Y)) == bits(fn(e, h) if swapped else fn(h, e))

    @pytest.mark.parametrize("operator", ["less", "greater_equal", "equal", "not_equal"])
    def test_comparisons_are_booleans(self, operator, policy):
        compare = getattr(jnp, operator)
        out = mp.autocast(lambda x, w, y: compare(x @ w, jnp.exp(y)), policy)(X, W, Y)
        assert out.dtype == bool
        h = lax.dot(X.astype(LOW[policy]), W.astype(LOW[policy])).astype(jnp.float32)
        assert np.array_equal(out, compare(h, jnp.exp(Y)))


MASK = np.arange(16).reshape(4, 4) % 3 == 0

BIAS = np.arange(4, dtype=np.float32)

# TensorFlow's "infer" list: low where a matrix product comes before and after. Its operations with a float32 core
# (log, softplus, elu) have none in the 16-bit kernels of TensorFlow either; here that core is visible, and float32.
INFER = {
    "add": (lambda h: h + h, "low"),
    "mul": (lambda h: h * h, "low"),
    "sub": (lambda h: h - 0.5, "low"),
    "real_div": (lambda h: h / 2.0, "low"),
    "floor_div": (lambda h: jnp.floor(h / 2.0), "low"),
    "bias_add": (lambda h: h + BIAS, "low"),
    "reciprocal": (lambda h: 1.0 / (jnp.abs(h) + 1.0), "low"),
    "leaky_relu": (lambda h: jax.nn.leaky_relu(h, 0.1), "low"),
    "tanh": (jnp.tanh, "low"),
    "sigmoid": (jax.nn.sigmoid, "low"),
    "softsign": (jax.nn.soft_sign, "low"),
    "sqrt": (lambda h: jnp.sqrt(jnp.abs(h)), "low"),
    "square": (jnp.square, "low"),
    "erf": (lax.erf, "low"),
    "erfc": (lax.erfc, "low"),
    "max_pool": (lambda h: lax.reduce_window(h, -np.inf, lax.max, (2, 1), (1, 1), "SAME"), "low"),
    "softmax": (jax.nn.softmax, "low"),
    "log": (lambda h: jnp.log(jnp.abs(h) + 1.0), "float32"),
    "log1p": (lambda h: jnp.log1p(jnp.abs(h)), "float32"),
    "log_softmax": (jax.nn.log_softmax, "float32"),
    "softplus": (jax.nn.softplus, "float32"),
    "elu": (jax.nn.elu, "float32"),
    "selu": (jax.nn.selu, "float32"),
    "rsqrt": (lambda h: lax.rsqrt(jnp.abs(h) + 1.0), "float32"),
    "prod": (lambda h: jnp.prod(h, -1, keepdims=True) * jnp.ones(4), "float32"),
    "avg_pool": (lambda h: lax.reduce_window(h, 0.0, lax.add, (2, 1), (1, 1), "SAME") / 2.0, "float32"),
}


class TestColouring:
    """Scenario 20: the cases of TensorFlow's graph rewrite, with the outcomes of mpjax's own contract."""

    def test_no_matrix_work_and_no_cast(self):
        fn = lambda x: jnp.maximum(jnp.sqrt(jnp.maximum(jnp.exp(x), 0.0)), 0.0)
        cast = mp.autocast(fn, "mixed_float16")
        assert not casts(cast, X)
        assert [e.primitive.name for e in trace(cast, X).eqns] == [e.primitive.name for e in trace(fn, X).eqns]

    @by_policy
    def test_what_is_low_already(self, policy):
        fn = lambda x, w: jnp.exp(jnp.maximum(x @ w, 0.0)).sum()
        args = X.astype(LOW[policy]), W.astype(LOW[policy])
        shape = lambda fn: [(e.primitive.name, [v.aval for v in e.outvars]) for e in equations(trace(fn, *args))]
        assert shape(mp.autocast(fn, policy)) == shape(fn)

    @by_policy
    def test_simple(self, policy):
        """exp, relu and sqrt stay float32, as does a logarithm after the product; one cast in, one out.

        TensorFlow makes the relu just before the product low, and the one after it. Here what is float32 stays so
        until the product, and what only a logarithm reads is float32: the cast is fused into either.
        """

        def fn(x):
            h = jnp.maximum(jnp.sqrt(jnp.maximum(jnp.exp(x), 0.0)), 0.5)
            return jnp.sum(jnp.log(jnp.maximum(h @ h, 0.25)))

        cast = mp.autocast(fn, policy)
        found = census(cast, X)
        for name in ("exp", "sqrt", "log", "reduce_sum"):
            assert found[name, "float32"] == 1
        assert found["max", "float32"] == 3
        assert found["dot_general", LOW[policy]] == 1
        assert sorted(dtype for _, dtype in casts(cast, X)) == sorted([LOW[policy], "float32"])

    @by_policy
    @pytest.mark.parametrize("name", INFER)
    def test_between_two_products(self, name, policy):
        op, dtype = INFER[name]
        marked = jax.named_call(op, name="between")

        def fn(x, w):
            return marked(x @ w) @ w

        found = {
            str(v.aval.dtype)
            for e in equations(trace(mp.autocast(fn, policy), X, W))
            for v in e.outvars
            if "between" in str(e.source_info.name_stack) and jnp.issubdtype(v.aval.dtype, jnp.floating)
            # A bias is spread out before it is cast.
            if e.primitive.name not in ("broadcast_in_dim", "convert_element_type")
        }
        low = LOW[policy]
        if name == "square" and policy == "mixed_float16":
            assert found == {"float32"}  # 257**2 is infinite in float16
        elif dtype == "low" and name != "softmax":
            assert found == {low}
        elif dtype == "float32":
            assert "float32" in found
        assert dtypes_of("dot_general", mp.autocast(fn, policy), X, W) == {low}
        tolerance = {"bfloat16": 0.05, "float16": 0.01}[low]
        true = fn(X, W)
        got = mp.autocast(fn, policy)(X, W)
        np.testing.assert_allclose(got, true, atol=tolerance * float(jnp.abs(true).max()))

    @by_policy
    def test_an_infer_operation_as_deny(self, policy):
        """With a rule of the user's: in, out, in and out again."""
        rules = mp.default_rules().with_rule("tanh", "full", "denied")
        fn = lambda x: jnp.tanh(x @ x) @ jnp.eye(4)[::2].T
        cast = mp.autocast(fn, policy, rules)
        assert dtypes_of("tanh", cast, X) == {"float32"}
        assert dtypes_of("tanh", mp.autocast(fn, policy), X) == {LOW[policy]}
        into = [(v, d) for v, d in casts(cast, X) if d == LOW[policy]]
        out = [(v, d) for v, d in casts(cast, X) if d == "float32" and str(v.aval.dtype) == LOW[policy]]
        assert (len(into), len(out)) == (3, 2)  # one of the three is the constant

    @by_policy
    def test_a_chain_in_both_directions(self, policy):
        """Two relus of one input, joined, before a product.

        TensorFlow paints them low, against the direction of the data. Here a value that nothing has decided on stays
        float32 until a product reads it, so that gradients of parameters are added up in float32.
        """
        fn = lambda x, w: jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)]) @ w
        cast = mp.autocast(fn, policy)
        assert dtypes_of("concatenate", cast, X, W) == {"float32"}
        assert dtypes_of("dot_general", cast, X, W) == {LOW[policy]}
        assert len(casts(cast, X, W)) == 3  # two operands in, one result out

    @by_policy
    def test_outputs_keep_their_dtype(self, policy):
        """Inside a chain of low operations too."""

        def fn(x, w):
            a = x @ w
            b = jax.nn.relu(a)
            return {"a": a, "b": b, "c": b @ w}

        out = mp.autocast(fn, policy)(X, W)
        assert {v.dtype.name for v in out.values()} == {"float32"}
        for value in out.values():
            assert bits(value) == bits(value.astype(LOW[policy]).astype(jnp.float32))

    @by_policy
    @pytest.mark.parametrize("loop", ["scan", "while"])
    def test_what_a_loop_carries_has_one_dtype(self, loop, policy):
        def fn(x, w):
            body = lambda c: jax.nn.relu(c @ w)
            if loop == "scan":
                return lax.scan(lambda c, _: (body(c), None), x, length=3)[0]
            return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, body(s[1])), (0, x))[1]

        (eqn,) = [e for e in equations(trace(mp.autocast(fn, policy), X, W)) if e.primitive.name == loop]
        assert {str(v.aval.dtype) for v in eqn.outvars} - {"int32"} == {LOW[policy]}


class TestRegions:
    """Scenario 21."""

    def test_two_dtypes_share_a_weight(self):
        """torch's cache of cast weights is not keyed by dtype."""
        inner = mp.autocast(lambda x, w: x @ w, "mixed_float16")
        fn = lambda x, w: (inner(x, w) + x @ w) @ w
        cast = mp.autocast(fn, "mixed_bfloat16")
        found = census(cast, X, W)
        assert (found["dot_general", "float16"], found["dot_general", "bfloat16"]) == (1, 2)
        grads = jax.grad(lambda w: cast(X, w).sum())(W)
        true = jax.grad(lambda w: fn(X, w).sum())(W)
        assert grads.dtype == jnp.float32
        np.testing.assert_allclose(grads, true, atol=0.03 * float(jnp.abs(true).max()))

    def test_an_exception_leaves_nothing_behind(self):
        layer = jax.jit(lambda x, w: jnp.tanh(x @ w))

        def fails(x, w):
            raise RuntimeError(f"on purpose: {layer(x, w)}")

        before = str(jax.make_jaxpr(layer)(X, W))
        for wrap in (lambda f: f, jax.jit, jax.vmap):
            with pytest.raises(RuntimeError, match="on purpose"):
                wrap(mp.autocast(fails, "mixed_bfloat16"))(X, W)
        assert str(jax.make_jaxpr(layer)(X, W)) == before
        assert dtypes_of("dot_general", mp.autocast(layer, "mixed_bfloat16"), X, W) == {"bfloat16"}

    def test_an_exception_at_run_time_of_the_loop_body(self):
        """Inside a scan's body, which is traced several times."""

        def fn(x, w):
            def body(c, _):
                raise RuntimeError("on purpose")

            return lax.scan(body, x @ w, length=2)[0]

        with pytest.raises(RuntimeError, match="on purpose"):
            mp.autocast(fn, "mixed_bfloat16")(X, W)
        assert dtypes_of("dot_general", lambda x, w: x @ w, X, W) == {"float32"}

    def test_jit_knows_one_policy_from_another(self):
        """One function, jitted inside: with two policies and with none, in any order."""
        layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
        plain = layer(X, W)
        for policy in (*LOW, "float32", *LOW):
            low = LOW.get(policy, "float32")
            assert dtypes_of("dot_general", jax.jit(mp.autocast(layer, policy)), X, W) == {low}
            # Compiled both, since a compiler may keep more digits than it was told to.
            by_hand = jax.jit(lambda x, w, t=low: jnp.tanh(lax.dot(x.astype(t), w.astype(t))).astype(jnp.float32))
            assert bits(jax.jit(mp.autocast(layer, policy))(X, W)) == bits(by_hand(X, W))
            assert bits(layer(X, W)) == bits(plain)

    def test_threads(self):
        layer = jax.jit(lambda x, w: jnp.tanh(x @ w))

        def work(i):
            policy = ("mixed_bfloat16", "mixed_float16", "float32")[i % 3]
            return LOW.get(policy, "float32"), dtypes_of("dot_general", mp.autocast(layer, policy), X, W)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for expected, found in pool.map(work, range(24)):
                assert found == {expected}

    @pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap], ids=["jit", "remat", "vmap"])
    def test_autocast_inside_and_outside_of_a_transform(self, wrap):
        """The inner region alone is low."""

        def fn(x, w):
            return mp.autocast(wrap(lambda a, b: a @ b), "mixed_bfloat16")(x, w) + wrap(lambda a, b: a @ b)(x, w)

        for outer in (lambda f: f, jax.jit, jax.checkpoint, jax.grad):
            scalar = outer(lambda x, w: fn(x[:, None] if wrap is jax.vmap else x, w).sum())
            args = (X, jnp.stack([W] * 4) if wrap is jax.vmap else W)
            assert dtypes_of("dot_general", scalar, *args) == {"bfloat16", "float32"}


def weight_casts(fn, w, policy, *args):
    """How many instructions of the compiled program cast the weight, which no other array has the shape of."""
    compiled = jax.jit(mp.autocast(fn, policy)).lower(w, *args).compile().as_text()
    low = {"bfloat16": "bf16", "float16": "f16"}[LOW[policy]]
    shape = ",".join(map(str, w.shape))
    return re.findall(rf"= {low}\[{shape}\]\S* (?:convert|fusion)\(f32\[", compiled) or re.findall(
        rf"= {low}\[{shape}\]\S* (?:convert|fusion)\(", compiled
    )


@by_policy
class TestCastsOfAWeight:
    """Scenario 22: one cast of a weight for each call, however often it is used."""

    W = jax.random.normal(K[3], (6, 6))
    X = jax.random.normal(K[4], (3, 6))

    def four(self, w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return x

    def scanned(self, w, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=7)[0]

    def test_four_uses_in_a_jaxpr(self, policy):
        """At most one for each use, so that the gradients of the uses are added up in float32."""
        jaxpr = trace(mp.autocast(self.four, policy), self.W, self.X)
        found = [e for e in jaxpr.eqns if e.primitive.name == "convert_element_type" and e.invars[0] is jaxpr.invars[0]]
        assert 1 <= len(found) <= 4

    def test_four_uses_compiled(self, policy):
        assert len(weight_casts(self.four, self.W, policy, self.X)) == 1

    def test_a_scan(self, policy):
        """Once before it, or once in its body: not once for each step of an unrolled loop."""
        assert len(weight_casts(self.scanned, self.W, policy, self.X)) == 1

    def test_a_gradient_of_many_uses_is_added_up_in_float32(self, policy):
        fn = lambda w, x: self.four(w, x).sum()
        jaxpr = trace(jax.grad(mp.autocast(fn, policy)), self.W, self.X)
        sums = [e for e in equations(jaxpr) if e.primitive.name == "add_any" and e.outvars[0].aval.shape == (6, 6)]
        assert sums
        assert {str(e.outvars[0].aval.dtype) for e in sums} == {"float32"}


def exactly(fn):
    """Compiled with every rounding that the program asks for: XLA drops those inside a fusion by default."""
    return jax.jit(fn, compiler_options={"xla_allow_excess_precision": False})


@by_policy
@pytest.mark.parametrize("save", ["nothing", "dots", "everything"])
@pytest.mark.parametrize("wrap", [lambda f: f, exactly], ids=["eager", "jit"])
def test_gradients_with_and_without_remat(save, policy, wrap):
    """Scenario 24: what is recomputed is what was computed, bit by bit."""
    policies = jax.checkpoint_policies
    saved = {
        "nothing": policies.nothing_saveable,
        "dots": policies.dots_saveable,
        "everything": policies.everything_saveable,
    }[save]

    def block(x, w):
        return x + jax.nn.gelu(layer_norm(x @ w)) @ w

    def loss(block, w):
        return jnp.mean(block(block(X, w), w) ** 2)

    plain = wrap(jax.grad(mp.autocast(lambda w: loss(block, w), policy)))(W)
    again = wrap(jax.grad(mp.autocast(lambda w: loss(jax.checkpoint(block, policy=saved), w), policy)))(W)
    assert bits(again) == bits(plain)


ALL_POLICIES = ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float32"]


class TestGradients:
    """Scenario 25."""

    @pytest.mark.parametrize("policy", ALL_POLICIES)
    def test_of_float32_parameters_are_float32(self, policy):
        params = {"w": W, "b": jnp.zeros(4), "scale": jnp.ones(4), "table": Y, "kernel": jnp.ones((2, 2, 4, 4))}

        def loss(p):
            h = p["table"][LABELS] @ p["w"] + p["b"]
            h = layer_norm(h, p["scale"]).reshape(1, 2, 2, 4)
            out = lax.conv_general_dilated(h, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return optax.softmax_cross_entropy_with_integer_labels(out.reshape(4, 4), LABELS).mean()

        grads = jax.grad(mp.autocast(loss, policy))(params)
        true = jax.grad(loss)(params)
        assert {g.dtype.name for g in jax.tree.leaves(grads)} == {"float32"}
        jax.tree.map(lambda g, t: np.testing.assert_allclose(g, t, atol=0.05 * float(jnp.abs(t).max())), grads, true)

    @by_policy
    def test_an_lstm_equals_casts_by_hand(self, policy):
        """Its cell is a running sum (f * c + i * g) that stays float32; its matrix work and hidden state are low."""
        low = LOW[policy]
        wx, wh = jax.random.normal(K[5], (4, 16)), jax.random.normal(K[6], (4, 16)) * 0.3
        xs = jax.random.normal(K[7], (5, 3, 4))

        def cell(carry, x, product, full):
            h, c = carry
            i, f, g, o = jnp.split(product(x, wx) + product(h, wh), 4, -1)
            c = full(jax.nn.sigmoid(f)) * c + full(jax.nn.sigmoid(i) * jnp.tanh(g))
            return (full(jax.nn.sigmoid(o)) * jnp.tanh(c), c), None

        def lstm(xs):
            start = jnp.zeros((3, 4)), jnp.zeros((3, 4))
            return lax.scan(lambda c, x: cell(c, x, jnp.matmul, lambda v: v), start, xs)[0]

        def by_hand(xs):
            state = jnp.zeros((3, 4)), jnp.zeros((3, 4))
            product = lambda a, b: lax.dot(a.astype(low), b.astype(low))
            for x in xs:
                state, _ = cell(state, x, product, lambda v: v.astype(jnp.float32))
            return state

        for got, expected, true in zip(mp.autocast(lstm, policy)(xs), by_hand(xs), lstm(xs), strict=True):
            tolerance = {"bfloat16": 2**-7, "float16": 2**-10}[low]
            np.testing.assert_allclose(got, expected, atol=tolerance)
            np.testing.assert_allclose(got, true, atol=8 * tolerance)

    @by_policy
    @pytest.mark.parametrize("kind", ["rnn", "gru"])
    def test_a_cell_equals_casts_by_hand(self, kind, policy):
        low = LOW[policy]

        def cell(h, x, w, u):
            if kind == "rnn":
                return jnp.tanh(x @ w + h @ u)
            z = jax.nn.sigmoid(x @ w + h @ u)
            return (1.0 - z) * h + z * jnp.tanh(x @ u + (z * h) @ w)

        args = (Y, X, W, W.T)
        by_hand = cell(*(v.astype(low) for v in args)).astype(jnp.float32)
        assert bits(mp.autocast(cell, policy)(*args)) == bits(by_hand)

    @by_policy
    def test_what_is_kept_for_the_backward_pass_is_low(self, policy):
        """After a normalisation, a gelu and a residual: no more bytes than with casts by hand."""
        low = LOW[policy]
        args = jnp.ones((64, 8)) * jnp.arange(8.0), jnp.eye(8), jnp.eye(8) * 0.5, jnp.ones(8)

        def fn(x, w1, w2, scale):
            h = x @ w1
            return (h + jax.nn.gelu(layer_norm(h, scale)) @ w2) @ w1

        def by_hand(x, w1, w2, scale):
            """As flax's layers do it with `dtype=bfloat16`: statistics in float32, the result of a layer low."""
            w1, w2 = w1.astype(low), w2.astype(low)
            h = x.astype(low) @ w1
            normed = layer_norm(h.astype(jnp.float32), scale).astype(low)
            return ((h + jax.nn.gelu(normed) @ w2) @ w1).astype(jnp.float32)

        def kept(fn):
            residuals = [r for r in jax.tree.leaves(jax.vjp(fn, *args)[1]) if r.shape == (64, 8)]
            return collections.Counter(str(r.dtype) for r in residuals), sum(r.nbytes for r in residuals)

        (found, size), (hand, limit) = kept(mp.autocast(fn, policy)), kept(by_hand)
        assert found[low] > 0
        # The third power of gelu, which overflows float16 at 41, is float32.
        assert size <= limit + (64 * 8 * 2 if policy == "mixed_float16" else 0), f"{found} instead of {hand}"


class TestNumerics:
    """Scenario 26, for activations in float16."""

    def cast(self, fn, values):
        """Of values that come out of a matrix product."""
        values = jnp.asarray(values, jnp.float32)
        return mp.autocast(lambda v: fn(v[:, None] @ jnp.eye(1)), "mixed_float16")(values)

    def test_norm(self):
        assert float(jnp.linalg.norm(jnp.full(4, 300.0, jnp.float16))) == np.inf
        assert float(self.cast(jnp.linalg.norm, [300.0] * 4)) == 600.0

    def test_softmax(self):
        out = self.cast(lambda v: jax.nn.softmax(v[:, 0]), [6e4, 0.0])
        assert out.tolist() == [1.0, 0.0]

    def test_log_softmax(self):
        """The difference of two float16 numbers may not be one."""
        out = self.cast(lambda v: jax.nn.log_softmax(v[:, 0]), [6e4, -6e4])
        assert out.tolist() == [0.0, -120000.0 - 0.0]

    def test_logsumexp(self):
        out = self.cast(lambda v: jax.nn.logsumexp(v[:, 0]), [6e4, 6e4, -6e4])
        assert float(out) == pytest.approx(6e4 + np.log(2), rel=1e-6)

    def test_var(self):
        out = self.cast(jnp.var, np.array([-1000.0, 1000.0] * 500))
        assert float(out) == 1e6

    def test_cumsum(self):
        out = self.cast(lambda v: jnp.cumsum(v[:, 0]), np.ones(100_000))
        assert np.array_equal(out, np.arange(1, 100_001))


def test_numbers_of_python_stay_numbers():
    """A flag or an axis: the function that is wrapped may branch on it, as without autocast."""

    def fn(x, axis, train):
        y = x @ x
        return y.sum(axis) if train else y

    assert mp.autocast(fn, "mixed_bfloat16")(X, 0, train=True).shape == (4,)
