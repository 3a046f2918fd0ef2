"""`mpjax.diagnostics.tree_stats`: how the numbers of a tree lie in the ranges of the formats, counted on the device."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._dtypes import canonical_dtype, wide_dtype
from mpjax._errors import problem
from mpjax._state import rebuild, register_state, register_with_flax
from mpjax._tree import is_inexact_leaf, path_name
from mpjax._typing import Tree

FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
NO_EXPONENT = -(2**31)
_LARGEST_COUNT = 2**31 - 1
# Of a leaf below it, it does not matter what comparing all with all costs; it compiles in a fraction of the time.
_SMALL = 2**14


@register_state(
    *("size", "non_finite", "zeros", "overflow", "subnormal", "underflow"),
    *("min_exponent", "median_exponent", "max_exponent", "amax", "histogram"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class TreeStats:
    """What `tree_stats` counts: arrays with one entry a leaf, of `n` leaves, and static names.

    Attributes:
      paths: the leaves that were counted, static.
      formats: names of the dtypes that were asked about, static.
      exponents: the first and the last exponent of the histogram, static.
      size: int32 (n,), how many numbers; a complex one counts as two.
      non_finite: int32 (n,), inf and NaN. They count in nothing below.
      zeros: int32 (n,), what is 0 already.
      overflow, subnormal, underflow: int32 (n, formats), numbers that rounding to the format, to nearest even, makes
        inf or NaN; a subnormal number; 0.
      min_exponent, median_exponent, max_exponent: int32 (n,), of the finite numbers that are not 0, where 2**e <= |x| <
        2**(e + 1), and -2**31 where there are none. The median is the lower one; where it falls into the first or the
        last bin of the histogram, it is that bin's exponent, or the nearest of the two others.
      amax: float32 (n,), the largest finite |x|.
      histogram: int32 (n, bins), the finite numbers that are not 0, by exponent. The first bin has all smaller ones
        too, the last all larger ones.
    """

    paths: tuple[str, ...]
    formats: tuple[str, ...]
    exponents: tuple[int, int]
    size: Any
    non_finite: Any
    zeros: Any
    overflow: Any
    subnormal: Any
    underflow: Any
    min_exponent: Any
    median_exponent: Any
    max_exponent: Any
    amax: Any
    histogram: Any

    def __post_init__(self) -> None:
        register_with_flax(type(self))

    def fractions(self, dtype: Any) -> dict[str, jax.Array]:
        """Of the finite numbers that are not 0 yet, how many a format would lose.

        Args:
          dtype: one of `formats`.

        Returns:
          `{"overflow", "subnormal", "zero"}`: float32 (n,) each, from 0 to 1.

        Raises:
          ValueError: the statistics are not of this format.
        """
        name = str(canonical_dtype(dtype))
        if name not in self.formats:
            raise ValueError(
                problem(
                    f"the statistics have no {name}.",
                    expected=f"one of {', '.join(self.formats)}",
                    write=f'mp.diagnostics.tree_stats(tree, "{name}")',
                )
            )
        index = self.formats.index(name)
        numbers = jnp.maximum(self.size - self.non_finite - self.zeros, 1).astype(jnp.float32)
        counts = {"overflow": self.overflow, "subnormal": self.subnormal, "zero": self.underflow}
        return {kind: count[..., index].astype(jnp.float32) / numbers for kind, count in counts.items()}

    def _replace(self, **changes: Any) -> Self:
        new: Self = rebuild(type(self), **{**vars(self), **changes})
        return new


def tree_stats(
    tree: Tree,
    dtype: Any = None,
    *,
    exponents: tuple[int, int] = (-47, 16),
    axis_name: str | Sequence[str] | None = None,
) -> TreeStats:
    """Counts in each leaf what low-precision formats would lose, and how large its numbers are.

    For use inside the step: counts are sums of comparisons of the numbers' bits with constants, exact, and under `jit`
    with sharded arrays nothing but these sums is sent. With some 80 comparisons a number it costs a good part of an
    optimizer's step (`benchmarks/step_cost.py`): do it every so many steps, as `gradient_monitor` does.

    Args:
      tree: any pytree. Leaves that are not floating or complex do not count. float64 is looked at as it is.
      dtype: a format or several. Default: float16, bfloat16, float8_e4m3fn and float8_e5m2.
      exponents: the first and the last bin of the histogram, one a power of two.
      axis_name: under `shard_map`, the axes over whose devices to add up. What is not sharded counts once a device.

    Returns:
      A `TreeStats`, a pytree of float32 and int32 arrays.

    Raises:
      ValueError: a leaf has 2**31 numbers or more, which int32 cannot count; the first exponent is not below the last,
        or one is not a normal float32's; and as `mpjax.get_policy` for a dtype.
      TypeError: as `mpjax.get_policy` for a dtype.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> stats = mp.diagnostics.tree_stats({"w": jnp.array([1.0, 70000.0, 2.0**-20, 2.0**-30])}, "float16")
    >>> stats.paths, {kind: float(share[0]) for kind, share in stats.fractions("float16").items()}
    (('w',), {'overflow': 0.25, 'subnormal': 0.25, 'zero': 0.25})
    >>> int(stats.min_exponent[0]), int(stats.max_exponent[0])
    (-30, 16)

    References:
      The formats: IEEE 754-2019; Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """
    formats = FORMATS if dtype is None else _names(dtype)
    first, last = exponents
    if not -126 <= first < last <= 127:
        raise ValueError(
            problem(
                f"exponents is {exponents}.",
                expected="the first and the last exponent, -126 <= first < last <= 127",
                write="exponents=(-47, 16)",
            )
        )
    leaves = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree) if is_inexact_leaf(x)]
    paths = tuple(path_name(path) or "<root>" for path, _ in leaves)
    axes = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    return _stats([x for _, x in leaves], paths, formats, (first, last), axes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)  # or outside of jit each operation is compiled
def _stats(
    leaves: Sequence[Any], paths: tuple[str, ...], formats: tuple[str, ...], exponents: tuple[int, int], axis_name: Any
) -> TreeStats:
    first, last = exponents
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    rows = [_leaf(path, x, formats, exponents, axis_name, devices) for path, x in zip(paths, leaves, strict=True)]
    # A tree without such leaves has arrays of length 0.
    columns = zip(*(rows or [_leaf("", jnp.zeros(0), formats, exponents, None, 1)]), strict=True)
    size, counts, low, high, amax = (jnp.stack(column)[: len(paths)] for column in columns)
    # Counts of |x| >= threshold, in the order of _thresholds: their differences are what lies between two.
    nonzero, infinite = counts[:, :1], counts[:, 1:2]
    edges = counts[:, 2 : 2 + last - first]
    of_formats = counts[:, 2 + last - first :].reshape(len(rows), len(formats), 3)
    histogram = -jnp.diff(jnp.concatenate([nonzero, edges, infinite], 1), axis=1)
    numbers = (nonzero - infinite)[:, 0]
    passed = jnp.cumsum(histogram, 1, dtype=jnp.int32) > ((numbers - 1) // 2)[:, None]
    median = jnp.clip(first + jnp.argmax(passed, 1).astype(jnp.int32), low, high)
    return TreeStats(
        paths=paths,
        formats=formats,
        exponents=exponents,
        size=size,
        non_finite=infinite[:, 0],
        zeros=size - nonzero[:, 0],
        overflow=of_formats[..., 2] - infinite,
        subnormal=of_formats[..., 0] - of_formats[..., 1],
        underflow=nonzero - of_formats[..., 0],
        min_exponent=jnp.where(numbers > 0, low, NO_EXPONENT),
        median_exponent=jnp.where(numbers > 0, median, NO_EXPONENT),
        max_exponent=jnp.where(numbers > 0, high, NO_EXPONENT),
        amax=amax,
        histogram=histogram,
    )


def _names(dtype: Any) -> tuple[str, ...]:
    chosen = dtype if isinstance(dtype, list | tuple) else [dtype]
    return tuple(dict.fromkeys(str(canonical_dtype(one)) for one in chosen))


def _leaf(
    path: str, leaf: Any, formats: tuple[str, ...], exponents: tuple[int, int], axis_name: Any, devices: int
) -> tuple[jax.Array, ...]:
    """Size, counts of |x| >= threshold, smallest and largest exponent, largest |x|; in the order of `tree_stats`."""
    x = jnp.asarray(leaf)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    x = x.astype(wide_dtype(x.dtype))  # exact
    size = math.prod(x.shape) * devices
    if size > _LARGEST_COUNT:
        raise ValueError(
            problem(
                f"{path} has {size:,} numbers.",
                expected="fewer than 2**31 a leaf, which int32 can count",
                write="mp.diagnostics.tree_stats(jax.tree.map(lambda x: x[0], tree)), of one layer of a stack",
            )
        )
    # Without its sign, the bits of a number are in the order of its size: subnormals, which a device may take for 0 in
    # arithmetic, inf and NaN too.
    whole = np.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, whole) & np.array(2 ** (8 * whole.itemsize - 1) - 1, whole)
    thresholds = np.array(_thresholds(x.dtype, formats, exponents), whole)
    axes = tuple(range(x.ndim))

    def compared(bits: jax.Array) -> jax.Array:
        return jnp.sum(bits[..., None] >= thresholds, axes, dtype=jnp.int32)

    def one_by_one(bits: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(bits >= threshold, dtype=jnp.int32) for threshold in thresholds])

    # XLA for TPU joins sums of one array into one pass, a thirteenth of the time of the comparison with all at once.
    # Other compilers do not, and take seconds to compile them.
    by_platform = x.size >= _SMALL
    counts = jax.lax.platform_dependent(bits, tpu=one_by_one, default=compared) if by_platform else compared(bits)
    infinity = thresholds[1]
    low = jnp.min(jnp.where(bits == 0, infinity, bits), initial=infinity)
    high = jnp.max(jnp.where(bits < infinity, bits, np.zeros([], whole)), initial=0)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
        low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
    amax = jax.lax.bitcast_convert_type(high, x.dtype).astype(jnp.float32)
    return jnp.int32(size), counts, _exponent(low, x.dtype), _exponent(high, x.dtype), amax


def _thresholds(wide: Any, formats: Sequence[str], exponents: tuple[int, int]) -> list[int]:
    """The bits of the numbers from which on something else happens, first of all that one is not 0, and that it is inf.

    Then come the edges of the histogram; and for each format the smallest number that it does not round to 0, to a
    subnormal number, to a finite number.
    """

    def bits(number: Any) -> int:
        with np.errstate(over="ignore"):
            return int(np.asarray(number, wide).view(f"int{8 * wide.itemsize}"))

    found = [1, bits(np.inf), *(bits(2.0**e) for e in range(exponents[0] + 1, exponents[1] + 1))]
    for name in formats:
        info, dtype = jnp.finfo(name), jnp.dtype(name)
        largest, tiny, normal = float(info.max), float(info.smallest_subnormal), float(info.smallest_normal)
        # Halfway past the largest: rounding to even keeps it where the largest is even, as 448 of float8_e4m3fn is.
        with np.errstate(over="ignore"):
            past = np.float64(largest) + 2.0 ** (math.frexp(largest)[1] - 2 - info.nmant)
            stays = bool(np.isfinite(past.astype(dtype).astype(np.float64)))
        # Halfway to the smallest subnormal becomes 0, halfway to the smallest normal number becomes that.
        found += [bits(tiny / 2) + 1, bits(normal - tiny / 2), bits(past) + stays]
    return found


def _exponent(bits: jax.Array, wide: Any) -> jax.Array:
    """The exponent of a positive number, from its bits."""
    info = jnp.finfo(wide)
    of_normal = (bits >> info.nmant) - info.maxexp + 1
    of_subnormal = 8 * bits.dtype.itemsize - 1 - jax.lax.clz(bits) + int(info.minexp) - info.nmant
    return jnp.where(bits >> info.nmant > 0, of_normal, of_subnormal).astype(jnp.int32)
