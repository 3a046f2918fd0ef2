"""Primitives that hold functions: entered, rewritten, and bound again with their own parameters."""

from collections.abc import Sequence
from typing import Any

import jax

from mpjax._autocast._interpreter import Context, Reads, evaluate
from mpjax._autocast._marks import Mark, Value, boundary_mark, join_marks
from mpjax._compat import abstract, bind, open_jaxpr, scan_split


def rewrite(
    ctx: Context, jaxpr: Any, ins: Sequence[Value], targets: Sequence[Mark | None] | None = None
) -> tuple[Any, list[Mark | None]]:
    """Traces a jaxpr in mixed precision: the new closed jaxpr, and the marks of its results.

    Cached, so that a function called twenty times stays one function.

    Args:
      ctx: the evaluation.
      jaxpr: closed or not.
      ins: values to trace with; only their types, marks and constants matter.
      targets: the marks that the results are to have. Default: their own, statistics and normalised activations
        brought to what may cross a boundary.
    """
    avals = tuple(v.array if isinstance(v.array, jax.ShapeDtypeStruct) else abstract(v.array) for v in ins)
    key = (id(jaxpr), avals, tuple((v.mark, v.const) for v in ins), None if targets is None else tuple(targets))
    if key in ctx.cache:
        return ctx.cache[key][1:]
    inner, consts = open_jaxpr(jaxpr)
    marks: list[Mark | None] = []

    def run(*arrays: Any) -> list[Any]:
        values = [Value(a, v.mark, v.const) for a, v in zip(arrays, ins, strict=True)]
        outs = evaluate(ctx, inner, consts, values)
        wanted = [boundary_mark(v.mark) for v in outs] if targets is None else targets
        marks[:] = wanted
        return [ctx.cast(v, mark).array for v, mark in zip(outs, wanted, strict=True)]

    new = jax.make_jaxpr(run)(*avals)
    # The old jaxpr is kept beside it, so that its id stays its own.
    ctx.cache[key] = (jaxpr, new, list(marks))
    return new, list(marks)


def call(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jit`: one new function for each combination of input marks."""
    del reads
    new, marks = rewrite(ctx, eqn.params["jaxpr"], ins)
    return _values(bind(eqn, _arrays(ins), jaxpr=new), marks)


def remat(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jax.checkpoint`: what is recomputed is recomputed in the same precision; its policy is kept."""
    del reads
    new, marks = rewrite(ctx, eqn.params["jaxpr"], ins)
    inner, consts = open_jaxpr(new)
    assert not consts, "a rematerialised body has no constants of its own"
    return _values(bind(eqn, _arrays(ins), jaxpr=inner), marks)


def cond(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`cond` and `switch`: all branches return the same marks."""
    del reads
    index, *operands = ins
    marks = [rewrite(ctx, branch, operands)[1] for branch in eqn.params["branches"]]
    joined = [_join_all(column) for column in zip(*marks, strict=True)]
    branches = tuple(rewrite(ctx, branch, operands, joined)[0] for branch in eqn.params["branches"])
    return _values(bind(eqn, [index.array, *_arrays(operands)], branches=branches), joined)


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
    return _values(bind(eqn, _arrays([*consts, *carry, *xs]), jaxpr=new), targets)


def while_loop(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`while` and `fori_loop`: as `scan`, with a condition that reads the same carry."""
    del reads
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    body = eqn.params["body_jaxpr"]
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
    return _values(bind(eqn, arrays, body_jaxpr=new_body, cond_jaxpr=new_cond), targets)


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
    return _values(mapped(*_arrays(ins)), marks)


# Arithmetic that keeps a running sum a running sum: c + x, a * c + x, and what only moves c.
_LINEAR = {"add", "sub", "add_any", "mul", "div", "neg", "convert_element_type", "copy", "reshape", "squeeze"}
_LINEAR |= {"broadcast_in_dim", "transpose", "select_n", "dynamic_update_slice", "slice", "concatenate"}


def accumulators(jaxpr: Any, n_consts: int, n_carry: int) -> list[bool]:
    """Which carries are running sums: their update adds something that does not read them.

    `c + g(x)` and `a * c + b` lose digits at every step in 16 bits; a residual stream `c + g(c)` does not.
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
            stack.extend(a for a in producer[atom].invars if not hasattr(a, "val"))
        return False

    def adds(atom: Any, carry: Any) -> bool:
        while not hasattr(atom, "val") and atom in producer:
            eqn = producer[atom]
            if eqn.primitive.name not in _LINEAR:
                return False
            readers = [a for a in eqn.invars if not hasattr(a, "val") and reads(a, carry)]
            if len(readers) != 1:
                return False
            others = [a for a in eqn.invars if a is not readers[0]]
            if eqn.primitive.name in ("add", "sub", "add_any") and others:
                return True
            atom = readers[0]
        return False

    carries = jaxpr.invars[n_consts : n_consts + n_carry]
    return [adds(out, carry) for out, carry in zip(jaxpr.outvars, carries, strict=False)]


def _carried(ctx: Context, value: Value, accumulates: bool) -> Value:
    mark = boundary_mark(value.mark)
    # A carry changes from step to step: it is no constant, whatever it starts as.
    return ctx.cast(value, Mark.FULL if accumulates and mark else mark)._replace(const=None)


def _join_all(marks: Sequence[Mark | None]) -> Mark | None:
    first, *others = marks
    for mark in others:
        first = join_marks(first, mark)
    return first


def _arrays(values: Sequence[Value]) -> list[Any]:
    return [value.array for value in values]


def _values(arrays: Sequence[Any], marks: Sequence[Mark | None]) -> list[Value]:
    return [Value(array, mark) for array, mark in zip(arrays, marks, strict=True)]
