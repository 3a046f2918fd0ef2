"""The optax side of loss scaling: unscaling, and the wrapper that owns the loss scale."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._convert import as_loss_scale
from mpjax._errors import listing, problem
from mpjax._loss_scale import LossScale
from mpjax._tree import agreed, check_flag, instances, path_name
from mpjax._typing import Tree
from mpjax.transforms._skip_on_overflow import SkipOnOverflowState, check_state, skip_on_overflow


class LossScaledState(NamedTuple):
    """State of `loss_scaled`.

    Attributes:
      loss_scale: the loss scale to use in the next step.
      skip_state: a `SkipOnOverflowState` with the wrapped transform's state and the counts of skipped steps.
    """

    loss_scale: LossScale
    skip_state: SkipOnOverflowState


def unscale() -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the loss scale that they were computed with, in float32.

    The scale comes with each update: `tx.update(grads, opt_state, params, loss_scale=loss_scale)`. A part of
    `mpjax.loss_scaled` for those who keep the loss scale themselves; adjust it only after the update.

    Raises:
      ValueError: the update was called without `loss_scale`.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> tx = mp.unscale()
    >>> scale = mp.StaticLossScale(1024.0)
    >>> tx.update({"w": jnp.float16(2048)}, tx.init(None), loss_scale=scale)[0]
    {'w': Array(2., dtype=float32)}
    """

    def update(
        updates: Tree, state: Any, params: Tree = None, *, loss_scale: Any = None, **extra_args: Any
    ) -> tuple[Tree, Any]:
        del params, extra_args
        if loss_scale is None:
            raise ValueError(
                problem(
                    "mp.unscale() was updated without the loss scale.",
                    expected="the loss scale that the gradients were computed with",
                    write="tx.update(grads, opt_state, params, loss_scale=loss_scale), or mp.loss_scaled(inner)",
                )
            )
        return as_loss_scale(loss_scale).unscale(updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def loss_scaled(
    inner: optax.GradientTransformation,
    loss_scale: Any,
    *,
    axis_name: str | Sequence[str] | None = None,
    check_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it owns the loss scale: unscales, skips on overflow, adapts the scale.

    It takes the still-scaled gradients of `mpjax.value_and_grad(loss_fn, mpjax.get_loss_scale(opt_state))`.
    Put it outermost, around `optax.chain` and `optax.MultiSteps`, for the reasons that `skip_on_overflow` gives.

    A skipped step does not count inside: schedules, bias corrections and `optax.MultiSteps` go by the steps that were
    taken. A counter outside, such as the `step` of Flax's `TrainState`, counts all; `skips_total` is the difference.

    Where an overflow was seen that the gradients do not show any more (`mpjax.accumulate` dropped a microbatch), say
    `tx.update(grads, opt_state, params, overflowed=dropped.any())`: the step is taken, and the scale backs off.

    Args:
      inner: any optax transform. It sees true gradients in float32, so clip at the norm that you mean.
      loss_scale: the initial state, `policy.loss_scale()` or `DynamicLossScale(...)`; jmp's are converted.
      axis_name: as in `skip_on_overflow`.
      check_updates: as in `skip_on_overflow`.

    Returns:
      A transform with a `LossScaledState`. With `NoOpLossScale` nothing is multiplied, and a step with non-finite
      gradients is skipped all the same. Updates are float32 for half-precision parameters.

    Raises:
      TypeError: `inner` is not an optax transform, or `loss_scale` not a loss scale; on update, the state is
        another transform's, or `overflowed` is not one boolean.
      ValueError: `inner` holds a loss scale already; on update, gradients and params differ in structure or shape.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4)), mp.DynamicLossScale())
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = tx.init(params)
    >>> loss_fn = lambda params, x: jnp.sum((params["w"] * x) ** 2)
    >>> loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))(params, 3.0)
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> float(loss), float(mp.get_loss_scale(opt_state).loss_scale), int(opt_state.skip_state.skips_total)
    (18.0, 65536.0, 0)
    """
    initial = as_loss_scale(loss_scale)
    skip = skip_on_overflow(inner, axis_name=axis_name, check_updates=check_updates)

    def init(params: Tree) -> LossScaledState:
        # Copies: the state may be donated, and the next init must find the initial arrays alive.
        return LossScaledState(jax.tree.map(jnp.copy, initial), skip.init(params))

    def update(
        updates: Tree, state: LossScaledState, params: Tree = None, *, overflowed: Any = None, **extra_args: Any
    ) -> tuple[Tree, LossScaledState]:
        check_state(state, LossScaledState)
        # Unscale with the scale that was used, and only then adjust it.
        unscaled = state.loss_scale.unscale(updates)
        updates, skip_state = skip.update(unscaled, state.skip_state, params, **extra_args)
        clean = skip_state.last_step_finite
        if overflowed is not None:
            clean = agreed(clean & ~check_flag(overflowed, "overflowed"), axis_name)
        return updates, LossScaledState(state.loss_scale.adjust(clean), skip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def get_loss_scale(opt_state: Any) -> LossScale:
    """Finds the one loss scale in an optimizer state, however deep in chains and wrappers it is.

    Args:
      opt_state: the state of a transform that holds one `loss_scaled`.

    Raises:
      ValueError: the state has no loss scale, or more than one (their paths are listed).

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = optax.chain(optax.identity(), mp.loss_scaled(optax.sgd(0.1), mp.StaticLossScale(128.0)))
    >>> mp.get_loss_scale(tx.init(jnp.ones(3))).loss_scale
    128.0
    """
    found = instances(opt_state, LossScale)
    if len(found) != 1:
        rows = [f"{path_name(path)}: {type(leaf).__name__}" for path, leaf in found]
        raise ValueError(
            problem(
                f"the optimizer state has {len(found)} loss scales{':' if rows else '.'}\n{listing(rows)}".rstrip(),
                expected="exactly one: a loss has one scale",
                write="tx = mp.loss_scaled(optax.chain(...), mp.DynamicLossScale()), once and outermost",
            )
        )
    scale: LossScale = found[0][1]
    return scale
