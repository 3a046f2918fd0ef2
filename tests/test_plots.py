"""mpjax.plots: what the artists hold. That the pictures are good, someone has looked at."""

import dataclasses
import io
import json
import math
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import mpjax as mp
from mpjax.diagnostics import Comparison, OperationError, tree_stats
from mpjax.plots import _house

BAD_STEPS = (0, 3, 4, 9)
STEPS = 12


@pytest.fixture(scope="module")
def training():
    """Twelve steps, four of which overflow: what each used and said, in every form that a loop may keep."""
    tx = mp.diagnostics.gradient_monitor(mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**10, period=3)), 5)
    params = {"w": jnp.ones(4)}
    update = jax.jit(tx.update)
    state, kept = tx.init(params), {"scales": [], "flags": [], "counts": [], "states": [], "rows": []}
    kept["first"] = state
    for step in range(STEPS):
        kept["scales"].append(float(mp.get_loss_scale(state).loss_scale))
        _, state = update({"w": jnp.full(4, jnp.inf if step in BAD_STEPS else 2.0**-3)}, state, params)
        kept["flags"].append(bool(~state.inner_state.skip_state.last_step_finite))
        kept["counts"].append(int(state.inner_state.skip_state.skips_total))
        kept["states"].append(state)
        kept["rows"].append(mp.diagnostics.scalars(state))
    return kept


def line_of(figure):
    return [tuple(map(np.ndarray.tolist, map(np.asarray, line.get_data()))) for line in figure.axes[0].lines]


def texts_of(ax):
    return [text.get_text() for text in ax.texts]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


