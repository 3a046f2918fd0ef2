"""The evaluation loop: an equation's rule decides the precision that it is bound in."""

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._autocast._marks import Mark, Value, follow_mark, reduced_mark
from mpjax._autocast._rules import Rules
from mpjax._autocast._softmax import probabilities
from mpjax._autocast._tables import Kind
from mpjax._compat import bind, equation_context, inner_jaxprs, is_literal, source_line
from mpjax._dtypes import FLOAT32


@dataclasses.dataclass(frozen=True)
class Context:
    """What an evaluation carries along.

    Attributes:
      low: the compute dtype.
      rules: the table.
      higher_order: how primitives that hold functions are evaluated, by name.
      cache: functions already rewritten, by their jaxpr and the marks of their inputs.
    """

    low: np.dtype[Any]
    rules: Rules
    higher_order: dict[str, Callable[..., list[Value]]]
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def narrow(self, value: Value) -> Any:
        """The array in the compute dtype."""
        return value.array if value.mark in (None, Mark.LOW) else value.array.astype(self.low)

    def widen(self, value: Value) -> Any:
        """The array in its original dtype."""
        return value.array.astype(FLOAT32) if value.mark is Mark.LOW else value.array

    def cast(self, value: Value, mark: Mark | None) -> Value:
        """The value with another mark, in the dtype that goes with it."""
        array = self.narrow(value) if mark is Mark.LOW else self.widen(value)
        return Value(array, mark, value.const)

    def holds(self, const: float | None) -> bool:
        """Whether the compute dtype can hold a constant: 1e9 is inf in float16, 1e-8 is 0."""
        if const is None or const == 0 or not np.isfinite(const):
            return True
        limits = jnp.finfo(self.low)
        return float(limits.tiny) <= abs(const) <= float(limits.max)


