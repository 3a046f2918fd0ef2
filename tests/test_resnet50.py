"""examples/resnet50.py: it is ResNet-50, it learns, a skipped step is none, and images come in as they are on disk."""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits

import mpjax as mp

# optax's schedules rely on JAX's usual promotion; nearly all the time of a small run is compilation.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

PATH = Path(__file__).parent.parent / "examples" / "resnet50.py"
SMALL = ["--dataset", "digits", "--size", "16", "--batch", "32"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("resnet50", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variables_of(model, side=32):
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, side, side, 3)), train=False), jax.random.key(0))


def test_it_is_resnet50(example):
    variables = variables_of(example.ResNet(1000), 224)
    # The published count, of weights and of BatchNorm's means and variances.
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 25_557_032
    assert sum(x.size for x in jax.tree.leaves(variables["batch_stats"])) == 53_120
    # v1.5: the second convolution of a stage's first block has the stride.
    x = jnp.zeros((1, 8, 8, 64))
    block = example.Bottleneck(32, stride=2)
    _, found = jax.eval_shape(
        lambda key: block.apply(block.init(key, x, False), x, False, capture_intermediates=True), jax.random.key(0)
    )
    shapes = [found["intermediates"][f"Conv_{i}"]["__call__"][0].shape for i in range(4)]
    assert shapes == [(1, 8, 8, 32), (1, 4, 4, 32), (1, 4, 4, 128), (1, 4, 4, 128)]


def test_convolutions_are_in_the_compute_dtype_and_statistics_in_float32(example):
    model = example.ResNet(10, stages=(1, 1, 1), width=8)
    variables = variables_of(model)
    batch = {"image": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((4,), jnp.int32)}
    loss_fn = jax.value_and_grad(example.loss_of(model), has_aux=True)
    arguments = variables["params"], variables["batch_stats"], batch
    found = mp.explain(loss_fn, "mixed_float16")(*arguments)
    convolutions = [row for row in found.operations if row.primitive == "conv_general_dilated"]
    assert {dtype for row in convolutions for dtype in row.inputs} == {"float16"}
    # The stem and four a block, each with two gradients, but that of the images.
    assert sum(row.count for row in convolutions) == 3 * (1 + 3 * 4) - 1
    (loss, batch_stats), grads = jax.eval_shape(mp.autocast(loss_fn, "mixed_float16"), *arguments)
    assert {x.dtype for x in jax.tree.leaves((loss, batch_stats, grads))} == {jnp.dtype("float32")}


