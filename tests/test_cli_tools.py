"""`mpjax explain`, `compare`, `fit` and `bench`, run in this process on a small module."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp
from mpjax.cli import _bench, _bench_measure, _compare, _show, _target_function, main

MODEL = """
import jax
import jax.numpy as jnp


def loss_fn(params, batch):
    with jax.named_scope("mlp"):
        hidden = jax.nn.relu(batch["x"] @ params["w1"])
    losses = jax.nn.logsumexp(hidden @ params["w2"], axis=-1)
    return losses.mean(), losses


def logits(params, batch):
    return batch["x"] @ params["w1"]


def init(key):
    return {"w1": jax.random.normal(key, (8, 16)), "w2": jax.random.normal(key, (16, 4))}


def example_args():
    return jax.eval_shape(init, jax.random.key(0)), {"x": jax.ShapeDtypeStruct((16, 8), "float32")}


def power(x, exponent, name):
    assert name == "cubed"
    return (x @ x) ** exponent if exponent > 2 else x


power_args = {"x": jax.ShapeDtypeStruct((4, 4), "float32"), "exponent": 3, "name": "cubed"}
odd_args = (jax.ShapeDtypeStruct((8, 16), "float32"), {"x": jax.ShapeDtypeStruct((12, 8), "float32")})
a_list = [1]


def broken_args():
    return 1 / 0


def raises(params, batch):
    raise KeyError("no such head")


def mismatched(params, batch):
    return batch["x"] @ params["w2"]
