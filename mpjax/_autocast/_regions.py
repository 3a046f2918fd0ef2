"""Regions: parts of a function that autocast computes in float32, or leaves alone."""

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._dtypes import BFLOAT16, FLOAT16, FLOAT32


class Region(enum.Enum):
    """What holds inside a region; the value is its name scope, which survives every transformation."""

    FULL = "mpjax.full_precision"
    KEEP = "mpjax.keep_precision"


def full_precision(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Computes a function in float32, also inside `mpjax.autocast`.

    Half-precision arguments are cast to float32 at the call; inside, nothing is narrowed. The region is a name
    scope: it survives `jit`, `grad`, `vmap`, `scan`, `remat` and `shard_map` on either side.

    A matrix product of float32 arrays is still one pass of bfloat16 on a TPU and TF32 on a GPU unless its
    `precision` says otherwise.

    Args:
      fn: any function of pytrees.

    Returns:
      A function of the same arguments.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> router = mp.full_precision(lambda x, w: jax.nn.softmax(x @ w))
    >>> cast = mp.autocast(lambda x, w: router(x @ w, w), "mixed_bfloat16")
    >>> [str(e.invars[0].aval.dtype) for e in jax.make_jaxpr(cast)(jnp.ones((2, 2)), jnp.ones((2, 2))).eqns
    ...  if e.primitive.name == "dot_general"]
    ['bfloat16', 'float32']
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(_widened, (args, kwargs))
        with jax.named_scope(Region.FULL.value):
            return fn(*args, **kwargs)

    return wrapped


def keep_precision(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves a function exactly as it is written, also inside `mpjax.autocast`.

    Its arguments arrive in the dtypes that they have without autocast. For code with precision choices of its own.
    The region is a name scope: it survives `jit`, `grad`, `vmap`, `scan`, `remat` and `shard_map` on either side.

    Args:
      fn: any function of pytrees.

    Returns:
      A function of the same arguments.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> attention = mp.keep_precision(lambda x: x.astype(jnp.float16) @ x.astype(jnp.float16))
    >>> mp.autocast(attention, "mixed_bfloat16")(jnp.ones((2, 2))).dtype.name
    'float16'
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(Region.KEEP.value):
            return fn(*args, **kwargs)

    return wrapped


def _widened(x: Any) -> Any:
    return jnp.asarray(x, FLOAT32) if getattr(x, "dtype", None) in (BFLOAT16, FLOAT16) else x


def region_of(path: tuple[str, ...]) -> Region | None:
    """The innermost region that a path of name scopes lies in."""
    values = {region.value: region for region in Region}
    return next((values[name] for name in reversed(path) if name in values), None)


def modules_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """The name scopes of a path that are not mpjax's own."""
    return tuple(name for name in path if not name.startswith("mpjax."))