def evaluate(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr in mixed precision; results keep the marks that they have."""
    env: dict[Any, Value] = {}
    reads = Reads.of(jaxpr, env)

    def read(atom: Any) -> Value:
        if is_literal(atom):
            return marked(atom.val, atom.aval)
        return env[atom]

    env.update((var, marked(const, var.aval)) for var, const in zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        with equation_context(eqn):
            outs = _step(ctx, eqn, ins, reads)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def is_subject(aval: Any) -> bool:
    """Whether autocast may touch a value: only what the original program has in float32."""
    return getattr(aval, "dtype", None) == FLOAT32


def marked(array: Any, aval: Any) -> Value:
    """A value that enters the evaluation."""
    if not is_subject(aval):
        return Value(array)
    is_number = isinstance(array, int | float | np.generic | np.ndarray) and np.shape(array) == ()
    return Value(jnp.asarray(array, FLOAT32), Mark.FREE, float(array) if is_number else None)


@dataclasses.dataclass(frozen=True)
class Reads:
    """Who makes and who reads each variable of a jaxpr.

    Attributes:
      readers: the equations that read it; None stands for the jaxpr's own outputs.
      producer: the equation that makes it.
      values: what has been evaluated so far.
    """

    readers: Mapping[Any, list[Any]]
    producer: Mapping[Any, Any]
    values: Mapping[Any, Value]

    @classmethod
    def of(cls, jaxpr: Any, values: Mapping[Any, Value]) -> "Reads":
        """Reads a jaxpr once."""
        readers = defaultdict(list)
        for eqn in (*jaxpr.eqns, None):
            for atom in jaxpr.outvars if eqn is None else eqn.invars:
                if not is_literal(atom):
                    readers[atom].append(eqn)
        return cls(readers, {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}, values)

    def only_by(self, rules: Rules, eqn: Any, kind: Kind, through: Container[str] = ()) -> bool:
        """Whether all that an equation makes goes into equations of one kind, possibly through others."""
        readers = [reader for var in eqn.outvars for reader in self.readers.get(var, ())]
        return bool(readers) and all(
            r is not None
            and (
                rules.of(r.primitive.name).kind is kind
                or (r.primitive.name in through and self.only_by(rules, r, kind, through))
            )
            for r in readers
        )

    def made_by(self, atom: Any, primitive: str) -> Any:
        """The equation that makes a value, if it is of this primitive; else None."""
        eqn = None if is_literal(atom) else self.producer.get(atom)
        return eqn if eqn is not None and eqn.primitive.name == primitive else None


def _step(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    higher_order = ctx.higher_order.get(eqn.primitive.name)
    if higher_order is not None:
        return higher_order(ctx, eqn, ins, reads)
    kind = ctx.rules.of(eqn.primitive.name).kind
    if kind is Kind.OPAQUE or _is_never(eqn):
        return opaque(ctx, eqn, ins)
    if kind is Kind.PASS:
        arrays = bind(eqn, [value.array for value in ins])
        return [Value(a, v.mark, v.const) for a, v in zip(arrays, ins, strict=True)]
    if kind is Kind.LOW:
        changes = {"preferred_element_type": ctx.low} if "preferred_element_type" in eqn.params else {}
        return _results(eqn, bind(eqn, [ctx.narrow(v) for v in ins], **changes), Mark.LOW)
    if kind in (Kind.FULL, Kind.SUM):
        mark = Mark.FULL if kind is Kind.FULL else reduced_mark(v.mark for v in ins)
        return _results(eqn, bind(eqn, [ctx.widen(v) for v in ins]), mark)
    return _follow(ctx, eqn, ins, reads)


def opaque(ctx: Context, eqn: Any, ins: list[Value]) -> list[Value]:
    """Binds an equation exactly as it was written."""
    if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == FLOAT32 and ins[0].mark:
        return ins  # float32 to float32: only sheds a weak type
    _report_unentered(ctx, eqn)
    return _results(eqn, bind(eqn, [ctx.widen(v) for v in ins]), Mark.FREE)


def _report_unentered(ctx: Context, eqn: Any) -> None:
    """Says that matrix work inside an equation is left alone: never silently."""
    stack = inner_jaxprs(eqn)
    while stack:
        for inner in stack.pop().eqns:
            stack.extend(inner_jaxprs(inner))
            if ctx.rules.of(inner.primitive.name).kind is Kind.LOW and not _is_never(inner):
                line = source_line(eqn)
                warnings.warn(
                    f"autocast leaves {eqn.primitive.name}{line and f' at {line}'} as written: "
                    f"its {inner.primitive.name} stays float32",
                    UserWarning,
                    stacklevel=2,
                )
                return


def _follow(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    mark = follow_mark(v.mark for v in ins)
    if mark is Mark.FULL and (softmax := match_softmax(ctx, eqn, reads)):
        return [Value(softmax(ctx.low), Mark.LOW)]
    if mark is Mark.LOW and not all(ctx.holds(v.const) for v in ins):
        mark = Mark.FULL
    elif mark is Mark.LOW and reads.only_by(ctx.rules, eqn, Kind.SUM):
        # A float16 square overflows at 256; XLA fuses the cast into the reduction anyway.
        mark = Mark.NORMED
    cast = ctx.narrow if mark is Mark.LOW else ctx.widen
    outs = _results(eqn, bind(eqn, [cast(v) for v in ins]), mark)
    const = ins[0].const if len(ins) == 1 and eqn.primitive.name in ("broadcast_in_dim", "reshape", "copy") else None
    return outs if const is None else [value._replace(const=const) for value in outs]


# What may lie between a softmax and the matrix work that reads it: dropout, and moving values about.
_BETWEEN = ("mul", "div", "select_n", "transpose", "reshape", "broadcast_in_dim", "squeeze")


def match_softmax(ctx: Context, eqn: Any, reads: Reads) -> Callable[[Any], Any] | None:
    """Recognises exp(z) / sum(exp(z)) that only matrix work reads, as in attention."""
    if eqn.primitive.name != "div" or not reads.only_by(ctx.rules, eqn, Kind.LOW, _BETWEEN):
        return None
    exp = reads.made_by(eqn.invars[0], "exp")
    spread = reads.made_by(eqn.invars[1], "broadcast_in_dim")
    total = spread and reads.made_by(spread.invars[0], "reduce_sum")
    if not exp or not total or total.invars[0] is not eqn.invars[0] or is_literal(exp.invars[0]):
        return None
    axes = total.params["axes"]
    # The sums have to stand where they were taken: x / x.sum(0)[:, None] of a square x is no softmax.
    if spread.params["broadcast_dimensions"] != tuple(i for i in range(eqn.outvars[0].aval.ndim) if i not in axes):
        return None
    logits = reads.values[exp.invars[0]]
    return lambda dtype: probabilities(logits.array, axes, dtype)


def _is_never(eqn: Any) -> bool:
    """Whether the user decided already: other dtypes among the floats, or an accumulator of another dtype."""
    dtypes = {getattr(atom.aval, "dtype", None) for atom in (*eqn.invars, *eqn.outvars)}
    others = {d for d in dtypes if d is not None and d != FLOAT32 and jnp.issubdtype(d, jnp.floating)}
    preferred = eqn.params.get("preferred_element_type")
    return bool(others) or FLOAT32 not in dtypes or preferred not in (None, FLOAT32)


def _results(eqn: Any, arrays: list[Any], mark: Mark | None) -> list[Value]:
    return [
        Value(array, mark if is_subject(var.aval) else None) for array, var in zip(arrays, eqn.outvars, strict=True)
    ]
