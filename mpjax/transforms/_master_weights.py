"""Float32 masters for weights in half precision: whole, or as the 16 bits that bfloat16 leaves out."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._dtypes import FLOAT32
from mpjax._errors import problem
from mpjax._typing import Tree
from mpjax.transforms._half_weights import (
    check_update,
    check_weights,
    is_low,
    keep_low,
    updates_to,
)
from mpjax.transforms._rounding import nearest
from mpjax.transforms._skip_on_overflow import as_transform, check_state
from mpjax.transforms._stored import SelectingTransform, as_seen_by, keep_state, stand_still, to_float32

# From what is to be kept after a step to what is kept: the old, where the step is skipped.
_Choose = Callable[[jax.Array], jax.Array]


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      inner_state: the wrapped transform's, made for the masters.
      masters: for each parameter in half precision its float32 master, or with `form="remainder"` the int16 that is the
        master less the weight, in units of the last bit; nothing for all others.
    """

    inner_state: Any
    masters: Tree


def master_weights(
    inner: optax.GradientTransformation, *, form: Literal["float32", "remainder"] = "float32"
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it steps float32 masters of parameters stored in half precision.

    A step below half the spacing of bfloat16, 1/512 to 1/256 of a weight, is lost when it is added to it; the master
    collects them. `optax.apply_updates(params, updates)` is the master rounded to the parameter's dtype: the nearest
    value, ties to even, and the largest finite one where the master is past it. (That is what float32 updates can do:
    they never make a zero -0.0, and where one step takes a weight that was rounded up to a power of two across zero, to
    less than 2**-15 of it, the parameter may miss its master by 2**-23 of the old weight.)

    Parameters that are not their master rounded, as after loading a checkpoint of parameters alone, are new masters
    themselves, number by number. With `form="remainder"` that cannot be told: the weights are those that were loaded,
    and each master is its weight displaced by the 16 bits that the state happens to hold, by half the spacing of
    bfloat16 at most. `tx.init(params)` starts without any.

    Args:
      inner: any optax transform. Parameters, gradients and so its state are float32 to it.
      form: `"float32"` keeps masters as they are: 4 bytes beside each weight. `"remainder"`, for bfloat16 alone, keeps
        the lower 16 bits of each: 2 bytes beside the weight's 2, and the same masters bit for bit, but for two cases.
        A master half-way between two weights is rounded away from zero, not to even, since 65537 float32 numbers round
        to each even bfloat16; and masters end at 3.395e38, the largest that rounds to a finite weight.

    Returns:
      A transform with a `MasterWeightsState`, for `mpjax.loss_scaled` and `mpjax.skip_on_overflow` directly around
      it, or for use without them. Updates of half-precision parameters are float32. Parameters in float32 are their
      own masters, and are updated as by `inner` alone.

    Raises:
      TypeError: `inner` is not an optax transform; on update, the state is another transform's.
      ValueError: `form` is unknown; on init, no parameter is in half precision, or one is in float16 or fp8 with
        `form="remainder"`; on update, there are no params, or their dtypes are not those of init.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.loss_scaled(mp.transforms.master_weights(optax.sgd(1.0)), mp.NoOpLossScale())
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     updates, state = tx.update({"w": jnp.full(1, -1e-3, jnp.bfloat16)}, state, params)
    ...     params = mp.transforms.apply_updates(params, updates)
    >>> float(params["w"][0]), state.skip_state.inner_state.masters["w"]
    (1.1015625, Array([1.0999451], dtype=float32))

    References:
      Micikevicius et al., Mixed Precision Training, arXiv 1710.03740. The remainder is that of Apex's
      `DistributedFusedAdam(store_param_remainders=True)`.
    """
    if form not in _FORMS:
        raise ValueError(
            problem(
                f"form is {form!r}.",
                expected='"float32" (4 bytes beside each weight) or "remainder" (2, for bfloat16 alone)',
                write='mp.transforms.master_weights(inner, form="remainder")',
            )
        )
    inner = as_transform(inner)
    join, split, refused = _FORMS[form]

    def init(params: Tree) -> MasterWeightsState:
        check_weights(
            params, "master_weights", refused, 'mp.transforms.master_weights(inner, form="float32"), for any dtype'
        )
        # Widened twice: what the inner transform keeps of the parameters must not be the same buffer, for donation.
        kept = keep_low(lambda p: split(jnp.asarray(p).astype(FLOAT32), p.dtype)[1], params)
        return MasterWeightsState(inner.init(as_seen_by(inner, to_float32(params))), kept)

    def update(
        updates: Tree, state: MasterWeightsState, params: Tree = None, *, taken: Any = None, **extra_args: Any
    ) -> tuple[Tree, MasterWeightsState]:
        check_state(state, MasterWeightsState)
        check_update(params, "master_weights", state.masters)
        masters = jax.tree.map(lambda p, kept: join(p, kept) if is_low(p) else p, params, state.masters)
        steps, inner_state = inner.update(
            to_float32(updates), state.inner_state, as_seen_by(inner, masters), **extra_args
        )

        def stepped(param: Any, master: jax.Array, step: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
            return split(master + step.astype(FLOAT32), param.dtype, lambda new: _chosen(taken, new, kept))

        pairs = keep_low(stepped, params, masters, steps, state.masters)
        weights = keep_low(lambda p, pair: pair[0], params, pairs)
        kept = keep_low(lambda p, pair: pair[1], params, pairs)
        steps = updates_to(params, weights, steps)
        if taken is not None:
            steps, inner_state = stand_still(taken, steps), keep_state(taken, inner_state, state.inner_state)
        return steps, MasterWeightsState(inner_state, kept)

    return SelectingTransform(init, update)


def _chosen(taken: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if taken is None else jnp.where(taken, new, old)


def _whole(weight: Any, master: jax.Array) -> jax.Array:
    weight = jnp.asarray(weight)
    bits = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
    is_its_master = nearest(master, weight.dtype, saturate=True)
    a, b = (jax.lax.bitcast_convert_type(x, bits) for x in (is_its_master, weight))
    # Integers, since comparing floats takes subnormal numbers for zeros on a backend that flushes them.
    same = (a == b) | ((a | b) << 1 == 0)
    return jnp.where(same, master, weight.astype(FLOAT32))


def _keep_whole(master: jax.Array, dtype: Any, choose: _Choose = lambda new: new) -> tuple[jax.Array, jax.Array]:
    return nearest(master, dtype, saturate=True), choose(master)


def _join(weight: Any, remainder: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(jnp.asarray(weight), jnp.uint16).astype(jnp.int32)
    remainder = remainder.astype(jnp.int32)
    code = bits & 0x7FFF
    magnitude = (code << 16) + jnp.where(code < _INF, remainder, 0)
    negative = jnp.where(code == 0, remainder < 0, bits >= 0x8000)
    magnitude = jnp.where(code == 0, remainder & 0x7FFF, magnitude)
    return jax.lax.bitcast_convert_type((negative.astype(jnp.int32) << 31) | magnitude, FLOAT32)


def _split(master: jax.Array, dtype: Any, choose: _Choose = lambda new: new) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(master, jnp.int32)
    negative, magnitude = bits < 0, bits & 0x7FFFFFFF
    finite = jnp.minimum(magnitude, _LARGEST_MASTER)
    magnitude = jnp.where(magnitude < _INF << 16, finite, jnp.where(magnitude == _INF << 16, magnitude, _NAN << 16))
    # The lower half as a signed number: from 0x8000 on, how far it is to the weight above. Where the weight is zero it
    # has a bit to spare, for the sign, which no update can give to a zero.
    spare = jnp.where(negative & (magnitude < 0x8000), 0x8000, 0)
    remainder = choose((magnitude + spare).astype(jnp.int16))
    # From what is kept, so that XLA for TPU writes both in one pass: two 16-bit outputs it else computes separately.
    # In a skipped step that makes no weight, and it is not used.
    code = (magnitude - remainder.astype(jnp.int32)) >> 16
    weight = jax.lax.bitcast_convert_type((code | (negative.astype(jnp.int32) << 15)).astype(jnp.uint16), dtype)
    return weight, remainder


# Magnitudes as bfloat16 has them, and the largest float32 that rounds to a finite one.
_INF, _NAN, _LARGEST_MASTER = 0x7F80, 0x7FC0, 0x7F7F7FFF

_Join = Callable[[Any, jax.Array], jax.Array]
_Split = Callable[..., tuple[jax.Array, jax.Array]]
# For each form: the master of a weight and what was kept, the weight of a master and what to keep, and what it refuses.
_FORMS: dict[str, tuple[_Join, _Split, tuple[str, ...]]] = {
    "float32": (_whole, _keep_whole, ()),
    "remainder": (_join, _split, ("float16", "float8_e4m3fn", "float8_e5m2")),
}
