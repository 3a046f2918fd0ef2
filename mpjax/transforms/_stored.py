"""Parameters stored in half precision: what a transform sees of them, and how its updates hit the value it means."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax._dtypes import FLOAT32, is_float8
from mpjax._tree import is_inexact_leaf, widen
from mpjax._typing import T, Tree


class StoredTransform(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # optax has no types here
    """A transform that has to know in which dtypes the parameters are stored.

    `loss_scaled` and `skip_on_overflow` hand parameters to any other inner transform in float32. Inside
    `optax.chain` the type is lost: put such a transform directly into the wrapper, around the chain.
    """


class SelectingTransform(StoredTransform):
    """A stored transform that does a skipped step itself: its update takes `taken`, whether the step is to count.

    XLA for TPU writes two 16-bit arrays in one pass only where one is computed from the other, and a selection between
    them is in its way: the wrapper's, after the update, takes a third more bytes.
    """


def stand_still(taken: Any, steps: T) -> T:
    """The steps, or where the step does not count -0.0: x + -0.0 is x for every x, x + 0.0 turns -0.0 into 0.0."""
    return jax.tree.map(lambda step: jnp.where(taken, step, -jnp.zeros_like(step)), steps)


def keep_state(taken: Any, new: T, old: T) -> T:
    """The new state, or where the step does not count the old one, bit for bit."""

    def keep(new: Any, old: Any) -> Any:
        # Some transforms let a state's dtype follow the gradients; a fixed one means one trace, ever.
        old = old if isinstance(old, jax.Array) else jnp.asarray(old)
        return jnp.where(taken, jnp.asarray(new, old.dtype), old)

    return jax.tree.map(keep, new, old)


def update_inner(
    inner: optax.GradientTransformationExtraArgs, taken: Any, updates: Tree, state: Any, params: Tree, extra_args: Any
) -> tuple[Tree, Any]:
    """The steps and the new state of `inner`, of a step that counts where `taken` says so; with None it does."""
    if taken is not None and isinstance(inner, SelectingTransform):
        steps, new = inner.update(updates, state, params, taken=taken, **extra_args)
        return steps, new
    steps, new = inner.update(updates, state, params, **extra_args)
    return (steps, new) if taken is None else (stand_still(taken, steps), keep_state(taken, new, state))


def to_float32(tree: T) -> T:
    """Casts float leaves narrower than float32 to it, fp8 included; all others stay."""

    def one(x: Any) -> Any:
        return x.astype(FLOAT32) if hasattr(x, "dtype") and is_float8(x.dtype) else x

    return jax.tree.map(one, widen(tree))


def as_seen_by(inner: optax.GradientTransformation, params: T) -> T:
    """The parameters as `inner` is to see them: as stored, or in float32."""
    return params if isinstance(inner, StoredTransform) else to_float32(params)


def update_to(old: Any, new: Any) -> jax.Array:
    """The float32 update that takes a stored parameter exactly to `new`: `apply_updates` rounds `old + update` to it.

    Where nothing changes it is -0.0, which leaves -0.0 as it is.

    The difference of the two is exact, or far below the rounding of the dtype, as long as `new` was rounded from
    `w + step` with `w` a float32 that rounds to `old` and `step` float32: what cancels is then on the grid of the two.
    Two things no float32 update can do: make a zero -0.0, and hit a number under 2**-15 of `old` to more than 2**-23
    of it where `old` was rounded up to a power of two. A difference past float32's range is its largest number.

    Args:
      old: the parameter, float16 or bfloat16.
      new: a value of its dtype.
    """
    wide_old, wide_new = (jnp.asarray(x).astype(FLOAT32) for x in (old, new))
    same = jax.lax.bitcast_convert_type(wide_old, jnp.int32) == jax.lax.bitcast_convert_type(wide_new, jnp.int32)
    largest = float(jnp.finfo(FLOAT32).max)
    change = wide_new - wide_old
    finite = jnp.isfinite(wide_new) & jnp.isfinite(wide_old)
    return jnp.where(same, jnp.float32(-0.0), jnp.where(finite, jnp.clip(change, -largest, largest), change))


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Like `optax.apply_updates`, with the addition in float32 for every dtype, fp8 included.

    optax's own relies on JAX's implicit promotion of half-precision parameters beside float32 updates, which
    `jax.numpy_dtype_promotion("strict")` refuses, and which fp8 parameters do not have.

    Args:
      params: any pytree; leaves keep their dtypes. `None` and leaves without a gradient stay as they are.
      updates: a tree of the same structure.

    Returns:
      The new parameters.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> mp.transforms.apply_updates({"w": jnp.bfloat16(1)}, {"w": jnp.float32(0.5)})
    {'w': Array(1.5, dtype=bfloat16)}
    """

    def one(param: Any, update: Any) -> Any:
        if not is_inexact_leaf(param):
            return param
        param, update = jnp.asarray(param), jnp.asarray(update)
        return (to_float32(param) + to_float32(update)).astype(param.dtype)

    return jax.tree.map(one, params, updates, is_leaf=lambda x: x is None)
