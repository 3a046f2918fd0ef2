"""What `mpjax.aot.compile_for` returns: the compiler's figures, and how they are shown."""

import dataclasses
import functools
import json
from typing import Any

from mpjax.aot._hlo import Module
from mpjax.aot._traffic import Collective, collectives, main_memory_bytes
from mpjax.aot._work import flops, uncounted


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiler says of a program, for each device that runs it. None of it varies from run to run.

    Attributes:
      target: the name of the target.
      title: what that is.
      devices: how many run the program.
      compiler: the compiler and its version.
      memory_limit: bytes of main memory that a program may use on a device; `None` where that is not known. JAX takes
        three quarters of a GPU's, unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise.
      peak_bytes: the most memory in use at one time, arguments and results included.
      temp_bytes: of what is neither argument nor result.
      argument_bytes, output_bytes: of arguments and results.
      alias_bytes: of results that take a donated argument's place.
      bytes_accessed: the compiler's own sum; `None` where it has none, as for a GPU.
      hlo: the optimized program, as text.
      refusal: what the compiler said of a program that does not fit, and that it did not compile: of that, only
        `peak_bytes` is known.
    """

    target: str
    title: str
    devices: int
    compiler: str
    memory_limit: int | None
    peak_bytes: int
    temp_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    bytes_accessed: int | None = None
    hlo: str = dataclasses.field(default="", repr=False)
    refusal: str = ""

    @property
    def needed_bytes(self) -> int:
        """Memory that it takes to run: the peak, or arguments, results (aliases once) and temporaries if they are more.

        Temporaries are one block that a run has from its beginning, with gaps in it that the peak leaves out.
        """
        parts = (self.argument_bytes, self.output_bytes, self.temp_bytes)
        return max(self.peak_bytes, sum(n or 0 for n in parts) - (self.alias_bytes or 0))

    @property
    def fits(self) -> bool | None:
        """Whether a device has the memory that it needs; `None` where that is not known."""
        if self.refusal:
            return False
        return None if self.memory_limit is None else self.needed_bytes <= self.memory_limit

    @property
    def spare_bytes(self) -> int | None:
        """Memory that is left; negative by how much it does not fit."""
        return None if self.memory_limit is None else self.memory_limit - self.needed_bytes

    @functools.cached_property
    def main_memory_bytes(self) -> int | None:
        """Bytes that a run reads from and writes to main memory, loops counted once a turn; read from the HLO."""
        return main_memory_bytes(self._module) if self.hlo else None

    @functools.cached_property
    def flops(self) -> dict[str, int]:
        """FLOPs of dots and convolutions by the dtype of their operands; read from the HLO.

        At default precision a TPU makes a float32 product in one pass of bfloat16, and an A100 or H100 may in TF32.
        """
        return flops(self._module)

    @functools.cached_property
    def estimated_cycles(self) -> int | None:
        """Cycles that the TPU compiler expects, without waiting for other devices; `None` elsewhere."""
        return self._module.estimated_cycles()

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Collectives by kind and dtype, with their number and what each device sends; single numbers left out."""
        return collectives(self._module)

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends to others in a run."""
        return sum(row.bytes_sent for row in self.collectives)

    @functools.cached_property
    def host_transfers(self) -> tuple[str, ...]:
        """Kinds of instructions that talk to the host, which a training step should not have."""
        return self._module.host_transfers()

    @functools.cached_property
    def uncounted(self) -> tuple[str, ...]:
        """What the figures leave out: kernels such as Pallas', and loops of unknown length."""
        return uncounted(self._module)

    @functools.cached_property
    def _module(self) -> Module:
        return Module(self.hlo)

    def to_dict(self) -> dict[str, Any]:
        """All figures, of types that JSON has; without the HLO."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hlo"}
        names = ("needed_bytes", "fits", "spare_bytes", "main_memory_bytes", "flops", "estimated_cycles", "bytes_sent")
        rows = [dataclasses.asdict(row) for row in self.collectives]
        lists = {"host_transfers": list(self.host_transfers), "uncounted": list(self.uncounted)}
        return {**fields, **{name: getattr(self, name) for name in names}, "collectives": rows, **lists}

    def to_json(self) -> str:
        """All figures, as JSON; without the HLO."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [(title, show(value)) for title, value, show in self.figures()]
        rows += [(f"{row.kind} of {row.dtype}", _sent(row)) for row in self.collectives]
        width = max(len(title) for title, _ in rows)
        lines = [f"  {title:{width}}  {text}" for title, text in rows]
        notes = [f"Talks to the host: {', '.join(self.host_transfers)}."] if self.host_transfers else []
        notes += [f"Not counted: {'; '.join(self.uncounted)}."] if self.uncounted else []
        notes += [f"The compiler refused it: {self.refusal}"] if self.refusal else []
        return "\n".join([self.heading, "", *lines, *(["", *notes] if notes else [])])

    @property
    def heading(self) -> str:
        """What it is compiled for, and by what; then whether it fits."""
        many = f"{self.devices} x " if self.devices > 1 else ""
        verdict = ""
        if self.fits is not None and self.spare_bytes is not None and self.memory_limit is not None:
            word = "spare" if self.fits else "too much"
            verdict = f"\n{'fits' if self.fits else 'does not fit'}: {in_bytes(self.needed_bytes)} of "
            verdict += f"{in_bytes(self.memory_limit)}, {in_bytes(abs(self.spare_bytes))} {word}"
        return f"{many}{self.title}, {self.compiler}{verdict}"

    def figures(self) -> list[tuple[str, float, Any]]:
        """The title of each figure that there is, its value, and the function that shows it."""
        rows: list[tuple[str, float | None, Any]] = [
            ("peak memory", self.peak_bytes, in_bytes),
            ("temporary", self.temp_bytes, in_bytes),
            ("arguments", self.argument_bytes, in_bytes),
            ("results", self.output_bytes, in_bytes),
            ("aliased", self.alias_bytes, in_bytes),
            ("main-memory traffic", self.main_memory_bytes, in_bytes),
            ("bytes accessed", self.bytes_accessed, in_bytes),
            *((f"FLOPs, {dtype}", work, in_thousands) for dtype, work in self.flops.items()),
            ("estimated cycles", self.estimated_cycles, in_thousands),
            ("sent by each device", self.bytes_sent if self.devices > 1 and self.hlo else None, in_bytes),
        ]
        return [(title, value, show) for title, value, show in rows if value is not None]


def _sent(row: Collective) -> str:
    return f"{in_bytes(row.bytes_sent)} in {row.count}"


def in_bytes(n: float) -> str:
    """A number of bytes, in the binary units that compilers count memory in."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 2**power:
            return f"{n / 2**power:.2f} {unit}"
    return f"{n:.0f} B"


def in_thousands(n: float) -> str:
    """A count, shortened."""
    for unit, power in (("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3)):
        if n >= 10**power:
            return f"{n / 10**power:.2f} {unit}"
    return f"{n:.0f}"
