"""Autocast: what 16 bits would overflow or add up wrongly, in float16 and in bfloat16.

The terms of a sum are low: products of matrix work, rounded once. Given those terms, every sum is compared with one
in float64, to within what float32 loses; in 16 bits all of them would be off by a percent or more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import mpjax as mp

LOW = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
by_policy = pytest.mark.parametrize("policy", LOW)

LONG = 100_000
STEPS = 4096


def uniform(*shape, low=0.0, high=1.0, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape), jnp.float32)


W = uniform(3, 2, seed=1)


def terms(x, w, dtype):
    """The activations of `x @ w` in the compute dtype."""
    return lax.dot(x.astype(dtype), w.astype(dtype))


def exact(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def exactly(fn):
    """Compiled with every rounding that the program asks for: XLA drops those inside a fusion by default."""
    return jax.jit(fn, compiler_options={"xla_allow_excess_precision": False})


def scan_sum(h):
    return lax.scan(lambda c, row: (c + row, None), jnp.zeros(h.shape[1:]), h)[0]


def scan_sum_with_a_count(h):
    def body(carry, row):
        return {"total": carry["total"] + row, "count": carry["count"] + 1.0}, None

    end, _ = lax.scan(body, {"total": jnp.zeros(h.shape[1:]), "count": jnp.zeros(())}, h)
    return end["total"] / end["count"]


def scan_difference(h):
    return lax.scan(lambda c, row: (c - row, None), jnp.zeros(h.shape[1:]), h)[0]


def while_sum(h):
    def body(state):
        i, c = state
        return i + 1, c + h[i]

    return lax.while_loop(lambda state: state[0] < len(h), body, (0, jnp.zeros(h.shape[1:])))[1]


def in_slots(h):
    """Running sums in one buffer, as a histogram or a paged cache keeps them."""

    def body(buffer, row):
        return lax.dynamic_update_slice(buffer, (buffer[:1] + row)[:1], (0, 0)), None

    return lax.scan(body, jnp.zeros((2, h.shape[1])), h)[0][0]


def average(h):
    return lax.scan(lambda c, row: (0.999 * c + 0.001 * row, None), jnp.zeros(h.shape[1:]), h)[0]


def average_reference(h):
    weighted, c = exact(h * jnp.asarray(0.001, h.dtype)), 0.0
    for row in weighted:
        c = np.float32(0.999) * c + row
    return c


def gates(h):
    return jax.nn.sigmoid(h[:, 0] + 3.0), h[:, 1]


def recurrence(h):
    return lax.scan(lambda c, ab: (ab[0] * c + ab[1], c), jnp.zeros(()), gates(h))[0]


def compose(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]


def associative_recurrence(h):
    return lax.associative_scan(compose, gates(h))[1][-1]


def recurrence_reference(h):
    c = 0.0
    for a, b in zip(*map(exact, gates(h)), strict=True):
        c = a * c + b
    return c


def segments(n):
    return np.arange(n) % 7


def segment_reference(h):
    out = np.zeros((7, h.shape[1]))
    np.add.at(out, segments(len(h)), exact(h))
    return out


def logsumexp_reference(h):
    h = exact(h)
    return np.log(np.exp(h - h.max(0)).sum(0)) + h.max(0)


# Name: the function of low activations, its float64 reference, how many rows it sums.
SUMS = {
    "sum": (lambda h: h.sum(0), lambda h: exact(h).sum(0), LONG),
    "mean": (lambda h: h.mean(0), lambda h: exact(h).mean(0), LONG),
    "var": (lambda h: h.var(0), lambda h: exact(h).var(0), LONG),
    "std of all": (lambda h: jnp.std(h), lambda h: exact(h).std(), LONG),
    "norm": (lambda h: jnp.linalg.norm(h, axis=0), lambda h: np.linalg.norm(exact(h), axis=0), LONG),
    "logsumexp": (lambda h: jax.nn.logsumexp(h, 0), logsumexp_reference, LONG),
    "cumsum": (lambda h: jnp.cumsum(h, 0)[999::1000], lambda h: exact(h).cumsum(0)[999::1000], LONG),
    "product": (lambda h: jnp.prod(h / 2.0 + 0.5, 0), lambda h: (exact(h) / 2 + 0.5).prod(0), 100),
    "segment sum": (lambda h: jax.ops.segment_sum(h, segments(len(h)), 7), segment_reference, LONG),
    "scatter add": (lambda h: jnp.zeros((7, 2)).at[segments(len(h))].add(h), segment_reference, LONG),
    "average pool": (
        lambda h: lax.reduce_window(h, 0.0, lax.add, (5000, 1), (5000, 1), "VALID"),
        lambda h: exact(h).reshape(-1, 5000, 2).sum(1),
        LONG,
    ),
    "scan sum": (scan_sum, lambda h: exact(h).sum(0), 10_000),
    "scan sum with a count": (scan_sum_with_a_count, lambda h: exact(h).mean(0), 10_000),
    "scan difference": (scan_difference, lambda h: -exact(h).sum(0), 10_000),
    "while sum": (while_sum, lambda h: exact(h).sum(0), 10_000),
    "running sum in a buffer": (in_slots, lambda h: exact(h).sum(0), 10_000),
    "average": (average, average_reference, STEPS),
    "recurrence": (recurrence, recurrence_reference, STEPS),
    "associative recurrence": (associative_recurrence, recurrence_reference, STEPS),
    "associative sum": (lambda h: lax.associative_scan(jnp.add, h)[-1], lambda h: exact(h).sum(0), STEPS),
}


@by_policy
@pytest.mark.parametrize("name", SUMS)
def test_sums(name, policy):
    fn, reference, rows = SUMS[name]
    # Between 0.5 and 1, where a difference of two terms is exact in their own dtype.
    x, w = uniform(rows, 3, low=0.55, high=0.95), jnp.asarray([[0.5, 0.0], [0.5, 0.5], [0.0, 0.5]])
    run = exactly if "associative" in name else (lambda f: f)  # hundreds of operations
    out = run(mp.autocast(lambda x, w: fn(x @ w), policy))(x, w)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference(terms(x, w, LOW[policy])), rtol=1e-4)


@by_policy
def test_online_softmax(policy):
    """A running maximum, normaliser and output over blocks of keys, as in flash attention."""
    low, blocks, size = LOW[policy], 500, 8
    q = jnp.ones((1, 4))
    # Whole-numbered scores, the largest in the first block: exact in both dtypes, as is their distance to it.
    scores = np.random.default_rng(2).integers(-4, 3, (blocks, size)).astype(np.float32)
    scores[0, 0] = 3.0
    k = jnp.asarray(scores)[..., None] * jnp.asarray([1.0, 0.0, 0.0, 0.0])
    v = uniform(blocks, size, 2, seed=3)

    def attention(q, k, v):
        def body(carry, block):
            biggest, total, out = carry
            keys, rows = block
            s = q @ keys.T
            new = jnp.maximum(biggest, s.max(-1))
            p, shrink = jnp.exp(s - new[:, None]), jnp.exp(biggest - new)
            return (new, shrink * total + p.sum(-1), shrink[:, None] * out + p @ rows), None

        start = jnp.full(1, -jnp.inf), jnp.zeros(1), jnp.zeros((1, 2))
        (_, total, out), _ = lax.scan(body, start, (k, v))
        return out / total[:, None]

    p = np.exp(scores - 3.0)
    products = [exact(terms(jnp.asarray(row[None]), rows, low)) for row, rows in zip(p, v, strict=True)]
    expected = sum(products) / p.astype(np.float64).sum()
    np.testing.assert_allclose(mp.autocast(attention, policy)(q, k, v), expected, rtol=1e-4)


@by_policy
class TestGradientsOverManyRows:
    """A gradient of a parameter is a sum over the batch: in float32, of cotangents in the compute dtype."""

    ROWS = 20_000
    X = uniform(ROWS, 3)
    T = uniform(ROWS, 2, low=0.1, high=1.0, seed=4)

    def test_bias(self, policy):
        grad = jax.grad(mp.autocast(lambda b: jnp.sum((self.X @ W + b) * self.T), policy))(jnp.zeros(2))
        np.testing.assert_allclose(grad, exact(self.T.astype(LOW[policy])).sum(0), rtol=1e-4)

    def test_weight(self, policy):
        """One product over all rows: accumulated in float32 by its kernel, rounded once."""
        grad = jax.grad(mp.autocast(lambda w: jnp.sum((self.X @ w) * self.T), policy))(W)
        low = LOW[policy]
        true = exact(self.X.astype(low)).T @ exact(self.T.astype(low))
        np.testing.assert_allclose(grad, true, rtol=2.0 * float(jnp.finfo(low).eps))

    def test_embedding(self, policy):
        low, ids = LOW[policy], segments(self.ROWS)
        loss = lambda table: jnp.sum((table[ids] @ W) * self.T)
        grad = jax.grad(mp.autocast(loss, policy))(uniform(7, 3, seed=5))
        expected = np.zeros((7, 3))
        np.add.at(expected, ids, exact(lax.dot_general(self.T.astype(low), W.astype(low), (((1,), (1,)), ((), ())))))
        np.testing.assert_allclose(grad, expected, rtol=1e-4)

    def test_scale_of_a_normalisation(self, policy):
        def loss(scale, x):
            h = x @ W
            h = (h - h.mean(0)) * lax.rsqrt(h.var(0) + 1e-6) * scale
            return jnp.sum(h * h)

        grad = jax.grad(mp.autocast(loss, policy))(jnp.ones(2), self.X)
        # Of n normalised rows: two for each of them.
        np.testing.assert_allclose(grad, [2.0 * self.ROWS] * 2, rtol=2e-3)

    def test_weight_of_a_scan(self, policy):
        """Its backward pass adds one product for each step."""
        low, steps = LOW[policy], 5000
        x, t = self.X[:steps], self.T[:steps]

        def loss(w):
            _, out = lax.scan(lambda c, row: (c, row[None] @ w), 0.0, x)
            return jnp.sum(out[:, 0] * t)

        grad = jax.grad(mp.autocast(loss, policy))(W)
        outer = lax.dot_general(x.astype(low)[:, :, None], t.astype(low)[:, None], (((2,), (1,)), ((0,), (0,))))
        np.testing.assert_allclose(grad, exact(outer).sum(0), rtol=1e-4)

    def test_bias_of_a_scan(self, policy):
        low, steps = LOW[policy], 5000
        x, t = self.X[:steps], self.T[:steps]

        def loss(b):
            _, out = lax.scan(lambda c, row: (c, row[None] @ W + b), 0.0, x)
            return jnp.sum(out[:, 0] * t)

        grad = jax.grad(mp.autocast(loss, policy))(jnp.zeros(2))
        np.testing.assert_allclose(grad, exact(t.astype(low)).sum(0), rtol=1e-4)

    def test_what_a_cumulative_sum_reads(self, policy):
        """Its cotangent is the reversed sum of the cotangents."""
        loss = lambda x: jnp.sum(jnp.cumsum((x @ jnp.eye(2))[:, 0]))
        grad = jax.grad(mp.autocast(loss, policy))(jnp.ones((1000, 2)))
        expected = np.arange(1000, 0, -1.0)
        np.testing.assert_allclose(grad[:, 0], exact(jnp.asarray(expected).astype(LOW[policy])), rtol=1e-6)


def low_first(fn):
    """`fn` of what comes out of a product with the identity: the values, as low activations."""
    return lambda x, *rest: fn(x @ jnp.eye(x.shape[-1]), *rest)


# How far a constant is from itself in the compute dtype.
ROUNDING = {"mixed_bfloat16": 2.0**-7, "mixed_float16": 2.0**-10}


def check(fn, policy, *args, rtol=0.0, atol=0.0):
    """Value and gradients are finite, and close to float32's."""
    cast, plain = mp.autocast(low_first(fn), policy), low_first(fn)
    np.testing.assert_allclose(cast(*args), plain(*args), rtol=rtol, atol=atol)
    got, true = (jax.grad(lambda *a, f=f: jnp.sum(f(*a)))(*args) for f in (cast, plain))
    assert np.isfinite(true).all()
    np.testing.assert_allclose(got, true, rtol=rtol, atol=atol)


