"""The one file that may touch what JAX moves between releases; it exports capabilities, not versions."""

# Not jax.extend, which has some of the same names: it imports Pallas, longer than all of mpjax takes.
import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax._src.config
import jax._src.core
import jax._src.hardware_utils
import jax._src.interpreters.partial_eval
import jax._src.lax.lax
import jax._src.source_info_util
import jax.custom_derivatives
import jax.interpreters.ad
import jax.interpreters.batching
import jax.interpreters.mlir
import jax.numpy as jnp
import jaxlib.xla_client
import numpy as np

# Messages and profiles then name the user's line, and not the one in here that traced it.
jax._src.source_info_util.register_exclusion(os.path.dirname(__file__))


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
    return isinstance(atom, jax._src.core.Literal)


def equation_context(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """What has to hold while an equation is bound again: its source line, name stack and settings."""
    util = jax._src.source_info_util
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
    return [open_jaxpr(jaxpr)[0] for jaxpr in jax._src.core.jaxprs_in_params(eqn.params)]


def source_line(eqn: Any, calls: int = 1) -> str:
    """Where in the user's code an equation comes from, as "file.py:12 (function)"; with lines of calls before it."""
    return str(jax._src.source_info_util.summarize(eqn.source_info, calls))


def name_scopes(eqn: Any) -> tuple[str, ...]:
    """The names of `jax.named_scope`s, modules among them, that an equation was traced in."""
    # Transformations stand among them as entries of another class, which has transpose(jvp(...)) as it prints.
    return tuple(entry.name for entry in eqn.source_info.name_stack.stack if type(entry).__name__ == "Scope")


def is_backward(eqn: Any) -> bool:
    """Whether an equation was made by transposing, as the backward pass of a gradient is."""
    return any(getattr(entry, "name", None) == "transpose" for entry in eqn.source_info.name_stack.stack)


def as_function(jaxpr: Any) -> Callable[..., list[Any]]:
    """The function of flat lists that a closed jaxpr stands for."""
    return jax._src.core.jaxpr_as_fun(jaxpr)


def with_invariants(jaxpr: Any, saved: Callable[..., Any]) -> Callable[..., list[Any]]:
    """The function of a closed jaxpr; what `saved`, as a policy of `jax.checkpoint`, names is made here if it can."""
    pe, (opened, consts) = jax._src.interpreters.partial_eval, open_jaxpr(jaxpr)
    later = [i >= len(consts) for i in range(len(consts) + len(opened.invars))]
    known, rest, *_ = pe.partial_eval_jaxpr_custom(pe.convert_constvars_jaxpr(opened), later, True, True, True, saved)
    known, _ = pe.dce_jaxpr(known, [True] * len(known.outvars), True)
    kept = [*jax._src.core.eval_jaxpr(known, (), *consts), *consts]
    return lambda *args: jax._src.core.eval_jaxpr(rest, (), *kept, *args)


def trace_context() -> Any:
    """Everything in JAX's configuration that a trace depends on, hashable."""
    return jax._src.config.trace_context()


def looks_for_nans() -> bool:
    """Whether jax_debug_nans or jax_debug_infs is on."""
    return any(getattr(jax.config, name) for name in ("jax_debug_nans", "jax_debug_infs"))


def is_staged(x: Any) -> bool:
    """Whether `x` is being traced to a jaxpr, as inside jit; not so the tracers of an eager grad or vmap."""
    return type(x).__name__ == "DynamicJaxprTracer"


def weakly_typed(x: Any) -> Any:
    """An array whose dtype gives way to that of an array beside it, as a Python number's does."""
    return jax._src.lax.lax._convert_element_type(x, x.dtype, weak_type=True)


def is_custom_root(eqn: Any) -> bool:
    """Whether a custom_jvp_call is `jax.lax.custom_root`."""
    return "_custom_root" in str(open_jaxpr(eqn.params["call_jaxpr"])[0].debug_info.func_src_info)


def custom_jvp_rule(eqn: Any) -> Callable[..., Any]:
    """The rule of a custom_jvp_call: flat primals and tangents to flat results and their tangents."""
    _, rule = eqn.primitive.get_bind_params(eqn.params)["subfuns"]
    return rule.call_wrapped


def custom_vjp_rule(eqn: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and backward function of a custom_vjp_call, on flat lists.

    forward: (primals, whether each is perturbed) -> results and residuals. backward: (residuals, cotangents, some of
    them a SymbolicZero) -> the primals' cotangents, None for a zero.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    _, fwd, bwd = params["subfuns"]

    def forward(primals: Sequence[Any], perturbed: Sequence[bool]) -> list[Any]:
        flat = fwd.call_wrapped(*(x for pair in zip(primals, perturbed, strict=True) for x in pair))
        # A residual that is an argument is not returned again: its index is listed instead.
        _, _, forwarded = params["out_trees"]()
        made = sum(index is None for index in forwarded)
        residuals = iter(flat[:made])
        return [*flat[made:], *(next(residuals) if index is None else primals[index] for index in forwarded)]

    def backward(residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        if not params["symbolic_zeros"]:
            zero = jax.custom_derivatives.SymbolicZero
            cotangents = [jnp.zeros(ct.shape, ct.dtype) if isinstance(ct, zero) else ct for ct in cotangents]
        cts = bwd.call_wrapped(*residuals, *cotangents)
        # JAX 0.12 returns (cotangents, logs), JAX 0.10 the cotangents.
        cts = cts[0] if isinstance(cts, tuple) else cts
        return [None if isinstance(ct, jax.interpreters.ad.Zero) else ct for ct in cts]

    return forward, backward


# Part of the key of jit's caches: what was traced for another device is traced again.
_traced_for = jax.make_user_context(default_value=("", None))


def target_platform() -> str:
    """The platform that programs are traced for: "cpu", "gpu" or "tpu"."""
    return _traced_for.value[0] or jax.default_backend()


def target_has_float8() -> bool | None:
    """Whether the device of `tracing_for` has fp8 units; None outside of that, where this process's devices tell."""
    return _traced_for.value[1]


def tracing_for(platform: str, float8: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for a device that this process need not have."""
    return _traced_for((platform, float8))


def is_loaded(plugin: str) -> bool:
    """Whether this process has loaded the plugin of JAX for "tpu" or "cuda"."""
    return bool(jaxlib.xla_client.pjrt_plugin_loaded(plugin))


def tpu_chips() -> int:
    """How many TPU chips this machine has."""
    return int(jax._src.hardware_utils.num_available_tpu_chips_and_device_id()[0])


def matrix_tangent(name: str, value: Callable[..., Any], transpose: Callable[..., Any], batch: Any) -> Any:
    """A new primitive for the derivative of a dot or convolution by one operand, with a transpose of its own.

    It takes the tangent, the other operand and constants; the primitive (`matrix`), the tangent's `position` in it, the
    `dtype` of the result, what else is to be told (`method`), and parameters of `matrix`.

    `transpose` is its gradient in `dtype`, of the cotangent, the transpose of `matrix` (of two arrays and its result's
    dtype), the other operand and constants.
    """
    new, ad = jax._src.core.Primitive(name), jax.interpreters.ad

    def aval(*avals: Any, matrix: Any, position: int, dtype: Any, method: Any, **params: Any) -> Any:
        operands = [x.update(dtype=dtype) for x in avals[:2]]
        return matrix.abstract_eval(*operands[:: 1 - 2 * position], **params, preferred_element_type=dtype)

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        changes = [(i, tangent) for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
        parts = [new.bind(*primals[:i], tangent, *primals[i + 1 :], **params) for i, tangent in changes]
        return new.bind(*primals, **params), sum(parts[1:], parts[0])

    def transposed(
        cotangent: Any, *operands: Any, matrix: Any, position: int, dtype: Any, method: Any, **params: Any
    ) -> Any:
        by_tangent = isinstance(operands[0], ad.UndefinedPrimal)
        wanted = operands[0 if by_tangent else 1]

        def backward(cotangent: Any, known: Any, dtype: Any, **changes: Any) -> Any:
            unknown = ad.UndefinedPrimal(wanted.aval.update(dtype=dtype))
            pair = [unknown, known][:: 1 if by_tangent == (position == 0) else -1]
            changed = {**params, "preferred_element_type": dtype, **changes}
            return next(x for x in ad.get_primitive_transpose(matrix)(cotangent, *pair, **changed) if x is not None)

        if by_tangent:
            own = {"position": position, "dtype": wanted.aval.dtype, "method": method, **params}
            return [transpose(cotangent, backward, *operands[1:], **own), *(None for _ in operands[1:])]
        return [None, backward(cotangent, jax.lax.convert_element_type(operands[0], dtype), dtype)]

    new.def_effectful_abstract_eval(aval)
    ad.primitive_transposes[new] = transposed
    return _registered(new, value, jvp, batch)


def varying_alike(*xs: Any) -> list[Any]:
    """Arrays that vary over the same axes of a mesh, as operands of one primitive under shard_map have to."""
    return list(jax._src.core.auto_insert_reshard(*xs))


def abstract(x: Any, row: bool = False, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """The shape and type of a value, or of one row of it, to trace with; possibly in another dtype."""
    aval = jax.typeof(x)
    aval = aval if dtype is None else aval.update(dtype=dtype)
    start, about = 1 if row else 0, {}
    if not aval.manual_axis_type.empty:
        # Under shard_map, what a value varies over goes with the mesh that it is on.
        spec = jax.sharding.PartitionSpec(*aval.sharding.spec[start:])
        about["sharding"] = jax.sharding.NamedSharding(aval.sharding.mesh, spec)
        about["manual_axis_type"] = aval.manual_axis_type
    return jax.ShapeDtypeStruct(aval.shape[start:], aval.dtype, weak_type=aval.weak_type, **about)


def whole_primitive(name: str, value: Callable[..., Any], no_derivative: Callable[[], Exception]) -> Any:
    """A new primitive for a function of one array and static parameters that stays one equation under transformations.

    It returns a list of arrays; where a derivative is taken, `no_derivative` makes the error.
    """
    new = jax._src.core.Primitive(name)
    new.multiple_results = True

    def avals(x: Any, **params: Any) -> Any:
        given = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, manual_axis_type=x.manual_axis_type)
        jaxpr, _ = open_jaxpr(jax.make_jaxpr(functools.partial(value, **params))(given))
        return [var.aval for var in jaxpr.outvars]

    def jvp(*_: Any, **params: Any) -> Any:
        raise no_derivative()

    def batch(operands: Sequence[Any], axes: Sequence[Any], *, mapped: int, **params: Any) -> Any:
        outs = new.bind(jnp.moveaxis(operands[0], axes[0], 0), mapped=mapped + 1, **params)
        return outs, [0] * len(outs)

    new.def_abstract_eval(avals)
    return _registered(new, value, jvp, batch)


def _registered(new: Any, value: Callable[..., Any], jvp: Callable[..., Any], batch: Callable[..., Any]) -> Any:
    lowered = jax.interpreters.mlir.lower_fun(value, multiple_results=new.multiple_results)
    new.def_impl(value)
    jax.interpreters.mlir.register_lowering(new, lowered)
    jax.interpreters.ad.primitive_jvps[new] = jvp
    jax.interpreters.batching.primitive_batchers[new] = batch
    return new
