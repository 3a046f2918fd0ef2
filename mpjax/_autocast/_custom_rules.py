"""Functions with a derivative or batching rule of their own: the rule is kept, and rewritten like everything else."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from mpjax._autocast._context import Context
from mpjax._autocast._higher_order import rewrite, with_marks
from mpjax._autocast._interpreter import evaluate
from mpjax._autocast._marks import Mark, Value, boundary_mark
from mpjax._autocast._reads import Reads
from mpjax._compat import abstract, bind, custom_jvp_rule, custom_vjp_rule, is_custom_root, open_jaxpr
from mpjax._dtypes import FLOAT32


def custom_jvp(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jax.custom_jvp`: primal and rule are both evaluated in mixed precision."""
    del reads
    if is_custom_root(eqn):
        ctx = ctx.in_float32("a root that is solved for: 16 bits stall at their rounding")
    ins = [ctx.cast(v, boundary_mark(v.mark)) for v in ins]
    _, marks = rewrite(ctx, eqn.params["call_jaxpr"], ins)
    rule, in_rule = custom_jvp_rule(eqn), _in_rule(ctx)

    def jvp(primals: Any, tangents: Any) -> Any:
        outs = _ruled(in_rule, rule, [*_like(ins, primals), *_like(ins, tangents)])
        results, changes = outs[: len(marks)], outs[len(marks) :]
        return _arrays(ctx, results, marks), _arrays(ctx, changes, marks)

    primal = jax.custom_jvp(_primal(ctx, eqn.params["call_jaxpr"], ins, marks))
    primal.defjvp(jvp, symbolic_zeros=eqn.params["symbolic_zeros"])
    return with_marks(primal(*(v.array for v in ins)), marks)


