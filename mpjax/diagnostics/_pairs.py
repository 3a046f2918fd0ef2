"""Values of two evaluations side by side, and how far apart they are."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """A value in both evaluations; one array, not two, where they cannot differ yet.

    Attributes:
      exact: as the reference has it.
      low: as it is with those sites in low precision that are switched on.
      pending: whether it was cast for what reads it, which rounds it or not.
    """

    exact: Any
    low: Any
    pending: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def agrees(self) -> bool:
        """Whether the two are known to be the same."""
        return self.exact is self.low


def settled(pairs: Sequence[Pair]) -> list[Pair]:
    """What goes around a loop or comes out of a branch: nothing is known of its cast any more."""
    return [Pair(x.exact, x.low) for x in pairs]


def packed(pairs: Sequence[Pair]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Pair]]]:
    """The arrays of pairs, one for those that agree, and what makes pairs of them again."""
    known = [(x.agrees, x.pending) for x in pairs]

    def unpack(arrays: Sequence[Any]) -> list[Pair]:
        moving = iter(arrays)
        return [Pair(x, x if same else next(moving), p) for (same, p), x in zip(known, moving, strict=False)]

    return [array for x in pairs for array in ((x.exact,) if x.agrees else (x.exact, x.low))], unpack


def squares(low: Any, exact: Any) -> tuple[Any, Any, Any]:
    """A scale, and the sums of squares of two arrays' difference and of the exact one, over that scale.

    The difference is infinite where one is finite and the other not, or one NaN.
    """
    same = (low == exact) | ((low != low) & (exact != exact))
    finite = jnp.where(jnp.isfinite(exact), exact, jnp.zeros_like(exact))
    # Squares of the scaled numbers neither overflow nor vanish.
    scale = jnp.max(jnp.abs(finite), initial=0)
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    distance = jnp.sum(jnp.square(jnp.where(same, jnp.zeros_like(low), (low - exact) / scale)))
    distance = jnp.where(jnp.isfinite(distance), distance, jnp.full_like(distance, jnp.inf))
    return scale, distance, jnp.sum(jnp.square(finite / scale))


def relative_error(low: Any, exact: Any) -> Any:
    """The norm of two arrays' difference over that of the exact one; 1 if that is all zeros and the other is not."""
    _, distance, norm = squares(low, exact)
    some = norm > 0
    ratio = jnp.sqrt(distance) / jnp.sqrt(jnp.where(some, norm, jnp.ones_like(norm)))
    return jnp.where(some | jnp.isinf(distance), ratio, jnp.sign(distance))


def is_float(aval: Any) -> bool:
    """Whether an abstract value is an array of real floats, and no reference to one."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and not hasattr(aval, "inner_aval")
