"""An optax wrapper that keeps statistics of the gradients, and which of them overflowed first and last."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._errors import problem
from mpjax._loss_scale import LossScale
from mpjax._tree import instances, is_inexact_leaf, path_name
from mpjax._typing import Scalar, Tree
from mpjax.diagnostics._tree_stats import TreeStats, tree_stats
from mpjax.transforms import SkipOnOverflowState, get_loss_scale
from mpjax.transforms._skip_on_overflow import as_transform, check_state


class NonFiniteStep(NamedTuple):
    """A step that was skipped.

    Attributes:
      step: int32, its number, from 0; -1 where there was none.
      loss_scale: float32, the scale of its gradients.
      non_finite: int32 (n,), how many numbers of each leaf were inf or NaN. None at all where the step was skipped for
        a norm past float32's range, or for updates that were not finite (`check_updates`).
    """

    step: Scalar
    loss_scale: Scalar
    non_finite: jax.Array


class GradientMonitorState(NamedTuple):
    """State of `gradient_monitor`.

    Attributes:
      inner_state: the wrapped transform's.
      step: int32, updates so far.
      stats: the last statistics, of the gradients as they came: multiplied by the loss scale.
      stats_step: int32, the step that they are of; -1 before the first.
      stats_scale: float32, the loss scale of that step.
      first_skip, last_skip: the first and the last step that was skipped.
    """

    inner_state: Any
    step: Scalar
    stats: TreeStats
    stats_step: Scalar
    stats_scale: Scalar
    first_skip: NonFiniteStep
    last_skip: NonFiniteStep


def gradient_monitor(
    inner: optax.GradientTransformation,
    every: int | None = 100,
    *,
    dtype: Any = None,
    exponents: tuple[int, int] = (-47, 16),
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `mpjax.loss_scaled` so that its state says how the gradients are, and which leaves overflowed.

    Put it around `mpjax.loss_scaled` or `mpjax.skip_on_overflow`, and nothing else around it. It is the one wrapper
    that belongs there: inside, a skipped step leaves no trace, and those are what it is asked about; outside, gradients
    are still scaled, as a float16 backward pass makes them, and it only looks at them. `mpjax.get_loss_scale` finds the
    scale as before; `skips_total` is in `opt_state.inner_state.skip_state`.

    On a step that is measured the gradients are read as `tree_stats` says, and on a skipped step once; on all others
    the branches that do so are not entered. But `jax.vmap` computes both sides of a branch: a `vmap` over optimizers
    pays on each step what a measured one costs.

    Numbers that float16 has flushed to 0 on the way count in `zeros`: what the statistics say that a format would lose
    is what else it would.

    Args:
      inner: the loss-scaled optimizer; extra arguments are forwarded to it.
      every: measures steps 0, `every`, 2 * `every`, ...; with `None` there is no monitor: `inner` as it is.
      dtype: as in `tree_stats`.
      exponents: as in `tree_stats`.
      axis_name: as in `tree_stats`: what `inner` got.

    Returns:
      A transform with a `GradientMonitorState`, whose updates are those of `inner`. `mpjax.diagnostics.summary` says
      the state in words, `mpjax.diagnostics.scalars` in numbers.

    Raises:
      TypeError: `inner` is not an optax transform, `every` no whole number; on update, the state is another
        transform's.
      ValueError: `every` is below 1; on init, `inner` skips no steps, or in more than one place; on update, the
        gradients have other leaves than the parameters; and as `tree_stats`.

    >>> import jax, jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.diagnostics.gradient_monitor(mp.loss_scaled(optax.adam(1e-3), mp.DynamicLossScale()))
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    >>> state = tx.init(params)
    >>> _, state = tx.update({"w": jnp.array([1.0, jnp.inf]), "b": jnp.zeros(1)}, state, params)
    >>> int(state.first_skip.step), dict(zip(state.stats.paths, state.first_skip.non_finite.tolist()))
    (0, {'b': 0, 'w': 1})
    """
    inner = as_transform(inner)
    if every is None:
        return inner
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(problem(f"every is {every!r}.", expected="a whole number, or None for no monitor", write="100"))
    if every < 1:
        raise ValueError(problem(f"every is {every}.", expected="1 or more, or None for no monitor", write="every=100"))

    def init(params: Tree) -> GradientMonitorState:
        inner_state = inner.init(params)
        _skip_state(inner_state)
        paths, leaves = _numbers(params)
        # Shapes alone, for which no axis is needed: init may be outside of shard_map.
        shapes = jax.eval_shape(lambda: tree_stats(leaves, dtype, exponents=exponents))._replace(paths=paths)
        stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        # Each its own arrays: a donated state must not hold a buffer twice.
        def no_step() -> tuple[Scalar, Scalar]:
            return jnp.full([], -1, jnp.int32), jnp.zeros([], jnp.float32)

        skips = [NonFiniteStep(*no_step(), jnp.zeros(len(paths), jnp.int32)) for _ in range(2)]
        return GradientMonitorState(inner_state, jnp.zeros([], jnp.int32), stats, *no_step(), *skips)

    def update(
        updates: Tree, state: GradientMonitorState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, GradientMonitorState]:
        check_state(state, GradientMonitorState)
        paths, grads = _numbers(updates)
        _check_paths(paths, state.stats.paths)
        scale = _scale(state.inner_state)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        skipped = ~_skip_state(inner_state).last_step_finite

        def measure() -> tuple[TreeStats, Any, Any]:
            stats = tree_stats(grads, dtype, exponents=exponents, axis_name=axis_name)
            return stats._replace(paths=paths), state.step, scale

        def look() -> tuple[NonFiniteStep, NonFiniteStep]:
            counts = jnp.asarray([jnp.sum(~jnp.isfinite(x)) for x in grads], jnp.int32)
            last = NonFiniteStep(state.step, scale, counts if axis_name is None else jax.lax.psum(counts, axis_name))
            is_first = state.first_skip.step < 0
            return jax.tree.map(lambda new, old: jnp.where(is_first, new, old), last, state.first_skip), last

        def when(pred: Any, changed: Callable[[], Any], kept: Any) -> Any:
            return jax.lax.cond(pred, changed, lambda: kept)

        due = state.step % every == 0
        stats, stats_step, stats_scale = when(due, measure, (state.stats, state.stats_step, state.stats_scale))
        first, last = when(skipped, look, (state.first_skip, state.last_skip))
        step = optax.safe_increment(state.step)
        return updates, GradientMonitorState(inner_state, step, stats, stats_step, stats_scale, first, last)

    return optax.GradientTransformationExtraArgs(init, update)


