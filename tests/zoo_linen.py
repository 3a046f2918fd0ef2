"""Models in Flax Linen, as people write them."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from zoo_case import LENGTH, ROWS, VOCABULARY, WIDTH, Case, cross_entropy, images, integers, jit, normal, tokens

KEY = jax.random.key(0)
WIDE_CARRY = "the carry starts in float32 and makes the recurrent dots float32"
ONE_KEY = "one dropout key draws the masks of all rows"


def init(model, *args, **kwargs):
    return jit(lambda key: model.init(key, *args, **kwargs))(KEY)


class ResNetBlock(nn.Module):
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        h = nn.relu(norm()(nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)))
        h = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(h))
        if h.shape != x.shape:
            x = norm()(nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = ResNetBlock(8)(x, train)
        x = ResNetBlock(16, 2)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


def resnet():
    model, batch = ResNet(), images()
    variables = init(model, batch["x"])

    def loss_fn(params, batch):
        logits, updates = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]}, batch["x"], mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch["y"]), updates

    return loss_fn, variables["params"], batch


class MLPBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(x)))


class Block(nn.Module):
    """A pre-LN block."""

    causal: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        h = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(h)
        return x + nn.Dropout(self.dropout, deterministic=not train)(MLPBlock()(nn.LayerNorm()(x)))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(WIDTH, (4, 4), (4, 4), padding="VALID")(x)
        x = x.reshape(len(x), -1, WIDTH)
        cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        x = Block(causal=False, dropout=0.1)(x, train)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


def vit():
    model, batch = ViT(), images()

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["x"], train=True, rngs={"dropout": KEY})
        return cross_entropy(logits, batch["y"])

    return loss_fn, init(model, batch["x"])["params"], batch


class Stack(nn.Module):
    """A `nn.scan` carries the residual stream and returns nothing else."""

    @nn.compact
    def __call__(self, x, _):
        return Block()(x), None


class LanguageModel(nn.Module):
    layers: str = "unrolled"
    depth: int = 1
    tied: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(tokens) + nn.Embed(LENGTH, WIDTH)(jnp.arange(tokens.shape[1]))
        if self.layers == "scan":
            layers = nn.scan(Stack, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, _ = layers()(x, None)
        else:
            block = nn.remat(Block, static_argnums=(2,)) if self.layers == "remat" else Block
            for _ in range(self.depth):
                x = block(dropout=self.dropout)(x, train)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(VOCABULARY)(x)


def language_model(**options):
    model, batch = LanguageModel(**options), tokens()

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["x"], train=True, rngs={"dropout": KEY})
        return cross_entropy(logits, batch["y"]), {"accuracy": jnp.mean(logits.argmax(-1) == batch["y"])}

    return loss_fn, init(model, batch["x"])["params"], batch


def pre_ln_lm():
    return language_model(depth=2, dropout=0.1)


def scan_over_layers_lm():
    return language_model(layers="scan", depth=2)


def remat_lm():
    return language_model(layers="remat")


def tied_embeddings_lm():
    return language_model(tied=True)


class EncoderDecoder(nn.Module):
    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(VOCABULARY, WIDTH)
        positions = nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))
        memory = Block(causal=False)(embed(source) + positions)
        x = Block()(embed(target) + positions)
        # Token 0 is padding.
        mask = nn.make_attention_mask(target >= 0, source > 0)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), nn.LayerNorm()(memory), mask=mask)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x + MLPBlock()(nn.LayerNorm()(x))))


def encoder_decoder():
    model = EncoderDecoder()
    batch = {**tokens(), "source": integers(1, VOCABULARY, ROWS, LENGTH)}

    def loss_fn(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["source"], batch["x"]), batch["y"])

    return loss_fn, init(model, batch["source"], batch["x"])["params"], batch


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, decode=True)(nn.LayerNorm()(x))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x + MLPBlock()(nn.LayerNorm()(x))))


def kv_cache_decoding():
    """One token at a time; the cache is the state that a scan carries."""
    model, batch = Decoder(), tokens()

    def loss_fn(params, batch):
        shapes = jax.eval_shape(model.init, KEY, batch["x"])["cache"]
        cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def step(cache, column):
            logits, updates = model.apply({"params": params, "cache": cache}, column[:, None], mutable=["cache"])
            return updates["cache"], logits[:, 0]

        cache, logits = jax.lax.scan(step, cache, batch["x"].T)
        return cross_entropy(logits, batch["y"].T), cache

    return loss_fn, init(model, batch["x"])["params"], batch


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.RNN(nn.OptimizedLSTMCell(WIDTH))(nn.Embed(VOCABULARY, WIDTH)(tokens))
        return nn.Dense(VOCABULARY)(x)


def lstm():
    model, batch = LSTM(), tokens()

    def loss_fn(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["x"]), batch["y"])

    return loss_fn, init(model, batch["x"])["params"], batch


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = lambda x, features, strides=1: nn.swish(
            nn.GroupNorm(num_groups=4)(nn.Conv(features, (3, 3), strides)(x))
        )
        fine = layer(x, 8)
        coarse = layer(layer(fine, 16, 2), 16)
        up = nn.ConvTranspose(8, (2, 2), (2, 2))(coarse)
        return nn.Conv(2, (1, 1))(layer(jnp.concatenate([fine, up], axis=-1), 8))


def unet():
    model = UNet()
    batch = {"x": normal(0, ROWS, 8, 8, 3), "y": integers(0, 2, ROWS, 8, 8)}

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["x"])
        return cross_entropy(logits, batch["y"]), {"probabilities": nn.softmax(logits)}

    return loss_fn, init(model, batch["x"])["params"], batch


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(WIDTH, (2, 2), (2, 2), padding="VALID")(x))
        h = nn.LayerNorm()(nn.Conv(WIDTH, (3, 3), feature_group_count=WIDTH)(x))
        x = x + self.param("scale", nn.initializers.constant(0.1), (WIDTH,)) * MLPBlock()(h)
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


def convnext():
    model, batch = ConvNeXt(), images()

    def loss_fn(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["x"]), batch["y"])

    return loss_fn, init(model, batch["x"])["params"], batch


CASES = [
    Case(resnet, "linen", has_aux=True, gradient_bound=0.16, rows_meet="BatchNorm"),
    Case(vit, "linen", rows_meet=ONE_KEY),
    Case(pre_ln_lm, "linen", has_aux=True, rows_meet=ONE_KEY),
    Case(scan_over_layers_lm, "linen", has_aux=True),
    Case(remat_lm, "linen", has_aux=True),
    Case(tied_embeddings_lm, "linen", has_aux=True),
    Case(encoder_decoder, "linen"),
    Case(
        kv_cache_decoding,
        "linen",
        has_aux=True,
        check_vma=False,
        not_by_hand="the cache is float32 whatever the parameters are",
    ),
    Case(lstm, "linen", check_vma=False, not_by_hand=WIDE_CARRY),
    Case(unet, "linen", has_aux=True),
    Case(convnext, "linen"),
]
