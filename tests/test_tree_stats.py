import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax.diagnostics import tree_stats
from mpjax.diagnostics._tree_stats import FORMATS, NO_EXPONENT

FIRST, LAST = -47, 16


def cast(x, name):
    """Rounded to a format by numpy or ml_dtypes, in float64."""
    with np.errstate(over="ignore"):
        return x.astype(name if name == "float16" else getattr(ml_dtypes, name)).astype(np.float64)


def oracle(x, formats=FORMATS):
    """The same counts in NumPy, from what a cast makes of the numbers."""
    x = np.asarray(x).ravel()
    wide = x.astype(np.float64)
    alive = np.isfinite(wide) & (wide != 0)
    exponents = np.sort(np.frexp(wide[alive])[1] - 1)
    found = {
        "size": x.size,
        "non_finite": (~np.isfinite(wide)).sum(),
        "zeros": (wide == 0).sum(),
        "min_exponent": exponents[0] if alive.any() else NO_EXPONENT,
        "max_exponent": exponents[-1] if alive.any() else NO_EXPONENT,
        "amax": np.float32(np.abs(wide[np.isfinite(wide)]).max(initial=0)),
        "histogram": np.bincount(np.clip(exponents, FIRST, LAST) - FIRST, minlength=LAST - FIRST + 1).tolist(),
        "overflow": [],
        "subnormal": [],
        "underflow": [],
    }
    median = exponents[(len(exponents) - 1) // 2] if alive.any() else NO_EXPONENT
    if alive.any():
        median = np.clip(np.clip(median, FIRST, LAST), exponents[0], exponents[-1])
    found["median_exponent"] = median
    for name in formats:
        rounded = cast(x[alive], name)
        normal = float(ml_dtypes.finfo(name).smallest_normal)
        found["overflow"].append((~np.isfinite(rounded)).sum())
        found["subnormal"].append(((rounded != 0) & (np.abs(rounded) < normal)).sum())
        found["underflow"].append((rounded == 0).sum())
    return found


def assert_is_oracle(stats, leaves, formats=FORMATS):
    for i, leaf in enumerate(leaves):
        for name, expected in oracle(leaf, formats).items():
            assert np.array_equal(np.asarray(getattr(stats, name))[i], expected), (name, i)


def around(number):
    """A float32 and its neighbours."""
    number = np.float32(number)
    with np.errstate(over="ignore"):
        return [number, np.nextafter(number, np.float32(0)), np.nextafter(number, np.float32(np.inf))]


def edges():
    """Everywhere that a format's rounding changes its mind, and some more."""
    found = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, *around(np.finfo(np.float32).max)]
    for name in FORMATS:
        info = ml_dtypes.finfo(name)
        tiny, normal, largest = (float(x) for x in (info.smallest_subnormal, info.smallest_normal, info.max))
        ulp = 2.0 ** (math.frexp(largest)[1] - 1 - info.nmant)
        for x in (tiny / 2, tiny, normal - tiny / 2, normal, largest, largest + ulp / 2, largest + ulp / 4):
            found += around(x)
    for e in (FIRST - 1, FIRST, FIRST + 1, LAST, LAST + 1, -126):
        found += around(2.0**e)
    return np.array([*found, *(-x for x in found)], np.float32)


counted = jax.jit(tree_stats)


def test_each_edge_by_itself():
    """A leaf for each number: none hides another."""
    numbers = edges()
    stats = jax.jit(jax.vmap(tree_stats))(numbers[:, None])
    stats = jax.tree.map(lambda x: x[:, 0], stats)
    assert_is_oracle(stats, numbers[:, None])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=24, max_size=24))
@example([0] * 24)
@example([2**31 - 1] * 24)
@settings(max_examples=40)
def test_any_bits_of_any_dtype(words):
    """Exact, from the raw bits: subnormals, both zeros and every NaN included."""
    leaves = []
    for name in ("float32", "float16", *FORMATS[1:]):
        dtype = jnp.dtype(name)
        whole = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize]
        leaves.append(np.array(words, np.uint32).astype(whole).view(dtype))
    with np.errstate(invalid="ignore"):  # numpy warns of NaN that it casts
        assert_is_oracle(counted([jnp.asarray(x) for x in leaves]), [x.astype(np.float32) for x in leaves])


@pytest.mark.slow
def test_a_large_leaf_and_how_a_tpu_counts_it(monkeypatch):
    """Both ways to count, and every size between: sums over more than one axis."""
    leaf = np.random.default_rng(0).normal(size=(3, 40, 150)).astype(np.float32)
    leaf *= np.float32(2.0) ** np.random.default_rng(1).integers(-60, 20, leaf.shape)
    leaf[0, :2, :7] = np.inf
    stats = counted({"w": leaf})
    assert_is_oracle(stats, [leaf])
    chosen = []

    def on_a_tpu(bits, tpu, default):
        chosen.append(tpu)
        return tpu(bits)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_tpu)
    few = lambda tree: tree_stats(tree, "float16", exponents=(-4, 2))
    on_tpu = few({"w": leaf})
    assert len(chosen) == 1
    monkeypatch.undo()
    assert bits(on_tpu) == bits(few({"w": leaf.reshape(-1)}))


def test_which_leaves_count():
    few = functools.partial(tree_stats, dtype="float16", exponents=(-1, 1))
    tree = {
        "layer": {"kernel": jnp.ones((2, 3)), "n": jnp.arange(3), "none": None},
        "key": jax.random.key(0),
        "complex": jnp.array([1 + 70000j, jnp.inf + 0j], jnp.complex64),
        "python": 2.0,
        "empty": jnp.zeros((0, 4)),
    }
    stats = few(tree)
    assert stats.paths == ("complex", "empty", "layer/kernel", "python")
    assert stats.size.tolist() == [4, 0, 6, 1]
    assert stats.non_finite.tolist() == [1, 0, 0, 0]
    assert stats.zeros.tolist() == [1, 0, 0, 0]
    assert stats.overflow[:, 0].tolist() == [1, 0, 0, 0]
    assert stats.median_exponent.tolist() == [0, NO_EXPONENT, 0, 1]
    assert stats.amax.tolist() == [70000.0, 0.0, 1.0, 2.0]
    assert few(jnp.ones(2)).paths == ("<root>",)


