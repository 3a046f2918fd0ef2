"""The benchmarks: their pure parts, that their page is of their figures, and that each method of the GPU one runs."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def model_costs():
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("model_costs")
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


MEMORY = {
    "affine": lambda batch: 1000 + 37 * batch,
    "padded to 128": lambda batch: 1000 + 37 * (-(-batch // 128) * 128),
    "quadratic": lambda batch: 1000 + batch**2,
    "recomputes when it is short of memory": lambda batch: 1000 + 40 * batch - (3000 if batch > 300 else 0),
    "without slope": lambda batch: 5000 if batch <= 200 else 20000,
    "too large in any batch": lambda batch: 20000 + batch,
}


@pytest.mark.parametrize("start", [8, 64, 1024])
@pytest.mark.parametrize("kind", MEMORY)
def test_the_largest_batch_and_the_next_were_both_tried(model_costs, kind, start):
    needed, limit, step, tried = MEMORY[kind], 16000, 8, []
    found = model_costs.largest_batch(lambda b: tried.append(b) or needed(b), limit, start, step, fixed=900)
    assert found == max(batch for batch in range(0, 2048, step) if batch == 0 or needed(batch) <= limit)
    assert found + step in tried
    assert found == 0 or found in tried
    assert len(tried) == len(set(tried)) <= (4 if kind == "affine" else 16)


def test_a_row_that_was_not_measured_says_so_or_why(model_costs):
    report = {"peak_bytes": 8e9, "temp_bytes": 6e9, "bytes_accessed": 1e9, "main_memory_bytes": 1e9}
    report |= {"estimated_cycles": 1e6, "flops": {"bfloat16": 3, "float32": 1}, "refusal": "", "largest_batch": 80}
    half = {**report, "temp_bytes": 3e9}
    rows = model_costs.table("v5e", {"bert-base": {"float32": report, "autocast, bfloat16": half}}).splitlines()
    of = {tuple(row.split(" | ")[:2]): row for row in rows[2:]}
    assert "3.00 GB (0.50x)" in of["| bert-base, 64", "autocast, bfloat16"]
    assert "bfloat16 75%, float32 25% | 80 |" in of["| bert-base, 64", "float32"]
    assert "not measured" in of["| bert-base, 64", "autocast, float16"]
    assert "no 8-bit floats" in of["| bert-base, 64", "autocast, fp8"]
    assert len({row.count("|") for row in rows}) == 1


def test_the_page_has_the_tables_of_the_raw_figures(model_costs):
    page = (BENCHMARKS / "RESULTS.md").read_text()
    files = sorted((BENCHMARKS / "raw").glob("model_costs-*.json"))
    assert files
    for file in files:
        kept = json.loads(file.read_text())
        assert model_costs.table(file.stem.split("-")[1], kept["figures"]) in page
        assert kept["versions"] in page


def test_every_benchmark_is_run_by_make_or_named_on_the_page():
    named = (ROOT / "Makefile").read_text() + (BENCHMARKS / "RESULTS.md").read_text()
    sources = {file.stem: file.read_text() for file in sorted(BENCHMARKS.glob("*.py"))}
    for name, source in sources.items():
        if 'if __name__ == "__main__":' in source:
            assert f"benchmarks/{name}.py" in named, name
        else:
            imported = re.compile(rf"^ *(from {name} import|import {name}\b)", re.MULTILINE)
            assert any(imported.search(other) for other in sources.values()), name


def gpu_steps(*options):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_steps.py", *options],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_method_runs_and_no_second_of_a_cpu_is_shown():
    ran = gpu_steps("--smoke", "--models", "bert-base")
    assert ran.returncode == 0, ran.stderr
    rows = [row.strip("| ").split(" | ") for row in ran.stdout.splitlines()[2:]]
    outcomes = {method: outcome for _, method, outcome in rows}
    assert len(outcomes) == 12
    may_be_missing = {method for method in outcomes if method.startswith(("mpx", "torch"))}
    for method, outcome in outcomes.items():
        missing = method in may_be_missing and "not installed" in outcome
        assert missing or outcome.startswith("ran, loss"), (method, outcome)
    # All begin with the same weights and batch; a float16 step that was skipped leaves the loss at its start.
    losses = [float(outcome.split()[-1]) for m, outcome in outcomes.items() if not m.startswith(("mpx", "torch"))]
    assert max(losses) - min(losses) < 0.2
    assert "ms" not in ran.stdout
    assert "steps a second" not in ran.stdout


@pytest.mark.slow
def test_without_a_gpu_there_is_no_table():
    ran = gpu_steps("--models", "bert-base")
    assert ran.returncode != 0
    assert "seconds of a CPU are no speeds" in ran.stderr
    assert ran.stdout == ""