def custom_vjp(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jax.custom_vjp`: primal, forward and backward in mixed precision; LOW residuals are kept in 16 bits."""
    del reads
    ins = [ctx.cast(v, boundary_mark(v.mark)) for v in ins]
    _, marks = rewrite(ctx, eqn.params["call_jaxpr"], ins)
    fwd, bwd = custom_vjp_rule(eqn)

    def forward(*primals: Any) -> tuple[list[Any], _Residuals]:
        perturbed = [p.perturbed for p in primals]
        outs = _ruled(ctx, lambda *xs: fwd(xs, perturbed), _like(ins, [p.value for p in primals]))
        kept = [ctx.cast(v, boundary_mark(v.mark)) for v in outs[len(marks) :]]
        return _arrays(ctx, outs[: len(marks)], marks), _Residuals([v.array for v in kept], tuple(v.mark for v in kept))

    def backward(residuals: _Residuals, cotangents: Any) -> tuple[Any, ...]:
        kept = with_marks(residuals.arrays, residuals.marks)
        given = _like(with_marks([None] * len(marks), marks), cotangents)
        outs = _ruled(_in_rule(ctx), lambda *xs: bwd(xs[: len(kept)], xs[len(kept) :]), [*kept, *given])
        return tuple(_arrays(ctx, outs, [v.mark for v in ins]))

    primal = jax.custom_vjp(_primal(ctx, eqn.params["call_jaxpr"], ins, marks))
    primal.defvjp(forward, backward, symbolic_zeros=True)
    return with_marks(primal(*(v.array for v in ins)), marks)


def remat_opt(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """The forward rule of a `custom_vjp` with `optimize_remat`: becomes the primal where no residual is used."""
    del reads
    n_consts, n_residuals = eqn.params["num_consts"], eqn.params["num_res"]
    new, marks = rewrite(ctx, eqn.params["fwd_jaxpr"], ins)

    @functools.cache
    def primal() -> Any:
        jaxpr, consts = eqn.params["fun_jaxpr_thunk"]()
        inputs = ins[n_consts:]

        def run(*arrays: Any) -> list[Any]:
            return _arrays(ctx, evaluate(ctx, jaxpr, consts, _like(inputs, arrays)), marks[n_residuals:])

        return open_jaxpr(jax.make_jaxpr(run)(*(abstract(v.array) for v in inputs)))

    return with_marks(bind(eqn, [v.array for v in ins], fwd_jaxpr=new, fun_jaxpr_thunk=primal), marks)


def custom_vmap(ctx: Context, eqn: Any, ins: list[Value], reads: Reads) -> list[Value]:
    """`jax.custom_batching.custom_vmap`: primal and batching rule are both evaluated in mixed precision."""
    del reads
    ins = [ctx.cast(v, boundary_mark(v.mark)) for v in ins]
    _, marks = rewrite(ctx, eqn.params["call"], ins)

    def rule(size: int, batched: Sequence[bool], *arrays: Any) -> Any:
        out_batched: list[bool] = []

        def flat(*xs: Any) -> list[Any]:
            tree = eqn.params["in_tree"]
            outs, mapped = eqn.params["rule"](size, jax.tree.unflatten(tree, batched), *jax.tree.unflatten(tree, xs))
            out_batched[:] = jax.tree.leaves(mapped)
            return jax.tree.leaves(outs)

        return _arrays(ctx, _ruled(ctx, flat, _like(ins, arrays)), marks), out_batched

    primal = jax.custom_batching.custom_vmap(_primal(ctx, eqn.params["call"], ins, marks))
    primal.def_vmap(rule)
    return with_marks(primal(*(v.array for v in ins)), marks)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("marks",))
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """What a forward rule keeps for the backward rule."""

    arrays: list[Any]
    marks: tuple[Mark | None, ...]


def _in_rule(ctx: Context) -> Context:
    """For a rule of derivatives: what is linear in tangents stays so, and gradients get no format for weights."""
    return dataclasses.replace(ctx, float8=ctx.float8 and "in a derivative rule, which is written for 16 bits or more")


# Stands for an array among what a rule returns.
_ARRAY = object()


def _primal(ctx: Context, jaxpr: Any, ins: Sequence[Value], marks: Sequence[Mark | None]) -> Callable[..., list[Any]]:
    inner, consts = open_jaxpr(jaxpr)
    return lambda *arrays: _arrays(ctx, evaluate(ctx, inner, consts, _like(ins, arrays)), marks)


def _ruled(ctx: Context, rule: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
    """Traces a rule in its own dtypes and evaluates it; zeros that are no arrays go in and come out as they are."""
    static: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        moving = iter(arrays)
        outs = rule(*(next(moving) if isinstance(x, Value) else x for x in args))
        static[:] = [x if x is None or isinstance(x, SymbolicZero) else _ARRAY for x in outs]
        return [x for x, kept in zip(outs, static, strict=True) if kept is _ARRAY]

    values = [x for x in args if isinstance(x, Value)]
    avals = [abstract(v.array, dtype=FLOAT32 if v.mark is Mark.LOW else None) for v in values]
    jaxpr, consts = open_jaxpr(jax.make_jaxpr(flat)(*avals))
    outs = iter(evaluate(ctx, jaxpr, consts, values))
    return [next(outs) if x is _ARRAY else x for x in static]


def _like(values: Sequence[Value], arrays: Sequence[Any]) -> list[Any]:
    """Arrays with the marks of these values; a symbolic zero gets its original dtype."""
    return [
        _zero(a, FLOAT32 if v.mark else None) if isinstance(a, SymbolicZero) else Value(a, v.mark)
        for v, a in zip(values, arrays, strict=True)
    ]


def _arrays(ctx: Context, outs: Sequence[Any], marks: Sequence[Mark | None]) -> list[Any]:
    """The arrays of these values, brought to these marks; zeros that are no arrays stay what they are."""
    return [
        _zero(x, ctx.low if mark is Mark.LOW else None)
        if isinstance(x, SymbolicZero)
        else x and ctx.cast(x, mark).array
        for x, mark in zip(outs, marks, strict=True)
    ]


def _zero(zero: Any, dtype: Any) -> Any:
    return zero if dtype is None else SymbolicZero(zero.aval.update(dtype=dtype, weak_type=False))