class TestLossScaleHistory:
    def test_scales_and_flags(self, training):
        figure = mp.plots.loss_scale_history(training["scales"], training["flags"])
        (steps, scales), (marked, at) = line_of(figure)
        assert steps == list(range(STEPS))
        assert scales == training["scales"]
        assert len(set(scales)) > 2
        assert marked == list(BAD_STEPS)
        assert at == [training["scales"][i] for i in BAD_STEPS]
        assert legend_of(figure.axes[0]) == ["4 steps skipped"]
        ax = figure.axes[0]
        figure.draw_without_rendering()
        assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("step", "loss scale", "log")
        assert {"$2^{8}$", "$2^{9}$", "$2^{10}$"} <= set(labels_of(ax.yaxis))

    def test_every_form_says_the_same(self, training, tmp_path):
        path = tmp_path / "metrics.jsonl"
        with mp.diagnostics.JsonLines(path) as log:
            for step, row in enumerate(training["rows"]):
                log.write_scalars(step, {"loss": math.nan, **row})
        counted = line_of(mp.plots.loss_scale_history(jnp.asarray(training["scales"]), jnp.asarray(training["counts"])))
        assert counted == line_of(mp.plots.loss_scale_history(training["scales"], np.array(training["flags"])))
        (_, scales), (marked, at) = line_of(mp.plots.loss_scale_history(training["states"]))
        assert scales == [row["loss_scale"] for row in training["rows"]]
        # The scale after a skipped step has backed off; the mark is at the one that it overflowed with.
        assert marked == list(BAD_STEPS)
        assert at[1:] == [training["scales"][i] for i in BAD_STEPS[1:]]
        for history in (training["rows"], path, str(path), iter(training["states"])):
            assert line_of(mp.plots.loss_scale_history(history)) == [(list(range(STEPS)), scales), (marked, at)]

    def test_a_mark_stands_for_all_steps_since_the_last_entry(self, training):
        figure = mp.plots.loss_scale_history(training["rows"][::6], steps=range(100, 112, 6))
        assert line_of(figure)[1] == ([106], [training["rows"][0]["loss_scale"]])
        assert texts_of(figure.axes[0]) == ["2"]
        assert legend_of(figure.axes[0]) == ["2 steps skipped"]

    def test_without_skips(self):
        assert legend_of(mp.plots.loss_scale_history([8.0, 8.0], [False, False]).axes[0]) == ["0 steps skipped"]
        figure = mp.plots.loss_scale_history([8.0, math.inf, 16.0, 0.0])
        assert figure.axes[0].get_legend() is None
        np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [8.0, np.nan, 16.0, np.nan])
        assert figure.axes[0].get_ylim() == (4.0, 32.0)

    def test_entries_that_no_line_reaches(self):
        """A point for the last scale after a gap, and for the only one; a skip at the last scale that is known."""
        ax = mp.plots.loss_scale_history([8.0, math.nan, math.inf, 4.0], [False, True, True, False]).axes[0]
        _, point, skips = line_of(ax.figure)
        assert point == ([3], [4.0])
        assert skips == ([1, 2], [8.0, 8.0])
        alone = mp.plots.loss_scale_history([8.0])
        assert line_of(alone)[1] == ([0], [8.0])
        alone.draw_without_rendering()
        assert all(float(label.replace("\N{MINUS SIGN}", "-")).is_integer() for label in labels_of(alone.axes[0].xaxis))

    def test_many_skips_are_small(self):
        few, many = (mp.plots.loss_scale_history([8.0] * n, [True] * n).axes[0].lines[-1] for n in (100, 101))
        assert many.get_markersize() < few.get_markersize() / 2

    def test_a_run_that_went_on_from_a_checkpoint(self, tmp_path):
        """What was written after the checkpoint is written anew; the last line is still being written."""
        rows = [(0, 8.0, 0), (10, 8.0, 0), (20, 4.0, 1), (30, 2.0, 2), (20, 8.0, 0), (25, None, 0), (30, 4.0, 1)]
        lines = [{"step": step, "loss_scale": scale, "skips_total": n} for step, scale, n in rows]
        del lines[5]["loss_scale"]
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "loss_s')
        curve, marks = line_of(mp.plots.loss_scale_history(path))
        assert curve == ([0, 10, 20, 30], [8.0, 8.0, 8.0, 4.0])
        assert marks == ([30], [8.0])

    @pytest.mark.parametrize(
        ("args", "error", "message"),
        [
            (({"loss_scale": [8.0]},), TypeError, "history is a dict"),
            ((8.0,), TypeError, "history is a float"),
            (
                (mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale()).init(None),),
                TypeError,
                "history is a LossScaledState",
            ),
            (([],), ValueError, "no positive loss scale in 0 entries"),
            (([math.nan, -1.0],), ValueError, "no positive loss scale in 2 entries"),
            (([{"loss": 0.5}],), ValueError, "no positive loss scale in 0 entries"),
            ((np.ones((2, 2)),), ValueError, r"history has the shape \(2, 2\)"),
            (([8.0, 8.0], [True]), ValueError, r"skipped is of bool and of the shape \(1,\), for 2 scales"),
            (([8.0, 8.0], [0.0, 1.0]), ValueError, "skipped is of float64"),
            (([8.0, 8.0, 8.0], [1, 2, 0]), ValueError, "skipped counts 2 steps, and then 0"),
            (([{"loss_scale": 8.0}], [True]), ValueError, "skipped is given beside states or mappings"),
            (([optax.sgd(0.1).init(None)],), ValueError, "has no loss scale, and skips no steps"),
        ],
    )
    def test_bad_input(self, args, error, message):
        with pytest.raises(error, match=message) as raised:
            mp.plots.loss_scale_history(*args)
        assert "write:" in str(raised.value)

    def test_bad_steps_and_lines(self, tmp_path):
        with pytest.raises(ValueError, match=r"steps has the shape \(1,\), for 2 scales"):
            mp.plots.loss_scale_history([8.0, 8.0], steps=[0])
        with pytest.raises(ValueError, match="steps does not rise"):
            mp.plots.loss_scale_history([8.0, 8.0], steps=[1, 1])
        (tmp_path / "log").write_text("step 0\n")
        with pytest.raises(ValueError, match="has a line that is not JSON: 'step 0'"):
            mp.plots.loss_scale_history(tmp_path / "log")


