"""What to do with an equation, and why: the rules, the region, and a look at its neighbours."""

import enum
from typing import Any, NamedTuple

from jax.lax import Precision

from mpjax._autocast._ahead import feeds_matrix_work
from mpjax._autocast._context import Context
from mpjax._autocast._marks import Mark, Value, follow_mark, full_mark, is_weight, reduced_mark
from mpjax._autocast._patterns import is_half_of_a_pair, is_lookup, is_shift, is_softmax_input, match_softmax
from mpjax._autocast._reads import Reads, is_never
from mpjax._autocast._regions import Region, modules_of
from mpjax._autocast._tables import COLLECTIVES, GATHERS, Kind
from mpjax._compat import inner_jaxprs, is_backward
from mpjax._dtypes import FLOAT16, FLOAT32
from mpjax.fp8._recipe import sizes_of


class Action(enum.Enum):
    """How an equation is bound."""

    LOW = "float32 inputs cast to the compute dtype"
    FLOAT8 = "operands brought into 8 bits, the result in the compute dtype"
    WIDE = "inputs in their original dtypes"
    ROUNDED = "inputs in their original dtypes, activations no more exact than the compute dtype"
    PASS = "inputs as they are"
    DROP = "not at all: it hands its input on"
    ENTER = "its body rewritten"
    SOFTMAX = "as a softmax that is kept in the compute dtype"
    NARROW = "as it is, the result cast to the compute dtype"
    ACROSS = "a float32 weight made known to more devices: there in the compute dtype, its gradient in the reduce dtype"
    SATURATE = "in float32, the result brought into the range of the compute dtype"


class Decision(NamedTuple):
    """What to do with an equation.

    Attributes:
      action: how it is bound.
      mark: of its results.
      reason: one sentence.
    """

    action: Action
    mark: Mark | None
    reason: str


def decide(outer: Context, eqn: Any, ins: list[Value], reads: Reads) -> Decision:
    """What to do with an equation of the jaxpr that `outer` evaluates, and why."""
    name, ctx = eqn.primitive.name, outer.inside(eqn)
    if ctx.region is Region.KEEP:
        return Decision(Action.WIDE, Mark.FREE, ctx.why_here)
    if ctx.region is None and _is_embedding(outer, eqn, ins, reads):
        return Decision(Action.NARROW, Mark.LOW, "rows of a table that matrix work reads in the end: an activation")
    if name in ctx.higher_order:
        return Decision(Action.ENTER, None, "entered: its body is rewritten")
    rule = ctx.rules.of(name)
    if name == "convert_element_type" and eqn.params["new_dtype"] == FLOAT32 and ins[0].mark:
        return Decision(Action.DROP, None, "float32 to float32: only sheds a weak type")
    if rule.kind is Kind.OPAQUE:
        return Decision(Action.WIDE, Mark.FREE, rule.reason)
    if why := is_never(eqn):
        return Decision(Action.WIDE, Mark.FREE, why)
    if name == "pvary" and ctx.region is None and ctx.reduce != FLOAT32 and is_weight(ins[0]):
        return Decision(Action.ACROSS, Mark.FREE, f"the policy takes sums over devices in {ctx.reduce}")
    if rule.kind is Kind.PASS:
        return Decision(Action.PASS, None, rule.reason)
    if ctx.region is Region.FULL:
        return Decision(Action.WIDE, Mark.FULL, ctx.why_here)
    if rule.kind is Kind.LOW:
        return _matrix_work(ctx, eqn, ins, rule.reason)
    if rule.kind is Kind.FULL:
        return Decision(Action.WIDE, full_mark(v.mark for v in ins), rule.reason)
    if rule.kind is Kind.SUM and name in COLLECTIVES and ctx.reduce == ctx.low and _are_activations(ins):
        return Decision(Action.LOW, Mark.LOW, f"the policy takes sums of activations over devices in {ctx.low}")
    if rule.kind is Kind.SUM:
        return Decision(Action.WIDE, reduced_mark(v.mark for v in ins), rule.reason)
    if _is_gathered_weight(outer, eqn, ins, reads):
        return Decision(Action.ACROSS, Mark.FREE, f"a weight that only matrix work reads travels in {ctx.low}")
    if _is_residual_sum(outer, eqn, ins, reads):
        return Decision(Action.NARROW, Mark.LOW, "a sum with an activation that matrix work reads in the end")
    return _follow(ctx, eqn, ins, reads, rule.reason)


# Bounded functions and kinks: what a normalised activation goes through next is computed as an activation.
_NONLINEAR = ("tanh", "logistic", "erf", "erfc", "integer_pow", "square", "max", "min", "clamp", "abs")
# What may lie between a value and the sum that it ends in: a loss, the square of a variance, a masked mean.
_TO_SUM = (
    *("add", "sub", "mul", "div", "neg", "abs", "max", "min", "clamp", "select_n", "square", "integer_pow", "sqrt"),
    *("sign", "broadcast_in_dim", "reshape", "squeeze", "transpose", "convert_element_type", "copy"),
)


