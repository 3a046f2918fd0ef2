"""examples/bert.py: the vocabulary, the hidden tokens, the model's size, and that it learns at any precision."""

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import bits
from jaxprs import matrix_dtypes

import mpjax as mp

# optax's bias correction and schedules rely on JAX's usual promotion.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

PATH = Path(__file__).parent.parent / "examples" / "bert.py"
STEPS = 30


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("bert", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = module.Size(1, 32, 2, 384, 32, dropout=0.0, hidden=0.15, rate=1e-2, text_bytes=1_000_000)
    module.PRESETS = module.PRESETS | {"small": tiny}
    return module


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bert")


@pytest.fixture(scope="module")
def text(example, out):
    return example.load_text(example.PRESETS["small"], out)


def flags(out, *more):
    sizes = ["--steps", str(STEPS), "--batch", "16", "--length", "16", "--task-steps", str(STEPS), "--out", str(out)]
    return [*sizes, *more]


def run(example, out, *more):
    return example.train(example.parse(flags(out, *more)))


# The text ------------------------------------------------------------------------------------------------------------


def plain_byte_pairs(words, tokens):
    """The same, written down again: all pairs are counted again each time."""
    spelled = {word: list(word) for word in words}
    for made in range(256, tokens):
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(spelled[word], spelled[word][1:], strict=False):
                pairs[pair] += n
        most = max(pairs.values(), default=0)
        if most == 0:
            break
        best = min(pair for pair, n in pairs.items() if n == most)
        for word, old in spelled.items():
            new = []
            while old:
                both = tuple(old[:2]) == best
                new.append(made if both else old[0])
                old = old[1 + both :]
            spelled[word] = new
    return spelled


@pytest.mark.parametrize("tokens", [270, 1000])
def test_byte_pairs(example, tokens):
    words = Counter(example.WORD.findall(Path(example.__file__).read_bytes()[:2500]))
    words |= {b"aaaa": 3, b"aaaaaaa": 2, b" retention": 0, b"import": 0}
    assert example.byte_pairs(words, tokens) == plain_byte_pairs(words, tokens)


def test_words_are_all_of_the_text(example):
    for sample in (PATH.read_bytes(), bytes(range(256)), b"", "naïve \t\n\n  x_1 != y\r\n".encode()):
        assert b"".join(example.WORD.findall(sample)) == sample


def test_the_text_is_kept(example, out, text, monkeypatch):
    def never(*args):
        raise AssertionError("learnt again")

    monkeypatch.setattr(example, "byte_pairs", never)
    again = example.load_text(example.PRESETS["small"], out)
    assert again.paths == text.paths
    for a, b in zip(again.tokens, text.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [path.suffix for path in out.iterdir()] == [".npz"]
    assert len(text.tokens) == len(text.paths) == len(text.held_out)
    assert sum(text.held_out) == len(text.paths) // 10 > 0
    used = np.unique(np.concatenate(text.tokens))
    assert used.min() >= example.SPECIAL
    assert used.max() == example.PRESETS["small"].vocabulary - 1
    assert sum(map(len, text.tokens)) < 1_000_000 / 1.5


def test_what_is_hidden(example):
    rows = np.random.default_rng(0).integers(2, 100, (400, 41)).astype(np.int32)
    rows[:, 0] = example.CLS
    size = dataclasses.replace(example.PRESETS["base"], vocabulary=100)
    batch = example.masked(rows, size, np.random.default_rng(1))
    assert batch["places"].shape == (400, 6)  # 15% of 41
    assert batch["places"].min() == 1
    assert (np.diff(batch["places"]) > 0).all()
    np.testing.assert_array_equal(np.take_along_axis(rows, batch["places"], 1), batch["answers"])
    shown = np.take_along_axis(batch["tokens"], batch["places"], 1)
    masked, same = (shown == example.MASK).mean(), (shown == batch["answers"]).mean()
    # 2400 draws: four deviations.
    assert abs(masked - 0.8) < 0.033
    assert abs(same - 0.1) < 0.027
    assert shown[shown != example.MASK].min() >= example.SPECIAL
    untouched = batch["tokens"].copy()
    np.put_along_axis(untouched, batch["places"], batch["answers"], 1)
    np.testing.assert_array_equal(untouched, rows)


def test_batches_are_a_function_of_the_seed(example, text):
    size = example.PRESETS["small"]
    one, same, other = (
        next(example.masked_batches(text, size, example.parse(flags(".", "--seed", seed)))) for seed in "001"
    )
    assert bits(one) == bits(same) != bits(other)


def test_packages_are_held_out_by_module(example, text):
    names, (rows, held_out) = example.package_rows(text, 16)
    assert len(names) == len(rows) == len(held_out) > 1
    for held, parts in ((False, rows), (True, held_out)):
        for name, part in zip(names, parts, strict=True):
            modules = [tokens for path, tokens in text.chosen(held) if path.startswith(f"{name}/")]
            assert part[:, 1:].size <= sum(map(len, modules))
            assert (part[:, 0] == example.CLS).all()
            np.testing.assert_array_equal(part[0, 1:], next(t for t in modules if len(t) >= 16)[:15])


def test_one_package_is_no_task(example):
    paths = [f"email/{i}.py" for i in range(20)]
    text = example.Text(paths, [np.arange(50)] * 20, [i % 10 == 9 for i in range(20)])
    with pytest.raises(SystemExit, match=r"Less than two packages .*: raise --text-bytes"):
        example.package_rows(text, 16)


# The model -----------------------------------------------------------------------------------------------------------


def test_base_has_110_million_weights(example):
    size = example.PRESETS["base"]
    row = jax.ShapeDtypeStruct((1, 128), np.int32)
    init = lambda key, row: example.MaskedLM(size).init(key, row, row, deterministic=True)
    weights = sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), row)))
    width, layers = 768, 12
    layer = 4 * (width + 1) * width + (width + 1) * 4 * width + (4 * width + 1) * width + 4 * width
    # Embeddings and their norm, the layers, and the head: its own layer and norm, and a bias for each token.
    expected = (30_522 + 512 + 2) * width + layers * layer + (width + 3) * width + 30_522
    assert weights == expected
    assert abs(weights - 110e6) < 1e6