NUMBERS = {
    "w": jnp.array([2.0**-30, 2.0**-20, 1.5 * 2.0**-20, 1.0, 0.0, jnp.inf]),
    "b": jnp.array([1e5, 3e-8, 0.0, 1.0]),
}


class TestExponentHistogram:
    def test_one_tree(self):
        figure = mp.plots.exponent_histogram(tree_stats(NUMBERS, exponents=(-32, 16)))
        ax = figure.axes[0]
        filled, outline = ax.patches[:2]
        for patch in (filled, outline):
            shares, edges, _ = patch.get_data()
            assert edges.tolist() == list(range(-32, 18))
            found = {int(edge): share for edge, share in zip(edges, shares, strict=False) if share}
            assert found == {-30: 100 / 7, -20: 200 / 7, 0: 200 / 7, 16: 100 / 7, -25: 100 / 7}
        assert ax.get_xlim() == (-32, 17)
        assert ax.get_xlabel() == "size of the numbers (20.0% are 0 and 10.0% are not finite: left out)"
        assert ax.get_legend() is None
        assert texts_of(ax)[::2] == [
            "float16\n14.3% to 0, 42.9% subnormal, 14.3% to inf",
            "bfloat16\nnothing lost",
            "float8_e4m3fn\n57.1% to 0, 14.3% to inf",
            "float8_e5m2\n57.1% to 0, 14.3% to inf",
        ]

    def test_ranges_of_the_formats(self):
        """From the smallest subnormal number over the smallest normal one to the largest, as far as the axes go."""
        ax = mp.plots.exponent_histogram(tree_stats(NUMBERS)).axes[0]
        bars = [bar for bars in ax.containers for bar in bars]
        ends = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_hatch()) for bar in bars]
        expected = [
            (-24, -14, "////"),
            (-14, np.log2(65504), None),
            (-47, -47, "////"),
            (-47, 17, None),
            (-9, -6, "////"),
            (-6, np.log2(448), None),
            (-16, -14, "////"),
            (-14, np.log2(57344), None),
        ]
        for got, (left, right, hatch) in zip(ends, expected, strict=True):
            assert got[:2] == pytest.approx((left, right))
            assert got[2] == hatch
        assert texts_of(ax)[1::2] == ["$2^{-24}$", "◂ $2^{-133}$", "$2^{-9}$", "$2^{-16}$"]
        # Above the histogram, all of them.
        highest = max(patch.get_data()[0].max() for patch in ax.patches[:2])
        assert all(bar.get_y() * ax.get_ylim()[1] > highest for bar in bars)

    def test_several(self):
        grads = {"w": jnp.array([2.0**-26, 2.0**-20])}
        scaled = mp.scale_gradients(grads, mp.StaticLossScale(2.0**16))
        named = {"true": tree_stats(grads, "float16"), "scaled": tree_stats(scaled, ("float16", "bfloat16"))}
        ax = mp.plots.exponent_histogram(named).axes[0]
        assert legend_of(ax) == ["a: true", "b: scaled"]
        assert texts_of(ax)[::2] == ["float16\na: 50.0% to 0, 50.0% subnormal\nb: nothing lost"]
        lines = [patch.get_linestyle() for patch in ax.patches[1:4:2]]
        assert len(set(lines)) == 2

    def test_a_line_of_its_own_for_each(self):
        stats = tree_stats({"w": jnp.ones(2)}, "float16")
        ax = mp.plots.exponent_histogram({str(i): stats for i in range(8)}).axes[0]
        looks = [(patch.get_edgecolor()[:3], patch.get_linestyle()) for patch in ax.patches[1:16:2]]
        assert len(set(looks)) == 8

    @pytest.mark.parametrize(("exponents", "apart"), [((-126, 127), 32), ((-3, 2), 1), ((-47, 16), 8)])
    def test_any_range(self, exponents, apart):
        """Room between the ticks; what is beyond the range is told to be in the outermost bars."""
        stats = tree_stats({"w": jnp.array([2.0**-20, 1.0])}, "float16", exponents=exponents)
        figure = mp.plots.exponent_histogram(stats)
        assert set(np.diff(figure.axes[0].get_xticks())) == {apart}
        assert ("the outermost bars hold all beyond them" in figure.axes[0].get_xlabel()) == (exponents[0] == -3)

    def test_a_monitor(self, training):
        ax = mp.plots.exponent_histogram({"opt_state": training["states"][-1]}["opt_state"]).axes[0]
        assert legend_of(ax) == ["gradients of step 10, times their loss scale $2^{7}$"]
        assert np.flatnonzero(ax.patches[0].get_data()[0]).tolist() == [47 - 3]

    def test_bad_input(self, training):
        stats = tree_stats(NUMBERS)
        stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), stats)
        cases = [
            (jnp.ones(3), "stats has 0 times the statistics"),
            ({}, "stats has 0 times the statistics"),
            ((stats, stats), "stats has 2 times the statistics"),
            ({"a": stats, "b": None}, "stats has 0 times the statistics"),
            (stacked, "stats is of 3 steps or members"),
            (training["first"], "has not measured any step yet"),
            (tree_stats({"w": jnp.array([0.0, jnp.nan])}), "no finite number but 0"),
            (tree_stats({}), "no finite number but 0"),
        ]
        for given, message in cases:
            with pytest.raises(ValueError, match=message) as raised:
                mp.plots.exponent_histogram(given)
            assert "write:" in str(raised.value)


