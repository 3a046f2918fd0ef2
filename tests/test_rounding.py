"""Rounding to nearest and stochastic rounding: every value of the dtypes, their midpoints, and the statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import bits
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax.transforms._rounding import nearest, stochastic

DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
KEY = jax.random.key(0)


def uint(dtype):
    return np.uint16 if jnp.dtype(dtype).itemsize == 2 else np.uint8


def codes(x):
    return np.asarray(x).view(uint(x.dtype))


def grid(dtype):
    """All finite values of a dtype in float32, sorted; a single zero."""
    every = np.arange(np.iinfo(uint(dtype)).max + 1).astype(uint(dtype)).view(dtype).astype(np.float32)
    return np.unique(every[np.isfinite(every)])


def points(dtype):
    """All values, the midpoints between them, and float32's neighbours of both; past both ends too; inf and NaN."""
    values = grid(dtype).astype(np.float64)
    middle = (values[1:] + values[:-1]) / 2
    past = values[-1] + (values[-1] - values[-2]) * np.array([0.25, 0.5, 1, 10])
    with np.errstate(over="ignore", under="ignore"):
        others = [3e38, -3e38, 1e-45, -1e-45, 1e-38, -0.0]
        x = np.concatenate([values, middle, past, -past, others]).astype(np.float32)
        near = [np.nextafter(x, np.float32(side)) for side in (np.inf, -np.inf)]
    return np.concatenate([x, *near, np.float32([np.inf, -np.inf, np.nan])])


def expected(x, dtype):
    with np.errstate(all="ignore"):
        return x.astype(dtype)


class TestNearest:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_value_and_every_tie(self, dtype):
        x = points(dtype)
        want = codes(expected(x, dtype))
        for got in (nearest(x, dtype), jax.jit(nearest, static_argnums=1)(x, dtype), jnp.asarray(x).astype(dtype)):
            assert got.dtype == dtype
            np.testing.assert_array_equal(codes(got), want)

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(x=st.floats(width=32))
    def test_is_a_cast(self, dtype, x):
        got, want = nearest(np.float32(x), dtype), expected(np.float32([x]), dtype)[0]
        assert codes(got) == codes(want) or (np.isnan(np.float32(got)) and np.isnan(np.float32(want)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_keeps_its_sign_in_one_form(self, dtype):
        payloads = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7FA12345], np.uint32)
        x = np.concatenate([payloads, payloads | np.uint32(1 << 31)]).view(np.float32)
        nan = np.array([np.nan, -np.nan], dtype).repeat(4)
        np.testing.assert_array_equal(codes(nearest(x, dtype)), codes(nan))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_xla_cannot_leave_it_out(self, dtype):
        """`x.astype(dtype)` that is widened again may be: the program must see the rounded value."""
        x = points(dtype)
        want = expected(x, dtype).astype(np.float32)
        widened = jax.jit(lambda x: nearest(x, dtype).astype(jnp.float32))(x)
        np.testing.assert_array_equal(widened, want)
        error = jax.jit(lambda x: x - nearest(x, dtype).astype(jnp.float32))(jnp.float32([1 / 3]))
        assert error[0] == np.float32(1 / 3) - expected(np.float32([1 / 3]), dtype).astype(np.float32)[0] != 0

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_saturates_when_asked(self, dtype):
        x = points(dtype)
        largest = grid(dtype)[-1]
        want = expected(np.where(np.isinf(x), x, np.clip(x, -largest, largest)), dtype)
        np.testing.assert_array_equal(codes(nearest(x, dtype, saturate=True)), codes(want))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_under_vmap(self, dtype):
        x = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
        assert bits(jax.vmap(lambda x: nearest(x, dtype))(x)) == bits(nearest(x, dtype))


def neighbours(x, dtype):
    """The values of a dtype around x, and the probability of the upper one."""
    values = grid(dtype).astype(np.float64)
    x = np.clip(x.astype(np.float64), values[0], values[-1])
    upper = np.searchsorted(values, x)
    lower = np.maximum(np.where(values[upper] == x, upper, upper - 1), 0)
    width = np.where(lower == upper, 1.0, values[upper] - values[lower])
    return values[lower], values[upper], (x - values[lower]) / width


