"""Whether training ends in 16 bits where it does in float32: three workloads on real data, several seeds.

    python benchmarks/convergence.py [--workloads digits lm bert] [--extra-seeds 2] [--write]

The examples as they are: `resnet50.py` on digits, `train_lm.py` and `bert.py` on the standard library's source, each
from the same parameters on the same batches in float32, in bfloat16, and in float16 with and without a loss scale. A
run that is done is kept under out/convergence and not done again. --write puts the table into RESULTS.md, the curves
into convergence.png and the numbers into raw/convergence.json. Needs the extra `examples`.
"""

import argparse
import json
import statistics
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import flax
import jax
import matplotlib.figure
import numpy as np
import optax
import resnet50
import train_lm
from flax import nnx
from results import write_section

import mpjax as mp

HERE = Path(__file__).parent
RUNS = HERE.parent / "out" / "convergence"
FIGURE, NUMBERS = HERE / "convergence.png", HERE / "raw" / "convergence.json"
POINTS = 50  # of a curve, in the JSON and in the figure
# A policy, and whether it is used with its own loss scale ("policy") or with none.
PRECISIONS = {
    "float32": ("float32", "policy"),
    "bfloat16": ("mixed_bfloat16", "policy"),
    "float16, dynamic loss scale": ("mixed_float16", "policy"),
    "float16, no loss scale": ("mixed_float16", "none"),
}


def digits(policy: str, loss_scale: str, seed: int, settings: dict[str, int]) -> dict[str, Any]:
    flags = ["--dataset", "digits", "--policy", policy, "--loss-scale", loss_scale, "--seed", str(seed)]
    return resnet50.train(resnet50.parse(flags + as_flags(settings)))


def bert(policy: str, loss_scale: str, seed: int, settings: dict[str, int]) -> dict[str, Any]:
    import bert

    flags = ["--policy", policy, "--loss-scale", loss_scale, "--seed", str(seed)]
    return bert.train(bert.parse(flags + as_flags(settings)))