def layers(shift):
    """Below float16's normal numbers: of layer 2 a half, of layer 10 all, of the last none. The norm is all 0."""
    return {
        "layer_10": jnp.full(4, 2.0 ** (-20 + shift)),
        "layer_2": jnp.array([1.0, 1.0, 2.0**-30, 2.0**-15]) * 2.0**shift,
        "norm": jnp.zeros(3),
        "out": jnp.ones(2),
    }


@pytest.fixture(scope="module")
def stats():
    return [tree_stats(layers(shift)) for shift in (0, 4, 8)]


class TestUnderflowHeatmap:
    def test_shares(self, stats):
        figure = mp.plots.underflow_heatmap(stats, steps=[0, 50, 100])
        ax, bar = figure.axes
        assert labels_of(ax.yaxis) == ["layer_2", "layer_10", "norm", "out"]
        assert labels_of(ax.xaxis) == ["0", "50", "100"]
        assert bar.get_ylabel() == "% subnormal or zero in float16"
        image = ax.collections[0]
        expected = [[50, 25, 25], [100, 100, 0], [np.nan] * 3, [0, 0, 0]]
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), expected)
        assert image.get_clim() == (0, 100)
        assert ax.get_ylim() == (4, 0)
        assert texts_of(ax) == ["50", "25", "25", "100", "100", "0", "0", "0", "0"]

    def test_stacked_by_scan(self, stats):
        stacked = jax.lax.scan(lambda _, shift: (None, tree_stats(layers(shift))), None, jnp.array([0.0, 4.0, 8.0]))[1]
        one, other = (mp.plots.underflow_heatmap(x).axes[0].collections[0].get_array() for x in (stacked, stats))
        np.testing.assert_array_equal(one.mask, other.mask)
        np.testing.assert_array_equal(one.compressed(), other.compressed())
        assert mp.plots.underflow_heatmap(stats[0]).axes[0].collections[0].get_array().shape == (4, 1)

    def test_zeros_alone(self, stats):
        ax, bar = mp.plots.underflow_heatmap(stats, subnormal=False).axes
        assert bar.get_ylabel() == "% zero in float16"
        assert texts_of(ax)[:6] == ["25", "25", "0", "0", "0", "0"]

    def test_another_format(self, stats):
        ax, bar = mp.plots.underflow_heatmap(stats[:1], dtype="bf16").axes
        assert bar.get_ylabel() == "% subnormal or zero in bfloat16"
        assert set(texts_of(ax)) == {"0"}

    def test_many_leaves_and_steps(self):
        """Those that lose most are shown, with long names shortened from the left; numbers have no room."""
        tree = {
            f"{'a' * 50}/layer_{i}": jnp.array([2.0 ** (-30 if j < i else 0) for j in range(12)]) for i in range(12)
        }
        ax = mp.plots.underflow_heatmap([tree_stats(tree)] * 40, limit=5).axes[0]
        names = labels_of(ax.yaxis)
        assert [name.split("/")[1] for name in names] == [f"layer_{i}" for i in (7, 8, 9, 10, 11)]
        assert all(len(name) == 40 and name[0] == "…" for name in names)
        assert ax.get_ylabel() == "7 leaves that lose no more are left out"
        assert labels_of(ax.xaxis) == [str(step) for step in range(0, 40, 4)]
        assert texts_of(ax) == []

    def test_very_many_steps(self):
        """No edges, which would cover the columns, and fewer labels the longer they are."""
        stacked = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], 1000, 0), tree_stats({"w": jnp.ones(2)}))
        ax = mp.plots.underflow_heatmap(stacked, steps=100_000 + np.arange(1000)).axes[0]
        assert not ax.collections[0].get_edgecolor().size
        assert len(labels_of(ax.xaxis)) == 6

    def test_bad_input(self, stats):
        other = tree_stats({"w": jnp.ones(2)}, "float16")
        cases = [
            (([],), {}, ValueError, "stats is of 0 different trees or kinds"),
            (([*stats, other],), {}, ValueError, "stats is of 2 different trees or kinds"),
            ((tree_stats({}),), {}, ValueError, "a tree without leaves"),
            (([1.0],), {}, TypeError, "stats is a list of something else"),
            ((None,), {}, TypeError, "stats is a NoneType"),
            ((stats, [0, 1]), {}, ValueError, r"steps has the shape \(2,\), for statistics of 3 steps"),
            ((other,), {"dtype": "bfloat16"}, ValueError, "the statistics have no bfloat16"),
            ((stats,), {"limit": 0}, ValueError, "limit is 0"),
        ]
        for args, options, error, message in cases:
            with pytest.raises(error, match=message) as raised:
                mp.plots.underflow_heatmap(*args, **options)
            assert "write:" in str(raised.value)


