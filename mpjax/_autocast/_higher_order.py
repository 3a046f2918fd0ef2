"""Primitives that hold functions: entered, rewritten, and bound again with their own parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mpjax._autocast._context import Context, is_subject
from mpjax._autocast._interpreter import evaluate
from mpjax._autocast._marks import Mark, Value, boundary_mark, join_marks
from mpjax._autocast._reads import Reads
from mpjax._compat import abstract, bind, is_literal, open_jaxpr, scan_split
from mpjax.fp8._markers import keeps_weights
from mpjax.fp8._recipe import Method


def rewrite(
    ctx: Context,
    jaxpr: Any,
    ins: Sequence[Value],
    targets: Sequence[Mark | None] | None = None,
    boundary: Callable[[Mark | None], Mark | None] = boundary_mark,
) -> tuple[Any, list[Mark | None]]:
    """Traces a jaxpr in mixed precision: the new closed jaxpr, and the marks of its results.

    Cached, so that a function called twenty times stays one function.

    Args:
      ctx: the evaluation.
      jaxpr: closed or not.
      ins: values to trace with; only their types, marks and constants matter.
      targets: the marks that the results are to have. Default: their own.
      boundary: what becomes of a result's own mark.
    """
    avals = tuple(v.array if isinstance(v.array, jax.ShapeDtypeStruct) else abstract(v.array) for v in ins)
    by_path = ctx.rules.paths or ctx.float8 is not None
    where = (ctx.path if by_path else None, ctx.region, ctx.forced, ctx.float8)
    marked = tuple((v.mark, v.const) for v in ins)
    key = (id(jaxpr), avals, marked, None if targets is None else tuple(targets), boundary is boundary_mark, where)
    if key in ctx.cache:
        return ctx.cache[key][1:]
    inner, consts = open_jaxpr(jaxpr)
    marks: list[Mark | None] = []

    def run(*arrays: Any) -> list[Any]:
        values = [Value(a, v.mark, v.const) for a, v in zip(arrays, ins, strict=True)]
        outs = evaluate(ctx, inner, consts, values)
        wanted = [boundary(v.mark) for v in outs] if targets is None else targets
        marks[:] = wanted
        return [ctx.cast(v, mark).array for v, mark in zip(outs, wanted, strict=True)]

    new = jax.make_jaxpr(run)(*avals)
    # The old jaxpr is kept beside it, so that its id stays its own.
    ctx.cache[key] = (jaxpr, new, list(marks))
    return new, list(marks)


def call(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jit`: one new function for each combination of input marks, which go through it as if it were not there."""
    del reads
    new, marks = rewrite(ctx, eqn.params["jaxpr"], ins, boundary=lambda mark: mark)
    return with_marks(bind(eqn, _arrays(ins), jaxpr=new), marks)


