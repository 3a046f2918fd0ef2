"""ResNet-50 in mixed precision: ImageNet, or a few minutes of handwritten digits.

    pip install "mpjax[examples]"
    python examples/resnet50.py --dataset digits                    # a small ResNet of the same blocks, on real data
    python examples/resnet50.py --data /data/imagenet --steps 450000 --batch 256      # a folder of class subfolders
    python examples/resnet50.py --steps 100 --batch 64              # without --data: TFDS, or a synthetic set on disk
    python examples/resnet50.py --dataset digits --policy mixed_float16 --loss-scale none

The model is ResNet-50 v1.5 (He et al., https://arxiv.org/abs/1512.03385, with the stride in the 3 x 3 convolution of a
block) in Flax Linen: plain float32 code. The recipe is that of Goyal et al., https://arxiv.org/abs/1706.02677: SGD with
Nesterov momentum, a warm-up and a cosine, label smoothing. What mpjax adds is numbered from 1 to 6.

A folder has train/ and val/, or else every tenth of its images is held out. Images are read by threads, two batches
ahead of the device. With the defaults, 97% of the held-out digits are right under every policy, mean of five seeds.
"""

import argparse
import collections
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import mpjax as mp

MEAN, DEVIATION = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # of ImageNet's red, green and blue
SMOOTHING = 0.1
WEIGHT_DECAY = 1e-4
SUFFIXES = {".jpg", ".jpeg", ".png"}
SYNTHETIC_IMAGES, SYNTHETIC_CLASSES = 512, 10
AHEAD = 2  # batches
REPORT_EVERY = 10

Image = np.ndarray  # of shape (height, width, 3), uint8
Batch = dict[str, np.ndarray]


# The model: nothing in it knows about precision ----------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Three convolutions, each with BatchNorm, added to what came in."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images of shape (batch, height, width, channels) to ones of 4 `width` channels."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), self.stride)(y)))
        # The block starts as the identity.
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, stages of blocks, and a linear layer on the mean over all places."""

    classes: int
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images of shape (batch, height, width, 3) to logits of shape (batch, classes)."""
        x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=False, kernel_init=nn.initializers.he_normal())(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Bottleneck(self.width * 2**i, stride=2 if i > 0 and j == 0 else 1)(x, train)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01))(x.mean((1, 2)))


def normalised(images: jax.Array) -> jax.Array:
    """Float32 images with a mean of 0 and a deviation of 1. uint8 is a quarter of the bytes to send to the device."""
    return (images.astype(jnp.float32) - jnp.array(MEAN)) / jnp.array(DEVIATION)


def loss_of(model: nn.Module) -> Callable[..., Any]:
    """The smoothed cross entropy as a function of parameters, and beside it the new statistics of BatchNorm."""

    def loss_fn(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, normalised(batch["image"]), train=True, mutable=["batch_stats"])
        wanted = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), SMOOTHING)
        return optax.softmax_cross_entropy(logits, wanted).mean(), updated["batch_stats"]

    return loss_fn