def operation(primitive, total, local=0.0, accumulated=0.0, *backward, path="", source="/home/me/model.py:41 (block)"):
    back = (*backward, None, None)[:2]
    return OperationError(path, source, primitive, local, accumulated, *back, total, "a reason", True)


def comparison(*rows, total=0.5):
    return Comparison("a policy", "float64", rows, {"": total}, total, (), None)


ROWS = (
    operation("exp", math.inf, 2.0, math.inf, path="decoder/" + "long" * 20 + "/attention"),
    operation("dot_general", 0.25, 0.01, 0.02, 0.03, 0.001, path="decoder"),
    operation("mul", 0.0, 1e-3, 0.5),
    operation("add", 0.0, 0.0, 0.5),
)


class TestErrorBars:
    def test_bars_and_marks(self):
        figure = mp.plots.error_bars(comparison(*ROWS, total=math.inf))
        ax = figure.axes[0]
        left, right = ax.get_xlim()
        assert (left, right) == pytest.approx((1e-3 / 3, 6.0))
        finite, infinite = ax.containers
        # Each row at its place, from the top; add has no error of its own.
        assert [(bar.get_y() + 0.3, bar.get_x() + bar.get_width()) for bar in finite] == [(1, pytest.approx(0.25))]
        assert [bar.get_y() + 0.3 for bar in infinite] == [0]
        assert infinite[0].get_width() > right
        assert infinite[0].get_hatch()
        assert finite[0].get_hatch() is None
        own, accumulated, everything = ax.lines
        assert own.get_xydata().tolist() == [[2.0, 0], [0.03, 1], [1e-3, 2]]
        assert accumulated.get_xydata().tolist() == [[right, 0], [0.02, 1], [0.5, 2]]
        assert own.get_marker() != accumulated.get_marker()
        assert everything.get_xdata() == [right, right]
        assert texts_of(ax) == ["inf", "0.25", "0"]
        assert ax.get_xscale() == "log"
        assert ax.get_xlabel() == "error relative to float64"
        assert ax.get_ylim() == (2.6, -0.6)
        assert "results, all in low precision (inf)" in legend_of(ax)
        assert "results, this alone: infinite" in legend_of(ax)
        names = labels_of(ax.yaxis)
        assert names[1:] == ["dot_general  decoder  model.py:41", "mul  model.py:41"]
        assert names[0].startswith("exp  …")
        assert names[0].endswith("long/attention  model.py:41")
        assert len(names[0]) == 50

    def test_the_worst_of_many(self):
        rows = [operation(f"op{i}", 2.0**-i) for i in range(25)]
        ax = mp.plots.error_bars(comparison(*rows)).axes[0]
        assert [name.split()[0] for name in labels_of(ax.yaxis)] == [f"op{i}" for i in range(20)]
        assert ax.get_xlabel() == "error relative to float64 (5 operations that do less are left out)"
        assert len(mp.plots.error_bars(comparison(*rows), limit=3).axes[0].containers[0]) == 3

    @pytest.mark.parametrize("total", [0.0, math.inf])
    def test_nothing_between_zero_and_infinity(self, total):
        ax = mp.plots.error_bars(comparison(operation("exp", total, math.inf), total=total)).axes[0]
        assert len(ax.containers) == (total > 0)
        assert len(ax.lines) == 1 + (total > 0)

    def test_a_real_one(self):
        def fn(w, x):
            return jnp.sum(jnp.sin(50 * (x @ w)))

        w, x = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(2))
        found = mp.diagnostics.compare(fn, "mixed_bfloat16", through=jax.grad)(w, x)
        ax = mp.plots.error_bars(found).axes[0]
        first = ax.containers[0][0]
        assert first.get_x() + first.get_width() == pytest.approx(found.operations[0].total)
        assert labels_of(ax.yaxis)[0].startswith("dot_general  test_plots.py:")

    def test_bad_input(self):
        with pytest.raises(TypeError, match="comparison is a dict") as error:
            mp.plots.error_bars({})
        assert "mp.diagnostics.compare" in str(error.value)
        for given in (comparison(), comparison(operation("add", 0.0))):
            with pytest.raises(ValueError, match="no operation of comparison has an error"):
                mp.plots.error_bars(given)
        for limit in (0, True, 2.5):
            with pytest.raises(ValueError, match=f"limit is {limit}"):
                mp.plots.error_bars(comparison(*ROWS), limit=limit)


