import contextlib
import dataclasses
import io
import re
import struct
import types

import jax
import numpy as np
import pytest
from helpers import bits
from rich.console import Console

import mpjax as mp
from mpjax.cli import _checks, _demo, _demo_figure, _demo_report, _demo_train, main
from mpjax.cli._demo_tasks import BATCH, PRECISIONS, TASKS, TEST_IMAGES, Digits
from mpjax.cli._demo_train import Probe, Run, StepMetrics, TrainState

# Flax's BatchNorm and optax's schedules rely on JAX's usual promotion.
pytestmark = pytest.mark.standard_promotion

CONV_NET, AUX_MLP = TASKS
FLOAT32, BF16, UNSCALED, SCALED = PRECISIONS
STEPS = 8


@pytest.fixture(scope="module")
def digits():
    return Digits.load()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One short run of the command: its exit code, what it printed, and the path of the figure."""
    path = tmp_path_factory.mktemp("demo") / "new folder" / "figure.png"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "80")
        code = main(["demo", "--steps", str(STEPS), "--out", str(path)])
    return types.SimpleNamespace(code=code, out=printed.getvalue(), path=path)


def fake_run(task, precision, *, steps=30, accuracy=0.9, loss=1.0, skipped=(), scale=2.0**16, grads=None):
    finite = np.ones(steps, bool)
    finite[list(skipped)] = False
    grads = np.float32([0.0, 1e-9, 1e-7, 1e-3]) if grads is None else grads
    probe = Probe(np.int32(1), np.int32(4), grads, np.float32(scale))
    metrics = StepMetrics(np.full(steps, loss, np.float32), np.full(steps, scale, np.float32), finite)
    return Run(task, precision, metrics, accuracy, [probe] * 3, scale, 4096, 2048, ("f32", "bf16"))


def fake_runs(**changes):
    return [fake_run(task, precision, **changes) for task in TASKS for precision in PRECISIONS]


def printed_report(runs):
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    _demo_report.print_report(console, runs)
    return console.file.getvalue()


def rows_of(text):
    """The table's rows as lists of cells."""
    names = [task.name for task in TASKS]
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if re.match(rf"({'|'.join(names)})  ", line)]


def assert_is_png(content):
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 <= width <= 3000
    assert 700 <= height <= 2500
    assert content[-8:-4] == b"IEND"


@pytest.mark.slow
def test_command_succeeds(demo):
    assert demo.code == 0
    assert f"Figure: {demo.path}" in demo.out
    assert_is_png(demo.path.read_bytes())
    assert [path.name for path in demo.path.parent.iterdir()] == ["figure.png"]


@pytest.mark.slow
def test_output_without_a_terminal_is_plain(demo):
    assert "\x1b" not in demo.out
    assert "\r" not in demo.out
    assert all(len(line) <= 80 for line in demo.out.splitlines() if not line.startswith("Figure:"))
    for task in TASKS:
        for precision in PRECISIONS:
            assert f"training {task.name}, {precision.name}\n" in demo.out


@pytest.mark.slow
def test_table_has_a_row_for_each_run(demo):
    rows = rows_of(demo.out)
    assert [row[:2] for row in rows] == [[task.name, precision.name] for task in TASKS for precision in PRECISIONS]
    for _, precision, accuracy, loss, flushed, skipped, scale, param, temp in rows:
        assert 0 <= float(accuracy.rstrip("%")) <= 100
        assert 0 < float(loss) < 5
        assert 0 <= float(flushed.rstrip("%")) <= 100
        assert 0 <= int(skipped) <= STEPS
        assert scale == ("2^16" if precision == SCALED.name else "-")
        assert int(param) > 0
        assert int(temp) > 0
    for of_task in (rows[:4], rows[4:]):
        assert len({row[7] for row in of_task}) == 1, "the parameters that are kept are float32 in all precisions"
    flushed = {(row[0], row[1]): float(row[4].rstrip("%")) for row in rows}
    assert flushed[AUX_MLP.name, UNSCALED.name] > 10
    for key, share in flushed.items():
        if key[1] != UNSCALED.name:
            assert share < 1, key


def test_fp16_needs_the_scale_and_gets_along_with_it(digits):
    """The demonstration's point: without the scale the gradients are flushed and the network learns nothing."""
    runs = {
        precision.name: _demo_train.train(AUX_MLP, precision, digits, 150, 0, lambda steps: None)
        for precision in (FLOAT32, UNSCALED, SCALED)
    }
    true, unscaled, scaled = (runs[precision.name] for precision in (FLOAT32, UNSCALED, SCALED))
    assert true.accuracy > 0.6
    assert unscaled.accuracy < 0.3
    assert abs(scaled.accuracy - true.accuracy) < 0.03
    assert true.flushed == 0
    assert unscaled.flushed > 0.5
    assert scaled.flushed < 0.01
    assert abs(scaled.final_loss - true.final_loss) < 0.02
    assert scaled.final_scale == 2.0**17, "one growth after 100 clean steps"
    assert not any(run.skipped for run in runs.values())
    # The same parameters and the same first batch in all three.
    first = [float(run.metrics.loss[0]) for run in runs.values()]
    np.testing.assert_allclose(first, first[0], rtol=2e-3)
    # What the loss weight makes tiny, Adam makes whole again.
    whole = _demo_train.train(
        dataclasses.replace(AUX_MLP, loss_weight=1.0), FLOAT32, digits, 150, 0, lambda steps: None
    )
    assert abs(whole.accuracy - true.accuracy) < 0.03


