"""Functions with a gradient rule of their own: the rule is kept, and rewritten like everything else."""

from typing import Any

import jax

from mpjax._autocast._higher_order import rewrite
from mpjax._autocast._interpreter import Context, Reads, evaluate
from mpjax._autocast._marks import Value, boundary_mark
from mpjax._compat import custom_functions, open_jaxpr


def custom_jvp(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jax.custom_jvp`: primal and rule are both evaluated in mixed precision."""
    del reads
    ins = [ctx.cast(v, boundary_mark(v.mark)) for v in ins]
    inner, consts = open_jaxpr(eqn.params["call_jaxpr"])
    _, marks = rewrite(ctx, eqn.params["call_jaxpr"], ins)
    _, rule = custom_functions(eqn)

    def values(arrays: Any) -> list[Value]:
        return [Value(a, v.mark) for a, v in zip(arrays, ins, strict=True)]

    def brought(outs: list[Value]) -> list[Any]:
        return [ctx.cast(v, mark).array for v, mark in zip(outs, marks, strict=True)]

    @jax.custom_jvp
    def primal(*arrays: Any) -> list[Any]:
        return brought(evaluate(ctx, inner, consts, values(arrays)))

    @primal.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        both = [*values(primals), *values(tangents)]
        traced, traced_consts = open_jaxpr(jax.make_jaxpr(rule)(*map(ctx.widen, both)))
        outs = evaluate(ctx, traced, traced_consts, both)
        return brought(outs[: len(marks)]), brought(outs[len(marks) :])

    return [Value(a, m) for a, m in zip(primal(*(v.array for v in ins)), marks, strict=True)]