GIB = 2**30
FITS = mp.aot.Report(
    *("v5e", "TPU v5e chip", 1, "libtpu", 16 * GIB, 8 * GIB), temp_bytes=4 * GIB, argument_bytes=5 * GIB
)
TOO_LARGE = mp.aot.Report("v5e", "TPU v5e chip", 1, "libtpu", 16 * GIB, 20 * GIB, refusal="Ran out of memory")


class TestMemoryBars:
    def test_against_the_limit(self):
        ax = mp.plots.memory_bars(mp.aot.Comparison({"a" * 60: TOO_LARGE, "bfloat16": FITS})).axes[0]
        peaks, beyond = ax.containers
        assert [bar.get_width() for bar in peaks] == [20, 8]
        assert [(bar.get_x(), bar.get_width()) for bar in beyond] == [(20, 0), (8, 1)]
        assert all(bar.get_hatch() for bar in beyond)
        assert ax.lines[0].get_xdata() == [16, 16]
        assert legend_of(ax) == ["limit: 16.00 GiB", "peak", "needed beyond the peak"]
        assert texts_of(ax) == ["20.00 GiB, does not fit", "9.00 GiB, fits"]
        assert labels_of(ax.yaxis) == ["…" + 39 * "a", "bfloat16"]
        assert ax.get_xlabel() == "memory on TPU v5e chip (GiB)"
        assert ax.get_ylim() == (1.6, -0.6)

    def test_a_limit_that_is_far(self):
        small = dataclasses.replace(FITS, peak_bytes=3 * 2**20, temp_bytes=0, argument_bytes=0, devices=16)
        ax = mp.plots.memory_bars(mp.aot.Comparison({"small": small})).axes[0]
        assert not ax.lines
        assert legend_of(ax) == ["peak"]
        assert ax.get_xlim() == pytest.approx((0, 3.18))
        assert ax.get_xlabel() == "memory on each TPU v5e chip of 16, which has 16.00 GiB (MiB)"

    def test_no_limit(self):
        ax = mp.plots.memory_bars(mp.aot.Comparison({"x": dataclasses.replace(FITS, memory_limit=None)})).axes[0]
        assert not ax.lines
        assert texts_of(ax) == ["9.00 GiB"]

    def test_bad_input(self):
        with pytest.raises(TypeError, match="comparison is a Comparison") as error:
            mp.plots.memory_bars(comparison(*ROWS))
        assert "error_bars" in str(error.value)
        with pytest.raises(ValueError, match="comparison has no programs"):
            mp.plots.memory_bars(mp.aot.Comparison({}))