def scores_of(model: nn.Module) -> Callable[..., Any]:
    """Sums over a batch: of the cross entropy, and of right answers. Images with the label -1 do not count."""

    def scores_fn(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = model.apply(variables, normalised(batch["image"]), train=False)
        label = batch["label"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        return jnp.where(label < 0, 0.0, losses).sum(), (logits.argmax(-1) == label).sum()

    return scores_fn


# The step ------------------------------------------------------------------------------------------------------------


class State(TrainState):
    """Flax's train state, and BatchNorm's running statistics."""

    batch_stats: Any


def make_optimizer(scale: mp.LossScale, steps: int, rate: float) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum and weight decay of matrices and kernels, inside the wrapper that owns the loss scale."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=steps // 10, decay_steps=steps)
    decay = optax.add_decayed_weights(WEIGHT_DECAY, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    # 1. Outermost: unscales, and skips a step whose gradients overflowed: the momentum, the schedule never notice.
    return mp.loss_scaled(optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True)), scale)


def make_train_step(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The jitted step. It gives up the buffers of the old state for the new one."""

    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        # 2. Like jax.value_and_grad: the loss is the true one, the gradients are those of the loss times the scale.
        grad_fn = mp.value_and_grad(loss_fn, mp.get_loss_scale(state.opt_state), has_aux=True)
        (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, batch)
        # 3. In the place of state.apply_gradients: a skipped step leaves no trace in the statistics either. Those of a
        #    forward pass that overflowed are inf, and would be for good.
        state = mp.linen.apply_gradients(state, grads=grads, batch_stats=batch_stats)
        scale = mp.get_loss_scale(state.opt_state).loss_scale
        return state, {"loss": loss, "scale": scale, "skips": state.opt_state.skip_state.skips_total}

    return jax.jit(train_step, donate_argnums=0)


# The images ----------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What to train on, and how.

    Attributes:
      name: for the first line that is printed.
      train: a sequence of images with their labels.
      test: the same, held out.
      classes: how many there are.
      augment: `augment(image, side, random)`, a variant of the image.
      fit: `fit(image, side)`, the image itself, with the wanted sides.
    """

    name: str
    train: Sequence[tuple[Image, int]]
    test: Sequence[tuple[Image, int]]
    classes: int
    augment: Callable[[Image, int, np.random.Generator], Image]
    fit: Callable[[Image, int], Image]


def random_crop(image: Image, side: int, random: np.random.Generator) -> Image:
    """A part of 8% to 100% of the area, scaled to the wanted sides, and mirrored every other time."""
    height, width = image.shape[:2]
    area, ratio = height * width * random.uniform(0.08, 1.0), np.exp(random.uniform(-1, 1) * np.log(4 / 3))
    w, h = min(np.sqrt(area * ratio), width), min(np.sqrt(area / ratio), height)
    left, top = random.uniform(0, width - w), random.uniform(0, height - h)
    image = resized(image, side, (left, top, left + w, top + h))
    return image[:, ::-1] if random.random() < 0.5 else image


def centre_crop(image: Image, side: int) -> Image:
    """The square in the middle, of 7/8 of the shorter side, scaled to the wanted one."""
    height, width = image.shape[:2]
    s = min(height, width) * 7 / 8
    left, top = (width - s) / 2, (height - s) / 2
    return resized(image, side, (left, top, left + s, top + s))


def resized(image: Image, side: int, box: tuple[float, ...]) -> Image:
    """A box of the image, as left, top, right and bottom, scaled to a square."""
    from PIL import Image as Pillow  # here, so that the digits need no Pillow

    return np.asarray(Pillow.fromarray(image).resize((side, side), Pillow.Resampling.BILINEAR, box))


def shift(image: Image, side: int, random: np.random.Generator) -> Image:
    """The image moved by up to an eighth of its side, for images that are neither to be scaled nor mirrored."""
    most = side // 8
    y, x = random.integers(2 * most + 1, size=2)
    return np.pad(image, ((most, most), (most, most), (0, 0)))[y : y + side, x : x + side]


class Arrays(Sequence[tuple[Image, int]]):
    """Images and labels from arrays, which may be on disk."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> Any:
        return self.images[i], int(self.labels[i])


class Files(Sequence[tuple[Image, int]]):
    """Images from files, with their labels."""

    def __init__(self, files: Sequence[tuple[Path, int]]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: Any) -> Any:
        from PIL import Image as Pillow

        path, label = self.files[i]
        try:
            with Pillow.open(path) as image:
                return np.asarray(image.convert("RGB")), label
        except OSError as error:
            raise SystemExit(f"{path} could not be read as an image: {error}") from error


class TfdsSource(Sequence[tuple[Image, int]]):
    """Images from a data source of TensorFlow Datasets, which needs no TensorFlow to be read."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: Any) -> Any:
        example = self.source[i]
        return example["image"], int(example["label"])


def load_digits(side: int) -> Data:
    """The 1,797 images of 8 x 8 pixels that come with scikit-learn, scaled up; 360 of them held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = jnp.array(255 / 16 * digits.images[order], jnp.float32)
    large = np.asarray(jax.image.resize(small, (len(order), side, side), "linear")).round().astype(np.uint8)
    images, labels = np.repeat(large[..., None], 3, axis=-1), digits.target[order]
    train, test = Arrays(images[360:], labels[360:]), Arrays(images[:360], labels[:360])
    return Data("scikit-learn's digits", train, test, 10, shift, lambda image, side: image)


def files_in(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of all classes with their labels, in order of their paths."""
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]


def load_folder(folder: Path) -> Data:
    """ImageNet's layout: a folder a class, in train/ and val/, or all together."""
    if not folder.is_dir():
        raise SystemExit(f"--data {folder} is no folder.")
    split = (folder / "train").is_dir() and (folder / "val").is_dir()
    root = folder / "train" if split else folder
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    files = files_in(root, classes)
    held_out = files_in(folder / "val", classes) if split else files[9::10]
    train = files if split else [file for i, file in enumerate(files) if i % 10 != 9]
    if not train or not held_out:
        raise SystemExit(
            f"--data {folder} has {len(train)} images to train on and {len(held_out)} held out. Expected: a subfolder "
            "a class with .jpg, .jpeg or .png files, ten or more in all; or such subfolders in train/ and in val/."
        )
    return Data(str(folder), Files(train), Files(held_out), len(classes), random_crop, centre_crop)


def load_tfds() -> Data | None:
    """ImageNet from TensorFlow Datasets, if that is installed and has prepared it; nothing is downloaded."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        return None
    import tensorflow_datasets as tfds

    try:
        train, test = (
            TfdsSource(tfds.data_source("imagenet2012", split=split, download=False))
            for split in ("train", "validation")
        )
    except Exception as error:  # what it raises is not documented
        print(f"TFDS has no imagenet2012 that is prepared as array_record: {error}", file=sys.stderr)  # noqa: T201
        return None
    return Data("TFDS imagenet2012", train, test, 1000, random_crop, centre_crop)


def load_synthetic(side: int, out: Path) -> Data:
    """Noise over a pattern of colours for each class, made once and then read from disk: ImageNet's traffic."""
    path = out / f"synthetic-{SYNTHETIC_IMAGES}x{side}.npy"
    count = SYNTHETIC_IMAGES * 5 // 4
    labels = np.arange(count) % SYNTHETIC_CLASSES
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        patterns = random.integers(64, 192, (SYNTHETIC_CLASSES, 4, 4, 3))
        places = 4 * np.arange(side) // side
        part = path.with_suffix(".part")
        images = np.lib.format.open_memmap(part, "w+", np.uint8, (count, side, side, 3))
        for i, label in enumerate(labels):
            images[i] = patterns[label][places[:, None], places] + random.integers(-64, 64, (side, side, 3))
        images.flush()
        part.replace(path)
    images = np.load(path, mmap_mode="r")
    train, test = (
        Arrays(images[part], labels[part]) for part in (slice(SYNTHETIC_IMAGES), slice(SYNTHETIC_IMAGES, None))
    )
    return Data(f"a synthetic set, {path}", train, test, SYNTHETIC_CLASSES, random_crop, centre_crop)


def load(args: argparse.Namespace) -> Data:
    """The data that the flags ask for."""
    if args.dataset == "digits":
        return load_digits(args.size)
    if args.dataset == "synthetic":
        return load_synthetic(args.size, args.out)
    if args.data:
        return load_folder(args.data)
    return load_tfds() or load_synthetic(args.size, args.out)


def batches(data: Data, size: int, side: int, seed: int) -> Iterator[Batch]:
    """Batches without end, each epoch in another order, with other variants of the images; a function of the seed."""

    def one(epoch: int, i: int) -> tuple[Image, int]:
        image, label = data.train[i]
        return data.augment(image, side, np.random.default_rng([seed, epoch, i])), label

    order = (
        (epoch, int(i))
        for epoch in itertools.count()
        for i in np.random.default_rng([seed, epoch]).permutation(len(data.train))
    )
    with ThreadPoolExecutor() as threads:
        coming: collections.deque[Any] = collections.deque()
        while True:
            coming.append([threads.submit(one, *next(order)) for _ in range(size)])
            if len(coming) > AHEAD:
                yield stacked([future.result() for future in coming.popleft()])


def held_out_batches(data: Data, size: int, side: int) -> Iterator[Batch]:
    """Each held-out image once; the last batch is filled up with images whose label is -1."""
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(data.test), size):
            rows = range(start, min(start + size, len(data.test)))
            pairs = list(threads.map(lambda i: (data.fit(data.test[i][0], side), data.test[i][1]), rows))
            yield stacked(pairs + [(pairs[0][0], -1)] * (size - len(pairs)))