def test_a_skipped_step_leaves_no_trace(example):
    """From a scale at which the gradients overflow: all but the scale stays as it was, until it fits."""
    model = example.ResNet(10, stages=(1,), width=4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
    tx = example.make_optimizer(mp.DynamicLossScale(2.0**27), steps=20, rate=0.1)
    state = example.State.create(apply_fn=model.apply, tx=tx, **variables)
    step = example.make_train_step(mp.autocast(example.loss_of(model), "mixed_float16"))
    stream = example.batches(example.load_digits(16), 16, 16, seed=0)

    def kept(state):
        return bits((state.params, state.batch_stats, state.opt_state.skip_state.inner_state))

    skips = 0
    for _ in range(12):
        before = kept(state)
        state, metrics = step(state, next(stream))
        skipped = int(metrics["skips"]) > skips
        skips += skipped
        assert skipped == (kept(state) == before)
        assert float(metrics["scale"]) == 2.0 ** (27 - skips)
        assert np.isfinite(metrics["loss"])
    assert 3 <= skips < 12
    assert not skipped
    stream.close()


@pytest.mark.slow
def test_digits_are_learnt(example, capsys):
    found = example.main(["--dataset", "digits", "--policy", "mixed_float16", "--steps", "70", "--batch", "64"])
    printed = capsys.readouterr().out
    assert str(mp.get_policy("mixed_float16")) in printed
    assert "1,437 images of scikit-learn's digits" in printed
    assert f"{found['accuracy']:.1%} of 360 held-out images right" in printed
    assert f"{found['skips']} steps skipped" in printed
    assert len(found["losses"]) == 70
    assert np.mean(found["losses"][-10:]) < 0.7 * found["losses"][0]
    assert found["accuracy"] > 0.7
    assert found["skips"] == 0


@pytest.mark.slow
def test_a_seed_is_a_run(example):
    """With parameters in bfloat16."""
    runs = [example.train(example.parse([*SMALL, "--policy", "bfloat16", "--steps", "3"])) for _ in range(2)]
    assert runs[0] == runs[1]
    assert np.isfinite(runs[0]["losses"]).all()


@pytest.mark.slow
def test_without_data_it_makes_a_set(example, tmp_path, capsys, monkeypatch):
    """The whole ResNet-50, on images that are made once."""
    flags = ["--size", "32", "--batch", "4", "--steps", "2", "--policy", "mixed_bfloat16", "--out", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setattr(example, "SYNTHETIC_IMAGES", 16)
    found = example.main(flags)
    assert np.isfinite(found["losses"]).all()
    assert "23,528,522 weights, 16 images of a synthetic set" in capsys.readouterr().out


def test_the_synthetic_set_is_made_once(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "SYNTHETIC_IMAGES", 40)
    data = example.load_synthetic(16, tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    again = example.load_synthetic(16, tmp_path)
    assert path.stat().st_mtime_ns == written
    assert isinstance(again.train.images, np.memmap)
    assert (len(data.train), len(data.test), data.classes) == (40, 10, 10)
    for i in range(10):
        np.testing.assert_array_equal(data.test[i][0], again.test[i][0])
        # Of one class are images that are alike.
        near, far = (np.abs(np.int32(data.train[i][0]) - data.train[j][0]).mean() for j in (i + 10, i + 11))
        assert data.train[i][1] == data.train[i + 10][1] == i
        assert near < far


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes, in one colour each, as JPEG and PNG, in grey and with an alpha channel too."""
    from PIL import Image

    for name, colour in (("cat", (200, 40, 90)), ("dog", (20, 120, 230))):
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40 + i, 30), colour).save(tmp_path / name / f"{i}.jpg")
        Image.new("L", (20, 50), 77).save(tmp_path / name / "more" / "grey.PNG")
        Image.new("RGBA", (33, 33), (*colour, 128)).save(tmp_path / name / "see_through.png")
        (tmp_path / name / "readme.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_read(example, folder):
    data = example.load(example.parse(["--data", str(folder)]))
    assert (data.classes, len(data.train), len(data.test)) == (2, 11, 1)
    pairs = [*data.train, *data.test]
    assert sorted(label for _, label in pairs) == [0] * 6 + [1] * 6
    for image, label in pairs:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        grey = image.shape[:2] == (50, 20)
        expected = (77, 77, 77) if grey else ((200, 40, 90), (20, 120, 230))[label]
        assert np.abs(np.int32(image) - expected).max() <= 3
    stream = example.batches(data, 8, 24, seed=0)
    batch = next(stream)
    stream.close()
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 24, 24, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)
    (held_out,) = example.held_out_batches(data, 4, 24)
    assert held_out["label"].tolist() == [data.test[0][1], -1, -1, -1]


def test_train_and_val_of_a_folder(example, folder):
    for name in ("train", "val"):
        (folder / name).mkdir()
    (folder / "cat").rename(folder / "train" / "cat")
    (folder / "dog").rename(folder / "train" / "dog")
    (folder / "val" / "dog").mkdir()
    (folder / "train" / "dog" / "0.jpg").rename(folder / "val" / "dog" / "0.jpg")
    data = example.load_folder(folder)
    assert (data.classes, len(data.train), len(data.test), data.test[0][1]) == (2, 11, 1, 1)


def test_data_that_is_none_is_refused(example, folder, capsys):
    with pytest.raises(SystemExit, match=r"--data .*nowhere is no folder\."):
        example.load_folder(folder / "nowhere")
    with pytest.raises(SystemExit, match=r"has 0 images to train on and 0 held out\. Expected: a subfolder a class"):
        example.load_folder(folder / "cat" / "more")
    (folder / "cat" / "0.jpg").write_bytes(b"no image")
    stream = example.batches(example.load_folder(folder), 12, 24, seed=0)
    with pytest.raises(SystemExit, match=r"cat/0\.jpg could not be read as an image: cannot identify"):
        list(stream)
    with pytest.raises(SystemExit, match="2"):
        example.parse(["--dataset", "digits", "--data", str(folder)])
    assert "--data is for --dataset imagenet, not digits" in capsys.readouterr().err


def test_tfds_when_it_is_there(example, tmp_path, capsys, monkeypatch):
    asked = []

    def data_source(name, *, split, download):
        asked.append((name, split, download))
        return [{"image": np.full((5, 4, 3), i, np.uint8), "label": np.int64(i)} for i in range(3)]

    fake = types.ModuleType("tensorflow_datasets")
    fake.__spec__ = importlib.util.spec_from_loader("tensorflow_datasets", None)
    fake.data_source = data_source
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    data = example.load(example.parse([]))
    assert asked == [("imagenet2012", "train", False), ("imagenet2012", "validation", False)]
    assert (data.classes, len(data.train), data.test[2][1], data.test[2][0].max()) == (1000, 3, 2, 2)

    def nothing(name, **options):
        raise AssertionError("not prepared")

    fake.data_source = nothing
    monkeypatch.setattr(example, "SYNTHETIC_IMAGES", 8)
    data = example.load(example.parse(["--size", "16", "--out", str(tmp_path)]))
    assert "synthetic" in data.name
    assert "TFDS has no imagenet2012 that is prepared as array_record: not prepared" in capsys.readouterr().err


def test_an_epoch_has_every_image_once_and_a_seed_its_own_order(example):
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1) * np.ones((8, 8, 3), np.uint8)
    source = example.Arrays(images, np.arange(10))
    data = example.Data("", source, source, 10, example.shift, lambda image, side: image)

    def labels(seed):
        stream = example.batches(data, 4, 8, seed)
        found = [next(stream) for _ in range(5)]
        stream.close()
        for batch in found:
            assert (batch["image"].max((1, 2, 3)) == batch["label"]).all()
        return np.concatenate([batch["label"] for batch in found]).tolist()

    first = labels(0)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first[:10] != first[10:]
    assert labels(0) == first != labels(1)


def test_crops_stay_inside(example):
    random = np.random.default_rng(0)
    image = np.zeros((30, 50, 3), np.uint8)
    image[:, :, 0] = np.linspace(50, 250, 50)
    image[:, :, 1] = 200
    slopes = set()
    for _ in range(50):
        crop = example.random_crop(image, 16, random)
        assert crop.shape == (16, 16, 3)
        assert (crop[:, :, 1] == 200).all()
        slopes.add(int(np.sign(int(crop[8, 15, 0]) - int(crop[8, 0, 0]))))
    assert {-1, 1} <= slopes  # mirrored, and not
    middle = example.centre_crop(image, 16)
    assert middle[:, :, 0].min() > image[0, 10, 0]
    assert middle[:, :, 0].max() < image[0, 39, 0]


def test_the_last_batch_counts_no_image_twice(example):
    model = example.ResNet(10, stages=(1,), width=4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
    data = example.load_digits(16)
    data = data._replace(test=[data.test[i] for i in range(7)])
    scores_fn = jax.jit(example.scores_of(model))
    arguments = variables["params"], variables["batch_stats"]
    whole = [scores_fn(*arguments, batch) for batch in example.held_out_batches(data, 7, 16)]
    parts = [scores_fn(*arguments, batch) for batch in example.held_out_batches(data, 4, 16)]
    assert (len(whole), len(parts)) == (1, 2)
    np.testing.assert_allclose(np.sum(parts, axis=0), whole[0], rtol=1e-5)
