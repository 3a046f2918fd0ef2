"""Keeps what a compiler said, so that a second run compiles only what has changed."""

import dataclasses
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import mpjax as mp

KEPT = Path(__file__).parents[1] / "out" / "benchmarks"
# Read as they are imported: a run of many minutes is of one version, whatever is edited meanwhile.
MODELS = (Path(__file__).parent / "models.py").read_bytes()
MPJAX = b"".join(file.read_bytes() for file in sorted(Path(mp.__file__).parent.rglob("*.py")))


def kept(
    names: Sequence[str], parts: Sequence[Any], uses_mpjax: bool, compiled: Callable[[], mp.aot.Report]
) -> mp.aot.Report:
    """Compiles, or reads what the compiler said when the models, `parts` and, where it is used, mpjax were the same."""
    key = hashlib.sha256(repr((*names, *parts)).encode() + MODELS + (MPJAX if uses_mpjax else b""))
    file = KEPT / f"{'-'.join(names).replace(' ', '-')}-{key.hexdigest()[:12]}.json.gz"
    if not file.exists():
        print(f"compiling: {', '.join(names)}", file=sys.stderr, flush=True)
        report = compiled()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(report)).encode()))
        jax.clear_caches()
    return mp.aot.Report(**json.loads(gzip.decompress(file.read_bytes())))
