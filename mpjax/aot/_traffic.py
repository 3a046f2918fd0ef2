"""What a program moves: bytes through main memory, and between devices."""

import dataclasses
import functools
import math
import re
from collections import defaultdict

from mpjax.aot._hlo import Array, Instruction, Module, arrays_of, dtype_name

_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
_LIBRARY = "__cu"  # cuBLAS and cuDNN; other custom calls of a GPU or TPU only rename memory
_OTHERS = ("all-gather", "all-to-all", "ragged-all-to-all")
_COLLECTIVES = (*_OTHERS, "reduce-scatter", "all-reduce", "collective-permute", "collective-broadcast")


def _whole(type_text: str) -> int:
    return sum(array.bytes for array in arrays_of(type_text))


def _hbm(type_text: str) -> list[int]:
    """Bytes in main memory of each array in an HLO type."""
    return [0 if "S(" in array.layout else array.bytes for array in arrays_of(type_text)]


def main_memory_bytes(module: Module) -> int:
    """Bytes that a run reads from and writes to main memory.

    The compiler's "bytes accessed" counts a prefetch into on-chip memory three times (read, write, read again), the
    body of a loop once, and of a stack of layers all of it where one layer is read.
    """

    @functools.cache
    def of(name: str) -> int:
        outputs: dict[str, list[int]] = {}
        total = 0
        for one in module.computations.get(name, []):
            sizes = outputs[one.name] = _hbm(one.type_text)
            if one.opcode in _FREE or one.opcode.endswith("-done"):
                continue
            if one.opcode == "custom-call" and not one.custom_target.startswith(_LIBRARY):
                continue
            if one.opcode == "while":
                total += module.trips(one) * of(one.called("body"))
            elif one.opcode == "call":
                total += of(one.called("to_apply"))
            elif one.opcode == "conditional":  # one is taken: count the dearest
                total += max(map(of, one.branches), default=0)
            elif one.opcode == "copy-start":  # (destination, source, context)
                total += sizes[0] + sizes[1]
            elif one.opcode == "slice-start":  # ((source), destination, context): reads as much as it brings
                total += sum(_hbm(one.type_text.replace("S(1)", ""))[1:2]) + sizes[1]
            elif one.opcode == "dynamic-update-slice":  # (stack, layer, indices): in place
                total += 2 * sum(outputs.get(one.operands[1], []))
            else:
                reads = [sum(outputs.get(operand, [])) for operand in one.operands]
                total += sum(_touched(module, one, reads)) + sum(_written(module, one, sizes))
        return total

    return of(module.entry)


def _touched(module: Module, one: Instruction, reads: list[int]) -> list[int]:
    """What an instruction reads of its operands: of the stack of a loop's layers, one layer."""
    if one.opcode == "dynamic-slice":
        return [min(reads[0], _whole(one.type_text)), *reads[1:]]
    if one.opcode == "dynamic-update-slice":
        return [0, *reads[1:]]
    if one.opcode != "fusion":
        return reads
    inner = module.computations.get(one.called(), [])
    named = {int(i.rest.split(")")[0]): i.name for i in inner if i.opcode == "parameter"}
    return [_read_of(module, inner, named[i], size) if i in named else size for i, size in enumerate(reads)]


def _read_of(module: Module, inner: list[Instruction], name: str, size: int) -> int:
    total = 0
    for reader in inner:
        if name in reader.operands and total < size:
            if reader.opcode == "bitcast":
                total += _read_of(module, inner, reader.name, size)
            else:
                reads = [size if operand == name else 0 for operand in reader.operands]
                total += sum(_touched(module, reader, reads))
    return min(total, size)


def _written(module: Module, one: Instruction, sizes: list[int]) -> list[int]:
    """What an instruction writes of its results: of a stack that it puts a layer into, that layer."""
    if one.opcode != "fusion":
        return sizes
    inner = module.computations.get(one.called(), [])
    made = {i.name: i for i in inner}
    roots = [i for i in inner if i.is_root]
    if roots and roots[0].opcode == "tuple":
        roots = [made[name] for name in roots[0].operands]
    if len(roots) != len(sizes):
        return sizes
    written = []
    for source, size in zip(roots, sizes, strict=True):
        while source.opcode == "bitcast" and source.operands[0] in made:
            source = made[source.operands[0]]
        if source.opcode == "dynamic-update-slice":
            update = made.get(source.operands[1])
            written.append(min(size, _whole(update.type_text)) if update else size)
        elif source.opcode == "fusion":
            written += _written(module, source, [size])
        else:
            written.append(size)
    return written


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and dtype.

    Attributes:
      kind: as in `"all-gather"`.
      dtype: of what is sent.
      count: how many a run makes.
      bytes_sent: that one device sends in a run: the least that any algorithm sends, which rings do; of a ragged
        all-to-all, the most.
    """

    kind: str
    dtype: str
    count: int
    bytes_sent: float


def collectives(module: Module) -> tuple[Collective, ...]:
    """The collectives of a run, but those of single numbers; one of several stages has one channel and is one."""
    found: dict[str, tuple[str, list[Array], int, int]] = {}
    for one, turns, _ in module.each():
        kind = one.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        arrays = arrays_of(one.type_text)
        if one.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, contexts)
            arrays = [max(arrays, key=lambda array: array.bytes)]
        arrays = [array for array in arrays if array.bytes > 8]
        if arrays:
            channel = re.search(r"channel_id=(\d+)", one.rest)
            name = channel.group(1) if channel else one.name
            found[name] = (kind, arrays, _group_size(one.rest, module.devices), turns)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    sent: dict[tuple[str, str], float] = defaultdict(float)
    for kind, arrays, devices, turns in found.values():
        for dtype in dict.fromkeys(dtype_name(array.dtype) for array in arrays):
            counts[kind, dtype] += turns
        for array in arrays:
            sent[kind, dtype_name(array.dtype)] += turns * _factor(kind, devices) * array.bytes
    return tuple(Collective(*key, count, sent[key]) for key, count in sorted(counts.items()))


def _factor(kind: str, devices: int) -> float:
    """Bytes that a device sends for each byte of its result."""
    others = (devices - 1) / devices
    if kind in _OTHERS:
        return others
    return {"all-reduce": 2 * others, "reduce-scatter": devices - 1.0}.get(kind, 1.0)


def _group_size(rest: str, devices: int) -> int:
    """The devices in one group: of {{0,1},{2,3}}, of [groups,devices]<=[...], of mesh['x'=4,'y'=2] {'y'}."""
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        # An axis, or the part of one that has so many devices: 'x':(1)2.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota.group(1))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed.group(1).split(","))
    return devices  # no groups: all of them
