"""The models that the benchmarks of autocast compile and run: ordinary Flax Linen, with a `dtype` in every module.

With `dtype=None` each is a float32 model that knows nothing of precision; with `dtype=jnp.bfloat16` it is what one
writes by hand, nothing smarter.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

MODELS = ("resnet50", "vit", "lm", "lm-scan", "lm-scan-remat", "encoder-decoder")
# At their published sizes, with transformers as loops over their layers.
PUBLISHED = ("resnet50", "bert-base", "vit-b16", "gpt2-small")


class ResNet(nn.Module):
    """ResNet v1.5 with bottlenecks, as in Flax's ImageNet example."""

    dtype: Any
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.width, (7, 7), (2, 2), padding=3)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                width, strides = self.width * 2**i, (2, 2) if i > 0 and j == 0 else (1, 1)
                y = nn.relu(norm()(conv(width, (1, 1))(x)))
                y = nn.relu(norm()(conv(width, (3, 3), strides)(y)))
                y = norm(scale_init=nn.initializers.zeros)(conv(4 * width, (1, 1))(y))
                if x.shape != y.shape:
                    x = norm()(conv(4 * width, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


class Layer(nn.Module):
    """A pre-norm transformer layer; with `memory`, it attends to that as well."""

    dtype: Any
    heads: int

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Any = None, memory: jax.Array | None = None, memory_mask: Any = None
    ) -> jax.Array:
        width = x.shape[-1]
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        attention = functools.partial(nn.MultiHeadDotProductAttention, self.heads, dtype=self.dtype)
        x = x + attention()(norm()(x), mask=mask)
        if memory is not None:
            x = x + attention()(norm()(x), memory, mask=memory_mask)
        h = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(norm()(x)))
        return x + nn.Dense(width, dtype=self.dtype)(h)


class Encoder(nn.Module):
    """One layer that sees everything, with the signature that `nn.scan` asks for."""

    dtype: Any
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        return Layer(self.dtype, self.heads)(x), None


class VisionTransformer(nn.Module):
    dtype: Any
    layers: int
    width: int
    heads: int
    patch: int
    classes: int = 1000
    scan: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        patches = (self.patch, self.patch)
        x = nn.Conv(self.width, patches, patches, padding="VALID", dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)), x], 1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = x + positions.astype(x.dtype)
        if self.scan:
            x, _ = _scanned(Encoder, self.layers)(self.dtype, self.heads)(x, None)
        for _ in range(0 if self.scan else self.layers):
            x = Layer(self.dtype, self.heads)(x)
        return nn.Dense(self.classes, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)[:, 0])


class Decoder(nn.Module):
    """One causal layer, with the signature that `nn.scan` asks for."""

    dtype: Any
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        return Layer(self.dtype, self.heads)(x, mask), None


class LanguageModel(nn.Module):
    """A decoder; `mode` is `""`, `"scan"` or `"scan-remat"`, or `"shared"`: scanned with one layer's weights."""

    dtype: Any
    mode: str
    layers: int
    width: int
    heads: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
        if not self.mode:
            for _ in range(self.layers):
                x, _ = Decoder(self.dtype, self.heads)(x)
        else:
            block = nn.remat(Decoder, prevent_cse=False) if "remat" in self.mode else Decoder
            shared = self.mode == "shared"
            layers = nn.scan(
                block,
                variable_axes={} if shared else {"params": 0},
                variable_broadcast="params" if shared else False,
                split_rngs={"params": not shared},
                length=self.layers,
            )
            x, _ = layers(self.dtype, self.heads)(x, None)
        return nn.Dense(self.vocabulary, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


class BertLayer(nn.Module):
    """A post-norm layer, with the signature that `nn.scan` asks for."""

    dtype: Any
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12, dtype=self.dtype)
        x = norm()(x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(x, mask=mask))
        h = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(x), approximate=False)
        return norm()(x + nn.Dense(x.shape[-1], dtype=self.dtype)(h)), None


class Bert(nn.Module):
    """BERT with its head for masked tokens, which reads the masked places only; token 0 is padding. No dropout."""

    dtype: Any
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int

    @nn.compact
    def __call__(self, tokens: jax.Array, places: jax.Array) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12, dtype=self.dtype)
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.dtype)
        words = embed(self.vocabulary)
        x = words(tokens) + embed(self.length)(jnp.arange(tokens.shape[1])) + embed(2)(jnp.zeros_like(tokens))
        mask = nn.make_attention_mask(tokens > 0, tokens > 0)
        x, _ = _scanned(BertLayer, self.layers)(self.dtype, self.heads)(norm()(x), mask)
        x = jnp.take_along_axis(x, places[..., None], 1)
        x = norm()(nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x), approximate=False))
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        return words.attend(x).astype(jnp.float32) + bias


def _scanned(layer: Any, layers: int) -> Any:
    """A loop over layers that have weights of their own."""
    return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=layers)


