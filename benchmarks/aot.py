"""Compiles a function for a TPU on a machine that has none, and reads the compiler's own figures.

Needs `pip install "mpjax[aot-tpu]"` (libtpu). The figures do not vary from run to run; they are not seconds.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Read by libtpu as it loads: a topology without a machine behind it, and no search for one.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
)

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RESULTS = Path(__file__).parent / "RESULTS.md"


def write_section(name: str, text: str) -> None:
    """Replaces the generated section of RESULTS.md that stands between the comments of this name."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = RESULTS.read_text().split(start)
    RESULTS.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}")


class Cost(NamedTuple):
    """What the compiler says of one executable."""

    bytes_accessed: float
    hbm_bytes: int
    estimated_cycles: int
    temp_bytes: int
    peak_bytes: int
    hlo: str

    @property
    def leaves_the_device(self) -> list[str]:
        """Instructions that would talk to the host: callbacks, transfers, infeeds."""
        return sorted(set(re.findall(r"\b(infeed|outfeed|send|recv|custom-call-callback|xla_\w*callback)\b", self.hlo)))


_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"\d+")
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "custom-call")  # here: ConcatBitcast


def _hbm(type_text: str) -> list[int]:
    """Bytes in main memory of each array in an HLO type; memory space S(1) is on-chip."""
    sizes = []
    for dtype, shape, layout in _ARRAY.findall(type_text):
        bits = _BITS.search(dtype)
        elements = int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
        sizes.append(0 if "S(" in layout else elements * max(int(bits.group()) if bits else 8, 8) // 8)
    return sizes


def hbm_bytes(hlo: str) -> int:
    """Bytes that the entry computation reads from and writes to main memory.

    The compiler's "bytes accessed" counts a prefetch into on-chip memory three times: read, write, read again.
    """
    outputs: dict[str, list[int]] = {}
    total = 0
    for line in hlo[hlo.index("\nENTRY") :].splitlines()[2:]:
        found = re.match(r"\s*(?:ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*)", line)
        if not found:
            continue
        name, type_text, opcode, rest = found.groups()
        sizes = outputs[name] = _hbm(type_text)
        if opcode in _FREE or opcode.endswith("-done"):
            continue
        operands = re.findall(r"%[\w.-]+", rest.split("), ")[0])
        if opcode == "copy-start":  # (destination, source, context)
            total += sizes[0] + sizes[1]
        elif opcode == "slice-start":  # ((source), destination, context): reads as much as it brings
            total += sum(_hbm(type_text.replace("S(1)", ""))[1:2]) + sizes[1]
        else:
            total += sum(sizes) + sum(sum(outputs.get(operand, [])) for operand in operands)
    return total


def compile_for_v5e(fn: Callable[..., Any], *avals: Any, donate: tuple[int, ...] = ()) -> Cost:
    """Compiles `fn` for one v5e chip; `avals` are trees of `jax.ShapeDtypeStruct`."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    one = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    avals = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), avals)
    traced = jax.jit(fn, donate_argnums=donate).trace(*avals)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    hlo = compiled.as_text()
    return Cost(
        compiled.cost_analysis()["bytes accessed"],
        hbm_bytes(hlo),
        sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo))),
        compiled.memory_analysis().temp_size_in_bytes,
        compiled.memory_analysis().peak_memory_in_bytes,
        hlo,
    )
