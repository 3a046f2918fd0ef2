"""The small examples: quickstart, forces, equinox and haiku. They run under every policy and learn what they are to."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

import mpjax as mp

# optax's bias correction and schedules rely on JAX's usual promotion.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

FOLDER = Path(__file__).parent.parent / "examples"
# The steps of a smoke run, its batch, and what it is to reach: an accuracy, or by which factor the loss falls.
SMOKE = {
    "quickstart": (60, 32, 0.7),
    "equinox_loop": (30, 32, 0.5),
    "haiku_loop": (30, 32, 0.5),
    "pinn_or_forces": (40, 16, 0.2),
}
FLAGS = {"--policy", "--steps", "--batch", "--seed"}
POLICIES = ("mixed_float16", "float32", "mixed_bfloat16")
QUICK = {("quickstart", "mixed_float16"), ("equinox_loop", "mixed_float16")}
RUNS = [
    pytest.param(*run, marks=[] if run in QUICK else pytest.mark.slow) for run in itertools.product(SMOKE, POLICIES)
]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "policy"), RUNS)
def test_it_learns(name, policy, capsys):
    steps, batch, goal = SMOKE[name]
    result = load(name).main(["--policy", policy, "--steps", str(steps), "--batch", str(batch), "--seed", "1"])
    printed = " ".join(capsys.readouterr().out.split())
    assert str(mp.get_policy(policy)) in printed
    assert re.search(r"\d+ (steps )?skipped", printed)
    if name == "quickstart":
        assert result > goal
        return
    losses = result["losses"]
    assert len(losses) == steps
    assert sum(losses[-5:]) < goal * sum(losses[:5])
    assert result["skips"] < steps / 2


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "rounding"), [("mixed_float16", 0.002), ("mixed_bfloat16", 0.01)])
def test_forces_are_those_of_float32(policy, rounding, capsys):
    """A force is a gradient, and what is left out of it by 16 bits is little; training loses nothing by it."""
    result = load("pinn_or_forces").main(["--policy", policy, "--steps", "300", "--batch", "32"])
    assert "error of forces on held-out clusters" in capsys.readouterr().out
    assert 0 < result["rounding"] < rounding
    assert result["float32_error"] < 0.06
    assert result["error"] < 1.5 * result["float32_error"] + rounding


def test_the_quickstart_has_forty_lines():
    assert len((FOLDER / "quickstart.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", SMOKE)
def test_help_has_the_flags_of_all_examples(name, capsys):
    """Those that the smoke runs use, each with a line of its own, and no others."""
    with pytest.raises(SystemExit, match="0"):
        load(name).main(["--help"])
    assert set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)) == FLAGS


@pytest.mark.parametrize("name", SMOKE)
def test_an_unknown_policy_is_refused(name):
    with pytest.raises(ValueError, match=r"(?s)unknown policy 'mixed_float61'.*mixed_float16"):
        load(name).main(["--policy", "mixed_float61"])
