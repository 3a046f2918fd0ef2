"""`mpjax.diagnostics.summary`: what an optimizer's state says of its loss scale and its gradients."""

import dataclasses
from typing import Any

import jax
import numpy as np

from mpjax._dynamic_loss_scale import DynamicLossScale
from mpjax._errors import problem
from mpjax._loss_scale import LossScale, StaticLossScale
from mpjax._tree import instances
from mpjax.diagnostics._advice import advice_for
from mpjax.diagnostics._gradient_monitor import GradientMonitorState, NonFiniteStep
from mpjax.diagnostics._summary_value import FormatLoss, Measured, SkippedStep, Summary
from mpjax.diagnostics._tree_stats import TreeStats
from mpjax.transforms import SkipOnOverflowState


def summary(opt_state: Any) -> Summary:
    """Says what the loss scaler did, which leaves overflowed first and last, and what to do about it.

    For the host, between steps: it waits for the state and copies a few small arrays of it, once.

    Args:
      opt_state: the state of `mpjax.loss_scaled` or `mpjax.skip_on_overflow`, wherever it is nested. With
        `mpjax.diagnostics.gradient_monitor` around it there is more to say: which leaves, and what formats lose.

    Returns:
      A `Summary`: prints as text; its fields, `to_dict()` and `to_json()` are the same as data.

    Raises:
      ValueError: the state skips no steps, or has several loss scales, or one for each member of an ensemble.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.diagnostics.gradient_monitor(mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale()))
    >>> params = {"w": jnp.ones(2)}
    >>> _, state = tx.update({"w": jnp.array([1.0, jnp.inf])}, tx.init(params), params)
    >>> found = mp.diagnostics.summary(state)
    >>> found.skips_total, found.first_skip.leaves
    (1, (('w', 1),))
    >>> print(str(found).split(chr(10))[2])
    skipped first: step 0, at scale 2**16: w (1 not finite)
    """
    skip = _one(opt_state, SkipOnOverflowState)
    if skip is None:
        raise ValueError(
            problem(
                "the optimizer state has no loss scale, and skips no steps.",
                expected="the state of mp.loss_scaled or mp.skip_on_overflow",
                write="mp.diagnostics.summary(opt_state), with opt_state = mp.loss_scaled(...).init(params)",
            )
        )
    scale, monitor = _one(opt_state, LossScale), _one(opt_state, GradientMonitorState)
    wanted = (skip.skips_total, skip.skips_in_a_row, scale or (), monitor[1:] if monitor else ())
    total, in_a_row, scale, monitor = jax.device_get(without_boxes(wanted))
    if total.shape != ():
        raise ValueError(
            problem(
                f"the optimizer state is that of {total.shape[0]} members.",
                expected="one state; an ensemble has one a member",
                write="mp.diagnostics.summary(jax.tree.map(lambda x: x[0], opt_state)), for the first",
            )
        )
    found = Summary(**_of_scale(scale), skips_total=int(total), skips_in_a_row=int(in_a_row), **_of_monitor(*monitor))
    return dataclasses.replace(found, advice=advice_for(found))


def _one(opt_state: Any, cls: type[Any]) -> Any:
    """The one thing of a type in a state, or None."""
    found = [x for _, x in instances(opt_state, cls)]
    if len(found) > 1:
        raise ValueError(
            problem(
                f"the optimizer state has {len(found)} times a {cls.__name__}.",
                expected="one: a loss has one scale",
                write="tx = mp.diagnostics.gradient_monitor(mp.loss_scaled(optax.chain(...), loss_scale))",
            )
        )
    return found[0] if found else None


def without_boxes(tree: Any) -> Any:
    """Arrays in place of the boxes that nnx.Optimizer keeps each of them in."""
    return jax.tree.map(
        lambda box: jax.tree.leaves(box)[0], tree, is_leaf=lambda x: not isinstance(x, tuple | TreeStats | LossScale)
    )


def _of_scale(scale: Any) -> dict[str, Any]:
    dynamic = ("clean_steps", "period", "min_loss_scale", "max_loss_scale", "at_floor")
    if not isinstance(scale, DynamicLossScale):
        is_static = isinstance(scale, StaticLossScale)
        values = {"kind": "static" if is_static else "none", "loss_scale": scale.loss_scale if is_static else 1.0}
        return {**values, **dict.fromkeys(dynamic)}
    return {
        "kind": "dynamic",
        "loss_scale": float(scale._factor()),  # repaired, as the next step will
        "clean_steps": int(scale.counter),
        "period": scale.period,
        "min_loss_scale": scale.min_loss_scale,
        "max_loss_scale": scale.max_loss_scale,
        "at_floor": int(scale.at_floor),
    }


def _of_monitor(
    steps: Any = None, stats: Any = None, step: Any = -1, scale: Any = 1.0, first: Any = None, last: Any = None
) -> dict[str, Any]:
    measured = None if step < 0 else _measured(stats, int(step), float(scale))
    skips = {
        name: None if skip is None or skip.step < 0 else _skipped(skip, stats.paths)
        for name, skip in (("first_skip", first), ("last_skip", last))
    }
    return {"steps": None if steps is None else int(steps), **skips, "measured": measured}


def _skipped(skip: NonFiniteStep, paths: tuple[str, ...]) -> SkippedStep:
    leaves = tuple((path, int(n)) for path, n in zip(paths, skip.non_finite, strict=True) if n)
    return SkippedStep(int(skip.step), float(skip.loss_scale), leaves)


def _measured(stats: TreeStats, step: int, scale: float) -> Measured:
    # A tree may have more numbers than int32 can count.
    size, non_finite, zeros = (x.astype(np.int64) for x in (stats.size, stats.non_finite, stats.zeros))
    numbers = size - non_finite - zeros
    known = numbers > 0
    return Measured(
        step,
        scale,
        int(size.sum()),
        int(non_finite.sum()),
        int(zeros.sum()),
        int(stats.min_exponent[known].min()) if known.any() else None,
        int(stats.max_exponent[known].max()) if known.any() else None,
        tuple(_format_loss(stats, numbers, name, i) for i, name in enumerate(stats.formats)),
    )


def _format_loss(stats: TreeStats, numbers: Any, name: str, index: int) -> FormatLoss:
    counts = [x[:, index].astype(np.int64) for x in (stats.overflow, stats.subnormal, stats.underflow)]
    overflow, subnormal, zero = (float(count.sum() / max(numbers.sum(), 1)) for count in counts)
    lost = (counts[0] + counts[2]) / np.maximum(numbers, 1)
    worst = int(lost.argmax()) if lost.size else 0
    share = float(lost[worst]) if lost.size else 0.0
    return FormatLoss(name, overflow, subnormal, zero, stats.paths[worst] if share else "", share)