def _numbers(tree: Tree) -> tuple[tuple[str, ...], list[Any]]:
    """The leaves that have a gradient, with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = [(path_name(path) or "<root>", x) for path, x in leaves if is_inexact_leaf(x)]
    return tuple(path for path, _ in found), [x for _, x in found]


def _check_paths(paths: Sequence[str], expected: Sequence[str]) -> None:
    if paths != expected:
        others = ", ".join(sorted(set(paths) ^ set(expected))) or "another order"
        raise ValueError(
            problem(
                f"gradients differ from the parameters that tx.init saw: {others}.",
                expected="a gradient for each parameter",
                write="tx.init(params), with the params that are differentiated",
            )
        )


def _scale(inner_state: Any) -> Scalar:
    """The loss scale of the gradients that come next; 1 without any."""
    if not instances(inner_state, LossScale):
        return jnp.float32(1)
    factor = get_loss_scale(inner_state)._factor()
    return jnp.float32(1) if factor is None else jnp.asarray(factor, jnp.float32)


def _skip_state(inner_state: Any) -> SkipOnOverflowState:
    found = [state for _, state in instances(inner_state, SkipOnOverflowState)]
    if len(found) != 1:
        raise ValueError(
            problem(
                f"gradient_monitor is around a transform that skips steps in {len(found)} places.",
                expected="one mp.loss_scaled or mp.skip_on_overflow inside, whose skipped steps it is to see",
                write="mp.diagnostics.gradient_monitor(mp.loss_scaled(optax.adamw(3e-4), loss_scale))",
            )
        )
    return found[0]
