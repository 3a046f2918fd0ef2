"""A Vision Transformer in mixed precision, in Flax NNX.

    pip install "mpjax[examples]"
    python examples/vit.py --preset tiny                            # a few minutes of scikit-learn's handwritten digits
    python examples/vit.py --steps 100 --batch 64                   # ViT-B/16 at 224 px, on a synthetic set on disk
    python examples/vit.py --data /data/flowers --layers 6          # a folder with your images.npy and labels.npy
    python examples/vit.py --preset tiny --policy mixed_float16 --loss-scale none

The model is that of Dosovitskiy et al., https://arxiv.org/abs/2010.11929: plain float32 code with dropout. What mpjax
adds is numbered from 1 to 5. `mp.nnx` is for functions that take modules: what they change in them, here the counts of
random numbers, comes back as under NNX's own transforms. The tiny preset with its defaults, under mixed_bfloat16, has
96% of the held-out digits right.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import mpjax as mp

SMOOTHING = 0.1
SYNTHETIC_IMAGES, SYNTHETIC_CLASSES = 512, 10
HELD_OUT_IMAGES = 360  # of the digits
REPORT_EVERY = 10

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the model and its images are, how it starts and is trained.

    Attributes:
      layers: how many.
      width: of the residual stream.
      heads: of attention.
      patch: the side of a patch.
      side: the side of an image.
      positions: the deviation of the embeddings of places at the start.
      dropout: the share of the stream that is left out.
      rate: the largest learning rate.
    """

    layers: int
    width: int
    heads: int
    patch: int
    side: int
    positions: float
    dropout: float
    rate: float


PRESETS = {
    "b16": Size(12, 768, 12, patch=16, side=224, positions=0.02, dropout=0.1, rate=3e-4),
    # With few steps to learn where a patch was, that is to be seen from the start.
    "tiny": Size(2, 64, 4, patch=8, side=32, positions=0.5, dropout=0.05, rate=5e-3),
}


# The model: nothing in it knows about precision ----------------------------------------------------------------------


class Layer(nnx.Module):
    """Attention and a perceptron, each on the normalised residual stream."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        width = size.width
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(size.heads, width, decode=False, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(size.dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the stream, of shape (batch, places, width), to the next one."""
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm_mlp(x)))))


class VisionTransformer(nnx.Module):
    """Cuts images into patches, and reads the class off a token that is put before them."""

    def __init__(self, size: Size, classes: int, *, rngs: nnx.Rngs):
        patch, places = (size.patch, size.patch), (size.side // size.patch) ** 2 + 1
        self.patches = nnx.Conv(3, size.width, patch, patch, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, size.width)))
        positions = nnx.initializers.normal(size.positions)(rngs.params(), (1, places, size.width))
        self.positions = nnx.Param(positions)
        self.dropout = nnx.Dropout(size.dropout, rngs=rngs)
        self.layers = nnx.List([Layer(size, rngs=rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps uint8 images of shape (batch, side, side, 3) to logits of shape (batch, classes)."""
        x = self.patches(images.astype(jnp.float32) / 127.5 - 1.0)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1]))
        x = self.dropout(jnp.concatenate([token, x], axis=1) + self.positions[...])
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


def loss_fn(model: VisionTransformer, batch: dict[str, jax.Array]) -> jax.Array:
    """The smoothed cross entropy."""
    logits = model(batch["image"])
    wanted = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), SMOOTHING)
    return optax.softmax_cross_entropy(logits, wanted).mean()


def scores_fn(model: VisionTransformer, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Sums over a batch: of the cross entropy, and of right answers. Images with the label -1 do not count."""
    logits, label = model(batch["image"]), batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
    return jnp.where(label < 0, 0.0, losses).sum(), (logits.argmax(-1) == label).sum()


# The step ------------------------------------------------------------------------------------------------------------


def decays(params: Any) -> Any:
    """Which parameters are pulled towards 0: kernels; neither biases nor norms, nor positions and the class token."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def make_optimizer(scale: mp.LossScale, steps: int, rate: float) -> optax.GradientTransformationExtraArgs:
    """Clipping and AdamW with a warm-up and a cosine, inside the wrapper that owns the loss scale."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=steps // 10, decay_steps=steps)
    adamw = optax.adamw(schedule, weight_decay=0.05, mask=decays)
    # 1. Outermost: unscales, and skips a step whose gradients overflowed; nothing inside ever notices.
    return mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), adamw), scale)