def attention(x, mask):
    return jax.nn.softmax(x @ x.T + mask) @ x


X = uniform(6, 6, low=-1.0, high=1.0, seed=6)


@by_policy
class TestMasks:
    BIGGEST = float(np.finfo(np.float32).max)

    @pytest.mark.parametrize("number", [-1e9, -1e30, -BIGGEST, -np.inf], ids=["1e9", "1e30", "finfo.min", "inf"])
    @pytest.mark.parametrize("how", ["added", "selected", "argument"])
    def test_causal(self, number, how, policy):
        tri = np.tri(6, dtype=bool)
        if how == "selected":
            check(lambda x: jax.nn.softmax(jnp.where(tri, x @ x.T, number)) @ x, policy, X, atol=0.05)
        elif how == "added":
            check(lambda x: attention(x, jnp.where(tri, 0.0, number)), policy, X, atol=0.05)
        else:
            check(attention, policy, X, jnp.where(tri, 0.0, number), atol=0.05)

    @pytest.mark.parametrize("number", [-1e9, -BIGGEST], ids=["1e9", "finfo.min"])
    def test_a_row_that_is_masked_entirely(self, number, policy):
        rows = (np.arange(6) != 2)[:, None] & np.tri(6, dtype=bool)
        check(lambda x: jax.nn.softmax(jnp.where(rows, x @ x.T, number)) @ x, policy, X, atol=0.05)
        mask = jnp.where(rows, 0.0, number)
        cast = mp.autocast(attention, policy)
        assert np.isfinite(cast(X, mask)).all()
        assert np.isfinite(jax.grad(lambda x: cast(x, mask).sum())(X)).all()

    def test_an_overflow_before_the_softmax_is_seen(self, policy):
        """And is no large number, which would give shares that are finite and wrong."""
        cast = mp.autocast(lambda x: jax.nn.softmax(x @ x.T / 8), policy)
        large = jnp.full_like(X, 1e3 if policy == "mixed_float16" else 1e38)
        assert np.isfinite(cast(X)).all()
        assert np.isnan(cast(large)).all()
        assert np.isnan(jax.grad(lambda x: cast(x)[0, 0])(large)).any()

    def test_a_sum_of_two_masks(self, policy):
        """Causal and padding: -2e9."""
        mask = jnp.where(np.tri(6, dtype=bool), 0.0, -1e9) + jnp.where(np.arange(6) < 4, 0.0, -1e9)
        check(attention, policy, X, mask, atol=0.05)

    def test_in_the_loss(self, policy):
        """A masked class in a cross-entropy."""

        def loss(x):
            logits = jnp.where(np.arange(6) < 4, x, -1e9)
            return -jax.nn.log_softmax(logits)[:, :4].mean()

        check(loss, policy, X, rtol=0.02, atol=1e-3)


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)