"""


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """A folder with `cli_model.py`, which is the current one; what a command imports is forgotten afterwards."""
    (tmp_path / "cli_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("cli_"):
            del sys.modules[name]


def run(capsys, *argv):
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def failed(capsys, *argv):
    assert main(list(argv)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mpjax {argv[0]}: ")
    assert "Traceback" not in err
    return err


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_explain(capsys, model):
    out = run(capsys, "explain", "cli_model:loss_fn", "--json", "out/e.json", "--png", "out/e.png")
    module = sys.modules["cli_model"]
    expected = mp.explain(module.loss_fn, "mixed_bfloat16")(*module.example_args())
    assert out == f"{expected}\nJSON: out/e.json\nFigure: out/e.png\n"
    assert json.loads((model / "out/e.json").read_text()) == json.loads(expected.to_json())
    assert is_png(model / "out/e.png")
    assert "(backward)" not in out


def test_explain_of_a_file_with_gradients_and_other_options(capsys, model):
    (model / "src").mkdir()
    (model / "src/cli_below.py").write_text("from cli_model import example_args, loss_fn")
    out = run(capsys, "explain", "src/cli_below.py:loss_fn", "--grad", "--policy", "mixed_float16")
    assert out.startswith(str(mp.get_policy("mixed_float16")))
    assert "dot_general (backward)" in out
    kept = run(capsys, "explain", "cli_model:power", "--args", "power_args", "--rules", "matmul")
    assert "integer_pow" in kept
    (model / "cli_other.py").write_text("from cli_model import power_args as theirs")
    assert run(capsys, "explain", "cli_model:power", "--args", "cli_other:theirs", "--rules", "matmul") == kept


def test_on_a_terminal_a_table_is_drawn_by_rich(capsys, monkeypatch):
    class Shown:
        def __rich__(self):
            return "for a terminal"

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _show.show(Shown())
    assert capsys.readouterr().out == "for a terminal\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["cli_nowhere:f"], "there is no module cli_nowhere"),
        (["cli_model.py"], "the function is 'cli_model.py'"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        (
            ["cli_model:nothing"],
            "cli_model has no nothing.\n  expected: a name in cli_model\n  write:    cli_model:loss_",
        ),
        (["cli_model:a_list"], "cli_model:a_list is no function: it is of type list"),
        (["cli_model:raises"], "cli_model.py:40: KeyError: 'no such head'"),
        (["cli_model:mismatched"], "cli_model:mismatched raised an error at"),
        (["cli_model:mismatched", "--grad"], "TypeError: dot_general requires contracting dimensions"),
        (["cli_model:logits", "--grad"], "cli_model:logits returns float32[16, 16]"),
        (["cli_model:loss_fn", "--args", "nope"], "there are no arguments to try loss_fn with: cli_model:nope is not"),
        (["cli_model:loss_fn", "--args", "cli_model:nope"], "cli_model has no nope"),
        (["cli_model:loss_fn", "--args", "a_list"], "cli_model:a_list is of type list"),
        (["cli_model:loss_fn", "--args", "broken_args"], "cli_model.py:36: ZeroDivisionError: division by zero"),
        (["cli_model:loss_fn", "--policy", "fp17"], "unknown policy 'fp17'"),
        (["cli_model:loss_fn", "--png", "figure.pdf"], "--png is figure.pdf"),
        (["cli_model:loss_fn", "--json", "cli_model.py/x.json"], "--json is cli_model.py/x.json: cannot write"),
        (["cli_model:loss_fn", "--json", "/dev/null"], "/dev/null is no regular file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told(argv, told, capsys):
    assert told in failed(capsys, "explain", *argv)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import surely_not_there", "cannot be imported at .*cli_bad.py:1: ModuleNotFoundError: .*surely_not_there"),
        ("x = 1\nraise OSError('no data')", "cannot be imported at .*cli_bad.py:2: OSError: no data"),
        ("def f(:", "cannot be imported: SyntaxError: .*cli_bad.py, line 1"),
        ("raise SystemExit(3)", "cannot be imported at .*: SystemExit: 3"),
        ("def f(x):\n    return x", r"no arguments to try f with(.|\n)*write: +def example_args"),
    ],
)
@pytest.mark.parametrize("name", ["cli_bad:f", "cli_bad.py:f"])
def test_modules_that_cannot_be_used(name, source, told, capsys, model):
    (model / "cli_bad.py").write_text(source)
    assert re.search(told, failed(capsys, "explain", name))


def test_files_are_tried_before_anything_runs(capsys, model, monkeypatch):
    monkeypatch.setattr(_target_function, "_module", None)
    (model / "taken.png").mkdir()
    for argv in (["explain", "m:f"], ["compare", "m:f"], ["fit", "m:f", "--target", "cpu"], ["bench"]):
        assert "--png is taken.png: cannot write" in failed(capsys, *argv, "--png", "taken.png")


@pytest.mark.parametrize("command", ["explain", "compare", "bench"])
def test_missing_extras(command, capsys, monkeypatch):
    argv = [command] if command == "bench" else [command, "cli_model:loss_fn"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib, which is not installed" in failed(capsys, *argv, "--png", "x.png")
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "needs rich, which is not installed" in failed(capsys, *argv)


@pytest.mark.parametrize("command", ["explain", "compare", "fit", "bench"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert ("def example_args():" in out) == (command != "bench")


def test_compare(capsys, model):
    out = run(capsys, "compare", "cli_model:logits", "--seed", "3", "--json", "c.json", "--png", "c.png")
    module = sys.modules["cli_model"]
    args, drawn = _compare.filled(module.example_args(), 3)
    expected = mp.diagnostics.compare(module.logits, "mixed_bfloat16")(*args)
    assert out.startswith(f"{expected}\n{drawn} arrays that cli_model:logits has no values for were drawn from seed 3")
    assert json.loads((model / "c.json").read_text()) == json.loads(expected.to_json())
    assert is_png(model / "c.png")


def test_nothing_to_draw(capsys, model):
    assert main(["compare", "cli_model:logits", "--policy", "float32", "--png", "c.png"]) == 1
    out, error = capsys.readouterr()
    assert "no rule" not in out, "there is nothing to lower"
    assert "no operation of comparison has an error" in error
    assert not (model / "c.png").exists()


def test_structs_are_filled():
    struct = jax.ShapeDtypeStruct
    rows = {"x": struct((4000,), "float16"), "label": struct((4000,), "int32"), "given": jnp.ones(3)}
    args = (struct((50, 80), "float32"), rows, struct((), jax.random.key(0).dtype))
    (w, batch, key), drawn = _compare.filled(args, 0)
    assert drawn == 4
    assert np.std(w) == pytest.approx(1 / 50**0.5, rel=0.05)
    assert batch["x"].dtype == jnp.float16
    assert np.std(batch["x"].astype(np.float32)) == pytest.approx(1, rel=0.05)
    assert batch["label"].dtype == jnp.int32
    assert set(np.unique(batch["label"])) == {0, 1}
    assert batch["given"] is rows["given"]
    assert key.dtype == args[2].dtype
    again, _ = _compare.filled(args, 0)
    other, _ = _compare.filled(args, 1)
    assert np.array_equal(again[0], w)
    assert not np.array_equal(other[0], w)


def test_fit(capsys, model):
    policies = "float32; params=float32,compute=bfloat16"
    argv = ["fit", "cli_model:loss_fn", "--target", "cpu", "--grad", "--policies", policies, "--json", "f.json"]
    out = run(capsys, *argv, "--png", "f.png")
    assert is_png(model / "f.png")
    reports = json.loads((model / "f.json").read_text())["reports"]
    assert list(reports) == ["float32", "params=float32,compute=bfloat16"]
    assert all(report["peak_bytes"] > 0 and report["devices"] == 1 for report in reports.values())
    assert reports["float32"]["flops"]["float32"] > 0
    for name in reports:
        assert re.search(rf"^{name} needs [\d.]+ KiB; what a CPU has is not known\.$", out, re.MULTILINE)


def test_fit_over_devices(capsys, model):
    argv = ["fit", "cli_model:loss_fn", "--target", "cpu", "--mesh", "8", "--policies", "float32", "--json", "f.json"]
    out = run(capsys, *argv)
    assert "Data parallel: the last argument is split over 8 devices, the others are whole on each." in out
    found = json.loads((model / "f.json").read_text())["reports"]["float32"]
    assert found["devices"] == 8
    weights, batch = 4 * (8 * 16 + 16 * 4), 4 * 16 * 8
    assert found["argument_bytes"] == weights + batch // 8
    assert "(12, 8), to be split over 8 devices" in failed(capsys, *argv, "--args", "odd_args")

    shardings = "\nexample_shardings = lambda mesh: (jax.sharding.PartitionSpec(mesh.axis_names[1]), None)\n"
    (model / "cli_sharded.py").write_text(MODEL + shardings)
    argv[1] = "cli_sharded.py:loss_fn"
    out = run(capsys, *argv, "--mesh", "2x4", "--axes", "data, model")
    assert "Arguments lie as cli_sharded:example_shardings says." in out
    found = json.loads((model / "f.json").read_text())["reports"]["float32"]
    assert found["argument_bytes"] == weights // 4 + batch


def test_fit_keeps_what_the_users_own_jit_says(capsys, model):
    step = "\n\nstep = jax.jit(lambda params, batch: jax.tree.map(lambda w: w + 1, params), donate_argnums=0)\n"
    (model / "cli_step.py").write_text(MODEL + step)
    run(capsys, "fit", "cli_step:step", "--target", "cpu", "--policies", "float32", "--json", "f.json")
    assert json.loads((model / "f.json").read_text())["reports"]["float32"]["alias_bytes"] == 4 * (8 * 16 + 16 * 4)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--target", "v99"], "target is 'v99'"),
        (["--target", "cpu", "--mesh", "3x"], "chips is '3x'"),
        (["--target", "cpu", "--policies", "float32,fp17"], "unknown policy 'fp17'"),
        (["--target", "cpu", "--mesh", "2x2", "--axes", "a,b,c"], "axis_names is ('a', 'b', 'c')"),
    ],
)
def test_fit_tells_what_is_wrong_before_it_imports(argv, told, capsys, monkeypatch):
    monkeypatch.setattr(_target_function, "_module", None)
    assert told in failed(capsys, "fit", "cli_model:loss_fn", *argv)


@pytest.mark.standard_promotion  # optax
def test_bench_on_a_cpu_draws_no_conclusion_from_times(capsys, model):
    out = run(capsys, "bench", "--size", "16", "--runs", "2", "--json", "b.json", "--png", "b.png")
    assert "These are seconds of a CPU" in out
    assert "Each of them runs here, and its results are finite." in out
    assert "There is no row for fp8" in out
    assert not re.search(r"TFLOP|speed-?up|times as|as fast as|\d\s?x\b|\d ?%", out.replace("16 x 16", ""))
    facts = json.loads((model / "b.json").read_text())
    names = [(row["kind"], row["precision"]) for row in facts["measurements"]]
    assert names == [
        *(("matrix product", name) for name in ("float32", "bfloat16", "float16")),
        *(("training step", name) for name in ("float32", "mixed_bfloat16", "mixed_float16")),
    ]
    assert all(len(row["seconds"]) == 2 and row["finite"] for row in facts["measurements"])
    assert is_png(model / "b.png")


def test_bench_on_a_gpu(capsys, model, monkeypatch):
    class H100:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H100 80GB HBM3", "9.0"

    seconds = {"float32": 0.004, "mixed_bfloat16": 0.002, "bfloat16": 0.002, "float8_e4m3fn": 0.001}

    def measured(work, runs, turns):
        return [timed(row.kind, row.precision, *[seconds.get(row.precision, 0.005)] * runs) for row in work]

    monkeypatch.setattr(_bench, "start_backend", lambda: [H100])
    monkeypatch.setattr(_bench, "measure", measured)
    out = run(capsys, "bench", "--size", "8", "--runs", "3", "--json", "b.json", "--png", "b.png")
    rows = [line.split() for line in out.splitlines()]
    assert ["matrix", "product", "float8_e4m3fn", "1.000", "1.000", "to", "1.000", "1000.0"] in rows
    assert ["training", "step", "mixed_bfloat16", "2.000", "2.000", "to", "2.000", "500.0"] in rows
    assert 'Train with mp.get_policy("mixed_bfloat16"): its step is 2.00x as fast as float32\'s.' in " ".join(
        out.split()
    )
    assert "mixed_float8's step is no faster than bfloat16's beyond what the runs vary." in out
    assert "no row for fp8" not in out
    facts = json.loads((model / "b.json").read_text())
    assert facts["measurements"][0]["precision"] == "float32, precision highest"
    assert facts["conclusions"][0].startswith("Train with")
    assert is_png(model / "b.png")


def test_bench_that_needs_too_much_memory(capsys, monkeypatch):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 4 GiB\nmore")

    monkeypatch.setattr(_bench, "measure", refuse)
    err = failed(capsys, "bench", "--size", "64")
    assert "--size is 64: RESOURCE_EXHAUSTED: 4 GiB\n" in err
    assert "mpjax bench --size 32" in err


def test_measurements_take_turns():
    events = []
    now = iter(range(100))

    def work(name, value):
        def start():
            events.append(name)
            return jnp.float32(value)

        return _bench_measure.Work("kind", name, 10, start)

    def clock():
        return float(next(now))

    found = _bench_measure.measure([work("a", 1.0), work("b", np.nan)], runs=3, turns=2, clock=clock)
    assert events == ["a", "b", *["a", "a", "b", "b"] * 3]
    assert [(row.precision, row.seconds, row.finite) for row in found] == [
        ("a", (0.5, 0.5, 0.5), True),
        ("b", (0.5, 0.5, 0.5), False),
    ]


def timed(kind, precision, *seconds, finite=True):
    return _bench_measure.Measurement(kind, precision, 10**12, seconds, finite)


def steps(float32, bfloat16, float16):
    rows = zip(("float32", "mixed_bfloat16", "mixed_float16"), (float32, bfloat16, float16), strict=True)
    return [timed("training step", name, *seconds) for name, seconds in rows]


def test_the_middle_half_of_runs():
    row = timed("training step", "float32", 5.0, 1.0, 2.0, 3.0, 400.0)
    assert (row.median, row.middle_half) == (3.0, (2.0, 5.0))
    assert timed("training step", "float32", 7.0).middle_half == (7.0, 7.0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (steps((4.0, 4.1), (2.0, 2.0), (1.9, 2.1)), 'Train with mp.get_policy("mixed_bfloat16"): its step is 2.02x'),
        (steps((4.0, 4.1), (2.0, 2.0), (1.0, 1.1)), 'Train with mp.get_policy("mixed_float16")'),
        (steps((4.0, 4.0), (9.0, 9.0), (1.0, 1.0)), 'Train with mp.get_policy("mixed_float16"): its step is 4.00x'),
        (steps((4.0, 4.0), (2.0, 9.0), (5.0, 5.0)), "No precision's step is faster than float32's"),
    ],
)
def test_conclusions_on_an_accelerator(rows, told):
    assert told in _bench.conclusions(rows, "the default")[0]


def test_conclusions_of_equal_half_precisions_fp8_and_what_is_not_finite():
    rows = steps((4.0, 4.1), (2.0, 2.05), (1.9, 2.1))
    rows.append(timed("training step", "mixed_float8", 1.0, 1.1))
    rows.append(timed("matrix product", "float16", 1.0, finite=False))
    found = _bench.conclusions(rows, "the default")
    assert found[0].startswith('Train with mp.get_policy("mixed_bfloat16")')
    assert "float16 is no faster beyond what the runs vary" in found[0]
    assert found[1].startswith("mixed_float8's step is 1.93x as fast as bfloat16's.")
    assert found[2] == "Not finite: matrix product in float16."
    assert "mp.default_policy() here is the default." in found[3]
    rows[3] = timed("training step", "mixed_float8", 2.0, 2.1)
    assert _bench.conclusions(rows, "the default")[1].startswith("mixed_float8's step is no faster")
