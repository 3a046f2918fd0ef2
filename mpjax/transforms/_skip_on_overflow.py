"""An optax wrapper for which a step with non-finite gradients never happened."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._compat import is_float0
from mpjax._errors import listing, problem
from mpjax._loss_scale import LossScale
from mpjax._tree import agreed, all_finite, check_same_structure, instances, is_inexact_leaf, path_name, widen
from mpjax._typing import Scalar, Tree
from mpjax.transforms._norm import global_norm
from mpjax.transforms._stored import as_seen_by, keep_state, stand_still, update_inner


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


def skip_on_overflow(
    inner: optax.GradientTransformation,
    *,
    axis_name: str | Sequence[str] | None = None,
    check_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transform so that a step with non-finite gradients changes nothing at all.

    On such a step the updates are -0.0, which leaves every parameter as it is, -0.0 included (but for subnormal
    numbers on a backend that flushes those in any addition), and the inner state is kept bit for bit: moments,
    counts, schedules, averages, PRNG keys. There is no branch and no host sync: values are selected, never
    multiplied, so no NaN survives, however many steps are skipped in a row.

    The finite check is that of the gradients' sum of squares, which is also what clipping by the global norm
    computes, so that with `optax.clip_by_global_norm` inside it costs nothing. Gradients whose norm is past
    float32's range (1.8e19) are therefore skipped too: their squares would make any second moment inf for good.

    The inner transform sees float32: half-precision gradients and parameters are widened, and so its state is
    made in float32 and keeps its dtypes. (Those of mpjax that have to know how parameters are stored, such as
    `mpjax.transforms.master_weights`, see them so.) It does not see parameters without a gradient (integers,
    booleans, PRNG keys, functions, `None`), as if it were wrapped in `optax.masked`.

    What is outside does see the -0.0 of a skipped step: put the wrapper around `optax.chain` and `optax.MultiSteps`,
    not into them. `MultiSteps` keeps a NaN in its accumulator for good, and whatever comes first in a chain gets
    gradients that are not checked (nor unscaled) yet.

    Args:
      inner: any optax transform; extra arguments are forwarded to it.
      axis_name: under `shard_map` or `pmap`, the axes that have to agree: all skip when one overflows. Under
        `jit` with sharded arrays nothing is needed.
      check_updates: also skip when the inner transform made non-finite updates out of finite gradients (one
        more pass over the updates).

    Raises:
      TypeError: `inner` is not an optax transform; on update, the state is another transform's.
      ValueError: `inner` holds a loss scale, which could then never back off; on update, gradients and params
        differ in structure or shape.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.skip_on_overflow(optax.sgd(0.1))
    >>> params = {"w": jnp.array([1.0])}
    >>> updates, state = tx.update({"w": jnp.array([jnp.nan])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates), int(state.skips_total)
    ({'w': Array([1.], dtype=float32)}, 1)
    """
    inner = as_transform(inner)

    def init(params: Tree) -> SkipOnOverflowState:
        inner_state = jax.tree.map(_strongly_typed, inner.init(as_seen_by(inner, _visible(params))))
        if instances(inner_state, LossScale):
            raise ValueError(
                problem(
                    "the inner transform holds a loss scale: a skipped step would keep it from ever backing off.",
                    expected="mp.loss_scaled outermost; it skips on overflow itself",
                    write="mp.loss_scaled(optax.adamw(3e-4), mp.DynamicLossScale())",
                )
            )
        # Two arrays and not one twice: a donated state must not hold a buffer twice.
        return SkipOnOverflowState(inner_state, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(
        updates: Tree, state: SkipOnOverflowState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, SkipOnOverflowState]:
        check_state(state, SkipOnOverflowState)
        grads = widen(_visible(updates))
        weights = None if params is None else as_seen_by(inner, _visible(params))
        if weights is not None:
            _check_alike(grads, weights)
        finite = jnp.isfinite(global_norm(grads))
        if check_updates:
            steps, new_inner = inner.update(grads, state.inner_state, weights, **extra_args)
            finite = agreed(finite & all_finite(steps), axis_name)
            steps, new_inner = stand_still(finite, steps), keep_state(finite, new_inner, state.inner_state)
        else:
            finite = agreed(finite, axis_name)
            steps, new_inner = update_inner(inner, finite, grads, state.inner_state, weights, extra_args)

        def count(taken: Any, skipped: Any) -> Scalar:
            return jnp.where(finite, taken, optax.safe_increment(jnp.asarray(skipped, jnp.int32)))

        return _with_hidden(steps, updates, params), SkipOnOverflowState(
            new_inner,
            count(jnp.zeros([], jnp.int32), state.skips_in_a_row),
            count(state.skips_total, state.skips_total),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def check_state(state: Any, cls: type[Any]) -> None:
    """Raises a TypeError if `state` is not what the transform's init made."""
    if not isinstance(state, cls):
        raise TypeError(
            problem(
                f"the optimizer state is a {type(state).__name__}.",
                expected=f"the {cls.__name__} that tx.init(params) returned, or one restored into its structure",
                write="opt_state = tx.init(params)",
            )
        )


def as_transform(inner: Any) -> optax.GradientTransformationExtraArgs:
    """An optax transform that takes extra arguments, or a TypeError that says what `inner` is."""
    if isinstance(inner, optax.MultiSteps):
        # It takes extra arguments, but neither it nor its gradient_transformation() says so by its type.
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            problem(
                f"inner is {inner!r}.",
                expected="an optax gradient transformation",
                write="mp.loss_scaled(optax.adamw(3e-4), mp.DynamicLossScale())",
            )
        )
    return optax.with_extra_args_support(inner)


def _is_none(x: Any) -> bool:
    return x is None


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _visible(tree: Tree) -> Tree:
    """The tree with leaves that have no gradient masked out, as `optax.masked` does it."""
    return jax.tree.map(lambda x: x if is_inexact_leaf(x) else optax.MaskedNode(), tree, is_leaf=_is_none)


def _with_hidden(steps: Tree, updates: Tree, params: Tree) -> Tree:
    """Puts an update for each masked leaf back: a zero of the parameter's dtype, or what the gradient was."""
    if not any(map(_is_masked, jax.tree.leaves(steps, is_leaf=_is_masked))):
        return steps

    def one(grad: Any, step: Any, param: Any) -> Any:
        if not _is_masked(step):
            return step
        is_number = hasattr(param, "dtype") and not jnp.issubdtype(param.dtype, jax.dtypes.extended)
        return jnp.zeros(param.shape, param.dtype) if is_float0(grad) and is_number else grad

    return jax.tree.map(one, updates, steps, updates if params is None else params, is_leaf=_is_none)


def _check_alike(grads: Tree, weights: Tree) -> None:
    weights = weights.fast if isinstance(weights, optax.LookaheadParams) else weights
    check_same_structure(grads, weights, "grads", "params")
    pairs = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(weights), strict=True)
    rows = [
        f"{path_name(path) or '<root>'}: {jnp.shape(g)} against {jnp.shape(w)}"
        for (path, g), w in pairs
        if jnp.shape(g) != jnp.shape(w)
    ]
    if rows:
        raise ValueError(
            problem(
                f"grads and params differ in shape at\n{listing(rows)}",
                expected="a gradient of its parameter's shape at every leaf",
                write="mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))(params, batch)",
            )
        )


def _strongly_typed(x: Any) -> Any:
    # A weak-typed leaf (from a Python number) loses its weakness in the first update: a second trace.
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended):  # PRNG keys
        return x
    return jax.lax.convert_element_type(x, jnp.result_type(x))
