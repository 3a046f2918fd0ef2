import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import mpjax as mp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.standard_promotion
def test_the_loop_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert capsys.readouterr().out.split()[1] == "0"
    assert names["loss"].dtype == jnp.float32
    for _ in range(20):
        names["params"], names["opt_state"], loss = names["train_step"](
            names["params"], names["opt_state"], names["batch"]
        )
    assert loss < names["loss"]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float32"])
def test_the_loop_runs_in_every_precision(policy, monkeypatch):
    monkeypatch.setattr(mp, "default_policy", lambda: mp.get_policy(policy))
    names = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0], names)
    assert jnp.isfinite(names["loss"])
    assert isinstance(mp.get_loss_scale(names["opt_state"]), mp.DynamicLossScale) == (policy == "mixed_float16")


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("policy", "dtype"), [("mixed_bfloat16", "bf16"), ("mixed_float16", "f16")])
def test_the_loop_computes_in_low_precision(policy, dtype, monkeypatch):
    monkeypatch.setattr(mp, "default_policy", lambda: mp.get_policy(policy))
    names = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0], names)
    assert dtype in str(jax.make_jaxpr(names["loss_fn"])(names["params"], names["batch"]))


def test_every_name_in_the_readme_exists():
    for name in re.findall(r"\bmp\.([A-Za-z_]\w*)", README):
        assert hasattr(mp, name), name


def test_make_targets_and_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from mpjax import cli

    for command in re.findall(r"`mpjax ([a-z]\w*)`", README):
        with pytest.raises(SystemExit) as done:
            cli.main(shlex.split(f"{command} --help"))
        assert done.value.code == 0


def test_lengths_and_links():
    assert len(README.splitlines()) <= 110
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
