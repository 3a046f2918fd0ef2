"""What `mpjax.diagnostics.summary` returns: data, and how it is said in words."""

import dataclasses
import json
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class SkippedStep:
    """A step that was skipped.

    Attributes:
      step: its number, from 0.
      loss_scale: the scale of its gradients.
      leaves: the path of each leaf that was not finite, and how many of its numbers. None where the step was skipped
        for the norm of finite gradients, or for updates that were not finite.
    """

    step: int
    loss_scale: float
    leaves: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class FormatLoss:
    """What a format would lose of the gradients that were measured, as shares of the finite numbers that are not 0.

    Attributes:
      dtype: the format.
      overflow, subnormal, zero: of all leaves, what rounding to it makes inf or NaN; a subnormal number, with fewer
        digits; 0.
      worst: the leaf that would lose the largest share to overflow and 0, empty where none loses any.
      worst_share: that share.
    """

    dtype: str
    overflow: float
    subnormal: float
    zero: float
    worst: str
    worst_share: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """The gradients of one step, as they came: multiplied by the loss scale.

    Attributes:
      step: its number, from 0.
      loss_scale: the scale.
      numbers, non_finite, zeros: how many in all, how many inf or NaN, how many 0.
      min_exponent, max_exponent: of the finite ones that are not 0; None where there are none.
      formats: what each format would lose.
    """

    step: int
    loss_scale: float
    numbers: int
    non_finite: int
    zeros: int
    min_exponent: int | None
    max_exponent: int | None
    formats: tuple[FormatLoss, ...]

    def format(self, dtype: str) -> FormatLoss | None:
        """The row of one format; None where it was not asked about."""
        return next((row for row in self.formats if row.dtype == dtype), None)


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
      rule: the name of the rule that gave it.
      text: what to do.
      reason: why that follows.
    """

    rule: str
    text: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a loss-scaled optimizer went through.

    Attributes:
      kind: `"dynamic"`, `"static"` or `"none"`: the loss scale's.
      loss_scale: the scale of the next step.
      clean_steps: since it last moved. With `period` and the next three: None but for a dynamic scale.
      period: clean steps until it grows.
      min_loss_scale, max_loss_scale: its bounds.
      at_floor: how often the floor held it back.
      skips_total, skips_in_a_row: steps skipped, in all and since the last one that was taken.
      steps: steps so far. None, as are the next three, without `gradient_monitor`.
      first_skip, last_skip: the steps skipped first and last; None where none was.
      measured: the gradients of the last step that was measured; None before that.
      advice: what to do.
    """

    kind: str
    loss_scale: float
    clean_steps: int | None
    period: int | None
    min_loss_scale: float | None
    max_loss_scale: float | None
    at_floor: int | None
    skips_total: int
    skips_in_a_row: int
    steps: int | None
    first_skip: SkippedStep | None
    last_skip: SkippedStep | None
    measured: Measured | None
    advice: tuple[Advice, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as dicts, lists, numbers and text."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [self._scale, self._skips]
        for name, skip in (("first", self.first_skip), ("last", self.last_skip)):
            if skip is not None:
                lines.append(f"skipped {name}: step {skip.step:,}, at scale {power(skip.loss_scale)}: {_where(skip)}")
        if self.steps is None:
            lines.append("which leaves: mp.diagnostics.gradient_monitor(mp.loss_scaled(...)) keeps that")
        lines += self._gradients
        for advice in self.advice:
            lines += [f"advice: {advice.text}", f"        {advice.reason}"]
        return "\n".join(lines)

    @property
    def _scale(self) -> str:
        if self.kind == "none":
            return "no loss scale"
        if self.kind == "static":
            return f"loss scale {power(self.loss_scale)}, static"
        return (
            f"loss scale {power(self.loss_scale)}, dynamic: {self.clean_steps:,} of {self.period:,} clean steps until "
            f"it grows; held at its floor, {power(self.min_loss_scale or 0)}, {times(self.at_floor or 0)}"
        )

    @property
    def _skips(self) -> str:
        of = "" if self.steps is None else f" of {self.steps:,}"
        now = f", the last {self.skips_in_a_row:,} in a row" if self.skips_in_a_row else ""
        return f"steps skipped: {self.skips_total:,}{of}{now}"

    @property
    def _gradients(self) -> list[str]:
        found = self.measured
        if found is None:
            return []
        lines = [
            f"gradients of step {found.step:,}, at scale {power(found.loss_scale)}: {found.numbers:,} numbers, "
            f"{found.non_finite:,} not finite, {found.zeros:,} zeros"
        ]
        if found.min_exponent is not None:
            lines[0] += f", the others from 2**{found.min_exponent} to 2**{found.max_exponent}"
            lines.append(f"  {'rounded to':14} {'overflow':>9} {'subnormal':>9} {'zero':>9}")
        for row in found.formats if found.min_exponent is not None else ():
            shares = " ".join(f"{share:9.2%}" for share in (row.overflow, row.subnormal, row.zero))
            worst = f"  most in {row.worst} ({row.worst_share:.2%})" if row.worst else ""
            lines.append(f"  {row.dtype:14} {shares}{worst}")
        return lines


def power(scale: float) -> str:
    """A loss scale as one writes it."""
    return f"2**{int(math.log2(scale))}" if scale > 0 and math.frexp(scale)[0] == 0.5 else str(scale)


def times(count: int) -> str:
    """How often."""
    return "once" if count == 1 else f"{count:,} times"


def _where(skip: SkippedStep) -> str:
    if not skip.leaves:
        return "no gradient, but their norm was past float32's range, or the updates were not finite"
    ordered = sorted(skip.leaves, key=lambda row: -row[1])
    shown = [f"{path or '<root>'} ({count:,} not finite)" for path, count in ordered[:8]]
    more = [f"{len(ordered) - 8:,} more"] if len(ordered) > 8 else []
    return ", ".join(shown + more)