def _follow(ctx: Context, eqn: Any, ins: list[Value], reads: Reads, reason: str) -> Decision:
    name = eqn.primitive.name
    mark = follow_mark(v.mark for v in ins)
    if mark is Mark.FULL and match_softmax(ctx.rules, eqn, reads):
        return Decision(Action.SOFTMAX, Mark.LOW, "a softmax that matrix work reads: float32 inside, kept in 16 bits")
    if mark not in (Mark.LOW, Mark.NORMED):
        return Decision(Action.WIDE, mark, f"{reason}, and these are float32")
    if is_shift(eqn, reads):
        return Decision(Action.ROUNDED, Mark.FULL, "x - max(x), the start of a softmax: its last digits become factors")
    # A float16 square overflows at 256; XLA fuses the cast into the reduction anyway.
    if reads.only_by(ctx.rules, eqn, (Kind.SUM, Kind.FULL), _TO_SUM):
        return Decision(Action.WIDE, Mark.NORMED, "only what is computed in float32 reads it")
    if ctx.low == FLOAT16 and name in ("square", "integer_pow"):
        return Decision(Action.WIDE, Mark.NORMED, "a square overflows float16 at 256")
    if mark is Mark.NORMED and name not in _NONLINEAR:
        return Decision(Action.WIDE, mark, f"{reason}, and these are a normalisation")
    if not all(ctx.holds(v.const) for v in ins):
        return Decision(Action.WIDE, Mark.FULL, f"its constant is too large or too small for {ctx.low}")
    if inner_jaxprs(eqn):
        return Decision(Action.WIDE, Mark.NORMED, "the function that it combines with is written in float32")
    if is_half_of_a_pair(eqn, reads):
        return Decision(Action.WIDE, Mark.FULL, "the even or odd half of a parallel scan, which adds them up")
    if any(v.mark is Mark.FREE and v.const is None for v in ins) and is_softmax_input(eqn, reads):
        return Decision(Action.SATURATE, Mark.LOW, "a softmax reads it: a mask must not become infinite in 16 bits")
    return Decision(Action.LOW, Mark.LOW, reason)


def _matrix_work(ctx: Context, eqn: Any, ins: list[Value], reason: str) -> Decision:
    method = ctx.float8
    if method is None:
        return Decision(Action.LOW, Mark.LOW, reason)
    why_not = method if isinstance(method, str) else _why_not_float8(ctx, eqn, ins)
    if isinstance(method, str) or why_not:
        return Decision(Action.LOW, Mark.LOW, f"{ctx.low}, not fp8: {why_not}")
    how = ", emulated in float32" if method.emulate else ""
    formats = f"{method.forward}{how}, incoming gradients in {method.backward}"
    return Decision(Action.FLOAT8, Mark.LOW, f"operands in {formats}; the accumulator is float32")


def _why_not_float8(ctx: Context, eqn: Any, ins: list[Value]) -> str | None:
    if eqn.primitive.name != "dot_general":
        return "only dot_general is computed in fp8"
    if not any(map(is_weight, ins)):
        return "no weight among its operands, as in attention"
    if is_backward(eqn):
        return "a gradient that is taken inside of autocast, where no format for gradients is known; take it outside"
    if eqn.params["precision"] not in (None, (Precision.DEFAULT,) * 2) or eqn.params["out_sharding"] is not None:
        return "written with a precision or a sharding of its own"
    return ctx.rules.fp8.why_not(modules_of(ctx.path), sizes_of(eqn))


def _are_activations(ins: list[Value]) -> bool:
    """Whether these are activations or their gradients: no loss, no statistic, no count, which 16 bits cannot hold."""
    return follow_mark(v.mark for v in ins) in (Mark.LOW, Mark.NORMED)


def _is_embedding(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> bool:
    return (
        is_lookup(eqn)
        and ctx.rules.of("gather").kind is Kind.FOLLOW
        and follow_mark(v.mark for v in ins) is Mark.FREE
        and feeds_matrix_work(ctx, eqn, reads)
    )


def _is_gathered_weight(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> bool:
    return (
        eqn.primitive.name in GATHERS
        and is_weight(ins[0])
        and ctx.rules.of(eqn.primitive.name).kind is Kind.FOLLOW
        and feeds_matrix_work(ctx, eqn, reads, only_moved=True)
    )


def _is_residual_sum(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> bool:
    return (
        eqn.primitive.name == "add"
        and follow_mark(v.mark for v in ins) is Mark.FULL
        and any(v.mark in (Mark.LOW, Mark.NORMED) for v in ins)
        and feeds_matrix_work(ctx, eqn, reads)
    )
