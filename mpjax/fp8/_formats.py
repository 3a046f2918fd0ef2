"""The 8-bit floating formats: what they hold, who computes in them, and casts to them."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._dtypes import FLOAT32, canonical_dtype, is_float8
from mpjax._errors import problem


@dataclasses.dataclass(frozen=True)
class Format:
    """What an 8-bit format holds.

    Attributes:
      dtype: the format.
      max: its largest number.
      tiny: its smallest normal number; below, digits are lost.
      smallest: its smallest number above zero.
      has_inf: whether it has infinities; where it has none, they become NaN.
      backward: the format of gradients where this is that of activations and weights: a wider range, fewer digits.

    >>> import mpjax as mp
    >>> [(name, f.max, f.has_inf) for name, f in mp.fp8.FORMATS.items()][:2]
    [('float8_e4m3fn', 448.0, False), ('float8_e5m2', 57344.0, True)]
    """

    dtype: np.dtype[Any]
    max: float
    tiny: float
    smallest: float
    has_inf: bool
    backward: np.dtype[Any]


def _format(name: str, backward: str, has_inf: bool = False) -> Format:
    limits = jnp.finfo(name)
    return Format(
        jnp.dtype(name),
        float(limits.max),
        float(limits.tiny),
        float(limits.smallest_subnormal),
        has_inf,
        jnp.dtype(backward),
    )


# Those of the OCP, which NVIDIA's and Google's units have and AMD's from gfx950 (MI350) on; those of gfx94x (MI300).
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "float8_e4m3fn": _format("float8_e4m3fn", "float8_e5m2"),
        "float8_e5m2": _format("float8_e5m2", "float8_e5m2", has_inf=True),
        "float8_e4m3fnuz": _format("float8_e4m3fnuz", "float8_e5m2fnuz"),
        "float8_e5m2fnuz": _format("float8_e5m2fnuz", "float8_e5m2fnuz"),
    }
)


def format_of(dtype: Any) -> Format:
    """The format of an 8-bit dtype.

    Args:
      dtype: any spelling: `"e4m3"`, `jnp.float8_e5m2`.

    Raises:
      ValueError: the dtype does not have 8 bits, or its name is unknown.
      TypeError: the dtype is not floating.

    >>> import mpjax as mp
    >>> e4m3, e5m2 = mp.fp8.format_of("e4m3"), mp.fp8.format_of("e5m2")
    >>> e4m3.max, e5m2.max, e4m3.smallest == 2**-9, e4m3.backward.name
    (448.0, 57344.0, True, 'float8_e5m2')
    """
    found = canonical_dtype(dtype)
    if not is_float8(found):
        raise ValueError(
            problem(f"dtype is {found}.", expected=f"an 8-bit dtype: {', '.join(FORMATS)}", write='"float8_e4m3fn"')
        )
    return FORMATS[found.name]


def cast(x: Any, dtype: Any, *, saturate: bool = True) -> Any:
    """Casts an array to an 8-bit format as it is, without a scale, rounding to nearest even.

    Args:
      x: floating, any shape.
      dtype: the format.
      saturate: whether finite numbers past the largest become the largest. Else they become infinities, or NaN where
        the format has none. Infinities and NaNs never become finite: a loss scale has to see them.

    Returns:
      An array of that dtype.

    Raises:
      ValueError: the dtype does not have 8 bits.
      TypeError: `x` is not floating.
      NotImplementedError: a derivative is taken; `fake_quantize` has one.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> x = jnp.array([1.1, 500.0, jnp.inf])
    >>> mp.fp8.cast(x, "e4m3").tolist(), mp.fp8.cast(x, "e4m3", saturate=False).tolist()
    ([1.125, 448.0, nan], [1.125, nan, nan])
    """
    found = format_of(dtype)
    wide = _no_gradient(floating(x).astype(FLOAT32))
    if saturate:
        wide = jnp.where(jnp.isinf(wide), wide, jnp.clip(wide, -found.max, found.max))
    return wide.astype(found.dtype)


def floating(x: Any) -> jax.Array:
    """`x` as an array.

    Raises:
      TypeError: it is not floating.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(problem(f"x is in {x.dtype}.", expected="a floating dtype", write="x.astype(jnp.float32)"))
    return x


def without_derivative(error: Callable[[], Exception]) -> Callable[[Any], Any]:
    """A function that returns its argument, and raises this error where a derivative is taken."""

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise error()

    return same


# JAX's would be in 8 bits too, without a scale: gradients below 2**-10 become 0, those past 448 NaN.
_no_gradient = without_derivative(
    lambda: NotImplementedError(
        problem(
            "a derivative is taken of a cast to 8 bits, which has none.",
            expected="a function whose derivative is that of no rounding",
            write="mp.fp8.fake_quantize(x, dtype, block); or jax.lax.stop_gradient around x",
        )
    )
)
