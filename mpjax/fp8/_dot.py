"""A dot of 8-bit operands with scales of the moment, and its gradients."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mpjax._compat import matrix_tangent, target_platform, varying_alike
from mpjax._dtypes import BFLOAT16, FLOAT16, FLOAT32, canonical_dtype
from mpjax._errors import problem
from mpjax.fp8._markers import as_floats, differentiable_once, quantized
from mpjax.fp8._recipe import Method, Recipe, has_float8
from mpjax.fp8._scaling import Quantized


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    dtype: Any = "float8_e4m3fn",
    scaling: Literal["tensor", "channel"] = "tensor",
    gradients: Literal["e5m2", "e4m3"] = "e5m2",
    weight_gradient: Literal["float8", "bfloat16"] = "float8",
    emulate: bool | None = None,
) -> Any:
    """`jax.lax.dot_general` of operands that are brought into 8 bits, with a scale from their own largest number.

    Incoming gradients are brought into a wider format (e5m2), with a scale of their own. Sums are float32; scales,
    powers of two, are applied to the result. There is no state. Infinities and NaNs come through. It is for layers that
    take a `dot_general`, such as Flax's; `mpjax.autocast` needs none of this.

    It goes through `jit`, `vmap`, `scan`, `checkpoint` and `shard_map`, and forward and reverse derivatives, of first
    order. Under a sharded `jit` a scale is that of the whole array; under `shard_map` that of each device's part.

    Args:
      lhs: floating; float32 or 16 bits.
      rhs: the same; the weight.
      dimension_numbers: as `jax.lax.dot_general` takes it.
      precision: not used: operands have 8 bits.
      preferred_element_type: the dtype of the result. Default: bfloat16, or float32 if both operands are.
      out_sharding: `None` alone: that of the result follows from those of the operands.
      dtype: the format of the operands.
      scaling: as in `Recipe`.
      gradients: as in `Recipe`.
      weight_gradient: as in `Recipe`.
      emulate: whether to compute in float32 arithmetic what fp8 units would. Default: where there are none.

    Returns:
      An array as `jax.lax.dot_general` gives it; gradients have the dtypes of the operands.

    Raises:
      ValueError: `dtype` is no format for operands; `out_sharding` is given.
      TypeError: an operand is not in float32 or 16 bits.
      NotImplementedError: a derivative of second order is taken: rounding has none.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> x, w = jnp.full((2, 16), 0.3), jnp.ones((16, 4))
    >>> mp.fp8.dot_general(x, w, (((1,), (0,)), ((), ())))[0, 0]  # 0.3 is 0.3125 in e4m3
    Array(5., dtype=float32)
    """
    del precision
    if out_sharding is not None:
        raise ValueError(
            problem(
                f"out_sharding is {out_sharding}.",
                expected="None: the sharding of a product in fp8 follows from those of its operands",
                write="jax.sharding.reshard(mp.fp8.dot_general(lhs, rhs, dimension_numbers), out_sharding)",
            )
        )
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    for x in (lhs, rhs):
        if x.dtype not in (FLOAT32, BFLOAT16, FLOAT16):
            raise TypeError(
                problem(
                    f"an operand is in {x.dtype}.",
                    expected="float32, bfloat16 or float16, which are brought into 8 bits",
                    write="jax.lax.dot_general for what is to stay as it is, or x.astype(jnp.float32)",
                )
            )
    if preferred_element_type is None:
        preferred_element_type = FLOAT32 if lhs.dtype == rhs.dtype == FLOAT32 else BFLOAT16
    emulate = not has_float8() if emulate is None else emulate
    method = Recipe(scaling=scaling, gradients=gradients, weight_gradient=weight_gradient, emulate=emulate).method(
        dtype
    )
    (left_sum, right_sum), (left_batch, right_batch) = dimension_numbers
    numbers = (tuple(left_sum), tuple(right_sum)), (tuple(left_batch), tuple(right_batch))
    return dot(lhs, rhs, numbers, canonical_dtype(preferred_element_type), method, (False, True))


def dot(lhs: Any, rhs: Any, numbers: Any, dtype: Any, method: Method, weights: tuple[bool, bool]) -> Any:
    """A dot in 8 bits.

    Args:
      lhs: floating.
      rhs: floating. Gradients have the dtypes of the operands.
      numbers: as `jax.lax.dot_general` takes them.
      dtype: of the result.
      method: how.
      weights: which operands are weights.
    """

    @jax.custom_jvp
    def product(lhs: Any, rhs: Any) -> Any:
        return _forward(_quantized((lhs, rhs), numbers, method, weights), numbers, dtype, method)

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        eight = _quantized(primals, numbers, method, weights)
        out = _forward(eight, numbers, dtype, method)
        change = None
        for i, tangent in enumerate(tangents):
            if isinstance(tangent, SymbolicZero):
                continue
            other, scale = eight[1 - i].values, eight[1 - i].scale
            if weights[i] and not method.weight_gradient:
                other, scale = differentiable_once(primals[1 - i].astype(BFLOAT16)), jnp.ones_like(scale)
            part = _tangent.bind(
                tangent,
                other,
                scale,
                matrix=jax.lax.dot_general_p,
                position=i,
                dtype=dtype,
                method=method,
                dimension_numbers=numbers,
                precision=None,
                out_sharding=None,
            )
            change = part if change is None else change + part
        return out, jnp.zeros_like(out) if change is None else change

    product.defjvp(jvp, symbolic_zeros=True)
    return product(*varying_alike(lhs, rhs))


def _quantized(operands: Sequence[Any], numbers: Any, method: Method, weights: tuple[bool, bool]) -> list[Quantized]:
    found = []
    for role, x, summed, weight in zip(("lhs", "rhs"), operands, numbers[0], weights, strict=True):
        block = tuple(-1 if i in summed else 1 for i in range(x.ndim)) if method.by_channel else None
        # Nothing is past the largest number, unless infinite.
        found.append(quantized(role, x, method.forward, block, weight))
    return found


# The name scope of `mpjax.keep_precision`: an autocast around this one leaves the products of emulated operands alone.
_AS_WRITTEN = "mpjax.keep_precision"


def _forward(operands: Sequence[Quantized], numbers: Any, dtype: Any, method: Method) -> Any:
    # Rounding to bfloat16 and then scaling by powers of two is scaling and then rounding. So what `jax.checkpoint` may
    # keep, the result of the dot, has 16 bits, and XLA still makes one kernel of both.
    kept = BFLOAT16 if dtype == BFLOAT16 else FLOAT32
    left, right = (_computable(x.values, method.forward, method) for x in operands)
    with jax.named_scope(_AS_WRITTEN):
        out = jax.lax.dot_general(left, right, numbers, preferred_element_type=FLOAT32 if method.emulate else kept)
    out = out.astype(kept)
    for position, x in enumerate(operands):
        # One after the other: the product of the scales may leave float32's range where the result does not.
        out = out * _over_result(x.scale, position, numbers, out.ndim).astype(kept)
    return out.astype(dtype)


def _value(
    tangent: Any,
    other: Any,
    scale: Any,
    *,
    position: int,
    dtype: Any,
    method: Method,
    dimension_numbers: Any,
    **_: Any,
) -> Any:
    """The change of the result, itself not rounded to 8 bits: forward derivatives alone evaluate it."""
    other = other if other.dtype == BFLOAT16 else as_floats(other, method.forward)
    left, right = (tangent.astype(FLOAT32), other.astype(FLOAT32) * scale)[:: 1 - 2 * position]
    return jax.lax.dot_general(left, right, dimension_numbers).astype(dtype)


def _transpose(
    cotangent: Any,
    backward: Any,
    other: Any,
    scale: Any,
    *,
    position: int,
    dtype: Any,
    method: Method,
    dimension_numbers: Any,
    **_: Any,
) -> Any:
    """The gradient by one operand."""
    kept = BFLOAT16 if dtype == BFLOAT16 else FLOAT32
    if other.dtype == BFLOAT16:
        wide = FLOAT32 if method.emulate else BFLOAT16
        return backward(cotangent.astype(wide), other.astype(wide), FLOAT32 if method.emulate else kept).astype(dtype)
    if scale.size > 1:
        # What has a scale of its own is summed over now: its scale goes with the incoming gradient.
        cotangent = cotangent.astype(FLOAT32) * _over_result(scale, 1 - position, dimension_numbers, cotangent.ndim)
    ndim = _ndim(dimension_numbers, other.ndim, cotangent.ndim)
    own = _axes(position, dimension_numbers, ndim, cotangent.ndim)
    block = tuple(1 if i in own.values() else -1 for i in range(cotangent.ndim)) if method.by_channel else None
    eight = quantized("gradient", cotangent, method.backward, block)
    # Sums of fewer bits, which an H100 has for speed, are for the forward pass alone, as in TransformerEngine.
    precision = jax.lax.Precision.HIGHEST if target_platform() == "gpu" else None
    operands = (_computable(eight.values, method.backward, method), _computable(other, method.forward, method))
    with jax.named_scope(_AS_WRITTEN):
        out = backward(*operands, FLOAT32 if method.emulate else kept, precision=precision).astype(kept)
    out = out * _over_operand(eight.scale, own, out.ndim).astype(kept)
    if scale.size == 1:
        out = out * scale.reshape((1,) * out.ndim).astype(kept)
    return out.astype(dtype)


def _batch(
    operands: Sequence[Any], axes: Sequence[Any], *, position: int, dimension_numbers: Any, **params: Any
) -> Any:
    """Under vmap the product stays one, of operands with one more axis, so that gradients are in 8 bits there too."""
    tangent, other, scale = (
        x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)
    )
    if axes[1] is not None and axes[2] is None:
        scale = scale[None]
    if axes[1] is None and axes[2] is not None:
        other = jnp.broadcast_to(other, (scale.shape[0], *other.shape))
    mapped = [axes[0] is not None, axes[1] is not None or axes[2] is not None][:: 1 - 2 * position]
    sums, batches = (
        tuple(tuple(axis + moved for axis in part) for part, moved in zip(pair, mapped, strict=True))
        for pair in dimension_numbers
    )
    # An axis that one operand alone has is the first of its free axes.
    at = len(batches[0])
    if all(mapped):
        batches, at = tuple((0, *batch) for batch in batches), 0
    elif mapped[1]:
        left = (tangent, other)[position]
        at = left.ndim - len(sums[0])
    numbers = (sums, batches)
    return _tangent.bind(tangent, other, scale, position=position, dimension_numbers=numbers, **params), at


_tangent = matrix_tangent("float8_tangent", _value, _transpose, _batch)


def _computable(bits: Any, dtype: Any, method: Method) -> Any:
    """An operand of a dot: in float32 where that is emulated."""
    # XLA for GPUs takes two casts, to 8 bits and back, for none.
    return (
        as_floats(jax.lax.optimization_barrier(bits), dtype).astype(FLOAT32)
        if method.emulate
        else as_floats(bits, dtype)
    )


def _axes(position: int, numbers: Any, ndim: int, result_ndim: int) -> dict[int, int]:
    """Where the axes of an operand are in the result, without those that are summed over."""
    summed, batch = numbers[0][position], numbers[1][position]
    free = [axis for axis in range(ndim) if axis not in (*summed, *batch)]
    first = len(batch) if position == 0 else result_ndim - len(free)
    return {axis: i for i, axis in enumerate(batch)} | {axis: first + i for i, axis in enumerate(free)}


def _ndim(numbers: Any, other_ndim: int, result_ndim: int) -> int:
    """How many axes an operand has, by those of the other one and of the result."""
    return result_ndim - other_ndim + len(numbers[1][0]) + 2 * len(numbers[0][0])


def _over_result(scale: Any, position: int, numbers: Any, ndim: int) -> Any:
    """An operand's scales as something that broadcasts with the result."""
    axes = _axes(position, numbers, scale.ndim, ndim)
    shape = [1] * ndim
    for axis, at in axes.items():
        shape[at] = scale.shape[axis]
    return scale.transpose((*sorted(axes, key=axes.__getitem__), *numbers[0][position])).reshape(shape)


def _over_operand(scale: Any, axes: dict[int, int], ndim: int) -> Any:
    """An incoming gradient's scales as something that broadcasts with the gradient of an operand."""
    order = [axes[axis] for axis in sorted(axes)]
    shape = [scale.shape[axes[axis]] if axis in axes else 1 for axis in range(ndim)]
    return scale.transpose((*order, *(i for i in range(scale.ndim) if i not in order))).reshape(shape)
