"""Checkpoints and policies are data: nothing in them is run, and none of them keeps the program from going on."""

import ast
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mpjax as mp
from mpjax import _dtypes
from mpjax._policy_grammar import LONGEST_POLICY

ROOT = Path(mp.__file__).parent.parent
FILES = sorted(path for folder in ("mpjax", "examples") for path in (ROOT / folder).rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__", "execfile"}
RUNS_CODE_AS_METHODS = {"system", "popen", "unsafe_load", "full_load"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "code", "pty", "ctypes"}


def dangers(tree):
    """What could run code out of a file or a string: calls, keywords and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Name) and node.id in RUNS_CODE:
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr in RUNS_CODE_AS_METHODS | {"literal_eval"}:
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            yield node.arg


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path):
    assert list(dangers(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from yaml import load",
        "import os.path, marshal",
        "eval(text)",
        "f = exec",
        "np.load(path, allow_pickle=True)",
        "os.system(text)",
        "ast.literal_eval(text)",
    ],
)
def test_the_search_finds_it(code):
    assert len(list(dangers(ast.parse(code)))) == 1


PYTHON = [
    "__import__('os').system('touch ran')",
    "params=float32,compute=eval('1')",
    "float32; import os",
    "jnp.float32",
    "(lambda: 'float32')()",
    "!!python/object/apply:os.system ['touch ran']",
    "{0.__class__}",
    "cos\nsystem\n(S'touch ran'\ntR.",
]


@pytest.mark.parametrize("text", PYTHON)
def test_python_in_a_policy_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quoted = json.dumps(text)
    for read in (
        lambda: mp.get_policy(text),
        lambda: mp.get_policy(f"compute={text}"),
        lambda: mp.get_policy(f'overrides={{".*": {quoted}}}'),
        lambda: mp.get_policy("float32").with_overrides({".*": text}),
        lambda: mp.Policy(text, "float32", "float32"),
    ):
        with pytest.raises(ValueError, match="unknown"):
            read()
    assert list(tmp_path.iterdir()) == []


# numpy evaluates what looks like a shape, and divides by what follows a slash.
FOR_NUMPY = ["m8[2D/0]", "f8,(", "9" * 10_000, "(2,)f8", "i4,i4", "\0", "\ud800", "<f4", "U99999999999", "[('a','f4')]"]


@pytest.mark.parametrize("text", FOR_NUMPY)
def test_strings_that_numpy_would_read_as_more_than_a_name(text):
    """They do not reach it: the first one is a division by zero in numpy 2.4, which ends the process."""
    for read in (mp.get_policy, lambda t: mp.Policy(t, "f32", "f32")):
        with pytest.raises(ValueError, match="unknown"):
            read(text)


class Trap:
    """What a pickle could have put into a tree: it notes whatever is done with it."""

    touched = []

    def _touch(self, *args, **kwargs):
        Trap.touched.append(args)
        raise AssertionError("ran")

    __float__ = __int__ = __index__ = __bool__ = __array__ = __jax_array__ = __repr__ = __str__ = __format__ = _touch
    __len__ = __iter__ = __getitem__ = __eq__ = __lt__ = __hash__ = __call__ = __reduce__ = _touch


def in_an_array():
    array = np.empty((), object)
    array[()] = Trap()
    return array


TREES = [
    lambda x: {"loss_scale": x, "counter": 0, "hysteresis_left": 1, "at_floor": 0},
    lambda x: {"loss_scale": 2.0, "counter": x, "hysteresis_left": 1, "at_floor": 0},
    lambda x: {"scale": x, "fin_steps": 1},
    lambda x: {"scale": 2.0, "_growth_tracker": 1, "growth_interval": x},
    lambda x: {"scale": 2.0, "_growth_tracker": 1, "growth_factor": x},
    lambda x: {"loss_scale": 2.0, "counter": 0, "hysteresis_left": 1, "at_floor": 0, "hysteresis_refill": x},
    lambda x: {"opt_state": [{"w": x}, {"scale": 2.0, "other": x}]},
    lambda x: {"loss_scale": x, "counter": 1},
]


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("make", TREES)
@pytest.mark.parametrize("value", [Trap, in_an_array, lambda: "__import__('os').abort()"])
def test_a_malicious_checkpoint_runs_nothing(make, value, repair):
    saved = make(value())
    Trap.touched.clear()
    with pytest.raises((TypeError, ValueError), match="expected"):
        mp.read_loss_scale(saved, repair=repair)
    assert Trap.touched == []


def test_pickled_bytes_are_not_loaded():
    with pytest.raises(TypeError, match="scale is a bytes"):
        mp.read_loss_scale({"scale": b"cos\nsystem\n(S'touch ran'\ntR.", "fin_steps": 0})


MILLION = 10**6
LONG = [
    "a" * MILLION,
    "float32x" + " " * MILLION,
    "c=" + "f16" * MILLION,
    "c=f16," * (MILLION // 6),
    "overrides=" + "[" * MILLION,
    "overrides=" + "9" * MILLION,
    "overrides" * (MILLION // 9),
    "overrides=" + '{"a":' * (MILLION // 5),
    'overrides={"' + "(a+)+" * (MILLION // 5) + '": "float32"}',
    'overrides={".*": "' + "x" * MILLION + '"}',
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:15])
def test_a_million_characters(text):
    # Of each the longest part that is read at all, too.
    for part in (text, text[:LONGEST_POLICY], text[: LONGEST_POLICY - 1] + "}"):
        with pytest.raises((ValueError, TypeError)) as error:
            mp.get_policy(part)
        assert "expected:" in str(error.value)
        assert len(str(error.value)) < 2000


def test_the_longest_policy():
    """As many overrides as a string may have, each with a pattern that `re` would not finish."""
    patterns = {f"(.*{i}a+)+$": "float32" for i in range(3000)}
    text = "c=bf16,overrides=" + json.dumps(patterns)
    assert 0.7 * LONGEST_POLICY < len(text) <= LONGEST_POLICY
    policy = mp.get_policy(text)
    assert len(policy.overrides) == 3000
    few = policy.with_overrides(dict.fromkeys(list(patterns)[:50], "float32"))
    with pytest.warns(UserWarning, match="match no path"):
        assert few.cast_to_compute({"a" * 200 + "!": jnp.ones(1)})["a" * 200 + "!"].dtype == jnp.bfloat16


def test_catastrophic_patterns_wherever_patterns_are_matched():
    """Casts, rules of autocast for modules, dtypes of moments."""
    evil, path = "(a+)+$", "a" * 60 + "!"
    params = {path: jnp.ones((4, 4))}
    with pytest.warns(UserWarning, match="match no path"):
        mp.get_policy("bfloat16").with_overrides({evil: "float32"}).cast_to_param(params)
    with pytest.raises(ValueError, match="match no moment"):
        mp.transforms.state_dtypes(optax.sgd(0.1, momentum=0.9), {evil: "bfloat16"}).init(params)
    rules = mp.default_rules().with_path(evil, "full", "none matches")

    def fn(x):
        with jax.named_scope(path):
            return x @ x

    with pytest.warns(UserWarning, match="match no path"):
        mp.autocast(fn, "mixed_bfloat16", rules=rules)(jnp.ones((4, 4)))
    for reader in (
        mp.default_rules().with_path,
        lambda p, *_: mp.transforms.state_dtypes(optax.sgd(0.1, momentum=0.9), {p: "bf16"}),
    ):
        with pytest.raises(ValueError, match="has a backreference"):
            reader(r"(a)\1", "full", "none")


WORDS = [
    "float32",
    "bf16",
    "half",
    "params",
    "c",
    "=",
    ",",
    "overrides={",
    "}",
    '"',
    ":",
    ".*",
    "(",
    ")+",
    "mixed_",
    " ",
]
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.one_of(st.sampled_from([*WORDS, *_dtypes._SPELLINGS]), st.text(max_size=3)), max_size=12).map("".join),
    st.dictionaries(st.text(max_size=8), st.sampled_from(["f32", "c=bf16", "half", "x"]), max_size=3).map(
        lambda pairs: "c=f16,overrides=" + json.dumps(pairs)
    ),
)


def attempt(make):
    try:
        return make(), None
    except (ValueError, TypeError) as error:
        return None, str(error)


@given(TEXTS)
@example("overrides=" + "[" * 50_000)
@example('overrides={"' + "(" * 5000 + '": "f32"}')
@example('overrides={"a{99999999999}": "f32"}')
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_any_text_is_a_policy_or_an_error(text):
    policy, said = attempt(lambda: mp.get_policy(text))
    if policy is None:
        assert "expected:" in said
    else:
        assert mp.get_policy(str(policy)) == policy


@given(st.dictionaries(st.one_of(st.text(max_size=12), TEXTS), TEXTS, max_size=3), st.text("ab/_()*", max_size=10))
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning", "ignore:overrides that match:UserWarning")
def test_any_overrides_are_taken_or_an_error(overrides, path):
    policy, said = attempt(lambda: mp.get_policy("mixed_bfloat16").with_overrides(overrides))
    if policy is None:
        assert "expected:" in said
        return
    assert mp.get_policy(str(policy)) == policy
    found = {value for pattern, value in policy.overrides if re.fullmatch(pattern, path, re.IGNORECASE)}
    if len(found) > 1:
        with pytest.raises(ValueError, match="disagree"):
            policy.cast_to_compute({path: jnp.ones(1)})
    else:
        expected = found.pop().compute_dtype if found else jnp.bfloat16
        assert policy.cast_to_compute({path: jnp.ones(1)})[path].dtype == expected
