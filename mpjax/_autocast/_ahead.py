"""Looks ahead, through everything that a value goes into: is it an activation, which matrix work reads in the end?"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mpjax._autocast._context import Context, is_subject
from mpjax._autocast._reads import Reads, is_never
from mpjax._autocast._tables import Kind
from mpjax._compat import inner_jaxprs, is_literal, scan_split
from mpjax._dtypes import FLOAT16

# Primitives whose operands and results are those of the jaxpr inside, one by one.
_CALLS = (
    *("jit", "remat2", "scan", "shard_map", "closed_call", "call", "eval_jaxpr", "custom_jvp_call", "custom_vjp_call"),
)
# What an activation passes on its way, rounded or not. Not what orders or picks by value: rounding makes those equal.
_MOVES = (
    *("broadcast_in_dim", "reshape", "transpose", "squeeze", "rev", "slice", "dynamic_slice", "concatenate", "pad"),
    *("copy", "name"),
)
_PASSES = (*_MOVES, "gather", "add_any", "select_n")
# What else a statistic passes between its sum and the activation that it normalises.
_OF_STATISTICS = ("add", "sub", "mul", "div", "max", "sqrt", "rsqrt", "square", "integer_pow")
# What lies between an activation and its mean.
_TO_MEAN = ("broadcast_in_dim", "reshape", "squeeze")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A jaxpr that is looked into, where it is evaluated, and the equation that holds it."""

    ctx: Context
    reads: Reads
    jaxpr: Any = None
    eqn: Any = None
    outside: "_Frame | None" = None


def feeds_matrix_work(ctx: Context, eqn: Any, reads: Reads, only_moved: bool = False) -> bool:
    """Whether all that an equation makes goes into matrix work, past nothing that would magnify its rounding.

    Such a value is an activation, whatever it was made from: what reads it rounds it anyway. Scaling, residual sums and
    a normalisation over the last axes may lie between; no difference of two like values, no choice by size, no region.
    Not in float16, which a scale in between may be there for.

    Args:
      ctx: the evaluation of the jaxpr that the equation is in.
      eqn: the equation.
      reads: of that jaxpr.
      only_moved: whether nothing but moving values about may lie between, as for a weight; in float16 too.
    """
    if ctx.low == FLOAT16 and not only_moved:
        return False
    top = _Frame(ctx, reads)
    frames: dict[Any, _Frame] = {}
    # A statistic is what a sum over the last axes makes of an activation.
    waiting = [(top, var, False) for var in eqn.outvars]
    seen = set()
    found = False
    while waiting:
        frame, var, statistic = waiting.pop()
        if (id(frame), var, statistic) in seen:
            continue
        seen.add((id(frame), var, statistic))
        for reader in frame.reads.readers.get(var, ()):
            if reader is None:
                onward = _outside(frame, var)
                if onward is None:
                    return False
                waiting.extend((*place, statistic) for place in onward)
                continue
            here = frame.ctx.inside(reader)
            name, kind = reader.primitive.name, ctx.rules.of(reader.primitive.name).kind
            if here.region is not None:
                return False
            if only_moved and name in ("custom_jvp_call", "custom_vjp_call"):
                return False  # its rule may read the weight in another way
            if name in _CALLS and inner_jaxprs(reader):
                waiting.extend((*place, statistic) for place in _inside(frames, frame, here, reader, var))
            elif is_never(reader) or not all(is_subject(out.aval) for out in reader.outvars):
                return False
            elif kind is Kind.LOW:
                found = True
            elif only_moved and name not in _MOVES:
                return False
            elif name == "reduce_sum" and kind is Kind.SUM:
                summed = statistic or _over_last_axes(reader)
                waiting.extend((frame, out, summed) for out in reader.outvars)
            elif (kind in (Kind.FOLLOW, Kind.PASS) or name == "rsqrt") and _passes(reader, var, statistic, frame.reads):
                # A statistic beside an activation makes an activation.
                still = statistic and all(atom is var or _is_statistic(atom, frame.reads) for atom in reader.invars)
                waiting.extend((frame, out, still) for out in reader.outvars)
            else:
                return False
    return found


