"""The block-wise format against a NumPy reference that looks every number up in the list of those its dtype has."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp
from mpjax.transforms._blockwise import encode, encode_like, saves

DTYPES = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float16"]
encoded = jax.jit(encode, static_argnums=(1, 2))


@functools.cache
def numbers(dtype):
    """All finite numbers of a dtype from 0 up."""
    dtype = jnp.dtype(dtype)
    codes = np.arange(2 ** (8 * dtype.itemsize - 1)).astype(f"uint{8 * dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        found = codes.view(dtype).astype(np.float64)
    return found[np.isfinite(found)]


def lookup(wanted, dtype):
    """The nearest number, and of two the one with an even code."""
    grid = numbers(dtype)
    above = np.clip(np.searchsorted(grid, wanted), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    upper = (wanted - low > high - wanted) | ((wanted - low == high - wanted) & (above % 2 == 0))
    return np.where(upper, high, low)


def reference(x, dtype, block_size):
    """Encodes and decodes in float64, block by block."""
    grid = numbers(dtype)
    digits = 2.0 ** -jnp.finfo(dtype).nmant
    top = 2.0 ** (math.floor(math.log2(grid[-1])) - 1)
    out = np.array(x, np.float64)
    for row in out.reshape(-1, out.shape[-1]):
        for start in range(0, len(row), block_size or len(row)):
            block = row[start : start + (block_size or len(row))]
            is_root = block.min() >= 0
            size = np.abs(block)
            if is_root:
                size = np.sqrt(size.astype(np.float32)).astype(np.float64)  # or a tie may fall the other way
            power = 2.0 ** math.ceil(math.log2(max(size.max() / (2 - digits), 1e-300)))
            unit = max(power, top * 2.0 ** (-63 if is_root else -126)) / top
            stored = lookup(size / unit, dtype)
            if is_root:
                stored = np.where(block > 0, np.maximum(stored, grid[1]), stored)
            block[:] = (stored * unit) ** 2 if is_root else np.sign(block) * stored * unit
    return out


def arrays(seed=0, shape=(5, 300)):
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=shape)
    wide = normal * 10.0 ** rng.uniform(-12, 3, shape)
    return {
        name: x.astype(np.float32)
        for name, x in {
            "normal": normal,
            "squares": normal**2,
            "wide": wide,
            "wide squares": np.abs(wide),
            "one sign": np.abs(normal) * np.where(np.arange(shape[-1]) < 256, 1, -1),
            "small": normal * 1e-36,
            "large squares": normal**2 * 1e36,
            "zeros": normal * 0,
            "sparse": normal * (rng.uniform(size=shape) < 0.01),
        }.items()
    }


class TestFormat:
    @pytest.mark.parametrize("block_size", [None, 32])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nearest_is_the_references(self, dtype, block_size):
        for name, x in arrays().items():
            got = encoded(x, jnp.dtype(dtype), block_size, None)
            np.testing.assert_allclose(
                got.decode(), reference(x, dtype, block_size), rtol=1e-6, atol=2e-38, err_msg=name
            )

    @pytest.mark.parametrize(
        ("n", "block_size"), [(1, 1), (7, None), (5, 4), (8, 4), (9, 4), (63, 64), (65, 64), (1000, 256)]
    )
    def test_odd_sizes(self, n, block_size):
        x = arrays(n, (3, n))["normal"]
        stored = encoded(x, jnp.dtype("float8_e4m3fn"), block_size, None)
        assert stored.values.shape == x.shape
        assert stored.scales.shape == (3, math.ceil(n / (block_size or n)))
        np.testing.assert_allclose(stored.decode(), reference(x, "float8_e4m3fn", block_size), rtol=1e-6)
        # Blocks are told from the shapes alone.
        again = encode_like(stored.decode(), stored, None)
        np.testing.assert_array_equal(again.decode(), stored.decode())
        assert again.scales.shape == stored.scales.shape

    @pytest.mark.parametrize("shape", [(7,), (2, 3, 40)])
    def test_any_rank(self, shape):
        x = arrays(0, shape)["normal"]
        got = encoded(x, jnp.dtype("float8_e4m3fn"), 16, None)
        assert got.scales.shape == (*shape[:-1], math.ceil(shape[-1] / 16))
        np.testing.assert_allclose(got.decode(), reference(x, "float8_e4m3fn", 16), rtol=1e-6)

    def test_scales_are_powers_of_two(self):
        for x in arrays().values():
            scales = np.asarray(encoded(x, jnp.dtype("float8_e4m3fn"), 64, None).scales)
            assert (np.frexp(scales)[0] % 0.5 == 0).all()
            assert scales.dtype == np.float32

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("key", [None, 1])
    def test_what_was_decoded_stays(self, dtype, key):
        """Or a moment would wander though nothing changes it."""
        key = None if key is None else jax.random.key(key)
        for name, x in arrays(3).items():
            for block_size in (None, 256):
                once = encoded(x, jnp.dtype(dtype), block_size, key).decode()
                twice = encoded(once, jnp.dtype(dtype), block_size, jax.random.key(2)).decode()
                np.testing.assert_array_equal(twice, once, err_msg=name)

    def test_float16_scalars_and_rows_of_one_are_not_worth_it(self):
        eight, half = jnp.dtype("float8_e4m3fn"), jnp.dtype("float16")
        shapes = ((), (9, 1), (9, 2), (9, 3), (0,))
        smaller = [saves(jnp.zeros(shape), d, 256) for d in (eight, half) for shape in shapes]
        assert smaller == [saves(jnp.zeros(shape), d, None) for d in (eight, half) for shape in shapes]
        assert smaller == [False, False, True, True, False, False, False, False, True, False]


class TestRange:
    @pytest.mark.parametrize("key", [None, 0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_second_moment_is_never_0(self, dtype, key):
        """m / (sqrt(0) + eps) would explode; its root is kept down to 2e-5 of the block's largest or less."""
        key = None if key is None else jax.random.key(key)
        nu = jnp.array([1e-3, 0.0, 2e-38, 1e-30, 1e-20, 1e-11, 1e-8])
        stored = encoded(nu, jnp.dtype(dtype), 256, key).decode()
        assert (stored == 0).tolist() == [False, True] + [False] * 5
        smallest = float(jnp.sqrt(stored[2] / stored[0]))
        assert 1e-12 < smallest < 2e-5
        if dtype == "float16":
            np.testing.assert_allclose(stored[4:], nu[4:], rtol=0.5)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_first_moments_may_underflow(self, dtype):
        mu = jnp.array([1.0, -1e-30, 1e-30])
        assert encoded(mu, jnp.dtype(dtype), 256, None).decode()[1:].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("key", [None, 0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nothing_finite_becomes_non_finite(self, dtype, key):
        key = None if key is None else jax.random.key(key)
        largest = np.finfo(np.float32).max
        for values in ([largest, 1.0], [-largest, largest], [largest * 0.999, -1e-38], [1e-38, 0.0], [1e-45, -1e-45]):
            stored = encoded(jnp.array(values, jnp.float32), jnp.dtype(dtype), 256, key).decode()
            assert np.isfinite(stored).all()
            np.testing.assert_allclose(stored[0], values[0], rtol=0.3, atol=1e-37)

    @pytest.mark.parametrize("key", [None, 0])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    def test_what_is_not_finite_stays_so_and_alone(self, bad, dtype, key):
        key = None if key is None else jax.random.key(key)
        x = np.abs(arrays()["normal"])
        clean = encoded(x, jnp.dtype(dtype), 256, key).decode()
        x[:, 3] = 0
        x[1, 3] = bad
        stored = np.asarray(encoded(x, jnp.dtype(dtype), 256, key).decode())
        assert not np.isfinite(stored[1, 3])
        if dtype in ("float16", "float8_e5m2"):
            np.testing.assert_array_equal(stored[1, 3], np.abs(bad))
        stored, clean = (np.delete(y, 3, axis=1) for y in (stored, clean))
        np.testing.assert_array_equal(stored, clean)


class TestStochastic:
    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    @pytest.mark.parametrize("name", ["normal", "squares"])
    def test_neighbours_and_expected_value(self, name, dtype):
        """In what is stored, the square of a root too: its own expected value would be too large by its variance."""
        x = arrays(5, (64,))[name]
        draws = 4000
        stored = jax.jit(lambda key: encode(jnp.broadcast_to(x, (draws, 64)), jnp.dtype(dtype), 64, key).decode())
        drawn = np.asarray(stored(jax.random.key(3)), np.float64)
        error = np.abs(drawn.mean(0) - x)
        assert (error <= 4.5 * drawn.std(0) / np.sqrt(draws) + 1e-9).all()
        unit = np.abs(np.asarray(encoded(x, jnp.dtype(dtype), 64, None).scales)[0])
        for column, value in zip(drawn.T, x, strict=True):
            grid = numbers(dtype)
            possible = (grid**2 if name == "squares" else grid) * unit
            low, high = possible[possible <= abs(value)].max(), possible[possible >= abs(value)].min()
            assert set(np.unique(np.abs(column))) <= {low, high}

    def test_bits_are_the_keys(self):
        x = arrays()["normal"]
        first, again, other = (
            np.asarray(encoded(x, jnp.dtype("float8_e4m3fn"), 256, jax.random.key(k)).decode()) for k in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert 0.2 < (first != other).mean() < 0.6


class TestSharded:
    @pytest.mark.parametrize(
        ("spec", "n", "local"), [(("d", None), 96, True), ((None, "d"), 512, True), ((None, "d"), 96, False)]
    )
    def test_values_are_those_of_one_device(self, spec, n, local):
        """Blocks that lie within a shard need no communication."""
        mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        x = arrays(1, (16, n))["normal"]
        placed = jax.device_put(x, NamedSharding(mesh, P(*spec)))
        fn = jax.jit(lambda x: encode(x, jnp.dtype("float8_e4m3fn"), 64, jax.random.key(0)))
        got, expected = fn(placed), fn(x)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert got.values.sharding.is_equivalent_to(placed.sharding, 2)
        collectives = re.findall(r"(all-[a-z]+|collective-[a-z]+)\(", fn.lower(placed).compile().as_text())
        assert bool(collectives) != local


def test_decode_of_the_public_class():
    values = jnp.array([[0.5, -1.0, 2.0]], jnp.float8_e5m2)
    stored = mp.transforms.BlockScaled(values, jnp.array([[2.0**-4, -4.0]]))
    assert stored.decode().tolist() == [[0.03125, -0.0625, 16.0]]