PLOTS = {
    "loss_scale_history": lambda **k: mp.plots.loss_scale_history([8.0, 4.0], [True, False], **k),
    "exponent_histogram": lambda **k: mp.plots.exponent_histogram(tree_stats(NUMBERS), **k),
    "underflow_heatmap": lambda **k: mp.plots.underflow_heatmap(tree_stats(NUMBERS), **k),
    "error_bars": lambda **k: mp.plots.error_bars(comparison(*ROWS, total=math.inf), **k),
    "memory_bars": lambda **k: mp.plots.memory_bars(mp.aot.Comparison({"a": FITS, "b": TOO_LARGE}), **k),
}


def test_every_plot_is_here():
    assert set(PLOTS) == {name for name, x in vars(mp.plots).items() if callable(x) and not name.startswith("_")}


def settings():
    # To read the backend imports pyplot.
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


@pytest.mark.parametrize("name", PLOTS)
def test_drawn_without_pyplot_in_its_own_style_or_into_axes(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with matplotlib.rc_context({"font.size": 31.0}):
        before = settings()
        figure = PLOTS[name]()
        assert settings() == before
    assert type(figure) is Figure
    assert figure.axes[0].xaxis.label.get_size() < 20
    content = io.BytesIO()
    figure.savefig(content, format="png")
    assert content.getvalue()[:8] == b"\x89PNG\r\n\x1a\n"
    mine = Figure()
    part = mine.subfigures(1, 2)[1]
    axes = part.subplots(2, 1)
    assert PLOTS[name](ax=axes[1]) is mine
    assert axes[1].has_data()
    assert not axes[0].has_data()
    mine.draw_without_rendering()


@pytest.mark.parametrize("name", PLOTS)
def test_what_is_no_axes_and_no_matplotlib(name, monkeypatch):
    with pytest.raises(TypeError, match="ax is a Figure"):
        PLOTS[name](ax=Figure())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib, which draws the plots, is not installed") as error:
        PLOTS[name]()
    assert 'pip install "mpjax[viz]"' in str(error.value)


def test_shares_as_people_read_them():
    shares = [0.0, 1e-9, 0.001, 0.5, 0.999, 0.9999999, 1.0]
    assert list(map(_house.percent, shares)) == ["0%", "<0.1%", "0.1%", "50.0%", "99.9%", ">99.9%", "100%"]