def stacked(pairs: Sequence[tuple[Image, int]]) -> Batch:
    """A batch of images with their labels."""
    images, labels = zip(*pairs, strict=True)
    return {"image": np.stack(images), "label": np.array(labels, np.int32)}


# The run -------------------------------------------------------------------------------------------------------------


def loss_scale_of(text: str, policy: mp.Policy) -> mp.LossScale:
    """4. The policy knows: float16 needs a dynamic scale, bfloat16 and float32 none. "none" is for experiments."""
    return mp.NoOpLossScale() if text == "none" else policy.loss_scale()


def train(args: argparse.Namespace, console: Console | None = None) -> dict[str, Any]:
    """Trains, and evaluates in the end.

    Args:
      args: what `parse` returns.
      console: where to print; nowhere, if there is none.

    Returns:
      "losses" of all steps, "held_out", the cross entropy of the held-out images, "accuracy", the share of them that is
      right, and "skips", how many steps were skipped.
    """
    console = console or Console(quiet=True)
    policy = mp.get_policy(args.policy) if args.policy else mp.default_policy()
    loss_scale = loss_scale_of(args.loss_scale, policy)
    data = load(args)
    small = {"stages": (1, 1, 1), "width": 16} if args.dataset == "digits" else {}
    model = ResNet(data.classes, **small)
    rate = args.rate or (0.1 if args.dataset == "digits" else 0.1 * args.batch / 256)

    @jax.jit
    def init(key: jax.Array) -> State:
        variables = model.init(key, jnp.zeros((1, args.size, args.size, 3)), train=False)
        # 5. Parameters in the policy's dtype: float32 for the mixed policies. The statistics stay float32 under any.
        params = policy.cast_to_param(variables["params"])
        tx = make_optimizer(loss_scale, args.steps, rate)
        return State.create(apply_fn=model.apply, params=params, tx=tx, batch_stats=variables["batch_stats"])

    state = init(jax.random.key(args.seed))
    # 6. The same function with convolutions in the compute dtype; losses, sums and BatchNorm's statistics in float32.
    train_step = make_train_step(mp.autocast(loss_of(model), policy))
    weights = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(
        f"{policy}, {type(loss_scale).__name__}\n{weights:,} weights, {len(data.train):,} images of {data.name}"
    )

    metrics = []
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task("compiling", total=args.steps)
        stream = batches(data, args.batch, args.size, args.seed)
        for step, batch in enumerate(itertools.islice(stream, args.steps), start=1):
            state, numbers = train_step(state, batch)
            metrics.append(numbers)
            if step % REPORT_EVERY == 0 or step == args.steps:  # reading a number waits for the device
                shown = "loss {loss:.3f}, scale {scale:g}, {skips} skipped".format(**jax.device_get(numbers))
                progress.update(bar, completed=step, description=shown)
        stream.close()

    scores_fn = jax.jit(mp.autocast(scores_of(model), policy))
    held_out = held_out_batches(data, args.batch, args.size)
    scores = [jax.device_get(scores_fn(state.params, state.batch_stats, batch)) for batch in held_out]
    loss, right = (float(sum(values)) / len(data.test) for values in zip(*scores, strict=True))
    skips = int(metrics[-1]["skips"])
    console.print(f"{right:.1%} of {len(data.test):,} held-out images right, loss {loss:.3f}; {skips} steps skipped")
    losses = [float(numbers["loss"]) for numbers in jax.device_get(metrics)]
    return {"losses": losses, "held_out": loss, "accuracy": right, "skips": skips}


