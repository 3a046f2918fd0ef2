"""What autocast costs before a step runs: seconds to trace, seconds to compile, casts of each weight.

    python benchmarks/autocast_trace.py [--models lm vit] [--runs 5] [--write]

Traces and compiles loss and gradients of the models of `models.py`, at full size, for this machine's CPU, in turns,
with JAX's caches emptied before each. The medians are seconds of one machine: only their ratios mean something. Casts
are counted in the jaxpr: of a weight that a loop does not change, none belongs inside the loop.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import cpu_only  # noqa: F401 # isort: skip  # before jax

import flax
import jax
import jax.numpy as jnp
import models
from autocast_cost import VARIANTS, variant
from results import write_section

import mpjax as mp
from mpjax._compat import is_literal, scan_split

MODELS = (*models.MODELS, "lm-shared")
# What hands a weight on as it is, or moved about.
MOVES = {
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "squeeze",
    "slice",
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
}


class Casts(NamedTuple):
    """Casts of weights from float32 to 16 bits, by the number of the weight; `repeated` are those in vain."""

    all: list[int]
    repeated: list[int]


def casts_of(jaxpr: Any, weights: dict[Any, int], inside: frozenset[int] = frozenset()) -> Casts:
    """Counts in a jaxpr, whose variables `weights` are weights; those in `inside` a loop hands on unchanged."""
    found = Casts([], [])
    env = dict(weights)

    def enter(inner: Any, atoms: Sequence[Any], unchanged: frozenset[int]) -> None:
        inner = getattr(inner, "jaxpr", inner)
        known = {var: env[a] for var, a in zip(inner.invars, atoms, strict=True) if _is_var(a) and a in env}
        for mine, theirs in zip(found, casts_of(inner, known, unchanged), strict=True):
            mine.extend(theirs)

    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        of = [env[a] for a in eqn.invars if _is_var(a) and a in env]
        if not of:
            continue
        if name == "convert_element_type" and jnp.dtype(params["new_dtype"]).itemsize == 2:
            found.all.append(of[0])
            if of[0] in inside:
                found.repeated.append(of[0])
        elif name in MOVES:
            env[eqn.outvars[0]] = of[0]
        elif name == "scan":
            # Its constants stand still; what it goes along changes with each turn.
            moving = {env[a] for a in eqn.invars[scan_split(eqn)[0] :] if _is_var(a) and a in env}
            enter(params["jaxpr"], eqn.invars, (inside | frozenset(of)) - moving)
        elif name == "cond":
            for branch in params["branches"]:
                enter(branch, eqn.invars[1:], inside)
        else:
            for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
                if key in params:
                    enter(params[key], eqn.invars, inside)
    return found


def _is_var(atom: Any) -> bool:
    return not is_literal(atom)


def gradients(model: str, name: str) -> tuple[Callable[..., Any], Any]:
    case, loss = variant(model, name)
    return jax.value_and_grad(loss, has_aux=True), case.avals


def count(model: str, name: str) -> tuple[int, Casts]:
    """How many weights a model has, and their casts."""
    fn, avals = gradients(model, name)
    jaxpr = jax.make_jaxpr(fn)(*avals).jaxpr
    weights = len(jax.tree.leaves(avals[0]))
    return weights, casts_of(jaxpr, {var: i for i, var in enumerate(jaxpr.invars[:weights])})


def clocked(model: str, runs: int) -> dict[str, tuple[float, float]]:
    """Median seconds to trace and to compile, by precision."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(runs):
        for name, of_name in seconds.items():
            print(f"tracing and compiling: {model}, {name}", file=sys.stderr, flush=True)
            jax.clear_caches()
            fn, avals = gradients(model, name)
            start = time.perf_counter()
            traced = jax.jit(fn).trace(*avals)
            traced_at = time.perf_counter()
            lowered = traced.lower()
            lowered_at = time.perf_counter()
            lowered.compile()
            of_name.append((traced_at - start, time.perf_counter() - lowered_at))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in seconds.items()}


def rows_of(model: str, runs: int) -> list[str]:
    seconds = clocked(model, runs) if runs else {}
    rows = []
    for name in VARIANTS:
        weights, casts = count(model, name)
        times = ["", ""]
        if runs:
            trace, compile_ = seconds[name]
            times = [
                f"{trace:.2f} s ({trace / seconds['float32'][0]:.2f}x)",
                f"{compile_:.1f} s ({compile_ / seconds['by hand'][1]:.2f}x)",
            ]
        most = max((casts.all.count(i) for i in set(casts.all)), default=0)
        cells = [*times, str(weights), str(len(casts.all)), str(most), str(len(casts.repeated))]
        rows.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--runs", type=int, default=3, help="0 counts casts only")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    titles = "model | precision | trace | compile | weights | casts | most of one weight | in a loop, in vain"
    rows = [f"| {titles} |", "| --- " * 8 + "|"]
    for model in arguments.models:
        rows += rows_of(model, arguments.runs)
    text = (
        f"Traced and compiled for a CPU, medians of {arguments.runs}; jax {jax.__version__}, flax {flax.__version__}, "
        f"mpjax {mp.__version__}. Command: `python benchmarks/autocast_trace.py --runs {arguments.runs}`. Factors of "
        "tracing are relative to the function's own, of compiling to the model written by hand.\n\n" + "\n".join(rows)
    )
    print(text)
    if arguments.write:
        write_section("autocast_trace", text)


if __name__ == "__main__":
    main()