def as_flags(settings: dict[str, int]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def lm(policy: str, loss_scale: str, seed: int, settings: dict[str, int]) -> dict[str, Any]:
    """The parts of `train_lm.py`, without its checkpoints."""
    chosen, steps, rows, length = mp.get_policy(policy), settings["steps"], settings["batch"], settings["length"]
    scale = mp.NoOpLossScale() if loss_scale == "none" else chosen.loss_scale()
    mesh = train_lm.make_mesh(1, 1)
    with jax.set_mesh(mesh):
        graph, params = nnx.split(train_lm.Decoder(settings["layers"], settings["width"], length, rngs=nnx.Rngs(seed)))
        loss_fn = mp.autocast(train_lm.loss_of(graph), chosen)
        tx = train_lm.make_optimizer(SimpleNamespace(loss_scale=lambda: scale), steps, 3e-3)
        state = {"params": params, "opt_state": tx.init(params)}
        shardings = train_lm.shardings_of(state, mesh)
        step, state = train_lm.make_train_step(loss_fn, tx, 1, shardings), jax.device_put(state, shardings)
        text, held_out = train_lm.load_text()
        reader, metrics = train_lm.Reader(text, length, seed), []
        for i in range(steps):
            state, numbers = step(state, train_lm.on_devices(reader.batch(rows * i, rows), mesh))
            metrics.append(numbers)
        starts = np.linspace(0, len(held_out) - length - 1, 512, dtype=int)
        evaluate = jax.jit(loss_fn)
        parts = np.split(train_lm.rows_at(held_out, starts, length), 512 // rows)
        final = np.mean([evaluate(state["params"], train_lm.on_devices(part, mesh)) for part in parts])
    losses = [float(numbers["loss"]) for numbers in jax.device_get(metrics)]
    return {"losses": losses, "held_out": float(final), "skips": int(metrics[-1]["skips"])}


class Workload(NamedTuple):
    """An example, its flags or sizes, and how many seeds it has at least."""

    what: str
    run: Callable[..., dict[str, Any]]
    seeds: int
    settings: dict[str, int]


WORKLOADS = {
    "digits": Workload("ResNet, digits at 32 px", digits, 5, {"steps": 200, "batch": 64}),
    "lm": Workload("decoder, bytes", lm, 3, {"steps": 160, "batch": 32, "length": 64, "layers": 2, "width": 64}),
    "bert": Workload("BERT-small, byte pairs", bert, 3, {"steps": 300, "batch": 32, "length": 32}),
}


def result_of(name: str, precision: str, seed: int) -> dict[str, Any]:
    """A run's result, from its file if it has been done with these settings."""
    workload = WORKLOADS[name]
    policy, loss_scale = PRECISIONS[precision]
    path = RUNS / f"{name}-{policy}-{loss_scale}-{seed}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == workload.settings:
            return kept
    found = workload.run(policy, loss_scale, seed, workload.settings)
    kept = {"settings": workload.settings} | {
        key: found[key] for key in ("losses", "held_out", "accuracy", "skips") if key in found
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept))
    print(name, precision, seed, {key: kept[key] for key in kept if key not in ("losses", "settings")}, flush=True)
    return kept


def thinned(losses: Sequence[float]) -> list[float]:
    """The means of `POINTS` parts of a curve."""
    return [round(float(part.mean()), 4) for part in np.array_split(np.array(losses), min(POINTS, len(losses)))]


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def rows_of(what: str, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The rows of a workload, with the mean of the differences from float32, seed by seed."""
    lines, base = [], [run["held_out"] for run in runs["float32"]]
    for precision, found in runs.items():
        losses = [run["held_out"] for run in found]
        more = statistics.mean(a - b for a, b in zip(losses, base, strict=True))
        cells = [
            what,
            precision,
            spread(losses, ".4f"),
            "" if precision == "float32" else f"{more:+.4f} ({more / statistics.stdev(base):+.2f})",
            spread([run["accuracy"] for run in found], ".2%") if "accuracy" in found[0] else "",
            " ".join(str(run["skips"]) for run in found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    figure = matplotlib.figure.Figure(figsize=(4 * len(results), 3.2), layout="constrained")
    # Wide lines lie below narrow ones, so that curves on top of each other can all be seen.
    styles = (
        ("#C8C8C8", 5.0, "-"),
        ("#56B4E9", 2.5, "-"),
        ("#000000", 1.2, (0, (1, 2))),
        ("#D55E00", 1.2, (0, (5, 4))),
    )
    for axes, (name, runs) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        steps = WORKLOADS[name].settings["steps"]
        for (precision, found), (colour, width, style) in zip(runs.items(), styles, strict=True):
            curve = np.mean([thinned(run["losses"]) for run in found], axis=0)
            at = (np.arange(len(curve)) + 0.5) * steps / len(curve)
            axes.plot(at, curve, color=colour, linewidth=width, linestyle=style, label=precision)
        axes.set(title=WORKLOADS[name].what, xlabel="step", ylabel="training loss, mean of the seeds")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(FIGURE, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--extra-seeds", type=int, default=0, help="beyond the 5 of digits and the 3 of the others")
    parser.add_argument("--write", action="store_true", help="table, curves and numbers into this folder")
    arguments = parser.parse_args()
    # A program is the same for every seed.
    jax.config.update("jax_compilation_cache_dir", str(RUNS / "compiled"))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in arguments.workloads:
        results[name] = {precision: [] for precision in PRECISIONS}
        for seed in range(WORKLOADS[name].seeds + arguments.extra_seeds):
            for precision in PRECISIONS:
                results[name][precision].append(result_of(name, precision, seed))
    header = (
        "workload",
        "precision",
        "held-out loss",
        "more than float32 (in its deviations)",
        "accuracy",
        "skips by seed",
    )
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for name, runs in results.items():
        lines += rows_of(WORKLOADS[name].what, runs)
    sizes = "; ".join(
        f"{name}: {', '.join(f'{key} {value}' for key, value in WORKLOADS[name].settings.items())}, "
        f"{len(runs['float32'])} seeds"
        for name, runs in results.items()
    )
    flags = f" --extra-seeds {arguments.extra_seeds}" if arguments.extra_seeds else ""
    text = (
        f"Mean ± standard deviation over seeds. {sizes}. On a CPU; text of Python {sysconfig.get_python_version()}, "
        f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}, mpjax {mp.__version__}. Command: "
        f"`python benchmarks/convergence.py{flags}`.\n\n" + "\n".join(lines) + "\n\n![Loss curves](convergence.png)"
    )
    print(text)
    if arguments.write:
        draw(results)
        kept = {
            name: {
                precision: [run | {"losses": thinned(run["losses"])} for run in found]
                for precision, found in runs.items()
            }
            for name, runs in results.items()
        }
        NUMBERS.parent.mkdir(exist_ok=True)
        NUMBERS.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
        write_section("convergence", text)


if __name__ == "__main__":
    main()
