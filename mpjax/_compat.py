"""The one file that may touch what JAX moves between releases; it exports capabilities, not versions."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.extend.source_info_util
import numpy as np

# Messages and profiles then name the user's line, and not the one in here that traced it.
jax.extend.source_info_util.register_exclusion(os.path.dirname(__file__))


def is_tracer(x: Any) -> bool:
    """Whether `x` stands for a value that is not known yet (inside jit, vmap, grad ...)."""
    # jax.core.Tracer is the one name of jax.core that JAX 0.10 to 0.12 still documents.
    return isinstance(x, jax.core.Tracer)


def is_float0(x: Any) -> bool:
    """Whether `x` is JAX's gradient of an integer: a placeholder that takes no arithmetic."""
    # A plain ndarray in JAX 0.10, a TypedNdArray later: only the dtype says what it is.
    return getattr(x, "dtype", None) == jax.dtypes.float0


def no_gradient(x: Any) -> np.ndarray | None:
    """The gradient of a leaf that has none: as `jax.grad` gives it for an array, `None` for anything else."""
    return np.zeros(np.shape(x), jax.dtypes.float0) if hasattr(x, "dtype") or isinstance(x, int) else None


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Splits a jaxpr, closed or not, into the jaxpr proper and its constants."""
    # JAX 0.10 has ClosedJaxpr and Jaxpr; 0.12 has one class for both, whose .jaxpr is itself.
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a literal: it has its value in `.val`."""
    return isinstance(atom, jax.extend.core.Literal)


def equation_context(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """What has to hold while an equation is bound again: its source line, name stack and settings."""
    util = jax.extend.source_info_util
    info = eqn.source_info
    stack = contextlib.ExitStack()
    stack.enter_context(util.user_context(info.traceback, name_stack=util.current_name_stack() + info.name_stack))
    stack.enter_context(eqn.ctx.manager)
    return stack


def bind(eqn: Any, args: list[Any], **changes: Any) -> list[Any]:
    """Binds an equation's primitive to new arguments, some parameters changed; always returns a list."""
    # get_bind_params turns the parameters of custom_jvp_call and its like back into functions ("subfuns").
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params({**eqn.params, **changes}))
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_split(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants and how many its carry; the rest is scanned over."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # JAX 0.12 has a tree of (constants, carry, xs) instead.
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs in an equation's parameters."""
    return [open_jaxpr(jaxpr)[0] for jaxpr in jax.extend.core.jaxprs_in_params(eqn.params)]


def source_line(eqn: Any) -> str:
    """Where in the user's code an equation comes from, as "file.py:12 (function)"."""
    return str(jax.extend.source_info_util.summarize(eqn.source_info))


def custom_functions(eqn: Any) -> tuple[Callable[..., Any], ...]:
    """The functions behind a custom_jvp_call (primal, jvp) or custom_vjp_call (primal, fwd, bwd), on flat lists."""
    return tuple(f.call_wrapped for f in eqn.primitive.get_bind_params(eqn.params)["subfuns"])


def abstract(x: Any, row: bool = False) -> jax.ShapeDtypeStruct:
    """The shape and type of a value, or of one row of it, to trace with."""
    aval = jax.typeof(x)
    start = 1 if row else 0
    manual = aval.manual_axis_type
    if manual.empty:
        return jax.ShapeDtypeStruct(aval.shape[start:], aval.dtype, weak_type=aval.weak_type)
    # Under shard_map, what a value varies over goes with the mesh that it is on.
    spec = jax.sharding.PartitionSpec(*aval.sharding.spec[start:])
    return jax.ShapeDtypeStruct(
        aval.shape[start:],
        aval.dtype,
        weak_type=aval.weak_type,
        sharding=jax.sharding.NamedSharding(aval.sharding.mesh, spec),
        manual_axis_type=manual,
    )
