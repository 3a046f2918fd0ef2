"""examples/vit.py: it is ViT-B/16, it learns, a skipped step is none, and arrays come in as they are on disk."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import bits

import mpjax as mp

# optax's schedules rely on JAX's usual promotion; nearly all the time of a small run is compilation.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

PATH = Path(__file__).parent.parent / "examples" / "vit.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("vit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def size(example):
    return example.Size(2, 16, 2, patch=8, side=16, positions=0.02, dropout=0.1, rate=1e-3)


@pytest.fixture
def arrays(tmp_path):
    """A folder of 40 images of 16 x 16 pixels, of two classes: dark and light."""
    labels = np.arange(40) % 2
    noise = np.random.default_rng(0).integers(0, 99, (40, 16, 16, 3))
    np.save(tmp_path / "images.npy", (noise + 120 * labels[:, None, None, None]).astype(np.uint8))
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path


def test_it_is_vit_b16(example):
    make = lambda: example.VisionTransformer(example.PRESETS["b16"], 1000, rngs=nnx.Rngs(0))
    # The published count.
    assert sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param))) == 86_567_656


def test_matrix_work_is_in_the_compute_dtype(example, size):
    make = lambda: example.VisionTransformer(size, 10, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(nnx.eval_shape(make))
    params, rest = jax.eval_shape(lambda: nnx.split(make(), nnx.Param, ...)[1:])
    batch = {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((4,), jnp.int32)}

    def loss_fn(params, rest, batch):
        return example.loss_fn(nnx.merge(graph, params, rest, copy=True), batch)

    grad_fn = jax.value_and_grad(loss_fn)
    found = mp.explain(grad_fn, "mixed_bfloat16")(params, rest, batch)
    dots = [row for row in found.operations if row.primitive == "dot_general"]
    # In each of two layers six matrices and the two products of attention, and the head, each with its two gradients.
    assert {dtype for row in dots for dtype in row.inputs} == {"bfloat16"}
    assert sum(row.count for row in dots) == 3 * (2 * 8 + 1)
    results = jax.eval_shape(mp.autocast(grad_fn, "mixed_bfloat16"), params, rest, batch)
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype("float32")}


def test_only_kernels_decay(example, size):
    model = example.VisionTransformer(size, 10, rngs=nnx.Rngs(0))
    mask = jax.tree_util.tree_leaves_with_path(example.decays(nnx.state(model, nnx.Param)))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, decays in mask if decays]
    # The patches, six matrices a layer, the head.
    assert len(names) == 1 + 2 * 6 + 1
    assert all("kernel" in name for name in names)
    assert len(mask) == len(names) + 2 + 2 * (6 + 4) + 1 + 2 + 1  # token and positions, biases and norms


def test_a_skipped_step_leaves_no_trace(example, size):
    """From a scale at which the gradients overflow: all but the scale and the noise stays as it was, until it fits."""
    model = example.VisionTransformer(size, 10, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, example.make_optimizer(mp.DynamicLossScale(2.0**27), 20, 1e-3), wrt=nnx.Param)
    step = example.make_train_step(mp.nnx.autocast(example.loss_fn, "mixed_float16"))
    stream = example.batches(example.load_digits(16), 16, seed=0)

    def kept():
        return bits((nnx.state(model, nnx.Param), nnx.as_pure(optimizer.opt_state).skip_state.inner_state))

    def noise():
        return bits(nnx.state(model, nnx.RngCount))

    skips = 0
    for _ in range(12):
        before, drawn = kept(), noise()
        metrics = step(model, optimizer, next(stream))
        skipped = int(metrics["skips"]) > skips
        skips += skipped
        assert skipped == (kept() == before)
        assert noise() != drawn
        assert float(metrics["scale"]) == 2.0 ** (27 - skips)
        assert np.isfinite(metrics["loss"])
    assert 3 <= skips < 12
    assert not skipped


@pytest.mark.slow
def test_digits_are_learnt(example, capsys):
    found = example.main(["--preset", "tiny", "--policy", "mixed_float16", "--steps", "90", "--batch", "64"])
    printed = capsys.readouterr().out
    assert str(mp.get_policy("mixed_float16")) in printed
    assert "1,437 images of scikit-learn's digits" in printed
    assert f"{found['accuracy']:.1%} of 360 held-out images right" in printed
    assert f"{found['skips']} steps skipped" in printed
    assert len(found["losses"]) == 90
    assert np.mean(found["losses"][-10:]) < 0.8 * found["losses"][0]
    assert found["accuracy"] > 0.5
    assert found["skips"] == 0


@pytest.mark.slow
def test_a_seed_is_a_run(example, arrays):
    """With parameters in bfloat16."""
    sizes = ["--preset", "tiny", "--layers", "1", "--width", "16", "--size", "16", "--batch", "8", "--steps", "3"]
    flags = [*sizes, "--data", str(arrays), "--policy", "bfloat16"]
    runs = [example.train(example.parse([*flags, "--seed", seed])) for seed in "112"]
    assert runs[0] == runs[1]
    assert runs[0]["losses"][1] != runs[2]["losses"][1]
    assert np.isfinite(runs[0]["losses"]).all()


def test_arrays_are_read(example, arrays):
    data = example.load_folder(arrays, 16)
    assert isinstance(data.images, np.memmap)
    assert data.held_out == 4
    batch = next(example.batches(data, 36, seed=0))
    assert (batch["image"].shape, batch["image"].dtype) == ((36, 16, 16, 3), np.uint8)
    assert sorted(batch["label"].tolist()) == [0] * 18 + [1] * 18
    # Moved and mirrored, but still dark or light.
    assert ((batch["image"].max((1, 2, 3)) > 110) == batch["label"]).all()
    parts = list(example.held_out_batches(data, 3))
    assert [part["label"].tolist() for part in parts] == [[0, 1, 0], [1, -1, -1]]
    np.testing.assert_array_equal(parts[0]["image"], data.images[36:39])


def test_arrays_that_do_not_fit_are_refused(example, arrays):
    with pytest.raises(SystemExit, match=r"nowhere/images\.npy is missing: the folder needs images\.npy and labels"):
        example.load_folder(arrays / "nowhere", 16)
    with pytest.raises(SystemExit, match=r"(?s)images\.npy is uint8\(40, 16, 16, 3\)\. Expected: .* 32, 32, 3\); --si"):
        example.load_folder(arrays, 32)
    np.save(arrays / "labels.npy", np.zeros(39, np.int32))
    with pytest.raises(
        SystemExit, match=r"labels\.npy is int32\(39,\)\. Expected: an integer .* each of the 40 images"
    ):
        example.load_folder(arrays, 16)


def test_the_synthetic_set_is_made_once(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "SYNTHETIC_IMAGES", 40)
    data = example.load_synthetic(16, tmp_path)
    written = (Path(data.name) / "images.npy").stat().st_mtime_ns
    example.load_synthetic(16, tmp_path)
    assert (Path(data.name) / "images.npy").stat().st_mtime_ns == written
    assert (len(data.labels), data.held_out) == (40, 4)
    for i in range(10):
        # Of one class are images that are alike.
        near, far = (np.abs(np.int32(data.images[i]) - data.images[j]).mean() for j in (i + 10, i + 11))
        assert near < far


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch", "15"], "--size 224 is to be a multiple of --patch 15"),
        (["--preset", "tiny", "--width", "66"], "--width 66 of --heads 4"),
        (["--dataset", "digits", "--data", "x"], "--data and --dataset are two answers to one question"),
    ],
)
def test_flags_that_do_not_fit_are_refused(example, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        example.parse(flags)
    assert message in capsys.readouterr().err