def make_train_step(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The jitted step, which changes the model and the optimizer."""

    @nnx.jit
    def train_step(model: nnx.Module, optimizer: nnx.Optimizer[Any], batch: dict[str, jax.Array]) -> Any:
        # 2. Like nnx.value_and_grad: the loss is the true one, the gradients are those of the loss times the scale. Of
        #    a step that will be skipped nothing stays in the model but the counts of random numbers.
        loss, grads = mp.nnx.value_and_grad(loss_fn, mp.get_loss_scale(optimizer.opt_state))(model, batch)
        optimizer.update(model, grads)
        state = nnx.as_pure(optimizer.opt_state)
        return {"loss": loss, "scale": mp.get_loss_scale(state).loss_scale, "skips": state.skip_state.skips_total}

    return train_step


# The images ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Images, which may be on disk.

    Attributes:
      name: for the first line that is printed.
      images: of shape (count, side, side, 3), uint8.
      labels: of shape (count,), from 0 on.
      held_out: how many of the last images are not trained on.
      mirror: whether a mirrored image is as good as the image.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    held_out: int
    mirror: bool


def load_digits(side: int) -> Data:
    """The 1,797 images of 8 x 8 pixels that come with scikit-learn, scaled up."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = jnp.array(255 / 16 * digits.images[order], jnp.float32)
    large = np.asarray(jax.image.resize(small, (len(order), side, side), "linear")).round().astype(np.uint8)
    images = np.repeat(large[..., None], 3, axis=-1)
    return Data("scikit-learn's digits", images, digits.target[order], HELD_OUT_IMAGES, mirror=False)


def load_folder(folder: Path, side: int) -> Data:
    """Arrays from `images.npy`, which stays on disk, and `labels.npy`; the last tenth is held out."""
    paths = [folder / "images.npy", folder / "labels.npy"]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"{path} is missing: the folder needs images.npy and labels.npy, as np.save writes them.")
    images, labels = (np.load(path, mmap_mode="r") for path in paths)
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
        raise SystemExit(
            f"{paths[0]} is {images.dtype}{images.shape}. Expected: uint8, of shape (count, {side}, {side}, 3); "
            "--size sets the sides."
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or len(labels) < 10 or labels.min() < 0:
        raise SystemExit(
            f"{paths[1]} is {labels.dtype}{labels.shape}. Expected: an integer from 0 on for each of the {len(images)} "
            "images, of which there are ten or more."
        )
    return Data(str(folder), images, np.asarray(labels), len(labels) // 10, mirror=True)


def load_synthetic(side: int, out: Path) -> Data:
    """Noise over a pattern of colours for each class, made once: what ImageNet's images cost, without the images."""
    folder = out / f"synthetic-{SYNTHETIC_IMAGES}x{side}"
    if not (folder / "labels.npy").exists():  # which is written last
        folder.mkdir(parents=True, exist_ok=True)
        random, labels = np.random.default_rng(0), np.arange(SYNTHETIC_IMAGES) % SYNTHETIC_CLASSES
        patterns, places = random.integers(64, 192, (SYNTHETIC_CLASSES, 4, 4, 3)), 4 * np.arange(side) // side
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (SYNTHETIC_IMAGES, side, side, 3))
        for i, label in enumerate(labels):
            images[i] = patterns[label][places[:, None], places] + random.integers(-64, 64, (side, side, 3))
        images.flush()
        np.save(folder / "labels.npy", labels)
    return load_folder(folder, side)


def batches(data: Data, size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, each epoch in another order; images are moved by up to an eighth and may be mirrored."""
    random = np.random.default_rng(seed)
    side = data.images.shape[1]
    most = side // 8
    order = (i for _ in itertools.count() for i in random.permutation(len(data.labels) - data.held_out))
    while True:
        rows = np.array([next(order) for _ in range(size)])
        images = np.pad(data.images[rows], ((0, 0), (most, most), (most, most), (0, 0)))
        corners = random.integers(2 * most + 1, size=(size, 2))
        images = np.stack([x[i : i + side, j : j + side] for x, (i, j) in zip(images, corners, strict=True)])
        if data.mirror:
            images = np.where(random.random((size, 1, 1, 1)) < 0.5, images, images[:, :, ::-1])
        yield {"image": images, "label": data.labels[rows].astype(np.int32)}


def held_out_batches(data: Data, size: int) -> Iterator[Batch]:
    """Each held-out image once; the last batch is filled up with images whose label is -1."""
    count = len(data.labels)
    for start in range(count - data.held_out, count, size):
        rows = np.arange(start, start + size)
        labels = np.where(rows < count, data.labels[np.minimum(rows, count - 1)], -1)
        yield {"image": data.images[np.minimum(rows, count - 1)], "label": labels.astype(np.int32)}


# The run -------------------------------------------------------------------------------------------------------------


def loss_scale_of(text: str, policy: mp.Policy) -> mp.LossScale:
    """3. The policy knows: float16 needs a dynamic scale, bfloat16 and float32 none. "none" is for experiments."""
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
    size, loss_scale = size_of(args), loss_scale_of(args.loss_scale, policy)
    if args.data:
        data = load_folder(args.data, size.side)
    else:
        data = load_digits(size.side) if args.dataset == "digits" else load_synthetic(size.side, args.out)

    @nnx.jit
    def make() -> tuple[VisionTransformer, nnx.Optimizer[Any]]:
        model = VisionTransformer(size, int(data.labels.max()) + 1, rngs=nnx.Rngs(args.seed))
        # 4. Parameters in the policy's dtype: float32 for the mixed policies.
        nnx.update(model, policy.cast_to_param(nnx.state(model, nnx.Param)))
        return model, nnx.Optimizer(model, make_optimizer(loss_scale, args.steps, size.rate), wrt=nnx.Param)

    model, optimizer = make()
    # 5. The same function of the model with its matrix work in the compute dtype; losses and norms in float32.
    train_step = make_train_step(mp.nnx.autocast(loss_fn, policy))
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    images = len(data.labels) - data.held_out
    console.print(f"{policy}, {type(loss_scale).__name__}\n{weights:,} weights, {images:,} images of {data.name}")

    metrics = []
    model.train()
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task("compiling", total=args.steps)
        stream = itertools.islice(batches(data, args.batch, args.seed), args.steps)
        for step, batch in enumerate(stream, start=1):
            numbers = train_step(model, optimizer, batch)
            metrics.append(numbers)
            if step % REPORT_EVERY == 0 or step == args.steps:  # reading a number waits for the device
                shown = "loss {loss:.3f}, scale {scale:g}, {skips} skipped".format(**jax.device_get(numbers))
                progress.update(bar, completed=step, description=shown)

    model.eval()
    low_scores_fn = nnx.jit(mp.nnx.autocast(scores_fn, policy))
    scores = [jax.device_get(low_scores_fn(model, batch)) for batch in held_out_batches(data, args.batch)]
    loss, right = (float(sum(values)) / data.held_out for values in zip(*scores, strict=True))
    skips = int(metrics[-1]["skips"])
    console.print(f"{right:.1%} of {data.held_out} held-out images right, loss {loss:.3f}; {skips} steps skipped")
    losses = [float(numbers["loss"]) for numbers in jax.device_get(metrics)]
    return {"losses": losses, "held_out": loss, "accuracy": right, "skips": skips}


def size_of(args: argparse.Namespace) -> Size:
    """The preset with what the flags change in it."""
    names = ("layers", "width", "heads", "patch", "side", "dropout", "rate")
    flags: dict[str, Any] = {name: getattr(args, name) for name in names}
    return dataclasses.replace(PRESETS[args.preset], **{k: v for k, v in flags.items() if v is not None})


def positive(text: str) -> int:
    """A flag's value that counts something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="A Vision Transformer.")
    parser.add_argument("--policy", help='"mixed_bfloat16", "mixed_float16", "float32" ...; default: by hardware')
    parser.add_argument("--preset", choices=PRESETS, default="b16", help="b16 has 86 million weights")
    parser.add_argument("--layers", type=positive, help="the sizes have the preset's values by default")
    parser.add_argument("--width", type=positive)
    parser.add_argument("--heads", type=positive)
    parser.add_argument("--patch", type=positive, help="of the patches' sides")
    parser.add_argument("--size", type=positive, dest="side", help="of the images' sides")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--rate", type=float, help="the largest learning rate; default: the preset's")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=64, help="images a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", choices=("digits", "synthetic"), help="default: digits for tiny, else synthetic")
    parser.add_argument("--data", type=Path, help="a folder with images.npy and labels.npy, in the place of --dataset")
    parser.add_argument("--out", type=Path, default=Path("out/vit"), help="where the synthetic set is kept")
    parser.add_argument("--loss-scale", choices=("policy", "none"), default="policy")
    args = parser.parse_args(argv)
    if args.data and args.dataset:
        parser.error("--data and --dataset are two answers to one question")
    size = size_of(args)
    if size.side % size.patch or size.width % size.heads:
        parser.error(
            f"--size {size.side} is to be a multiple of --patch {size.patch}, and --width {size.width} of "
            f"--heads {size.heads}"
        )
    args.dataset = args.dataset or ("digits" if args.preset == "tiny" else "synthetic")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints, and returns what `train` does."""
    return train(parse(argv), Console(highlight=False))


if __name__ == "__main__":
    main()