class TestStochastic:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_a_neighbour_or_the_value_itself(self, dtype):
        x = points(dtype)
        finite = np.isfinite(x)
        lower, upper, _ = neighbours(x[finite], dtype)
        for seed in range(2):
            got = jax.jit(stochastic, static_argnums=1)(x, dtype, jax.random.key(seed))
            value = np.asarray(got).astype(np.float64)
            assert got.dtype == dtype
            assert ((value[finite] == lower) | (value[finite] == upper)).all()
            np.testing.assert_array_equal(np.signbit(value[finite]), np.signbit(x[finite]))
            np.testing.assert_array_equal(codes(got)[~finite], codes(expected(x[~finite], dtype)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_all_values_of_the_dtype_stay(self, dtype):
        every = np.arange(np.iinfo(uint(dtype)).max + 1).astype(uint(dtype)).view(dtype)
        every = every[~np.isnan(every.astype(np.float32))]
        assert bits(stochastic(every.astype(np.float32), dtype, KEY)) == bits(every)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("draw", ["smallest", "largest"])
    def test_the_ends_of_the_draw(self, dtype, draw, monkeypatch):
        """With the smallest, all that is no value of the dtype goes away from zero, and a value does not."""
        draw_of = lambda kind: 0 if draw == "smallest" else np.iinfo(kind).max
        monkeypatch.setattr(jax.random, "bits", lambda key, shape, kind: jnp.full(shape, draw_of(kind), kind))
        values = grid(dtype)
        normal = float(jnp.finfo(dtype).smallest_normal)
        between = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
        between = between[np.abs(between) > normal]
        x = np.concatenate([values, between])
        lower, upper, chance = neighbours(x, dtype)
        away = np.where(x > 0, upper, lower) if draw == "smallest" else np.where(x > 0, lower, upper)
        got = np.asarray(stochastic(x, dtype, KEY)).astype(np.float64)
        np.testing.assert_array_equal(got, np.where(chance == 0, x, away))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_is_unbiased_over_all_random_bits(self, dtype, monkeypatch):
        """The mean over the 65536 draws that there are is the number itself, exactly."""
        asked = []

        def every(key, shape, kind):
            asked.append(kind)
            return jnp.arange(65536, dtype=kind)

        monkeypatch.setattr(jax.random, "bits", every)
        smallest = grid(dtype)[grid(dtype) > 0][0].astype(np.float64)
        exact_from = 2.0**-17 if dtype == "float16" else 0
        rng = np.random.default_rng(0)
        scales = 2.0 ** rng.integers(-40, 15, 60)
        for x in np.concatenate([rng.normal(size=60) * scales, [0, 2.0**-20, 2.0**-17 * 1.25]]).astype(np.float32):
            got = np.asarray(stochastic(np.full(65536, x), dtype, KEY)).astype(np.float64)
            bias = got.mean() - np.float64(x)
            assert bias == 0 if abs(x) >= exact_from else abs(bias) <= smallest * 2.0**-17
        assert set(asked) == {jnp.uint16}

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    def test_fp8_over_evenly_spaced_bits(self, dtype, monkeypatch):
        def even(key, shape, kind):
            assert kind == jnp.uint32
            return (jnp.arange(65536, dtype=kind) << 16) | 0x8000

        monkeypatch.setattr(jax.random, "bits", even)
        rng = np.random.default_rng(0)
        for x in (rng.normal(size=50) * 2.0 ** rng.integers(-20, 8, 50)).astype(np.float32):
            got = np.asarray(stochastic(np.full(65536, x), dtype, KEY)).astype(np.float64)
            lower, upper, _ = neighbours(x[None], dtype)
            assert abs(got.mean() - np.float64(x)) <= (upper - lower)[0] / 65536

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_statistics(self, dtype):
        """Scenario 30: 32 values, 100000 draws each; the means, and the frequencies of the upper neighbour."""
        draws = 100_000
        x = np.random.default_rng(1).uniform(size=32).astype(np.float32)
        got = jax.jit(lambda x: stochastic(jnp.broadcast_to(x[:, None], (32, draws)), dtype, KEY))(x)
        value = np.asarray(got.astype(jnp.float32)).astype(np.float64)
        lower, upper, chance = neighbours(x, dtype)
        deviation = (upper - lower) * np.sqrt(chance * (1 - chance) / draws)
        # torchao's tolerance for bfloat16, which is about seven deviations; coarser dtypes need more draws for it.
        tolerance = 3e-5 + 3e-5 * x if jnp.dtype(dtype).itemsize == 2 else 4 * deviation
        assert (np.abs(value.mean(1) - x) <= tolerance).all()
        ups = (value == upper[:, None]).sum(1)
        chi_square = ((ups - draws * chance) ** 2 / (draws * chance * (1 - chance))).sum()
        assert 1e-3 < scipy.stats.chi2.sf(chi_square, 32) < 1 - 1e-3

    def test_numbers_beside_each_other_are_uncorrelated(self):
        n = 200_000
        up = np.asarray(stochastic(jnp.full(n, 1 + 2.0**-8), "bfloat16", KEY).astype(jnp.float32)) > 1
        for lag in (1, 2, 128, 1024, n // 2, n // 8):
            assert abs(np.corrcoef(up, np.roll(up, lag))[0, 1]) < 4 / np.sqrt(n)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_a_function_of_the_key(self, dtype):
        x = jnp.linspace(-1, 1, 999)
        same, other = stochastic(x, dtype, KEY), stochastic(x, dtype, jax.random.key(1))
        assert bits(same) == bits(jax.jit(stochastic, static_argnums=1)(x, dtype, KEY)) != bits(other)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_xla_cannot_leave_it_out(self, dtype):
        x = jnp.linspace(-1, 1, 999)
        widened = jax.jit(lambda x: stochastic(x, dtype, KEY).astype(jnp.float32))(x)
        assert bits(widened) == bits(stochastic(x, dtype, KEY).astype(jnp.float32))

    def test_under_vmap(self):
        x, keys = jnp.linspace(-1, 1, 40).reshape(4, 10), jax.random.split(KEY, 4)
        got = jax.vmap(lambda x, key: stochastic(x, "bfloat16", key))(x, keys)
        assert bits(got) == bits(jnp.stack([stochastic(x[i], "bfloat16", keys[i]) for i in range(4)]))

    @pytest.mark.parametrize("spec", [P("d"), P(None, "d")])
    def test_shards_of_one_array_draw_their_own_bits(self, spec):
        """Those of the whole array: no communication, and the same result however it is sharded."""
        mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = NamedSharding(mesh, spec)
        x = jnp.full((64, 64), 1 + 2.0**-8)
        rounded = jax.jit(lambda x: stochastic(x, "bfloat16", KEY), in_shardings=sharding, out_shardings=sharding)
        got = rounded(x)
        assert bits(got) == bits(stochastic(x, "bfloat16", KEY))
        shards = np.stack([np.asarray(s.data.astype(jnp.float32)).ravel() for s in got.addressable_shards])
        correlation = np.corrcoef(shards > 1) - np.eye(8)
        assert np.abs(correlation).max() < 4 / np.sqrt(64 * 8)
        text = rounded.lower(x).compile().as_text()
        assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
