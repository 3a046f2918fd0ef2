"""benchmarks/convergence.py: its page is of its figures, which meet the bar that the page sets."""

import importlib
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax as mp

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def convergence():
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("convergence")
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS.parent)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def results(convergence):
    return json.loads(convergence.NUMBERS.read_text())


def test_the_page_has_the_figures(convergence, results):
    page = (BENCHMARKS / "RESULTS.md").read_text()
    assert results.keys() == convergence.WORKLOADS.keys()
    for name, runs in results.items():
        assert runs.keys() == convergence.PRECISIONS.keys()
        assert all(len(found) >= convergence.WORKLOADS[name].seeds for found in runs.values())
        assert all(run["settings"] == convergence.WORKLOADS[name].settings for found in runs.values() for run in found)
        assert "\n".join(convergence.rows_of(convergence.WORKLOADS[name].what, runs)) in page
    assert convergence.FIGURE.stat().st_size < 150_000


def test_the_bar_is_met(results):
    for runs in results.values():
        means, deviations = (
            {name: of([run["held_out"] for run in found]) for name, found in runs.items()}
            for of in (statistics.mean, statistics.stdev)
        )
        for name in ("bfloat16", "float16, dynamic loss scale"):
            assert abs(means[name] - means["float32"]) <= deviations["float32"]


def test_a_curve_is_thinned_to_means(convergence):
    assert convergence.thinned([1.0, 3.0] * 25 + [4.0] * 50) == [2.0] * 25 + [4.0] * 25
    assert convergence.thinned([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]


def test_a_run_is_kept_and_done_again_when_its_settings_change(convergence, tmp_path, monkeypatch):
    runs = []

    def run(policy, loss_scale, seed, settings):
        runs.append((policy, loss_scale, seed, settings["steps"]))
        return {"losses": [2.0, 1.0], "held_out": 1.5, "skips": 0, "unigram": 3.0}

    monkeypatch.setattr(convergence, "RUNS", tmp_path)
    for steps in (2, 2, 3):
        workload = convergence.Workload("", run, 1, {"steps": steps})
        monkeypatch.setitem(convergence.WORKLOADS, "digits", workload)
        kept = convergence.result_of("digits", "float16, no loss scale", 7)
        assert kept == {"settings": {"steps": steps}, "losses": [2.0, 1.0], "held_out": 1.5, "skips": 0}
    assert runs == [("mixed_float16", "none", 7, 2), ("mixed_float16", "none", 7, 3)]


@pytest.mark.slow
def test_what_a_large_vocabulary_loses_without_a_scale():
    """What the page says of BERT-base: 64 of 5,120 predictions, at the start, when all 30,522 words are alike."""
    words, predictions = 30_522, 5_120
    x = jax.random.normal(jax.random.key(0), (64, 32))
    answers = jax.random.randint(jax.random.key(1), (64,), 0, words)

    def loss_fn(w):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, answers).sum() / predictions

    def gradient(policy, scale):
        return scale.unscale(mp.grad(mp.autocast(loss_fn, policy), scale)(w))

    w, wrong = jnp.zeros((32, words)), np.setdiff1d(np.arange(words), answers)
    true = gradient("float32", mp.NoOpLossScale())
    assert (true[:, wrong] != 0).all()
    assert (gradient("mixed_float16", mp.NoOpLossScale())[:, wrong] == 0).all()
    scaled = gradient("mixed_float16", mp.get_policy("mixed_float16").loss_scale())
    # x is rounded to float16 too, and sums of its entries may cancel.
    np.testing.assert_allclose(scaled[:, wrong], true[:, wrong], rtol=1e-2, atol=1e-11)
