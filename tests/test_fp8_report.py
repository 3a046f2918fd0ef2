"""`mpjax.diagnostics.fp8_report`: its numbers against NumPy's, in loops, with a state, and as text."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import rich.console

import mpjax as mp

RULES = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True))
W = jax.random.normal(jax.random.key(0), (16, 16))
X = jnp.exp(4 * jax.random.normal(jax.random.key(1), (32, 16)))


def product(x, w):
    return x @ w


FN = mp.autocast(product, "mixed_float8", RULES)
GRAD = jax.grad(mp.autocast(lambda w, x: jnp.mean(jnp.square(x @ w)), "mixed_float8", RULES))


def expected(x, dtype, scale):
    """Signal to noise in dB and the share that becomes 0, by NumPy."""
    x = np.asarray(x, np.float64)
    wide = (x / scale).astype(dtype).astype(np.float64) * scale
    sqnr = 10 * np.log10(np.sum(x**2) / np.sum((wide - x) ** 2))
    return sqnr, np.mean(wide[x != 0] == 0)


def scale_of(x, largest):
    return 2.0 ** np.ceil(np.log2(np.abs(np.asarray(x, np.float64)).max(keepdims=True) / largest))


def test_numbers_are_those_of_numpy():
    site = mp.diagnostics.fp8_report(FN)(X, W).sites[0]
    assert (site.name, site.dtype, site.scales) == ("main:0/lhs", "float8_e4m3fn", ())
    assert site.amax == float(X.max())
    scale = scale_of(X, 448)
    assert site.scale == scale.item()
    sqnr, underflow = expected(X, ml_dtypes.float8_e4m3fn, scale)
    assert site.loss.sqnr == pytest.approx(sqnr, abs=1e-3)
    assert site.loss.underflow == pytest.approx(underflow) != 0
    assert site.loss.saturated == 0


def test_what_other_ways_would_lose():
    what_if = mp.diagnostics.fp8_report(FN)(X, W).sites[0].what_if
    assert len(what_if) == 10
    assert what_if["e4m3 tensor"].sqnr == pytest.approx(
        expected(X, ml_dtypes.float8_e4m3fn, scale_of(X, 448))[0], abs=1e-3
    )
    scale = scale_of(X, 57344)
    assert what_if["e5m2 tensor"].sqnr == pytest.approx(expected(X, ml_dtypes.float8_e5m2, scale)[0], abs=1e-3)
    rows = 2.0 ** np.ceil(np.log2(np.asarray(X, np.float64).max(axis=1, keepdims=True) / 448))
    assert what_if["e4m3 row"].sqnr == pytest.approx(expected(X, ml_dtypes.float8_e4m3fn, rows)[0], abs=1e-3)
    # 16 numbers in a row: a block of MX, or of 128, is a row.
    assert what_if["e4m3 mx 1x32"] == what_if["e4m3 1x128"] == what_if["e4m3 row"]
    assert what_if["e4m3 row"].underflow < what_if["e4m3 tensor"].underflow


def test_a_state_gives_the_scales():
    state = mp.fp8.init(FN, steps=4)(X, W)
    _, state = mp.fp8.delayed(FN)(state, jnp.ones((32, 16)), W)
    _, state = mp.fp8.delayed(FN)(state, jnp.full((32, 16), 2.0), W)
    site = mp.diagnostics.fp8_report(FN, state)(jnp.where(X > 1, 1000.0, 1.0), W).sites[0]
    assert site.scales == (2.0**-7, 2.0**-8)
    assert site.scale == 2.0**-7
    assert site.loss.saturated == pytest.approx(float(jnp.mean(X > 1)))
    assert site.what_if["e4m3 tensor"].saturated == 0


def test_of_uses_and_iterations_the_worst():
    def fn(xs, w):
        return jax.lax.scan(lambda carry, x: (carry, x @ w), 0, xs)[1]

    xs = jnp.stack([jnp.ones((32, 16)), X, jnp.ones((32, 16))])
    site = mp.diagnostics.fp8_report(mp.autocast(fn, "mixed_float8", RULES))(xs, W).sites[0]
    alone = mp.diagnostics.fp8_report(FN)(X, W).sites[0]
    assert site.loss == alone.loss
    assert site.amax == alone.amax


def test_nothing_lost_and_nothing_finite():
    report = mp.diagnostics.fp8_report(FN)(jnp.ones((32, 16)).at[0, 0].set(jnp.inf), jnp.zeros((16, 16)))
    assert [site.loss.sqnr for site in report.sites] == [np.inf, np.inf]
    assert report.sites[0].amax == np.inf
    assert json.loads(report.to_json())["sites"][0]["amax"] == "inf"


@functools.cache
def of_gradients():
    return mp.diagnostics.fp8_report(GRAD)(W, X)


def test_gradients_and_channels():
    report = of_gradients()
    assert [site.name for site in report.sites] == ["main:0/lhs", "main:0/rhs", "main:0/gradient"]
    assert report.sites[2].dtype == "float8_e5m2"
    rules = RULES.with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True, scaling="channel"))
    by_row = mp.diagnostics.fp8_report(mp.autocast(product, "mixed_float8", rules))(X, W).sites[0]
    assert by_row.loss.sqnr == pytest.approx(by_row.what_if["e4m3 row"].sqnr)


def test_reads_as_text_and_as_a_table():
    report = of_gradients()
    assert "main:0/gradient  float8_e5m2" in str(report)
    assert "e4m3 tensor: " in str(report).splitlines()[-1], "of the gradient, the format with more digits is better"
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(report)
    assert "SQNR (dB)" in console.file.getvalue()


def test_bad_input():
    with pytest.raises(ValueError, match="the function brings nothing into 8 bits"):
        mp.diagnostics.fp8_report(product)(X, W)
    with pytest.raises(ValueError, match="fp8_report was called under jit"):
        jax.jit(lambda x: mp.diagnostics.fp8_report(FN)(x, W))(X)
    state = mp.fp8.init(GRAD)(W, X)
    with pytest.raises(ValueError, match="the state is of other places"):
        mp.diagnostics.fp8_report(FN, state)(X, W)