def test_progress_adds_up(digits):
    done = []
    _demo_train.train(AUX_MLP, FLOAT32, digits, 45, 0, done.append)
    assert done == [20, 20, 5]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_overflow_changes_nothing_but_the_scale(task, digits):
    """BatchNorm's running statistics included, which the forward pass has already spoilt by then."""
    images, labels = digits.train_images[:BATCH], digits.train_labels[:BATCH]
    variables = task.model.init(jax.random.key(0), images, train=False)
    tx = mp.loss_scaled(task.optimizer(10), SCALED.loss_scale())
    params, stats = variables["params"], variables.get("batch_stats", {})
    state = TrainState(params, stats, tx.init(params))
    step = jax.jit(_demo_train._make_step(task, mp.get_policy(SCALED.policy), tx))
    after, metrics = step(state, np.full_like(images, np.inf), labels)
    assert not metrics.finite
    assert float(metrics.scale) == 2.0**16
    assert float(mp.get_loss_scale(after.opt_state).loss_scale) == 2.0**15
    assert bits(after.params) == bits(state.params)
    assert bits(after.stats) == bits(state.stats)
    clean, metrics = step(after, images, labels)
    assert metrics.finite
    assert float(metrics.scale) == 2.0**15
    assert bits(clean.params) != bits(state.params)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves((clean.params, clean.stats)))


def test_split_is_fixed_and_disjoint(digits):
    again = Digits.load()
    assert np.array_equal(digits.test_images, again.test_images)
    assert len(digits.test_images) == len(digits.test_labels) == TEST_IMAGES
    assert len(digits.train_images) == len(digits.train_labels) == 1797 - TEST_IMAGES
    assert digits.train_images.shape[1:] == (8, 8, 1)
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1


def test_batches_are_epochs_in_shuffled_order(digits):
    batches = digits.batches(50, seed=3)
    assert batches.shape == (50, BATCH)
    assert np.array_equal(batches, digits.batches(50, seed=3))
    assert not np.array_equal(batches, digits.batches(50, seed=4))
    epoch = batches[: 1437 // BATCH].ravel()
    assert len(set(epoch)) == len(epoch)


def test_conclusions_follow_from_the_numbers():
    runs = fake_runs()
    runs[6] = dataclasses.replace(runs[6], accuracy=0.2)
    runs[3] = dataclasses.replace(runs[3], final_scale=2.0**18)
    runs[7] = fake_run(AUX_MLP, SCALED, skipped=(3, 4))
    text = " ".join(_demo_report.conclusions(runs))
    assert "On the conv net float32 reaches 90.0% (guessing: 10%); within 2 points of it are bf16 (90.0%), " in text
    assert "fp16 unscaled ends 70.0 points below it, with 25% of its gradient entries flushed to 0." in text
    assert "went from 2^16 to 2^18 on the conv net, where 0 of 30 steps overflowed" in text
    assert "stayed at 2^16 on the aux MLP, where 2 of 30 steps overflowed" in text


def test_footnote_tells_what_the_cpu_compiler_does():
    text = " ".join(printed_report(fake_runs()).split())
    # Two matmuls in each of six half-precision runs, one of the two widened.
    assert "(6 of 12 in the compiled bf16 and fp16 steps are float32)" in text
    narrow = [dataclasses.replace(run, matmul_dtypes=("bf16",)) for run in fake_runs()]
    assert "widens" not in printed_report(narrow)


def test_a_backend_without_a_memory_figure():
    runs = [dataclasses.replace(run, temp_bytes=None) for run in fake_runs()]
    assert {row[-1] for row in rows_of(printed_report(runs))} == {"-"}


@pytest.mark.parametrize(
    "runs",
    [
        fake_runs(),
        fake_runs(loss=np.nan, skipped=range(30), grads=np.full(4, np.nan, np.float32)),
        fake_runs(steps=1, loss=np.inf, grads=np.zeros(4, np.float32)),
    ],
    ids=["as usual", "all nan", "one step, no gradients"],
)
def test_report_and_figure_of_any_numbers(runs):
    assert len(rows_of(printed_report(runs))) == 8
    assert_is_png(_demo_figure.draw(runs))


def test_figure_leaves_matplotlib_as_it_was():
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0}):
        before = dict(matplotlib.rcParams)
        _demo_figure.draw(fake_runs())
        assert dict(matplotlib.rcParams) == before


def test_out_may_be_a_folder_or_a_file(tmp_path):
    assert _checks.figure_path(tmp_path, "demo.png") == tmp_path / "demo.png"
    assert _checks.figure_path(tmp_path / "a" / "b", "demo.png") == tmp_path / "a" / "b" / "demo.png"
    assert _checks.figure_path(tmp_path / "c" / "mine.PNG", "demo.png") == tmp_path / "c" / "mine.PNG"
    (tmp_path / "folder.png").mkdir()
    assert _checks.figure_path(tmp_path / "folder.png", "demo.png") == tmp_path / "folder.png" / "demo.png"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == []


def bad_places(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken" / "demo.png").mkdir(parents=True)
    return ["file", "file/below", "file/below.png", "taken", "figure.pdf"]


def test_out_that_cannot_be_written_fails_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_demo, "train", None)
    for out in bad_places(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert main(["demo", "--out", str(tmp_path / out)]) == 1
        printed, err = capsys.readouterr()
        assert printed == ""
        assert err.startswith(f"mpjax demo: --out is {tmp_path / out}")
        assert "expected:" in err
        assert "write:" in err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "demo.png"
    _checks.write_whole(path, b"old")
    _checks.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(_checks.CommandError, match="cannot write"):
        _checks.write_whole(tmp_path / "folder.png", b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["demo.png", "folder.png"]


def test_interrupt(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_demo, "train", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "mpjax demo: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_progress_bar_on_a_terminal(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with _demo._progress(console, 10) as begin:
        advance = begin("conv net, float32")
        advance(4)
        advance(6)
    assert "10/10" in console.file.getvalue()
    assert "conv net, float32" in console.file.getvalue()
