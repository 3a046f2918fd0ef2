import dataclasses
import json
import subprocess
import sys

import jax
import pytest

import mpjax
from mpjax import _hardware
from mpjax.cli import _checks, _info, main


@dataclasses.dataclass
class FakeDevice:
    platform: str
    device_kind: str = ""
    compute_capability: str | None = None


T4 = FakeDevice("gpu", "Tesla T4", "7.5")
H100 = FakeDevice("gpu", "NVIDIA H100 80GB HBM3", "9.0")
CPU = FakeDevice("cpu", "cpu")
UNHEARD_OF = FakeDevice("quantum", "Q1")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def use_devices(monkeypatch, *devices):
    monkeypatch.setattr(jax, "devices", lambda: list(devices))


def marked(facts):
    return [row["family"] for row in facts["hardware"] if row["this_machine"]]


def test_info_here(capsys):
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert f"Recommended policy: {mpjax.default_policy()}" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith(" ->")] == ["CPU"]
    for word in ("python", "jaxlib", "flax", "optax", "jmp", "mpjax", mpjax.__version__, jax.__version__):
        assert word in out
    cpu = next(line for line in out.splitlines() if line.startswith(" cpu"))
    assert cpu.split() == ["cpu", "cpu", str(len(jax.devices()))]


def test_info_as_json_says_the_same(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == _info.gather(jax.devices())
    assert facts["devices"] == [{"platform": "cpu", "kind": "cpu", "count": len(jax.devices())}]
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["versions"]["mpjax"] == mpjax.__version__
    assert marked(facts) == ["CPU"]
    assert facts["recommended"]["policy"] == str(mpjax.default_policy())


@pytest.mark.parametrize(
    ("device", "family", "compute", "loss_scale", "fp8"),
    [
        (T4, "NVIDIA sm_70/75 (V100, T4)", "float16", "dynamic", False),
        (H100, "NVIDIA sm_80+ (A100, L4, H100, H200, B200)", "bfloat16", "none", True),
        (FakeDevice("tpu", "TPU v5 lite"), "TPU v2 and later", "bfloat16", "none", False),
        (CPU, "CPU", "float32", "none", False),
    ],
    ids=lambda value: getattr(value, "device_kind", None),
)
def test_info_marks_the_row_of_the_first_device(device, family, compute, loss_scale, fp8):
    facts = _info.gather([device, device, CPU])
    assert marked(facts) == [family]
    assert [row["family"] for row in facts["hardware"]] == [row.name for row in _hardware.TABLE]
    recommended = facts["recommended"]
    assert recommended["policy"] == f"params=float32,compute={compute},output=float32"
    assert recommended["loss_scale"] == loss_scale
    assert recommended["fp8_matmuls"] is fp8
    assert recommended["reason"].endswith("This device has fp8 matmuls." if fp8 else "This device has no fp8 matmuls.")
    row = next(row for row in facts["hardware"] if row["this_machine"])
    assert row["loss_scale"] == loss_scale
    assert row["note"] in recommended["reason"]
    assert sum(kind["count"] for kind in facts["devices"]) == 3


def test_info_on_a_t4_in_words(monkeypatch, capsys):
    use_devices(monkeypatch, T4)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1:3] for line in out.splitlines() if line.startswith(" ->")] == [["NVIDIA", "sm_70/75"]]
    assert "Loss scale: mp.DynamicLossScale()." in out
    # Wrapped notes are folded, never cut off.
    assert "…" not in out


def test_info_on_an_unknown_device_has_a_row_for_it():
    facts = _info.gather([UNHEARD_OF])
    assert marked(facts) == ["unknown device"]
    assert len(facts["hardware"]) == len(_hardware.TABLE) + 1
    assert facts["recommended"]["policy"] == "params=float32,compute=float32,output=float32"


def test_info_names_a_package_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(_info, "_PACKAGES", ("jax", "no-such-package"))
    assert main(["info"]) == 0
    assert "not installed" in capsys.readouterr().out
    assert _info.gather([CPU])["versions"]["no-such-package"] is None


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("info", "rich", "rich"),
        ("demo", "rich", "rich"),
        ("demo", "flax", "flax"),
        ("demo", "matplotlib", "matplotlib"),
        ("demo", "sklearn", "scikit-learn"),
    ],
)
def test_missing_extra(command, module, name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f'mpjax {command}: `mpjax {command}` needs {name}, which is not installed: pip install "mpjax[examples]"\n'
    )
    assert not list(tmp_path.iterdir())


def test_several_missing_extras(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 1
    assert "needs rich, scikit-learn, which are not installed" in capsys.readouterr().err


def test_json_needs_no_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]


def test_a_broken_package_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("import surely_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        _checks.require("demo", "half_installed")


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu'"), AssertionError()])
@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["demo"]])
def test_no_backend(error, command, monkeypatch, capsys, tmp_path):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"JAX found no device to run on: {str(error) or 'AssertionError'}" in err
    assert "expected:" in err
    assert "write:" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "arguments are required"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["info", "--xml"], "unrecognized arguments: --xml"),
        (["demo", "--steps", "0"], "argument --steps: '0' is not a whole number from 1"),
        (["demo", "--steps", "-3"], "argument --steps: '-3' is not a whole number from 1"),
        (["demo", "--steps", "1.5"], "argument --steps: '1.5' is not a whole number from 1"),
        (["demo", "--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
        (["demo", "--seed", str(2**31)], "argument --seed: '2147483648' is not a whole number from 0"),
    ],
)
def test_bad_arguments(argv, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err


@pytest.mark.parametrize("argv", [["--help"], ["info", "--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip()


def test_as_installed():
    """The entry point of pyproject.toml is the command, and its output in a pipe has no control codes."""
    code = "import sys; from mpjax.cli import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Recommended policy" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
