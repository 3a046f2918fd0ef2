"""Reads the text of a compiled program: bytes through main memory, estimated cycles, collectives.

The compiler's own sums count the body of a loop once; these count it once a turn.
"""

import functools
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"\d+")
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
_LIBRARY = 'custom_call_target="__cu'  # cuBLAS and cuDNN; other custom calls here only rename memory
_INSTRUCTION = re.compile(r"\s*(ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*)")
_CALLED = re.compile(r"(calls|to_apply|body|condition)=(%[\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def array_bytes(type_text: str) -> list[tuple[str, int]]:
    """Dtype and bytes of each array in an HLO type."""
    sizes = []
    for dtype, shape, _ in _ARRAY.findall(type_text):
        bits = _BITS.search(dtype)
        elements = int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
        sizes.append((dtype, elements * max(int(bits.group()) if bits else 8, 8) // 8))
    return sizes


def _whole(type_text: str) -> int:
    return sum(size for _, size in array_bytes(type_text))


def _hbm(type_text: str) -> list[int]:
    """Bytes in main memory of each array in an HLO type; memory space S(1) is on-chip."""
    layouts = [layout for _, _, layout in _ARRAY.findall(type_text)]
    sizes = array_bytes(type_text)
    return [0 if "S(" in layout else size for layout, (_, size) in zip(layouts, sizes, strict=True)]


class Instruction(NamedTuple):
    """One line: what it makes, how, from what."""

    name: str
    type_text: str
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool

    def called(self, attribute: str = "calls") -> str:
        """The name of the computation that it enters."""
        return next((name for kind, name in _CALLED.findall(self.rest) if kind == attribute), "")


class Module:
    """The computations of an optimized HLO module, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line):
                name = head.group(2)
                self.computations[name] = []
                self.entry = name if head.group(1) else self.entry
            elif name and (found := _INSTRUCTION.match(line)):
                root, made, type_text, opcode, rest = found.groups()
                operands = re.findall(r"%[\w.-]+", rest.split("), ")[0])
                self.computations[name].append(Instruction(made, type_text, opcode, operands, rest, bool(root)))

    def trips(self, loop: Instruction) -> int:
        """How often a while loop turns: the number that its condition compares with, where there is but one."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known.group(1))
        condition = self.computations.get(loop.called("condition"), [])
        limits = [i.rest.split(")")[0] for i in condition if i.opcode == "constant" and i.type_text.startswith("s32[]")]
        return int(limits[0]) if len(limits) == 1 else 1

    @functools.cached_property
    def turns(self) -> dict[str, int]:
        """How often a run enters each computation."""
        turns = dict.fromkeys(self.computations, 1)

        def multiply(name: str, n: int, seen: set[str]) -> None:
            if name in turns and name not in seen:
                seen.add(name)
                turns[name] *= n
                for instruction in self.computations[name]:
                    for _, called in _CALLED.findall(instruction.rest):
                        multiply(called, n, seen)

        for instructions in self.computations.values():
            for loop in instructions:
                if loop.opcode == "while":
                    multiply(loop.called("body"), self.trips(loop), set())
        return turns

    def hbm_bytes(self, computation: str | None = None) -> int:
        """Bytes that a run reads from and writes to main memory.

        The compiler's "bytes accessed" counts a prefetch into on-chip memory three times: read, write, read again.
        """
        outputs: dict[str, list[int]] = {}
        total = 0
        for one in self.computations[computation or self.entry]:
            sizes = outputs[one.name] = _hbm(one.type_text)
            if one.opcode in _FREE or one.opcode.endswith("-done"):
                continue
            if one.opcode == "custom-call" and _LIBRARY not in one.rest:
                continue
            if one.opcode == "while":
                total += self.trips(one) * self.hbm_bytes(one.called("body"))
            elif one.opcode == "copy-start":  # (destination, source, context)
                total += sizes[0] + sizes[1]
            elif one.opcode == "slice-start":  # ((source), destination, context): reads as much as it brings
                total += sum(_hbm(one.type_text.replace("S(1)", ""))[1:2]) + sizes[1]
            elif one.opcode == "dynamic-update-slice":  # (stack, layer, indices): in place
                total += 2 * sum(outputs.get(one.operands[1], []))
            else:
                reads = [sum(outputs.get(operand, [])) for operand in one.operands]
                total += sum(self._touched(one, reads)) + sum(self._written(one, sizes))
        return total

    def _touched(self, one: Instruction, reads: list[int]) -> list[int]:
        """What an instruction reads of its operands: of the stack of a loop's layers, one layer."""
        if one.opcode == "dynamic-slice":
            return [min(reads[0], _whole(one.type_text)), *reads[1:]]
        if one.opcode == "dynamic-update-slice":
            return [0, *reads[1:]]
        if one.opcode != "fusion":
            return reads
        inner = self.computations.get(one.called(), [])
        named = {int(i.rest.split(")")[0]): i.name for i in inner if i.opcode == "parameter"}
        return [self._read_of(inner, named[i], size) if i in named else size for i, size in enumerate(reads)]

    def _read_of(self, inner: list[Instruction], name: str, size: int) -> int:
        total = 0
        for reader in inner:
            if name in reader.operands and total < size:
                if reader.opcode == "bitcast":
                    total += self._read_of(inner, reader.name, size)
                else:
                    reads = [size if operand == name else 0 for operand in reader.operands]
                    total += sum(self._touched(reader, reads))
        return min(total, size)

    def _written(self, one: Instruction, sizes: list[int]) -> list[int]:
        """What an instruction writes of its results: of a stack that it puts a layer into, that layer."""
        if one.opcode != "fusion":
            return sizes
        inner = self.computations.get(one.called(), [])
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
                written += self._written(source, [size])
            else:
                written.append(size)
        return written

    def estimated_cycles(self) -> int:
        """The TPU compiler's own estimate, less what it has none for and calls 2^63 - 1; 0 elsewhere."""
        return sum(
            self.turns[name] * int(cycles)
            for name, instructions in self.computations.items()
            for one in instructions
            for cycles in _CYCLES.findall(one.rest)
            if int(cycles) < 2**60
        )

    def collectives(self) -> list["Collective"]:
        """The collectives of a run, but those of single numbers; one of several stages has one channel and is one."""
        found: dict[str, Collective] = {}
        for computation, instructions in self.computations.items():
            for one in instructions:
                kind = one.opcode.removesuffix("-start")
                if kind not in _COLLECTIVES:
                    continue
                arrays = array_bytes(one.type_text)
                if one.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, contexts)
                    arrays = [max(arrays, key=lambda array: array[1])]
                arrays = [array for array in arrays if array[1] > 8]
                if arrays:
                    channel = re.search(r"channel_id=(\d+)", one.rest)
                    name = channel.group(1) if channel else one.name
                    found[name] = Collective(kind, arrays, _group_size(one.rest), self.turns[computation])
        return list(found.values())


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: as in "all-gather".
      results: dtype and bytes of each result, on one device.
      devices: how many take part in it with one another.
      turns: how often a run makes it.
    """

    kind: str
    results: list[tuple[str, int]]
    devices: int
    turns: int

    def sent(self) -> dict[str, float]:
        """Bytes that one device sends in a run, by dtype: the least that any algorithm sends, which rings do."""
        others = (self.devices - 1) / self.devices
        factor = {
            "all-gather": others,
            "all-to-all": others,
            "all-reduce": 2 * others,
            "reduce-scatter": self.devices - 1.0,
            "collective-permute": 1.0,
        }
        bytes_sent: dict[str, float] = defaultdict(float)
        for dtype, size in self.results:
            bytes_sent[dtype] += self.turns * factor[self.kind] * size
        return dict(bytes_sent)


def _group_size(rest: str) -> int:
    """The devices in one group: of {{0,1},{2,3}}, of [groups,devices]<=[...], of mesh['x'=4,'y'=2] {'y'}."""
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return int(np.prod([int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh.group(2))]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota.group(1))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed.group(1).split(","))
    return 2  # of a permute, which sends all that it has
