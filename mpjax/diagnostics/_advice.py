"""What follows from a summary: rules, each with its reason."""

from collections.abc import Callable
from typing import NamedTuple

from mpjax.diagnostics._summary_value import Advice, Summary, power, times

# Exponents of float16: numbers from 2**16 on overflow, and one halving of the scale is to leave room below that.
_FLOAT16_MAX_EXPONENT = 15
# A scale in balance skips one step a period; a period of 50 steps or more wastes less than this share of them.
_OFTEN = 0.02
# Of the numbers, this share may be subnormal or lost without anyone seeing it in a loss curve.
_MANY = 0.05


class _Rule(NamedTuple):
    """A row of the table.

    Attributes:
      name: of the rule.
      applies: whether the advice follows from a summary.
      text: what to do.
      reason: why.
    """

    name: str
    applies: Callable[[Summary], bool]
    text: Callable[[Summary], str]
    reason: str


def advice_for(found: Summary) -> tuple[Advice, ...]:
    """The advice of every rule that applies."""
    return tuple(Advice(rule.name, rule.text(found), rule.reason) for rule in RULES if rule.applies(found))


def _no_step_was_taken(s: Summary) -> bool:
    return bool(s.skips_total) and s.skips_total == s.steps


def _scaling_cannot_help(s: Summary) -> bool:
    return s.kind == "none" or bool(s.at_floor)


def _share(s: Summary) -> float:
    return s.skips_total / s.steps if s.steps else 0.0


def _is_first_search(s: Summary) -> bool:
    """Whether all skipped steps were the first ones, in which the scale came down from where it started."""
    first, last = s.first_skip, s.last_skip
    return first is not None and last is not None and first.step == 0 and last.step + 1 == s.skips_total


def _headroom(s: Summary) -> int:
    """By how many powers of two the gradients could still grow in float16."""
    if s.measured is None or s.measured.max_exponent is None:
        return 0
    return _FLOAT16_MAX_EXPONENT - s.measured.max_exponent


def _many_are_small(s: Summary) -> bool:
    row = s.measured.format("float16") if s.measured else None
    return row is not None and row.subnormal + row.zero > _MANY


def _bfloat16_would_keep_them(s: Summary) -> bool:
    row = s.measured.format("bfloat16") if s.measured else None
    return row is None or row.subnormal + row.zero + row.overflow < _MANY


def _skips_often(s: Summary) -> bool:
    is_search = _is_first_search(s)
    return s.kind == "dynamic" and not s.at_floor and s.skips_total >= 5 and _share(s) > _OFTEN and not is_search


def _range_is_too_wide(s: Summary) -> bool:
    no_room = _headroom(s) < 4 or (s.kind == "dynamic" and s.skips_total > 0)
    return s.kind != "none" and not s.at_floor and _many_are_small(s) and no_room and _bfloat16_would_keep_them(s)


def _could_be_higher(s: Summary) -> bool:
    return s.kind != "none" and s.skips_total == 0 and _many_are_small(s) and _headroom(s) >= 4


RULES = (
    _Rule(
        "data",
        lambda s: _no_step_was_taken(s) and _scaling_cannot_help(s),
        lambda s: (
            f"your data, your parameters or your loss have NaN or inf, or the forward pass overflows: gradients were "
            f"not finite from step 0 on"
            f"{f', down to scale {power(s.loss_scale)}' if s.kind == 'dynamic' else ''}. "
            "mp.diagnostics.locate_nonfinite finds the operation"
        ),
        "no step was taken at any scale, and a scale moves gradients alone; a forward pass that leaves float16's range "
        "stays in bfloat16's",
    ),
    _Rule(
        "floor",
        lambda s: bool(s.at_floor) and not _no_step_was_taken(s),
        lambda s: (
            f"look for NaN or inf in the data and the loss"
            f"{f' of step {s.last_skip.step:,}' if s.last_skip else ''}: gradients overflowed "
            f"{times(s.at_floor or 0)} at the scale's floor of {power(s.min_loss_scale or 0)}"
            f"{'. Or lower that: mp.DynamicLossScale(min_loss_scale=1.0)' if (s.min_loss_scale or 0) > 1 else ''}"
        ),
        "what a scale that low does not keep finite is no overflow of scaled gradients; parameters are as before",
    ),
    _Rule(
        "no scale to blame",
        lambda s: s.kind == "none" and bool(s.skips_total) and not _no_step_was_taken(s),
        lambda s: (
            f"look for NaN or inf in the data and the loss"
            f"{f' of step {s.last_skip.step:,}' if s.last_skip else ''}: gradients were not finite "
            f"{times(s.skips_total)}"
        ),
        "bfloat16 has float32's range: without a loss scale, float32 would have had them too",
    ),
    _Rule(
        "lower the static scale",
        lambda s: s.kind == "static" and s.skips_total >= 2 and _share(s) > _OFTEN,
        lambda s: f"lower the loss scale, {power(s.loss_scale)}, or let it adapt: mp.DynamicLossScale()",
        "more than one step in 50 was skipped, and a static scale never backs off",
    ),
    _Rule(
        "lower the initial scale",
        lambda s: s.kind == "dynamic" and not s.at_floor and s.skips_total >= 3 and _is_first_search(s),
        lambda s: (
            f"lower the initial scale: the first {s.skips_total:,} steps overflowed. "
            f"mp.DynamicLossScale({power(s.loss_scale)})"
        ),
        "each halving on the way down costs the run a step",
    ),
    _Rule(
        "raise the period",
        _skips_often,
        lambda s: (
            f"raise the period, {s.period:,}: {s.skips_total:,} of {s.steps:,} steps were skipped. "
            f"mp.DynamicLossScale(period={max(2000, 10 * (s.period or 0))})"
        ),
        "a scale in balance overflows each time it grows, and each time costs a step",
    ),
    _Rule(
        "bfloat16",
        _range_is_too_wide,
        lambda s: 'compute in bfloat16, which would remove this: mp.autocast(loss_fn, "mixed_bfloat16")',
        "at this scale the largest gradients are at the end of float16's range, and more than one in 20 is below its "
        "normal numbers: no scale fits both; bfloat16 has float32's range",
    ),
    _Rule(
        "raise the scale",
        _could_be_higher,
        lambda s: (
            f"start from a higher scale: 2**{_higher(s)} instead of {power(s.loss_scale)}"
            f"{'' if s.kind == 'dynamic' else f', mp.StaticLossScale(2.0**{_higher(s)})'}"
        ),
        "more than one gradient in 20 is below float16's normal numbers, and the largest are far from its end",
    ),
)


def _higher(s: Summary) -> int:
    """The exponent of the scale that would leave the largest gradient two powers of two of room."""
    scale = s.measured.loss_scale if s.measured else s.loss_scale
    return int(power(scale).removeprefix("2**")) + _headroom(s) - 2