def inline(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`closed_call` and its like: a call that was never meant to be seen."""
    del reads
    inner, consts = open_jaxpr(eqn.params.get("call_jaxpr") or eqn.params["jaxpr"])
    return evaluate(ctx, inner, consts, ins)


def remat(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jax.checkpoint`: what is recomputed is recomputed in the same precision; its policy is kept.

    Weights in 8 bits are kept too: a quarter of the weights themselves, for a step brings each into 8 bits once.
    """
    del reads
    new, marks = rewrite(ctx, eqn.params["jaxpr"], ins)
    inner, consts = open_jaxpr(new)
    assert not consts, "a rematerialised body has no constants of its own"
    kept = {"policy": keeps_weights(eqn.params["policy"])} if isinstance(ctx.float8, Method) else {}
    return with_marks(bind(eqn, _arrays(ins), jaxpr=inner, **kept), marks)


def cond(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`cond` and `switch`: all branches return the same marks."""
    del reads
    index, *operands = ins
    marks = [rewrite(ctx, branch, operands)[1] for branch in eqn.params["branches"]]
    joined = [_join_all(column) for column in zip(*marks, strict=True)]
    branches = tuple(rewrite(ctx, branch, operands, joined)[0] for branch in eqn.params["branches"])
    return with_marks(bind(eqn, [index.array, *_arrays(operands)], branches=branches), joined)


def scan(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`scan`: the carry's marks are a fixed point, so that a LOW residual stream stays LOW across layers."""
    del reads
    jaxpr = eqn.params["jaxpr"]
    n_consts, n_carry = scan_split(eqn)
    consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    rows = [Value(abstract(x.array, row=True), x.mark) for x in xs]
    accumulates = accumulators(open_jaxpr(jaxpr)[0], n_consts, n_carry)
    carry = [_carried(ctx, v, full) for v, full in zip(carry, accumulates, strict=True)]
    while True:
        _, marks = rewrite(ctx, jaxpr, [*consts, *carry, *rows])
        grown = [ctx.cast(v, join_marks(v.mark, mark)) for v, mark in zip(carry, marks, strict=False)]
        if [v.mark for v in grown] == [v.mark for v in carry]:
            break
        carry = grown
    targets = [v.mark for v in carry] + marks[n_carry:]
    new, _ = rewrite(ctx, jaxpr, [*consts, *carry, *rows], targets)
    return with_marks(bind(eqn, _arrays([*consts, *carry, *xs]), jaxpr=new), targets)


def while_loop(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`while` and `fori_loop`: as `scan`, with a condition that reads the same carry."""
    del reads
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    body = eqn.params["body_jaxpr"]
    if _reads_floats(eqn.params["cond_jaxpr"], n_cond):
        ctx = ctx.in_float32("a loop whose condition reads a float: 16 bits may never reach its tolerance")
    accumulates = accumulators(open_jaxpr(body)[0], n_body, len(carry))
    carry = [_carried(ctx, v, full) for v, full in zip(carry, accumulates, strict=True)]
    while True:
        _, marks = rewrite(ctx, body, [*body_consts, *carry])
        grown = [ctx.cast(v, join_marks(v.mark, mark)) for v, mark in zip(carry, marks, strict=True)]
        if [v.mark for v in grown] == [v.mark for v in carry]:
            break
        carry = grown
    targets = [v.mark for v in carry]
    new_body, _ = rewrite(ctx, body, [*body_consts, *carry], targets)
    new_cond, _ = rewrite(ctx, eqn.params["cond_jaxpr"], [*cond_consts, *carry])
    arrays = _arrays([*cond_consts, *body_consts, *carry])
    return with_marks(bind(eqn, arrays, body_jaxpr=new_body, cond_jaxpr=new_cond), targets)


def shard_map(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`shard_map`: rebuilt around the rewritten body, with its own mesh and specs."""
    del reads
    inner, consts = open_jaxpr(eqn.params["jaxpr"])
    marks: list[Mark | None] = []

    def body(*arrays: Any) -> list[Any]:
        outs = evaluate(ctx, inner, consts, [Value(a, v.mark, v.const) for a, v in zip(arrays, ins, strict=True)])
        marks[:] = [boundary_mark(v.mark) for v in outs]
        return [ctx.cast(v, mark).array for v, mark in zip(outs, marks, strict=True)]

    mapped = jax.shard_map(
        body,
        mesh=eqn.params["mesh"],
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=list(eqn.params["out_specs"]),
        axis_names=eqn.params["newly_manual_axes"],
        check_vma=eqn.params["check_vma"],
    )
    return with_marks(mapped(*_arrays(ins)), marks)


def _reads_floats(cond: Any, n_consts: int) -> bool:
    """Whether a loop's condition depends on a float of the carry."""
    jaxpr, _ = open_jaxpr(cond)
    read = {atom for eqn in jaxpr.eqns for atom in eqn.invars if not is_literal(atom)}
    return any(is_subject(var.aval) and var in read for var in jaxpr.invars[n_consts:])


# Arithmetic that keeps a running sum a running sum: c + x, a * c + x, and what only moves c.
_ADDING = ("add", "sub", "add_any")
_SCALING = ("mul", "div", "neg")
_MOVING = (
    *("convert_element_type", "copy", "reshape", "squeeze", "broadcast_in_dim", "transpose", "select_n"),
    *("dynamic_update_slice", "slice", "concatenate", "scatter"),
)


def accumulators(jaxpr: Any, n_consts: int, n_carry: int) -> list[bool]:
    """Which carries are running sums: their update adds something that does not read them.

    `c + g(x)` and `a * c + b` lose digits at every step in 16 bits; a residual stream `c + g(c)` does not, nor one that
    is normalised, `(c - mean(c)) * rsqrt(var(c)) + bias`.
    """
    producer = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def reads(atom: Any, carry: Any) -> bool:
        stack, seen = [atom], set()
        while stack:
            atom = stack.pop()
            if atom is carry:
                return True
            if atom in seen or atom not in producer:
                continue
            seen.add(atom)
            stack.extend(a for a in producer[atom].invars if not is_literal(a))
        return False

    def adds(atom: Any, carry: Any) -> bool:
        eqn = None if is_literal(atom) else producer.get(atom)
        if eqn is None or eqn.primitive.name not in (*_ADDING, *_SCALING, *_MOVING):
            return False
        readers = [a for a in eqn.invars if not is_literal(a) and reads(a, carry)]
        if eqn.primitive.name in _MOVING:
            return any(adds(reader, carry) for reader in readers)
        if len(readers) != 1:
            return False
        if eqn.primitive.name in _ADDING and len(eqn.invars) > 1:
            return not multiplied(readers[0], carry)
        return adds(readers[0], carry)

    def multiplied(atom: Any, carry: Any) -> bool:
        eqn = producer.get(atom)
        if eqn is None or eqn.primitive.name not in ("mul", "div", *_MOVING):
            return False
        readers = [a for a in eqn.invars if not is_literal(a) and reads(a, carry)]
        both = eqn.primitive.name in ("mul", "div") and len(readers) == 2
        return both or any(multiplied(reader, carry) for reader in readers)

    carries = jaxpr.invars[n_consts : n_consts + n_carry]
    return [adds(out, carry) for out, carry in zip(jaxpr.outvars, carries, strict=False)]


def _carried(ctx: Context, value: Value, accumulates: bool) -> Value:
    mark = boundary_mark(value.mark)
    # A carry changes from step to step: it is no constant, whatever it starts as.
    return dataclasses.replace(ctx.cast(value, Mark.FULL if accumulates and mark else mark), const=None)


def _join_all(marks: Sequence[Mark | None]) -> Mark | None:
    first, *others = marks
    for mark in others:
        first = join_marks(first, mark)
    return first


def _arrays(values: Sequence[Value]) -> list[Any]:
    return [value.array for value in values]


def with_marks(arrays: Sequence[Any], marks: Sequence[Mark | None]) -> list[Value]:
    """Values of these arrays and marks."""
    return [Value(array, mark) for array, mark in zip(arrays, marks, strict=True)]
