"""The floating dtypes that mpjax knows, by name, and how a spelling of one becomes a `numpy.dtype`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._errors import problem, shortened

# One row per dtype: its canonical name (what str() prints), then the other spellings that are read.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "float64": ("f64", "fp64", "double"),
    "float32": ("f32", "fp32", "full", "f", "single"),  # "f" is promised by jmp's own error text
    "bfloat16": ("bf16",),
    "float16": ("f16", "fp16"),
    "float8_e4m3fn": ("e4m3fn", "e4m3", "f8_e4m3fn"),
    "float8_e5m2": ("e5m2", "f8_e5m2"),
    "float8_e4m3fnuz": ("e4m3fnuz", "f8_e4m3fnuz"),  # AMD MI300
    "float8_e5m2fnuz": ("e5m2fnuz", "f8_e5m2fnuz"),
}

_BY_NAME: dict[str, np.dtype[Any]] = {
    spelling: jnp.dtype(name) for name, others in _SPELLINGS.items() for spelling in (name, *others)
}
_KNOWN: frozenset[np.dtype[Any]] = frozenset(_BY_NAME.values())

FLOAT32: np.dtype[Any] = jnp.dtype(jnp.float32)
FLOAT16: np.dtype[Any] = jnp.dtype(jnp.float16)
BFLOAT16: np.dtype[Any] = jnp.dtype(jnp.bfloat16)
HALF_NAMES = ("half", "h")  # by hardware; see mpjax.half_dtype


def known_names() -> str:
    """All canonical names, for messages."""
    return ", ".join(_SPELLINGS)


def canonical_dtype(dtype: Any, what: str = "dtype") -> np.dtype[Any]:
    """Turns any spelling of a floating dtype into the one `numpy.dtype` that stands for it.

    Args:
      dtype: a name (`"bf16"`, any case), a scalar type (`jnp.bfloat16`) or a `numpy.dtype`.
      what: what the dtype is for, in messages.

    Raises:
      TypeError: the dtype is known to numpy but is not a floating dtype that mpjax casts to.
      ValueError: the name is unknown.
    """
    if isinstance(dtype, str):
        found = _BY_NAME.get(dtype.strip().lower())
    elif dtype is None or any(dtype is t for t in (bool, int, float, complex)):
        found = None  # numpy reads these as 64-bit dtypes, which no one means here
    else:
        try:
            found = jnp.dtype(dtype)
        except TypeError:
            found = None
    if found is None:
        # Names such as "int32" are known to numpy, and are wrong in another way than a typing error.
        found = _numpy_dtype(dtype)
    if found is None:
        raise ValueError(
            problem(
                f"unknown {what} {shortened(dtype)}.",
                expected=f"a floating dtype: {known_names()}",
                write='"bfloat16" or jnp.bfloat16',
            )
        )
    if found not in _KNOWN:
        raise TypeError(
            problem(
                f"{what} {str(found)!r} is not a floating dtype that arrays are cast to.",
                expected=f"a floating dtype: {known_names()}",
                write='"float32"; integers, booleans and complex numbers are never cast',
            )
        )
    return found


def _numpy_dtype(dtype: Any) -> np.dtype[Any] | None:
    """What numpy takes `dtype` for, if that is no floating dtype."""
    # Names alone: numpy has codes of a letter too, evaluates parts of other strings, and dies of "m8[2D/0]".
    if isinstance(dtype, str) and not (dtype.isidentifier() and dtype[:3].isalpha() and 3 <= len(dtype) < 32):
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        return None
    return None if dtype is None or jnp.issubdtype(found, jnp.floating) else found


def is_float8(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` is one of the 8-bit formats, which mean nothing without a scale beside them."""
    return dtype.itemsize == 1 and dtype in _KNOWN


def is_castable(dtype: Any) -> bool:
    """Whether a leaf of this dtype takes part in casts: 16 bits or wider and real."""
    # numpy's issubdtype does not know ml_dtypes and PRNG-key dtypes; jnp's does.
    return bool(jnp.issubdtype(dtype, jnp.floating)) and np.dtype(dtype).itemsize > 1


def wide_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to do arithmetic on gradients in: float32, or float64 where the value already is."""
    return FLOAT32 if dtype.itemsize < FLOAT32.itemsize else dtype
