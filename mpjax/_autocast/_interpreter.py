"""The evaluation loop: each equation is bound again in the precision that was decided for it."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._autocast import _weights
from mpjax._autocast._context import Context, is_subject, marked
from mpjax._autocast._decide import Action, Decision, decide
from mpjax._autocast._marks import Mark, Value, is_weight
from mpjax._autocast._patterns import match_softmax
from mpjax._autocast._reads import Reads, is_never
from mpjax._autocast._softmax import saturated
from mpjax._autocast._tables import GATHERS, Kind
from mpjax._compat import bind, equation_context, inner_jaxprs, is_literal, source_line
from mpjax._dtypes import FLOAT32
from mpjax._errors import users_stacklevel
from mpjax.fp8._dot import dot
from mpjax.fp8._recipe import Method


def evaluate(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr in mixed precision; results keep the marks that they have."""
    env: dict[Any, Value] = {}
    reads = Reads.of(jaxpr, env)

    def read(atom: Any) -> Value:
        return marked(atom.val, atom.aval) if is_literal(atom) else env[atom]

    env.update((var, marked(const, var.aval)) for var, const in zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        here = ctx.inside(eqn)
        decision = decide(ctx, eqn, ins, reads)
        try:
            with equation_context(eqn):
                if ctx.notes is None:
                    outs = _apply(here, decision, eqn, ins, reads)
                else:
                    # The rewritten program carries the number of its note, through every transformation.
                    ctx.notes.append((eqn, decision))
                    with jax.named_scope(f"{NOTE}{len(ctx.notes) - 1}"):
                        outs = _apply(here, decision, eqn, ins, reads)
        except FloatingPointError as error:  # jax_debug_nans, whose traceback ends in here
            error.add_note(f"in {eqn.primitive.name} at {source_line(eqn)}")
            raise
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


# The name scope of an equation whose decision is noted: this, and the number of the note.
NOTE = "mpjax.note_"


def _apply(ctx: Context, decision: Decision, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    match decision.action:
        case Action.ENTER:
            return ctx.higher_order[eqn.primitive.name](ctx, eqn, ins, reads)
        case Action.DROP:
            return ins
        case Action.PASS:
            arrays = bind(eqn, [value.array for value in ins])
            # Some have no results.
            return [Value(a, v.mark, v.const) for a, v in zip(arrays, ins, strict=False)]
        case Action.SOFTMAX:
            softmax = match_softmax(ctx.rules, eqn, reads)
            assert softmax, "decided so because it matches"
            return [Value(softmax(ctx.low), Mark.LOW)]
        case Action.FLOAT8:
            assert isinstance(ctx.float8, Method), "decided so because it is"
            weights = (is_weight(ins[0]), is_weight(ins[1]))
            # Float32 weights get float32 gradients.
            keep = ctx.reduce != ctx.low
            left, right = (v.array if keep and w else ctx.narrow(v) for v, w in zip(ins, weights, strict=True))
            arrays = [dot(left, right, eqn.params["dimension_numbers"], ctx.low, ctx.float8, weights)]
        case Action.LOW if eqn.primitive.name in ctx.keep_gradients and any(map(is_weight, ins)):
            operands = [v.array if is_weight(v) else ctx.narrow(v) for v in ins]
            params = {**eqn.params, "preferred_element_type": ctx.low}
            arrays = [_weights.dot(eqn.primitive, operands, ctx.low, params)]
        case Action.LOW:
            changes = {"preferred_element_type": ctx.low} if "preferred_element_type" in eqn.params else {}
            arrays = bind(eqn, [_narrowed(ctx, v, eqn) for v in ins], **changes)
        case Action.NARROW:
            if enter := ctx.higher_order.get(eqn.primitive.name):
                outs = enter(ctx, eqn, ins, reads)
            else:
                outs = [Value(array, Mark.FREE) for array in bind(eqn, [ctx.widen(v) for v in ins])]
            return [ctx.cast(value, Mark.LOW if value.mark else None) for value in outs]
        case Action.ACROSS:
            forward = ctx.low if eqn.primitive.name in GATHERS else FLOAT32
            arrays = [_weights.across(eqn.primitive, ins[0].array, forward, ctx.reduce, eqn.params)]
        case Action.SATURATE:
            arrays = [saturated(x, ctx.low) for x in bind(eqn, [ctx.widen(v) for v in ins])]
        case Action.ROUNDED:
            arrays = bind(eqn, [_rounded(ctx, v) for v in ins])
        case Action.WIDE:
            if ctx.rules.of(eqn.primitive.name).kind is Kind.OPAQUE and ctx.region is None:
                _report_unentered(ctx, eqn)
            arrays = bind(eqn, [ctx.widen(v) for v in ins])
    # A constant stays one where it is only moved.
    const = ins[0].const if len(ins) == 1 and eqn.primitive.name in ("broadcast_in_dim", "reshape", "copy") else None
    return [
        Value(array, (decision.mark or Mark.FREE) if is_subject(var.aval) else None, const)
        for array, var in zip(arrays, eqn.outvars, strict=True)
    ]


def _narrowed(ctx: Context, value: Value, eqn: Any) -> Any:
    array, shape = value.array, eqn.outvars[0].aval.shape
    if (
        is_weight(value)
        and eqn.primitive.name in _BROADCASTING
        and 0 < array.ndim == len(shape)
        and array.shape != shape
    ):
        # The broadcast goes before the cast, so that a bias's gradient is summed in float32.
        value = Value(jax.lax.broadcast_in_dim(array, shape, tuple(range(len(shape)))), Mark.FREE)
    return ctx.narrow(value)


def _rounded(ctx: Context, value: Value) -> Any:
    """The array in its original dtype, with the digits of the compute dtype.

    XLA drops a cast to bfloat16 and back, for one reader and not for another. A cross entropy of logits that are
    rounded where it picks the label's, and not where it sums exponentials, goes below zero: -0.09 was seen on a CPU.
    """
    if value.mark is not Mark.LOW:
        return value.array
    info = jnp.finfo(ctx.low)
    return jax.lax.reduce_precision(ctx.widen(value), info.nexp, info.nmant)


# Primitives whose operands may have size 1 where the result has more.
_BROADCASTING = ("add", "sub", "mul", "div", "max", "min", "rem", "atan2", "select_n", "nextafter")


def _report_unentered(ctx: Context, eqn: Any) -> None:
    """Says that matrix work inside an equation is left alone: never silently."""
    stack = inner_jaxprs(eqn)
    while stack:
        for inner in stack.pop().eqns:
            stack.extend(inner_jaxprs(inner))
            if ctx.rules.of(inner.primitive.name).kind is Kind.LOW and not is_never(inner):
                line = source_line(eqn)
                warnings.warn(
                    f"autocast leaves {eqn.primitive.name}{line and f' at {line}'} as written: "
                    f"its {inner.primitive.name} stays float32",
                    UserWarning,
                    stacklevel=users_stacklevel(),
                )
                return