@pytest.fixture(scope="module")
def of_a_batch(example):
    size, inputs = dataclasses.replace(example.PRESETS["small"], dropout=0.1), ("tokens", "places")
    model = example.MaskedLM(size)
    rows = np.random.default_rng(0).integers(2, 384, (4, 16)).astype(np.int32)
    batch = example.masked(rows, size, np.random.default_rng(1))
    init = jax.jit(lambda key: model.init(key, *[batch[name] for name in inputs], deterministic=True))
    return example.loss_of(model, inputs), init(jax.random.key(0))["params"], batch


def test_matrix_work_is_in_the_compute_dtype(of_a_batch):
    loss_fn, params, batch = of_a_batch
    step = jax.value_and_grad(mp.autocast(loss_fn, "mixed_float16"), has_aux=True)
    assert matrix_dtypes(step, params, batch, jax.random.key(1)) == {"float16"}


def test_dropout_is_for_training(of_a_batch):
    loss_fn, params, batch = of_a_batch
    loss_fn = jax.jit(loss_fn)
    with_keys = {float(loss_fn(params, batch, jax.random.key(i))[0]) for i in range(3)}
    without = {float(loss_fn(params, batch)[0]) for _ in range(2)}
    assert len(with_keys | without) == 4


# The run -------------------------------------------------------------------------------------------------------------


def test_it_learns(example, out, text, capsys):
    result = example.main(flags(out, "--policy", "mixed_float16"))
    printed = " ".join(capsys.readouterr().out.split())
    assert str(mp.get_policy("mixed_float16")) in printed
    assert f"held-out loss {result['held_out']:.3f}" in printed
    assert f"{result['accuracy']:.1%} right; {result['skips']} skipped" in printed
    assert f"without the rest of the row has {result['unigram']:.3f}" in printed
    assert len(result["losses"]) == STEPS
    assert result["losses"][0] > 5.5  # a guess among 384 has 5.95
    assert np.mean(result["losses"][-5:]) < np.mean(result["losses"][:5]) - 0.3
    assert 4 < result["unigram"] < 5.5
    assert result["held_out"] < 5.6
    assert 0 <= result["skips"] < 5


@pytest.mark.slow
def test_precisions_land_close(example, out, text):
    """From the same parameters on the same rows; and a run that is repeated is the same."""
    wide, again, bfloat16, float16 = (
        run(example, out, "--policy", policy) for policy in ("float32", "float32", "mixed_bfloat16", "mixed_float16")
    )
    assert wide == again
    for low in (bfloat16, float16):
        assert low["losses"] != wide["losses"]
        np.testing.assert_allclose(low["losses"][0], wide["losses"][0], rtol=1e-2)
        np.testing.assert_allclose(low["held_out"], wide["held_out"], rtol=2e-2)


@pytest.mark.slow
def test_the_task_is_learnt(example, out, text, capsys, monkeypatch):
    """It starts from the encoder of the masked language model, and from a new head."""
    seen, fit = [], example.fit

    def recorded(what, loss_fn, params, *args):
        started = jax.tree.map(np.asarray, params)
        ended, *numbers = fit(what, loss_fn, params, *args)
        seen.append((started, jax.tree.map(np.asarray, ended)))
        return ended, *numbers

    monkeypatch.setattr(example, "fit", recorded)
    result = example.main(flags(out, "--policy", "mixed_bfloat16", "--task", "package", "--task-steps", "100"))
    (_, masked), (started, ended) = seen
    assert bits(started["encoder"]) == bits(masked["encoder"])
    assert set(started) == set(ended) == {"encoder", "pooler", "head"}
    assert len(result["task_losses"]) == 100
    assert np.mean(result["task_losses"][-20:]) < 0.8 * np.mean(result["task_losses"][:5])
    assert 0 < result["task_accuracy"] < 1
    assert f"in the right one of {', '.join(result['classes'])}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_scale_that_overflows_skips_every_step(example, out, text):
    """2^100 is more than any float16 gradient can be multiplied by; the loss is still the true one."""
    result = run(example, out, "--policy", "mixed_float16", "--loss-scale", str(2.0**100))
    assert result["skips"] == STEPS
    assert np.isfinite(result["losses"]).all()
    assert result["held_out"] > 5.5


@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        ("policy", "mixed_float16", mp.DynamicLossScale),
        ("policy", "mixed_bfloat16", mp.NoOpLossScale),
        ("none", "mixed_float16", mp.NoOpLossScale),
        ("dynamic", "float32", mp.DynamicLossScale),
        ("1024", "mixed_float16", mp.StaticLossScale),
    ],
)
def test_the_loss_scale_is_asked_for(example, name, policy, expected):
    args = example.parse(flags(".", "--loss-scale", name))
    assert type(example.loss_scale_of(args.loss_scale, mp.get_policy(policy))) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "33"], "--length 33 is not within 2 and 32, the positions of small"),
        (["--loss-scale", "some"], "argument --loss-scale: invalid"),
        (["--steps", "0"], "argument --steps: invalid"),
    ],
)
def test_flags_that_mean_nothing_are_refused(example, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_policy_is_refused(example):
    with pytest.raises(ValueError, match=r"(?s)unknown policy 'mixed_float61'.*mixed_float16"):
        example.main(["--policy", "mixed_float61", "--length", "16"])
