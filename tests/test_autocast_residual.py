"""What starts a residual stream: embeddings, their normalisation and positions do not widen it to float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import dtypes, trace
from zoo_case import jit

import mpjax as mp

ROWS, LENGTH, WIDTH, WORDS, LAYERS = 2, 5, 8, 11, 3
TOKENS = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % WORDS
PARAMS = {
    "table": 0.3 * jax.random.normal(jax.random.key(0), (WORDS, WIDTH)),
    "positions": 0.1 * jax.random.normal(jax.random.key(1), (LENGTH, WIDTH)),
    "layers": 0.3 * jax.random.normal(jax.random.key(2), (LAYERS, WIDTH, WIDTH)),
}


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + jnp.float32(1e-6))


def two_moments(x):
    """As Flax does it: the variance from the mean of squares."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.maximum((x * x).mean(-1, keepdims=True) - mean * mean, jnp.float32(0))
    return (x - mean) * jax.lax.rsqrt(variance + jnp.float32(1e-6))


def by_variance(x):
    """As equinox does it, and as most write it by hand."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + jnp.float32(1e-6))


def embedded(params):
    return params["table"][TOKENS]


def taken(params):
    return jnp.take(params["table"], TOKENS, axis=0) * jnp.float32(WIDTH**0.5)


def learned_positions(params):
    return embedded(params) + params["positions"]


def normalised(params):
    return norm(learned_positions(params))


def normalised_by_two_moments(params):
    return two_moments(embedded(params))


def normalised_by_variance(params):
    return by_variance(learned_positions(params))


def sinusoidal(params):
    angles = jnp.outer(jnp.arange(LENGTH, dtype=jnp.float32), jnp.logspace(0.0, -2.0, WIDTH, dtype=jnp.float32))
    return embedded(params) + jnp.sin(angles)


def unrolled(layer, x, weights):
    for w in weights:
        x = layer(x, w)
    return x


def scanned(layer, x, weights):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]


def rematerialised(layer, x, weights):
    return scanned(jax.checkpoint(layer), x, weights)


def jitted(layer, x, weights):
    return unrolled(jax.jit(layer), x, weights)


def pre_norm(x, w):
    return x + jnp.tanh(norm(x) @ w)


def post_norm(x, w):
    return norm(x + jnp.tanh(x @ w))


def model(start, layers, layer, params):
    return (layers(layer, start(params), params["layers"]) @ params["table"].T).mean()


def sums(fn, *args):
    """The dtypes of all sums in the shape of an activation, forward."""
    shape = (ROWS, LENGTH, WIDTH)
    return [
        dtypes(e.invars) for e in trace(fn, *args) if e.primitive.name == "add" and e.outvars[0].aval.shape == shape
    ]


@pytest.mark.parametrize("layer", [pre_norm, post_norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layers", [unrolled, scanned, rematerialised, jitted], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "start",
    [embedded, taken, learned_positions, normalised, normalised_by_two_moments, normalised_by_variance, sinusoidal],
    ids=lambda f: f.__name__,
)
def test_the_stream_is_low_from_the_start(start, layers, layer):
    fn = functools.partial(model, start, layers, layer)
    low = mp.autocast(fn, "mixed_bfloat16")
    found = sums(low, PARAMS)
    # The sum with sines is taken in float32, and rounded.
    wide = [pair for pair in found if "float32" in pair]
    assert len(found) >= (LAYERS if layers is unrolled else 1)
    assert len(wide) == (start is sinusoidal), found


def test_bert_carries_a_low_stream():
    """Its layers end in a norm with a bias, which is no running sum; its head reads some places alone."""
    places = jnp.array([[0, 3], [1, 2]])

    def layer(x, layer_params):
        w, scale, bias = layer_params
        return two_moments(x + jnp.tanh(x @ w)) * scale + bias, None

    def fn(params, scales, biases):
        x, _ = jax.lax.scan(layer, two_moments(learned_positions(params)), (params["layers"], scales, biases))
        return (jnp.take_along_axis(x, places[..., None], 1) @ params["table"].T).mean()

    jaxpr = jax.make_jaxpr(mp.autocast(fn, "mixed_bfloat16"))(
        PARAMS, jnp.ones((LAYERS, WIDTH)), PARAMS["layers"][0, :3]
    )
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [var.aval.dtype for var in loop.outvars] == [jnp.bfloat16]


@pytest.mark.parametrize("layer", [pre_norm, post_norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("start", [normalised, sinusoidal], ids=lambda f: f.__name__)
def test_the_stream_is_right(start, layer):
    fn = functools.partial(model, start, scanned, layer)
    got, grads = jit(jax.value_and_grad(mp.autocast(fn, "mixed_bfloat16")))(PARAMS)
    expected, true = jit(jax.value_and_grad(fn))(PARAMS)
    np.testing.assert_allclose(got, expected, rtol=0.01)
    for name, grad in grads.items():
        assert grad.dtype == jnp.float32
        assert jnp.linalg.norm(grad - true[name]) <= 0.05 * jnp.linalg.norm(true[name]), name


IDS, OTHERS = jnp.arange(16), jnp.arange(16)[::-1]
WEIGHTS = jax.random.normal(jax.random.key(3), (WIDTH, 4))
# Large beside their differences: what rounds them loses these.
YEARS = 1990 + 20 * jax.random.uniform(jax.random.key(4), (16, WIDTH))
drop = jax.jit(lambda x: jnp.where(IDS[:, None] > 3, x, jnp.zeros_like(x)) * jnp.float32(2))


def used_twice(t):
    """The first call of a function is returned; only the second goes into matrix work."""
    x = t[IDS]
    first, second = drop(x), drop(x)
    return (second @ WEIGHTS) * jnp.float32(1e-9), first


MAGNIFYING = {
    "neighbours": lambda t: (t[IDS] - t[OTHERS]) @ WEIGHTS,
    "scaled neighbours": lambda t: (t[IDS] - jnp.float32(1) * t[OTHERS]) @ WEIGHTS,
    "neighbours by a sum": lambda t: (t[IDS] + jnp.float32(-1) * t[OTHERS]) @ WEIGHTS,
    "an offset": lambda t: ((t[IDS] - jnp.float32(1990)) / jnp.float32(20)) @ WEIGHTS,
    "an offset by a sum": lambda t: (t[IDS] + jnp.float32(-1990)) @ WEIGHTS,
    "normalised over rows": lambda t: ((t[IDS] - t[IDS].mean(0)) / t[IDS].std(0)) @ WEIGHTS,
    "mean of other rows": lambda t: (t[IDS] - t[OTHERS].mean(-1, keepdims=True)) @ WEIGHTS,
    "the largest": lambda t: jax.nn.one_hot(t[IDS].argmax(-1), WIDTH) @ WEIGHTS,
    "top k": lambda t: jax.lax.top_k(t[IDS], 2)[0] @ WEIGHTS[:2],
    "full precision": lambda t: mp.full_precision(lambda x: x @ WEIGHTS)(t[IDS]),
    "full precision in a jit": lambda t: jax.jit(mp.full_precision(lambda x: x @ WEIGHTS))(t[IDS]),
    "keep precision": lambda t: mp.keep_precision(lambda x: x @ WEIGHTS)(t[IDS]),
    "a sum before full precision": lambda t: mp.full_precision(lambda x: x @ WEIGHTS)(
        jnp.exp(t[IDS] - jnp.float32(1990)) + (t @ WEIGHTS @ WEIGHTS.T) * jnp.float32(1e-3)
    ),
    "returned by another call": used_twice,
}


@pytest.mark.parametrize("name", MAGNIFYING)
def test_a_lookup_is_not_rounded_before_what_would_magnify_it(name):
    """Differences of neighbours, offsets, choices by size, and readers in float32 regions."""
    got = mp.autocast(MAGNIFYING[name], "mixed_bfloat16")(YEARS)
    true = MAGNIFYING[name](YEARS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        assert jnp.linalg.norm(a - b) <= 0.01 * jnp.linalg.norm(b)
    if "precision" in name and "sum" not in name:
        np.testing.assert_array_equal(got, true)
    if name == "returned by another call":
        np.testing.assert_array_equal(got[1], true[1])


@pytest.mark.parametrize("size", [1e5, 1e-8])
@pytest.mark.parametrize("reads", [lambda x, c: x * c, lambda x, c: norm(x * c)], ids=["scaled", "normalised"])
def test_float16_rounds_no_row_before_it_is_scaled(reads, size):
    table = size * jax.random.uniform(jax.random.key(5), (16, WIDTH))
    fn = lambda t: reads(t[IDS], jnp.float32(1 / size)) @ WEIGHTS
    got, true = mp.autocast(fn, "mixed_float16")(table), fn(table)
    assert jnp.linalg.norm(got - true) <= 2e-3 * jnp.linalg.norm(true)


def test_a_rule_of_the_callers_own_on_the_way_is_no_way():
    rules = mp.default_rules().with_rule("mul", "opaque", "as written")
    fn = lambda t: (t[IDS] * jnp.float32(3)) @ WEIGHTS
    by_hand = (YEARS[IDS] * jnp.float32(3)).astype(jnp.bfloat16) @ WEIGHTS.astype(jnp.bfloat16)
    np.testing.assert_array_equal(mp.autocast(fn, "mixed_bfloat16", rules=rules)(YEARS), by_hand.astype(jnp.float32))
    # By the default rules the rows are rounded before they are multiplied.
    assert (mp.autocast(fn, "mixed_bfloat16")(YEARS) != by_hand.astype(jnp.float32)).any()


@pytest.mark.parametrize(
    "reads",
    [
        lambda rows, w: rows,
        lambda rows, w: (rows**2).sum(),
        lambda rows, w: (jnp.log(rows) @ w, jnp.exp(rows)),
        lambda rows, w: (rows @ w, rows.max()),
        lambda rows, w: jnp.sort(rows, axis=0) + jnp.float32(1),
    ],
    ids=["returned", "a loss", "exp", "returned in part", "nothing of matrix work"],
)
def test_other_lookups_keep_their_digits(reads):
    table = jnp.array([[1.001, 2.003], [3.007, 4.0001]])
    fn = lambda table: reads(table[jnp.array([1, 0])], jnp.eye(2))
    # What is read beside matrix work, or instead of it, has all its digits.
    got, true = (jax.tree.leaves(f(table))[-1] for f in (mp.autocast(fn, "mixed_bfloat16"), fn))
    np.testing.assert_array_equal(got, true)


def test_a_sum_that_is_returned_stays_float32():
    fn = lambda x, w: x @ w + jnp.sin(x)
    x, w = jnp.full((2, 2), 1.001), jnp.eye(2)
    low = mp.autocast(fn, "mixed_bfloat16")(x, w)
    product = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    np.testing.assert_array_equal(low, product.astype(jnp.float32) + jnp.sin(x))


@pytest.mark.parametrize(
    "rules",
    [
        mp.default_rules("matmul"),
        mp.default_rules().with_rule("gather", "full", "exact rows"),
        mp.default_rules().with_rule("add", "full", "exact sums"),
        mp.default_rules().with_path("stem", "full", "exact"),
    ],
    ids=["matmul alone", "gather full", "add full", "a region"],
)
def test_rules_of_the_callers_own_come_first(rules):
    def fn(params):
        with jax.named_scope("stem"):
            x = learned_positions(params)
        return (x @ params["layers"][0]).sum()

    found = sums(mp.autocast(fn, "mixed_bfloat16", rules=rules), PARAMS)
    assert found == [("float32", "float32")]
    assert sums(mp.autocast(fn, "mixed_bfloat16"), PARAMS) == [("bfloat16", "bfloat16")]