class EncoderDecoder(nn.Module):
    """Layers that read a source, and layers that read what they made of it; token 0 is padding."""

    dtype: Any
    layers: int
    width: int
    heads: int
    vocabulary: int

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        memory, mask = embed(source), nn.make_attention_mask(source > 0, source > 0)
        for _ in range(self.layers):
            memory = Layer(self.dtype, self.heads)(memory, mask)
        memory, x = norm()(memory), embed(target)
        mask = nn.combine_masks(nn.make_attention_mask(target > 0, target > 0), nn.make_causal_mask(target))
        across = nn.make_attention_mask(target > 0, source > 0)
        for _ in range(self.layers):
            x = Layer(self.dtype, self.heads)(x, mask, memory, across)
        return embed.attend(norm()(x))


class Case(NamedTuple):
    """Something to train.

    Attributes:
      loss: `loss(params, state, batch) -> (loss, new state)`.
      init: `init(key) -> (params, state)`.
      batch: `batch(key) -> batch`.
    """

    loss: Callable[..., Any]
    init: Callable[..., Any]
    batch: Callable[..., Any]

    @property
    def avals(self) -> Any:
        """The types of what `loss` takes."""
        key = jax.random.key(0)
        return (*jax.eval_shape(self.init, key), jax.eval_shape(self.batch, key))


_TINY, _DECODER, _BASE = (2, 32, 2, 64), (6, 512, 8, 256), (12, 768, 12)


def case(name: str, dtype: Any, *, tiny: bool = False, batch: int | None = None, sizes: Any = None) -> Case:
    """A model of `MODELS` or `PUBLISHED`, or `"lm-shared"`; `tiny` for a look on a CPU, `sizes` for another decoder."""
    if name == "resnet50":
        sizes = {"stages": (1, 1), "width": 8} if tiny else {}
        return _of_images(ResNet(dtype, **sizes), batch or (2 if tiny else 64), 32 if tiny else 224)
    if name == "vit":
        sizes = (2, 32, 2, 8) if tiny else (12, 384, 6, 16)
        return _of_images(VisionTransformer(dtype, *sizes), batch or (2 if tiny else 64), 32 if tiny else 224)
    if name == "vit-b16":
        model = VisionTransformer(dtype, *((2, 32, 2, 8) if tiny else (*_BASE, 16)), scan=True)
        return _of_images(model, batch or (2 if tiny else 64), 32 if tiny else 224)
    if name == "bert-base":
        model = Bert(dtype, *((*_TINY, 16) if tiny else (*_BASE, 30522, 512)))
        return _of_masked_tokens(model, batch or (2 if tiny else 64), 16 if tiny else 128)
    if name == "gpt2-small":
        model = LanguageModel(dtype, "scan", *(_TINY if tiny else (*_BASE, 50257)))
        return _of_tokens(model, batch or (2 if tiny else 8), 16 if tiny else 512, sides=1)
    if name == "encoder-decoder":
        model = EncoderDecoder(dtype, *((2, 32, 2, 64) if tiny else (6, 512, 8, 8192)))
        return _of_tokens(model, batch or (2 if tiny else 32), 16 if tiny else 256, sides=2)
    sizes = sizes or dict(zip(("layers", "width", "heads", "vocabulary"), _TINY if tiny else _DECODER, strict=True))
    model = LanguageModel(dtype, name[3:], **sizes)
    return _of_tokens(model, batch or (2 if tiny else 32), 16 if tiny else 512, sides=1)


def _of_images(model: Any, batch: int, side: int) -> Case:
    def make(key: jax.Array) -> Any:
        images = jax.random.normal(key, (batch, side, side, 3))
        return {"images": images, "labels": jax.random.randint(key, (batch,), 0, model.classes)}

    def loss(params: Any, state: Any, batch: Any) -> Any:
        logits, state = model.apply({"params": params, **state}, batch["images"], mutable=["batch_stats"])
        return _cross_entropy(logits, batch["labels"]), state

    return Case(loss, lambda key: _init(model, key, jnp.zeros((1, side, side, 3))), make)


def _of_tokens(model: Any, batch: int, length: int, sides: int) -> Case:
    def make(key: jax.Array) -> Any:
        return [jax.random.randint(key, (batch, length), 0, model.vocabulary) for _ in range(sides)]

    def loss(params: Any, state: Any, batch: Any) -> Any:
        logits = model.apply({"params": params}, *batch)
        return _cross_entropy(logits, jnp.roll(batch[-1], -1, 1)), state

    return Case(loss, lambda key: _init(model, key, *[jnp.zeros((1, length), jnp.int32)] * sides), make)


def _of_masked_tokens(model: Any, batch: int, length: int) -> Case:
    masked = length * 20 // 128  # as BERT was trained: 20 of 128

    def make(key: jax.Array) -> Any:
        tokens = jax.random.randint(key, (batch, length), 1, model.vocabulary)
        places = jax.random.randint(key, (batch, masked), 0, length)
        labels = jax.random.randint(key, (batch, masked), 1, model.vocabulary)
        return {"tokens": tokens, "places": places, "labels": labels}

    def loss(params: Any, state: Any, batch: Any) -> Any:
        logits = model.apply({"params": params}, batch["tokens"], batch["places"])
        return _cross_entropy(logits, batch["labels"]), state

    zeros = jnp.zeros((1, length), jnp.int32)
    return Case(loss, lambda key: _init(model, key, zeros, zeros[:, :masked]), make)


def _init(model: Any, key: jax.Array, *inputs: Any) -> Any:
    state = dict(model.init(key, *inputs))
    return state.pop("params"), state


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logits, labels[..., None], -1))