EPSILONS = pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6], ids=str)


@by_policy
class TestEpsilons:
    ZERO = jnp.zeros((2, 4))

    @EPSILONS
    def test_layer_norm_of_a_constant_row(self, eps, policy):
        constant = jnp.asarray([[300.0] * 4, [0.0] * 4])
        cast = mp.autocast(low_first(lambda x: layer_norm(x, eps)), policy)
        assert np.array_equal(cast(constant), np.zeros((2, 4)))
        assert np.isfinite(jax.grad(lambda x: cast(x).sum())(constant)).all()

    @EPSILONS
    def test_square_root_of_a_square(self, eps, policy):
        check(lambda x: jnp.sqrt(x**2 + eps), policy, self.ZERO, rtol=ROUNDING[policy])

    @EPSILONS
    def test_logarithm(self, eps, policy):
        cast = mp.autocast(low_first(lambda x: jnp.log(x + eps)), policy)
        np.testing.assert_allclose(cast(self.ZERO), np.log(eps), rtol=ROUNDING[policy])
        entropy = mp.autocast(low_first(lambda x: -jnp.sum(x * jnp.log(x + eps))), policy)
        assert np.isfinite(jax.grad(entropy)(self.ZERO)).all()

    @EPSILONS
    def test_division(self, eps, policy):
        norm = lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + eps)
        assert np.array_equal(mp.autocast(low_first(norm), policy)(self.ZERO), self.ZERO)
        for size in (lambda x: jnp.abs(x).sum(-1, keepdims=True), lambda x: jnp.abs(x).max(-1, keepdims=True)):
            check(lambda x, size=size: x / (size(x) + eps) * eps, policy, self.ZERO, rtol=ROUNDING[policy])

    @EPSILONS
    def test_a_floor(self, eps, policy):
        check(lambda x: x / jnp.maximum(x.max(-1, keepdims=True), eps) * eps, policy, self.ZERO - 1.0, rtol=0.01)

    @EPSILONS
    def test_clipped_probabilities(self, eps, policy):
        cast = mp.autocast(low_first(lambda x: jnp.log(jnp.clip(x, eps, 1.0))), policy)
        np.testing.assert_allclose(cast(self.ZERO), np.log(eps), rtol=ROUNDING[policy])