def positive(text: str) -> int:
    """A flag's value that counts something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="ResNet-50 on ImageNet, or a small ResNet on handwritten digits.")
    parser.add_argument("--policy", help='"mixed_bfloat16", "mixed_float16", "float32" ...; default: by hardware')
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--batch", type=positive, default=64, help="images a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", choices=("imagenet", "digits", "synthetic"), default="imagenet")
    parser.add_argument("--data", type=Path, help="a folder of images; without: TFDS, if installed, or a synthetic set")
    parser.add_argument("--out", type=Path, default=Path("out/resnet50"), help="where the synthetic set is kept")
    parser.add_argument("--size", type=positive, help="of the images' sides; default: 224, of digits 32")
    parser.add_argument(
        "--rate", type=float, help="the largest learning rate; default: 0.1 for 256 images, of digits 0.1"
    )
    parser.add_argument("--loss-scale", choices=("policy", "none"), default="policy")
    args = parser.parse_args(argv)
    if args.data and args.dataset != "imagenet":
        parser.error(f"--data is for --dataset imagenet, not {args.dataset}")
    args.size = args.size or (32 if args.dataset == "digits" else 224)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints, and returns what `train` does."""
    return train(parse(argv), Console(highlight=False))


if __name__ == "__main__":
    main()