def test_a_tree_without_numbers():
    stats = tree_stats({"n": jnp.arange(3)})
    assert stats.paths == ()
    assert stats.histogram.shape == (0, LAST - FIRST + 1)
    assert stats.fractions("float16")["zero"].shape == (0,)


def test_all_leaves_are_strong_float32_and_int32():
    for leaf in jax.tree.leaves(counted([jnp.ones(24, jnp.bfloat16)])):
        assert leaf.dtype.name in ("float32", "int32")
        assert not leaf.weak_type


def test_float64_is_looked_at_as_it_is(x64):
    """A cast to float32 first would round twice: the second of these ends on a tie, which goes to even."""
    leaf = np.array([65519.999999999, 65520.0, 1e300, 1e-310, -(2.0**-1074), 2.0**-25 * (1 + 2.0**-40), 1.5, np.inf])
    stats = tree_stats(jnp.asarray(leaf), ["float16", "float32", "float64"])
    assert stats.overflow.tolist() == [[2, 1, 0]]
    assert stats.underflow.tolist() == [[2, 2, 0]]
    assert stats.subnormal.tolist() == [[1, 0, 2]]
    assert (int(stats.min_exponent[0]), int(stats.max_exponent[0])) == (-1074, 996)
    assert stats.amax.tolist() == [math.inf]
    assert {x.dtype.name for x in jax.tree.leaves(stats)} == {"float32", "int32"}


def test_fractions():
    tree = jnp.array([1.0, 0.0, jnp.nan, 2.0**-20, 2.0**-30, 1e5])
    stats = tree_stats(tree, ("fp16", "e5m2"))
    assert stats.formats == ("float16", "float8_e5m2")
    shares = jax.jit(lambda s: s.fractions(jnp.float16))(stats)
    assert {kind: share.tolist() for kind, share in shares.items()} == {
        "overflow": [0.25],
        "subnormal": [0.25],
        "zero": [0.25],
    }
    assert counted([jnp.zeros(24)]).fractions("float16")["zero"].tolist() == [0.0]
    with pytest.raises(ValueError, match="have no bfloat16") as error:
        stats.fractions("bfloat16")
    assert 'tree_stats(tree, "bfloat16")' in str(error.value)


def test_the_range_of_the_histogram():
    stats = tree_stats(jnp.array([2.0**-80, 2.0**-60, 1.9 * 2.0**-60, 1.0]), exponents=(-70, -50))
    assert stats.histogram.shape == (1, 21)
    assert np.flatnonzero(stats.histogram[0]).tolist() == [0, 10, 20]
    assert stats.median_exponent.tolist() == [-60]


class TestTransforms:
    tree = {"a": jnp.linspace(-1e-4, 1e5, 16), "b": jnp.array([[0.0, 2.0**-24]] * 8)}
    few = staticmethod(functools.partial(tree_stats, dtype="float16", exponents=(-4, 4)))

    @pytest.mark.slow
    def test_vmap_and_scan(self):
        stacked = jax.tree.map(lambda x: jnp.stack([x, x * 2]), self.tree)
        members = jax.jit(jax.vmap(self.few))(stacked)
        scanned = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, self.few(x)), None, xs)[1])(stacked)
        assert bits(jax.tree.map(lambda x: x[0], members)) == bits(self.few(self.tree))
        assert bits(members) == bits(scanned)
        assert members.fractions("float16")["subnormal"].tolist() == [[0.0, 1.0], [0.0, 1.0]]

    @pytest.mark.slow
    def test_shards(self):
        """By jit nothing is to be said; under shard_map, the axes. Only counts are sent."""
        mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        placed = jax.device_put(self.tree, NamedSharding(mesh, P("d")))
        expected = self.few(self.tree)
        compiled = jax.jit(self.few).lower(placed).compile()
        assert bits(compiled(placed)) == bits(expected)
        assert "all-gather" not in compiled.as_text()
        mapped = jax.shard_map(lambda t: self.few(t, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P())
        assert bits(jax.jit(mapped)(placed)) == bits(expected)

    def test_the_data_are_read_by_nothing_but_sums_and_extremes(self):
        """No scatter, sort or gather, which are slow on a TPU; nothing as large as the data comes out."""
        text = counted.lower({"w": jnp.ones((256, 128))}).as_text()
        assert "stablehlo.reduce" in text
        assert not any(f"stablehlo.{slow}" in text for slow in ("scatter", "sort", "gather", "while"))


class TestErrors:
    def test_more_than_int32_can_count(self):
        big = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
        with pytest.raises(ValueError, match=r"layer/w has 2,147,483,648 numbers"):
            jax.eval_shape(tree_stats, {"layer": {"w": big}})

    @pytest.mark.parametrize("exponents", [(3, 3), (-127, 0), (0, 128)])
    def test_the_range(self, exponents):
        with pytest.raises(ValueError, match=r"exponents is .*\n.*-126 <= first < last <= 127"):
            tree_stats(jnp.ones(1), exponents=exponents)

    def test_the_format(self):
        with pytest.raises(ValueError, match="unknown dtype 'float15'"):
            tree_stats(jnp.ones(1), "float15")
        with pytest.raises(TypeError, match="'int8' is not a floating dtype"):
            tree_stats(jnp.ones(1), "int8")
