"""How long a laptop takes to say whether a decoder of a billion parameters fits a slice of 256 TPU v5e chips.

    python benchmarks/large_slice.py [--write]

The step of `wire_bytes.py` under FSDP, with more layers, under `mp.autocast`: as a loop over its layers, each
rematerialised, and with its layers written out. What is timed is tracing and compilation.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cpu_only  # noqa: F401 # isort: skip  # before jax

import jax
import jax.numpy as jnp
import models
import wire_bytes
from results import write_section

import mpjax as mp

CHIPS = "16x16"
SIZES = {**wire_bytes.SIZES, "layers": 20}
MODELS = ("lm-scan-remat", "lm")


def row(model: str) -> str:
    params = models.case(model, jnp.float32, batch=1, sizes=SIZES).avals[0]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    start = time.perf_counter()
    report = wire_bytes.compile_step("fsdp", CHIPS, model, "autocast")
    seconds = time.perf_counter() - start
    peak, sent = (f"{size / 1e6:.0f} MB" for size in (report.peak_bytes, report.bytes_sent))
    return f"| {model} | {count:,} | {seconds:.0f} s | {peak} | {'yes' if report.fits else 'no'} | {sent} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    wire_bytes.SIZES.update(SIZES)
    titles = ("model", "parameters", "time to compile", "peak memory of a chip", "fits 16 GB", "sent by each chip")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|", *map(row, MODELS)]
    text = (
        f"A step of a decoder ({', '.join(f'{name} {n}' for name, n in SIZES.items())}; {wire_bytes.ROWS_A_CHIP} rows "
        f"of 512 tokens on each chip) with AdamW and clipping under FSDP on TPU v5e {CHIPS}, compiled by "
        f"{wire_bytes.versions()}, mpjax {mp.__version__}, on {os.cpu_count()} CPU cores. "
        "Command: `python benchmarks/large_slice.py`.\n\n" + "\n".join(lines)
    )
    print(text)
    if arguments.write:
        write_section("large_slice", text)


if __name__ == "__main__":
    main()