@by_policy
class TestSquares:
    """300 squared is 90,000: more than float16 holds."""

    BIG = jnp.full((4, 8), 300.0)

    @pytest.mark.parametrize(
        ("fn", "expected"),
        [
            (lambda x: jnp.mean(x**2), 90_000.0),
            (lambda x: jnp.mean(x * x), 90_000.0),
            (lambda x: jnp.mean(jnp.square(x)), 90_000.0),
            (lambda x: jnp.sum(x**2), 32 * 90_000.0),
            (lambda x: jnp.sqrt(jnp.mean(x**2)), 300.0),
            (lambda x: jnp.linalg.norm(x[0, :4]), 600.0),
            (lambda x: jnp.mean(jnp.abs(x) ** 3) / 1e6, 27.0),
            (lambda x: jnp.var(x * jnp.asarray([1.0, -1.0] * 4)), 90_000.0),
            (lambda x: jnp.sum(x, dtype=jnp.float32), 9_600.0),
            (lambda x: jnp.sum(x[0]) * 100.0, 240_000.0),
            (lambda x: jnp.mean(jnp.sum(x, -1) ** 2), 2400.0**2),
        ],
        ids=["square", "product", "jnp.square", "sum", "rms", "norm", "cube", "var", "dtype", "times 100", "of sums"],
    )
    def test_reduced(self, fn, expected, policy):
        cast = mp.autocast(low_first(fn), policy)
        assert float(cast(self.BIG)) == pytest.approx(expected, rel=1e-6)
        true = jax.grad(low_first(fn))(self.BIG)
        got = jax.grad(cast)(self.BIG)
        np.testing.assert_allclose(got, true, rtol=0.01, atol=0.01 * float(jnp.abs(true).max()) + 1e-3)

    @pytest.mark.parametrize(
        "fn",
        [
            lambda x: jnp.sum(x**2 / x.size),
            lambda x: jnp.sum(jnp.ones(x.shape) * x**2) / x.size,
            lambda x: jnp.sum(jnp.where(np.ones(x.shape, bool), x**2, 0.0)) / x.size,
            lambda x: jnp.mean((x**2).reshape(-1)),
        ],
        ids=["divided", "weighted", "masked", "reshaped"],
    )
    def test_with_another_operation_before_the_sum(self, fn, policy):
        assert float(mp.autocast(low_first(fn), policy)(self.BIG)) == pytest.approx(90_000.0, rel=0.01)

    def test_a_squared_error(self, policy):
        fn = lambda x: jnp.mean((x - jnp.full(x.shape, -300.0)) ** 2)
        assert float(mp.autocast(low_first(fn), policy)(self.BIG)) == pytest.approx(360_000.0, rel=1e-6)

    def test_a_large_softmax(self, policy):
        logits = jnp.asarray([[6e4, -6e4, 0.0, 0.0]])
        check(jax.nn.softmax, policy, logits, atol=1e-6)
        cast = mp.autocast(low_first(jax.nn.log_softmax), policy)
        assert np.isfinite(cast(logits)).all()


@pytest.mark.standard_promotion
@by_policy
def test_a_cross_entropy_is_not_below_zero(policy):
    """XLA may drop a cast to 16 bits where exponentials are summed, and not where the label's logit is picked."""
    x, w = 9 * uniform(256, 64, low=-0.5, high=0.5), uniform(64, 10, low=-1.7, high=1.7, seed=1)
    labels = jnp.argmax(x @ w, axis=1)

    def losses(w):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels)

    found = jax.jit(mp.autocast(losses, policy))(w)
    logits = exact(terms(x, w, LOW[policy]))
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(256), labels]
    assert found.min() >= 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
