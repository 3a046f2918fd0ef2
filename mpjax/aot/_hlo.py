"""Reads the text of an optimized HLO module: its computations, how often a run enters each, cycles.

The compiler's own sums count the body of a loop once; what is built on this counts it once a turn.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"\d+")
_HEAD = re.compile(r"(ENTRY )?(%[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s*(ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*)")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_NAME = re.compile(r"%[\w.-]+")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KINDS = {"f": "float", "s": "int", "u": "uint", "c": "complex"}


class Array(NamedTuple):
    """One array of an HLO type.

    Attributes:
      dtype: as HLO writes it: `"bf16"`.
      shape: its sizes.
      layout: what stands in braces; memory space S(1) of a TPU is on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Its size, without padding; a bool and a number of fewer than 8 bits are counted as a byte."""
        bits = _BITS.search(self.dtype)
        return math.prod(self.shape) * max(int(bits.group()) if bits else 8, 8) // 8


def arrays_of(type_text: str) -> list[Array]:
    """The arrays of an HLO type."""
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
        for dtype, shape, layout in _ARRAY.findall(type_text)
    ]


def dtype_name(hlo: str) -> str:
    """The name that JAX has for a dtype of HLO: `bfloat16` for `bf16`, `float8_e4m3fn` for `f8e4m3fn`."""
    if hlo == "pred":
        return "bool"
    if found := re.fullmatch(r"(bf|[fsuc])(\d+)(e\w+)?", hlo):
        kind, bits, format = found.groups()
        return f"{_KINDS.get(kind, 'bfloat')}{bits}{f'_{format}' if format else ''}"
    return hlo


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

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        listed = [name for names in _BRANCHES.findall(self.rest) for name in _NAME.findall(names)]
        pair = [self.called("true_computation"), self.called("false_computation")]
        return listed or [name for name in pair if name]

    @property
    def enters(self) -> list[str]:
        """All computations that it enters."""
        return [name for _, name in _CALLED.findall(self.rest)] + [
            name for names in _BRANCHES.findall(self.rest) for name in _NAME.findall(names)
        ]

    @property
    def custom_target(self) -> str:
        """The function that a custom call is of."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest) if self.opcode == "custom-call" else None
        return found.group(1) if found else ""


class Module:
    """The computations of an optimized HLO module, by name.

    Attributes:
      computations: the instructions of each.
      entry: the name of the one that a run begins in.
      devices: how many devices it is for.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = name = ""
        head = text.partition("\n")[0]
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
        self.devices = math.prod(map(int, counts))
        for line in text.splitlines():
            if found := _HEAD.match(line):
                name = found.group(2)
                self.computations[name] = []
                self.entry = name if found.group(1) else self.entry
            elif name and (found := _INSTRUCTION.match(line)):
                root, made, type_text, opcode, rest = found.groups()
                operands = _NAME.findall(rest.split("), ")[0])
                self.computations[name].append(Instruction(made, type_text, opcode, operands, rest, bool(root)))

    def known_trips(self, loop: Instruction) -> int | None:
        """How often a while loop turns: the number that its condition compares with, where there is but one."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known.group(1))
        condition = self.computations.get(loop.called("condition"), [])
        limits = [i.rest.split(")")[0] for i in condition if i.opcode == "constant" and i.type_text.startswith("s32[]")]
        return int(limits[0]) if len(limits) == 1 else None

    def trips(self, loop: Instruction) -> int:
        """How often a while loop turns; 1 where that is not known."""
        known = self.known_trips(loop)
        return 1 if known is None else known

    @functools.cached_property
    def turns(self) -> dict[str, int]:
        """How often a run enters each computation; every branch of a conditional, as if it were taken."""
        callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, instructions in self.computations.items():
            for one in instructions:
                # The other halves of an asynchronous pair name the computation again.
                for entered in () if one.opcode.endswith(("-done", "-update")) else one.enters:
                    callers[entered].append((name, self.trips(one) if one.opcode == "while" else 1))

        @functools.cache
        def of(name: str) -> int:
            return 1 if name == self.entry else sum(of(caller) * times for caller, times in callers[name])

        return {name: of(name) for name in self.computations}

    def each(self) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
        """All instructions that a run comes by, how often, and those of their computation by name."""
        for name, instructions in self.computations.items():
            if self.turns[name]:
                named = {one.name: one for one in instructions}
                for one in instructions:
                    yield one, self.turns[name], named

    def estimated_cycles(self) -> int | None:
        """The TPU compiler's own estimate, less what it has none for and calls 2^63 - 1; `None` elsewhere."""
        found = [turns * int(n) for one, turns, _ in self.each() for n in _CYCLES.findall(one.rest) if int(n) < 2**60]
        return sum(found) if found else None

    def host_transfers(self) -> tuple[str, ...]:
        """The kinds of instructions that talk to the host: callbacks, transfers, infeeds."""
        found = set()
        for one, _, _ in self.each():
            if one.opcode in ("infeed", "outfeed", "send", "recv"):
                found.add(one.opcode)
            elif "callback" in one.custom_target:
                found.add(one.custom_target)
        return tuple(sorted(found))
