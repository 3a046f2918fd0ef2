"""Compensated summation for weights in half precision."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._dtypes import FLOAT32
from mpjax._typing import Tree
from mpjax.transforms._half_weights import check_update, check_weights, keep_low, updates_to
from mpjax.transforms._rounding import nearest
from mpjax.transforms._skip_on_overflow import as_transform, check_state
from mpjax.transforms._stored import StoredTransform, as_seen_by, to_float32


class KahanState(NamedTuple):
    """State of `kahan`.

    Attributes:
      inner_state: the wrapped transform's, made for parameters in float32.
      compensation: for each parameter in half precision, in its dtype, what rounding has cut off so far and the next
        step adds; nothing for all others.
    """

    inner_state: Any
    compensation: Tree


def kahan(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that what rounding cuts off a half-precision parameter is added in the next step.

    With `u` the optimizer's step and `c` the compensation, `new = nearest(p + (u + c))` and `c' = (p - new) + (u + c)`,
    in float32 and rounded so that XLA cannot leave it out. `c` is stored in the parameter's dtype: 2 bytes
    beside each weight, and with bfloat16 about 16 bits of precision in all. float16 has as many for weights above 0.1,
    but `c` underflows for small ones.

    A compensation larger than the spacing of its parameter's dtype cannot be the parameter's own, as after loading a
    checkpoint of parameters alone: it is dropped. One that is smaller cannot be told, and displaces the parameter by
    less than that spacing.

    Args:
      inner: any optax transform. Parameters, gradients and so its state are float32 to it.

    Returns:
      A transform with a `KahanState`, for `mpjax.loss_scaled` and `mpjax.skip_on_overflow` directly around it, or for
      use without them. Updates of half-precision parameters are float32, and `optax.apply_updates(params, updates)`
      is `new`, which is never inf where the sum is finite. Parameters in float32 are updated as by `inner` alone.

    Raises:
      TypeError: `inner` is not an optax transform; on update, the state is another transform's.
      ValueError: on init, no parameter is in half precision, or one is in fp8, which has too few bits for `c`; on
        update, there are no params, or their dtypes are not those of init.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.loss_scaled(mp.transforms.kahan(optax.sgd(1.0)), mp.NoOpLossScale())
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     updates, state = tx.update({"w": jnp.full(1, -1e-3, jnp.bfloat16)}, state, params)
    ...     params = mp.transforms.apply_updates(params, updates)
    >>> float(params["w"][0])
    1.1015625

    References:
      Kahan, Further remarks on reducing truncation errors, 1965; Zamirai et al., Revisiting BFloat16 Training, arXiv
      2010.06192.
    """
    inner = as_transform(inner)

    def init(params: Tree) -> KahanState:
        check_weights(
            params,
            "kahan",
            ("float8_e4m3fn", "float8_e5m2"),
            "mp.transforms.stochastic_rounding(inner, jax.random.key(0)), which fp8 can do with",
        )
        return KahanState(inner.init(as_seen_by(inner, params)), keep_low(jnp.zeros_like, params))

    def update(updates: Tree, state: KahanState, params: Tree = None, **extra_args: Any) -> tuple[Tree, KahanState]:
        check_state(state, KahanState)
        check_update(params, "kahan", state.compensation)
        steps, inner_state = inner.update(
            to_float32(updates), state.inner_state, as_seen_by(inner, params), **extra_args
        )
        summed = keep_low(_compensated_sum, params, state.compensation, steps)
        weights = keep_low(lambda p, new: new[0], params, summed)
        compensation = keep_low(lambda p, new: new[1], params, summed)
        return updates_to(params, weights, steps), KahanState(inner_state, compensation)

    return StoredTransform(init, update)


def _compensated_sum(param: Any, compensation: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = param.dtype
    wide, cut_off = (jnp.asarray(x).astype(FLOAT32) for x in (param, compensation))
    # Its own is half the spacing at most, rounded; a half of that leaves the parameter as it is.
    is_its_own = nearest(wide + cut_off / 2, dtype) == param
    step = step.astype(FLOAT32) + jnp.where(is_its_own, cut_off, 0)
    total = wide + step
    new = nearest(total, dtype, saturate=True)
    # (p - new) is exact, (p + step) is not. What is past the largest value is no rounding error.
    left = jnp.where(jnp.abs(total) <= float(jnp.finfo(dtype).max), (wide - new.astype(FLOAT32)) + step, 0)
    return new, nearest(left, dtype)
