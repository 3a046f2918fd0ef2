"""How many floating-point operations a program's matrix work is, by the dtype of its operands."""

import functools
import math
import re
from collections import Counter, defaultdict

import numpy as np

from mpjax.aot._hlo import Array, Instruction, Module, arrays_of, dtype_name

_GEMM = ("__cublas$gemm", "__cublas$lt$matmul")
# Where the lhs, rhs and result of the forward convolution stand among (operands, result) of cuDNN's three.
_CUDNN = {"Forward": (0, 1, -1), "BiasActivationForward": (0, 1, -1), "BackwardInput": (-1, 1, 0)}
_CUDNN["BackwardFilter"] = (0, -1, 1)
_HELPER = re.compile(r"[A-Z][A-Za-z]*")  # how XLA names what it calls itself to move data about


def flops(module: Module) -> dict[str, int]:
    """FLOPs of dots and convolutions by dtype, the wider one where two differ; a multiplication and an addition are 2.

    Those of a loop are counted once a turn, and of a conditional in every branch.
    """
    found: dict[str, int] = defaultdict(int)
    for one, turns, named in module.each():
        if work := _flops_of(one, named):
            dtype, each = work
            found[dtype] += turns * each
    return dict(sorted(found.items()))


def uncounted(module: Module) -> tuple[str, ...]:
    """What the figures leave out: kernels whose inside is not known, and loops that turn nobody knows how often."""
    found: Counter[str] = Counter()
    for one, turns, named in module.each():
        target = one.custom_target
        if one.opcode == "while" and module.known_trips(one) is None:
            found["a loop of unknown length, counted as one turn"] += turns
        elif one.opcode == "ragged-dot" or (target and _flops_of(one, named) is None and _is_kernel(target)):
            found[f"{target or one.opcode}: its work is not known"] += turns
    return tuple(f"{text} ({count} x)" if count > 1 else text for text, count in found.items())


def _is_kernel(target: str) -> bool:
    return not _HELPER.fullmatch(target) and "callback" not in target


def _flops_of(one: Instruction, named: dict[str, Instruction]) -> tuple[str, int] | None:
    def operand(i: int) -> Array:
        return arrays_of(named[one.operands[i]].type_text)[0]

    result = next(iter(arrays_of(one.type_text)), None)
    if result is None or len(one.operands) < 2:
        return None
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        return _wider(operand(0), operand(1)), _dot(operand(0), result, contracted.group(1) if contracted else "")
    if one.custom_target.startswith(_GEMM):
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)
        dims = contracted.group(1).replace('"', "") if contracted else ""
        return _wider(operand(0), operand(1)), _dot(operand(0), result, dims)
    if one.opcode == "convolution":
        return _wider(operand(0), operand(1)), _convolution(one.rest, operand(0), operand(1), result)
    places = _CUDNN.get(one.custom_target.removeprefix("__cudnn$conv"))
    if places and one.custom_target.startswith("__cudnn$conv"):
        lhs, rhs, out = (result if place < 0 else operand(place) for place in places)
        return _wider(operand(0), operand(1)), _convolution(one.rest, lhs, rhs, out)
    return None


def _wider(lhs: Array, rhs: Array) -> str:
    return dtype_name(max((lhs, rhs), key=lambda array: array.bytes / max(math.prod(array.shape), 1)).dtype)


def _dot(lhs: Array, result: Array, contracted: str) -> int:
    return 2 * math.prod(result.shape) * math.prod(lhs.shape[int(i)] for i in contracted.split(",") if i)


def _convolution(rest: str, lhs: Array, rhs: Array, out: Array) -> int:
    """As XLA counts it: only where the window meets the input, and neither padding nor the holes of a dilation.

    On a TPU the batch of a product of matrices is such a dilated axis.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels, "a convolution has labels"
    of_lhs, of_rhs, of_out = labels.groups()
    per_output = rhs.shape[of_rhs.index("i")]
    total = 2 * out.shape[of_out.index("b")] * out.shape[of_out.index("f")] * per_output
    window = _window(rest)
    for axis, label in enumerate(sorted(c for c in of_out if c.isdigit())):
        sizes = (array.shape[names.index(label)] for array, names in ((lhs, of_lhs), (rhs, of_rhs), (out, of_out)))
        total *= _meetings(*sizes, *(window[name][axis] for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")))
    return total


def _window(rest: str) -> dict[str, list[int]]:
    """Of each axis of a window: stride, padding before it, dilations."""
    text = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(re.findall(r"(\w+)=(\S+)", text.group(1))) if text else {}
    axes = len(fields.get("size", "").split("x"))
    window = {name: [1] * axes for name in ("stride", "lhs_dilate", "rhs_dilate")}
    window = {name: [int(n) for n in fields[name].split("x")] if name in fields else v for name, v in window.items()}
    pad = fields.get("pad")
    return {**window, "pad": [int(p.split("_")[0]) for p in pad.split("x")] if pad else [0] * axes}


@functools.cache
def _meetings(size: int, kernel: int, outputs: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of a place in the window and an output at which the window meets a number of the input."""
    at = np.arange(outputs, dtype=np.int64) * stride - pad
    last = (size - 1) * lhs_dilate
    total = 0
    for k in range(kernel):
        place = at + k * rhs_dilate
        total += int(np.count_nonzero((place >= 0) & (place <= last) & (place % lhs_dilate == 0)))
    return total
