"""Looks ahead, through everything that a value goes into: is matrix work all that reads it in the end?"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mpjax._autocast._reads import Reads
from mpjax._autocast._rules import Rules
from mpjax._autocast._tables import MOVES, Kind
from mpjax._compat import inner_jaxprs, is_literal, scan_split

# What an activation goes through on its way: residual sums, scaling, dropout, a normalisation and its statistics.
_ON_THE_WAY = (
    *(
        "add",
        "add_any",
        "mul",
        "div",
        "max",
        "select_n",
        "copy",
        "integer_pow",
        "square",
        "sqrt",
        "rsqrt",
        "reduce_sum",
    ),
    *MOVES,
)
# Functions whose operands and results are those of the jaxpr inside, one by one.
_CALLS = (
    *("jit", "remat2", "scan", "shard_map", "closed_call", "call", "eval_jaxpr", "custom_jvp_call", "custom_vjp_call"),
)
# What a statistic passes between its sum and the value that it is taken from.
_FROM_STATISTIC = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "div", "mul", "square", "integer_pow")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A jaxpr that is looked into, and the equation that holds it."""

    reads: Reads
    jaxpr: Any = None
    eqn: Any = None
    outside: "_Frame | None" = None


def feeds_matrix_work(rules: Rules, eqn: Any, reads: Reads) -> bool:
    """Whether all that an equation makes goes into matrix work, past nothing that would magnify its rounding.

    Such a value is an activation, whatever it was made from: what reads it rounds it anyway.
    """
    top = _Frame(reads)
    frames: dict[int, _Frame] = {}
    waiting = [(top, var) for var in eqn.outvars]
    seen = set()
    found = False
    while waiting:
        frame, var = waiting.pop()
        if (id(frame), var) in seen:
            continue
        seen.add((id(frame), var))
        for reader in frame.reads.readers.get(var, ()):
            if reader is None:
                onward = _outside(frame, var)
            elif rules.of(reader.primitive.name).kind is Kind.LOW:
                found = True
                continue
            elif reader.primitive.name in _CALLS and inner_jaxprs(reader):
                onward = _inside(frames, frame, reader, var)
            elif _passes(rules, reader, frame.reads):
                onward = ((frame, out) for out in reader.outvars)
            else:
                onward = None
            if onward is None:
                return False
            waiting.extend(onward)
    return found


def _passes(rules: Rules, reader: Any, reads: Reads) -> bool:
    name, kind = reader.primitive.name, rules.of(reader.primitive.name).kind
    if kind is Kind.FULL and name != "rsqrt":  # by the caller's own rules
        return False
    if name == "sub":
        # x - mean(x). The difference of two like values would be mostly their rounding.
        return any(_is_statistic(atom, reads) for atom in reader.invars)
    return name in _ON_THE_WAY or kind is Kind.PASS


def _is_statistic(atom: Any, reads: Reads) -> bool:
    """Whether a value is a constant, or computed from a sum."""
    while not is_literal(atom):
        eqn = reads.producer.get(atom)
        if eqn is None or eqn.primitive.name not in _FROM_STATISTIC:
            return eqn is not None and eqn.primitive.name == "reduce_sum"
        atom = eqn.invars[0]
    return True


def _inside(frames: dict[int, _Frame], frame: _Frame, eqn: Any, var: Any) -> Iterator[tuple[_Frame, Any]]:
    if id(eqn) not in frames:
        jaxpr = inner_jaxprs(eqn)[0]
        frames[id(eqn)] = _Frame(Reads.of(jaxpr, {}), jaxpr, eqn, frame)
    inner = frames[id(eqn)]
    return ((inner, own) for own, operand in zip(inner.jaxpr.invars, eqn.invars, strict=True) if operand is var)


def _outside(frame: _Frame, var: Any) -> Iterator[tuple[_Frame, Any]] | None:
    """Where a result of an inner jaxpr goes on: outside, and round again as a loop's carry. None: out of sight."""
    if frame.outside is None:
        return None
    positions = [k for k, out in enumerate(frame.jaxpr.outvars) if out is var]
    onward = [(frame.outside, frame.eqn.outvars[k]) for k in positions]
    if frame.eqn.primitive.name == "scan":
        n_consts, n_carry = scan_split(frame.eqn)
        onward += [(frame, frame.jaxpr.invars[n_consts + k]) for k in positions if k < n_carry]
    return iter(onward)
