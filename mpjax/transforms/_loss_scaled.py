"""The optax side of loss scaling: unscale, skip on overflow, and both with the state they need."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._compat import is_float0
from mpjax._dynamic_loss_scale import as_loss_scale
from mpjax._errors import listing, problem
from mpjax._loss_scale import LossScale
from mpjax._tree import all_finite, check_same_structure, path_name, widen
from mpjax._typing import Scalar, Tree
from mpjax.transforms._norm import global_norm


class SkipOnOverflowState(NamedTuple):
    """State of `skip_on_overflow`.

    Attributes:
      inner_state: the wrapped transform's; unchanged, bit for bit, by a skipped step.
      skips_in_a_row: int32, steps skipped since the last one that was taken.
      skips_total: int32, steps skipped in all.
    """

    inner_state: Any
    skips_in_a_row: Scalar
    skips_total: Scalar

    @property
    def last_step_finite(self) -> Scalar:
        """Whether the last step was taken: a bool of shape ()."""
        return jnp.asarray(self.skips_in_a_row) == 0


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


def skip_on_overflow(
    inner: optax.GradientTransformation,
    *,
    axis_name: str | Sequence[str] | None = None,
    check_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transform so that a step with non-finite gradients changes nothing at all.

    On such a step the updates are -0.0 (which leaves every parameter's bits, -0.0 included, as they are) and the
    inner state is kept: moments, counts, schedules, averages, PRNG keys. There is no branch and no host
    sync: values are selected, never multiplied, so no NaN survives, however many steps are skipped in a row.

    The finite check is that of the gradients' sum of squares, which is also what clipping by the global norm
    computes, so that with `optax.clip_by_global_norm` inside it costs nothing. Gradients whose norm is past
    float32's range (1.8e19) are therefore skipped too: their squares would make any second moment inf for good.

    The inner transform sees float32: half-precision gradients and parameters are widened, and so its state is
    made in float32 and keeps its dtypes.

    Args:
      inner: any optax transform; extra arguments are forwarded to it.
      axis_name: under `shard_map` or `pmap`, the axes that have to agree: all skip when one overflows. Under
        `jit` with sharded arrays nothing is needed.
      check_updates: also skip when the inner transform made non-finite updates out of finite gradients (one
        more pass over the updates).

    Raises:
      TypeError: `inner` is not an optax transform.
      ValueError: on update, gradients and params have different tree structures.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.skip_on_overflow(optax.sgd(0.1))
    >>> params = {"w": jnp.array([1.0])}
    >>> updates, state = tx.update({"w": jnp.array([jnp.nan])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates), int(state.skips_total)
    ({'w': Array([1.], dtype=float32)}, 1)
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            problem(
                f"inner is {inner!r}.",
                expected="an optax gradient transformation",
                write="mp.loss_scaled(optax.adamw(3e-4), mp.DynamicLossScale())",
            )
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SkipOnOverflowState:
        zero = jnp.zeros([], jnp.int32)
        return SkipOnOverflowState(jax.tree.map(_strongly_typed, inner.init(widen(params))), zero, zero)

    def update(
        updates: Tree, state: SkipOnOverflowState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, SkipOnOverflowState]:
        if params is not None:
            check_same_structure(updates, params, "grads", "params")
        updates = widen(updates)
        finite = jnp.isfinite(global_norm(updates))
        new_updates, new_inner = inner.update(updates, state.inner_state, widen(params), **extra_args)
        if check_updates:
            finite = finite & all_finite(new_updates)
        if axis_name is not None:
            # An integer, since collectives take no booleans.
            finite = jax.lax.pmin(finite.astype(jnp.int32), axis_name) == 1

        def standstill(u: Any) -> Any:
            # x + -0.0 is x for every x; x + 0.0 would turn -0.0 into 0.0.
            return u if is_float0(u) else jnp.where(finite, u, jnp.asarray(-0.0, u.dtype))

        def keep(new: Any, old: Any) -> Any:
            # Some transforms let a state's dtype follow the gradients; a fixed one means one trace, ever.
            return jnp.where(finite, jnp.asarray(new, old.dtype), old)

        def count(taken: Scalar, skipped: Scalar) -> Scalar:
            return jnp.where(finite, taken, optax.safe_increment(skipped))

        return jax.tree.map(standstill, new_updates), SkipOnOverflowState(
            jax.tree.map(keep, new_inner, state.inner_state),
            count(jnp.zeros([], jnp.int32), state.skips_in_a_row),
            count(state.skips_total, state.skips_total),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scaled(
    inner: optax.GradientTransformation,
    loss_scale: Any,
    *,
    axis_name: str | Sequence[str] | None = None,
    check_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it owns the loss scale: unscales, skips on overflow, adapts the scale.

    It takes the still-scaled gradients of `mpjax.value_and_grad(loss_fn, mpjax.get_loss_scale(opt_state))`.
    Put it outermost, around `optax.chain` and `optax.MultiSteps`: then nothing outside can move on a skipped step.

    Args:
      inner: any optax transform. It sees true gradients in float32, so clip at the norm that you mean.
      loss_scale: the initial state, `policy.loss_scale()` or `DynamicLossScale(...)`; jmp's are converted.
      axis_name: as in `skip_on_overflow`.
      check_updates: as in `skip_on_overflow`.

    Returns:
      A transform with a `LossScaledState`. With `NoOpLossScale` nothing is multiplied, and a step with non-finite
      gradients is skipped all the same. Updates are float32 for half-precision parameters.

    Raises:
      TypeError: `inner` is not an optax transform, or `loss_scale` not a loss scale.
      ValueError: on update, gradients and params have different tree structures.

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
        return LossScaledState(initial, skip.init(params))

    def update(
        updates: Tree, state: LossScaledState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, LossScaledState]:
        # Unscale with the scale that was used, and only then adjust it.
        unscaled = state.loss_scale.unscale(updates)
        updates, skip_state = skip.update(unscaled, state.skip_state, params, **extra_args)
        return updates, LossScaledState(state.loss_scale.adjust(skip_state.last_step_finite), skip_state)

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
    leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda x: isinstance(x, LossScale))
    found = [(path, leaf) for path, leaf in leaves if isinstance(leaf, LossScale)]
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


def _strongly_typed(x: Any) -> Any:
    # A weak-typed leaf (from a Python number) loses its weakness in the first update: a second trace.
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended):  # PRNG keys
        return x
    return jax.lax.convert_element_type(x, jnp.result_type(x))