def _passes(reader: Any, var: Any, statistic: bool, reads: Reads) -> bool:
    name = reader.primitive.name
    constants = [float(atom.val) for atom in reader.invars if is_literal(atom)]
    if name == "sub":
        # x - mean(x), and E[x^2] - E[x]^2. The difference of two like values would be mostly their rounding.
        return _is_centring(reader, reads) or all(_is_statistic(atom, reads) for atom in reader.invars)
    if statistic:
        return name in (*_PASSES, *_OF_STATISTICS) or name == "stop_gradient"
    if name == "add":
        return not constants and not any(_is_negated(atom, reads) for atom in reader.invars)
    if name in ("mul", "max"):
        return all(constant >= 0 for constant in constants)
    if name == "div":
        return reader.invars[0] is var and reader.invars[1] is not var and all(constant > 0 for constant in constants)
    return name in _PASSES or name == "square" or (name == "integer_pow" and reader.params["y"] == 2)


def _is_negated(atom: Any, reads: Reads) -> bool:
    eqn = None if is_literal(atom) else reads.producer.get(atom)
    if eqn is None:
        return False
    factors = [float(a.val) for a in eqn.invars if is_literal(a)]
    return eqn.primitive.name == "neg" or (eqn.primitive.name in ("mul", "div") and any(c < 0 for c in factors))


def _is_centring(sub: Any, reads: Reads) -> bool:
    """Whether a difference is that of x and its mean over the last axes, or of x and 0."""
    x, mean = sub.invars
    total = _sum_behind(mean, reads)
    if total is None:
        return not is_literal(x) and _is_zero(mean, reads)
    return total.invars[0] is x and _over_last_axes(total)


def _is_zero(atom: Any, reads: Reads) -> bool:
    while not is_literal(atom):
        eqn = reads.producer.get(atom)
        if eqn is None or eqn.primitive.name not in _TO_MEAN:
            return False
        atom = eqn.invars[0]
    return bool(atom.val == 0)


def _sum_behind(atom: Any, reads: Reads) -> Any:
    """The sum that a mean comes from: spread, and divided by or multiplied with a number."""
    while not is_literal(atom):
        eqn = reads.producer.get(atom)
        if eqn is None or eqn.primitive.name == "reduce_sum":
            return eqn
        by_a_number = eqn.primitive.name in ("div", "mul") and is_literal(eqn.invars[1])
        if not by_a_number and eqn.primitive.name not in _TO_MEAN:
            return None
        atom = eqn.invars[0]
    return None


def _is_statistic(atom: Any, reads: Reads) -> bool:
    """Whether a value is computed from sums over last axes and single numbers alone."""
    if is_literal(atom) or atom.aval.shape == ():
        return True
    eqn = reads.producer.get(atom)
    if eqn is None:
        return False
    if eqn.primitive.name == "reduce_sum":
        return _over_last_axes(eqn)
    return eqn.primitive.name in (*_TO_MEAN, *_OF_STATISTICS) and all(_is_statistic(a, reads) for a in eqn.invars)


def _over_last_axes(reduce: Any) -> bool:
    axes, ndim = reduce.params["axes"], reduce.invars[0].aval.ndim
    return bool(axes) and tuple(sorted(axes)) == tuple(range(ndim - len(axes), ndim)) and (ndim == 1 or 0 not in axes)


def _inside(
    frames: dict[Any, _Frame], frame: _Frame, here: Context, eqn: Any, var: Any
) -> Iterator[tuple[_Frame, Any]]:
    key = id(frame), id(eqn)  # one jaxpr may be called from several places
    if key not in frames:
        jaxpr = inner_jaxprs(eqn)[0]
        frames[key] = _Frame(here, Reads.of(jaxpr, {}), jaxpr, eqn, frame)
    inner = frames[key]
    return ((inner, own) for own, operand in zip(inner.jaxpr.invars, eqn.invars, strict=True) if operand is var)


def _outside(frame: _Frame, var: Any) -> list[tuple[_Frame, Any]] | None:
    """Where a result of an inner jaxpr goes on: outside, and round again as a loop's carry. None: out of sight."""
    if frame.outside is None:
        return None
    positions = [k for k, out in enumerate(frame.jaxpr.outvars) if out is var]
    onward = [(frame.outside, frame.eqn.outvars[k]) for k in positions]
    if frame.eqn.primitive.name == "scan":
        n_consts, n_carry = scan_split(frame.eqn)
        onward += [(frame, frame.jaxpr.invars[n_consts + k]) for k in positions if k < n_carry]
    return onward
