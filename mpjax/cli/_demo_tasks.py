"""What `mpjax demo` trains: the digits, two networks, four precisions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from mpjax._dynamic_loss_scale import DynamicLossScale
from mpjax._loss_scale import LossScale, NoOpLossScale

BATCH = 64
TEST_IMAGES = 360
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits, 8 x 8 pixels in [0, 1], split once and for all."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def load(cls) -> "Digits":
        """Reads the 1,797 images that come with scikit-learn and keeps 360 of them for testing."""
        digits = load_digits()
        images = (digits.images / 16).astype(np.float32)[..., None]
        labels = digits.target.astype(np.int32)
        order = np.random.default_rng(0).permutation(len(images))
        train, test = order[TEST_IMAGES:], order[:TEST_IMAGES]
        return cls(images[train], labels[train], images[test], labels[test])

    def batches(self, steps: int, seed: int) -> np.ndarray:
        """The rows of each step's batch, shape (steps, BATCH): epochs in shuffled order."""
        random = np.random.default_rng(seed)
        count = len(self.train_images)
        per_epoch = count // BATCH
        epochs = [random.permutation(count)[: per_epoch * BATCH] for _ in range(-(-steps // per_epoch))]
        return np.concatenate(epochs).reshape(-1, BATCH)[:steps]


class ConvNet(nn.Module):
    """Three convolutions with BatchNorm; nothing in it knows about precision."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images of shape (batch, 8, 8, 1) to logits of shape (batch, 10)."""
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            x = nn.Conv(channels, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class DeepMLP(nn.Module):
    """Eight narrow tanh layers without normalisation: nothing lifts a small gradient on its way back."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images of shape (batch, 8, 8, 1) to logits of shape (batch, 10)."""
        del train
        x = x.reshape(len(x), -1)
        for _ in range(8):
            x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(CLASSES)(x)


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and its training: the same in all precisions.

    Attributes:
      name: short, for the table.
      about: one sentence on the network and its loss.
      model: a Flax module, `model(images, train) -> logits`.
      loss_weight: what the mean cross entropy is multiplied by.
      learning_rate: AdamW's at the start.
    """

    name: str
    about: str
    model: nn.Module
    loss_weight: float
    learning_rate: float

    def optimizer(self, steps: int) -> Any:
        """AdamW, with an epsilon far below all gradients: float32 then learns the same under any loss weight."""
        # Decayed to 0, so that the runs end at rest and not wherever the last batches have thrown them.
        return optax.adamw(optax.cosine_decay_schedule(self.learning_rate, steps), eps=1e-14)


TASKS = (
    Task(
        name="conv net",
        about="three convolutions with BatchNorm, cross entropy as it is.",
        model=ConvNet(),
        loss_weight=1.0,
        learning_rate=2e-3,
    ),
    Task(
        name="aux MLP",
        about="eight narrow tanh layers, cross entropy with the weight 5e-6, as small as that of an auxiliary loss "
        "beside a main one. Adam divides the weight out again, so float32 does not mind; in float16 the gradients "
        "fall below 2^-24, the smallest number there is.",
        model=DeepMLP(),
        loss_weight=5e-6,
        learning_rate=1e-3,
    ),
)


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy with a loss scale.

    Attributes:
      name: short, for table and figure.
      policy: for `mpjax.get_policy`.
      loss_scale: makes the initial loss scale.
    """

    name: str
    policy: str
    loss_scale: Callable[[], LossScale]

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled."""
        return not isinstance(self.loss_scale(), NoOpLossScale)


# The default period of 2,000 clean steps is longer than the whole demo: no growth would be seen.
PRECISIONS = (
    Precision("float32", "float32", NoOpLossScale),
    Precision("bf16", "mixed_bfloat16", NoOpLossScale),
    Precision("fp16 unscaled", "mixed_float16", NoOpLossScale),
    Precision("fp16 scaled", "mixed_float16", lambda: DynamicLossScale(period=100)),
)
