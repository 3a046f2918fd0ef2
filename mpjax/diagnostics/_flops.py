"""Floating-point operations and bytes of one equation."""

import math
from typing import Any

from mpjax._autocast._tables import MOVES, ROWS, Kind

_MATRIX = next(row.primitives for row in ROWS if row.kind is Kind.LOW)
_SUMS = next(row.primitives for row in ROWS if row.kind is Kind.SUM)
_FREE = (*MOVES, "convert_element_type", "copy", "name", "iota")


def flops(eqn: Any) -> int:
    """Floating-point operations: a product and a sum count as two; other arithmetic as one for each element.

    Exact for dots and convolutions; moving values about counts nothing.
    """
    name = eqn.primitive.name
    results = sum(_size(var) for var in eqn.outvars)
    if name in ("dot_general", "ragged_dot_general"):
        numbers = eqn.params.get("dimension_numbers", eqn.params.get("ragged_dot_dimension_numbers"))
        (contracted, _), _ = getattr(numbers, "dot_dimension_numbers", numbers)
        work = 2 * results * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        # Where the ragged dimension is summed over, each row goes into one group.
        ragged = set(getattr(numbers, "lhs_ragged_dimensions", ())) & set(contracted)
        return work // eqn.invars[2].aval.shape[-1] if ragged else work
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * results * math.prod(kernel) // features
    if name in _FREE:
        return 0
    return sum(_size(atom) for atom in eqn.invars) if name in _SUMS else results


def operand_bytes(eqn: Any) -> dict[str, int]:
    """Bytes of all operands and results by dtype, as if nothing were fused."""
    found: dict[str, int] = {}
    for atom in (*eqn.invars, *eqn.outvars):
        dtype: Any = getattr(atom.aval, "dtype", None)
        if hasattr(dtype, "itemsize") and atom.aval.shape:
            found[str(dtype)] = found.get(str(dtype), 0) + _size(atom) * dtype.itemsize
    return found


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))
