"""Models in equinox, haiku and plain JAX."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from zoo_case import LENGTH, ROWS, VOCABULARY, WIDTH, Case, cross_entropy, images, integers, jit, normal, tokens

KEY = jax.random.key(0)


def partitioned(make, loss):
    # Compiled: one by one, its small programs take longer.
    model = eqx.filter_jit(make)(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return (lambda params, batch: loss(eqx.combine(params, static), batch)), params


class PostLNBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=a)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, activation=jax.nn.gelu, key=b)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]

    def __call__(self, x):
        x = jax.vmap(self.norms[0])(x + self.attention(x, x, x, mask=jnp.tri(len(x), dtype=bool)))
        return jax.vmap(self.norms[1])(x + jax.vmap(self.mlp)(x))


class PostLNTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    block: PostLNBlock
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=a)
        self.block = PostLNBlock(b)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=c)

    def __call__(self, tokens):
        return jax.vmap(self.head)(self.block(jax.vmap(self.embed)(tokens)))


def post_ln_transformer():
    loss = lambda model, batch: cross_entropy(jax.vmap(model)(batch["x"]), batch["y"])
    return *partitioned(PostLNTransformer, loss), tokens()


def wgan_gradient_penalty():
    """The critic's loss: a gradient with respect to the input is part of it."""
    batch = {"real": normal(0, ROWS, 12), "fake": 0.5 * normal(1, ROWS, 12) + 1, "mix": abs(normal(2, ROWS, 1)) / 3}

    def loss(critic, batch):
        score = lambda x: critic(x)[0]
        mixed = batch["mix"] * batch["real"] + (1 - batch["mix"]) * batch["fake"]
        norms = jnp.sqrt(jnp.sum(jax.vmap(jax.grad(score))(mixed) ** 2, axis=-1) + 1e-12)
        wasserstein = jnp.mean(jax.vmap(score)(batch["fake"]) - jax.vmap(score)(batch["real"]))
        return wasserstein + 10 * jnp.mean((norms - 1) ** 2)

    return *partitioned(lambda key: eqx.nn.MLP(12, 1, 32, 2, activation=jax.nn.silu, key=key), loss), batch


def energy_and_forces():
    """An interatomic potential: forces are minus the gradient of the energy, and are fitted too."""
    batch = {"x": 1.5 * normal(0, ROWS, 5, 3), "energy": normal(1, ROWS), "forces": normal(2, ROWS, 5, 3)}

    def loss(model, batch):
        def energy(x):
            apart = x[:, None] - x[None] + 10.0 * jnp.eye(5)[..., None]
            distances = jnp.sqrt(jnp.sum(apart**2, axis=-1))
            features = jnp.exp(-((distances[..., None] - jnp.linspace(0.0, 4.0, WIDTH)) ** 2))
            return jnp.sum(jax.vmap(model)(features.sum(1)))

        energies, gradients = jax.vmap(jax.value_and_grad(energy))(batch["x"])
        return jnp.mean((energies - batch["energy"]) ** 2) + jnp.mean((gradients + batch["forces"]) ** 2)

    return *partitioned(lambda key: eqx.nn.MLP(WIDTH, 1, 32, 2, activation=jax.nn.silu, key=key), loss), batch


def hk_lstm():
    def forward(tokens):
        core = hk.LSTM(WIDTH)
        x = hk.Embed(VOCABULARY, WIDTH)(tokens)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(len(tokens)), time_major=False)
        return hk.BatchApply(hk.Linear(VOCABULARY))(out)

    model, batch = hk.without_apply_rng(hk.transform(forward)), tokens()
    loss_fn = lambda params, batch: cross_entropy(model.apply(params, batch["x"]), batch["y"])
    return loss_fn, jit(model.init)(KEY, batch["x"]), batch


def contrastive():
    """Images and captions: embeddings of length one, a learned temperature, a loss over all pairs."""

    def forward(image, text):
        pixels = hk.nets.MLP([32, WIDTH])(hk.Flatten()(image))
        words = hk.Linear(WIDTH)(jax.nn.relu(hk.Embed(VOCABULARY, WIDTH)(text)).mean(1))
        pixels, words = (e / jnp.linalg.norm(e, axis=-1, keepdims=True) for e in (pixels, words))
        temperature = hk.get_parameter("temperature", (), init=hk.initializers.Constant(2.0))
        return jnp.exp(temperature) * pixels @ words.T

    def loss_fn(params, batch):
        logits = model.apply(params, batch["x"], batch["text"])
        labels = jnp.arange(len(logits))
        return 0.5 * (cross_entropy(logits, labels) + cross_entropy(logits.T, labels))

    model = hk.without_apply_rng(hk.transform(forward))
    batch = {"x": normal(0, ROWS, 8, 8, 3), "text": integers(1, VOCABULARY, ROWS, LENGTH)}
    return loss_fn, jit(model.init)(KEY, batch["x"], batch["text"]), batch


def hk_conv_batch_norm():
    def forward(x):
        for channels in (8, 16):
            x = hk.Conv2D(channels, 3, stride=2, with_bias=False)(x)
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training=True))
        x = hk.dropout(hk.next_rng_key(), 0.1, x.mean((1, 2)))
        return hk.Linear(10)(x)

    model, batch = hk.transform_with_state(forward), images()
    params, state = jit(model.init)(KEY, batch["x"])

    def loss_fn(params, batch):
        logits, new_state = model.apply(params, state, KEY, batch["x"])
        return cross_entropy(logits, batch["y"]), new_state

    return loss_fn, params, batch


def weights(**shapes):
    """Scaled by the root of what is summed over."""
    return {
        name: normal(i, *shape) / (1 if len(shape) < 2 else shape[-2]) ** 0.5
        for i, (name, shape) in enumerate(shapes.items())
    }


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def mixture_of_experts():
    """Each token goes through its two best experts; tokens are sorted by expert, so that one ragged dot serves all."""
    experts, chosen = 4, 2
    params = weights(
        embed=(VOCABULARY, WIDTH),
        router=(WIDTH, experts),
        up=(experts, WIDTH, 32),
        down=(experts, 32, WIDTH),
        head=(WIDTH, VOCABULARY),
    )

    def loss_fn(params, batch):
        x = params["embed"][batch["x"].reshape(-1)]
        shares = jax.nn.softmax(x @ params["router"])
        gates, assigned = jax.lax.top_k(shares, chosen)
        assigned = assigned.reshape(-1)
        order = jnp.argsort(assigned)
        sizes = jnp.bincount(assigned, length=experts).astype(jnp.int32)
        h = jax.nn.gelu(jax.lax.ragged_dot(x[order // chosen], params["up"], sizes))
        h = jax.lax.ragged_dot(h, params["down"], sizes) * gates.reshape(-1)[order][:, None]
        x = x + jnp.zeros_like(x).at[order // chosen].add(h)
        balance = experts * jnp.sum(shares.mean(0) * sizes / len(assigned))
        return cross_entropy(x @ params["head"], batch["y"].reshape(-1)) + 0.01 * balance, {
            "balance": balance,
            "sizes": sizes,
        }

    return loss_fn, params, tokens()


def state_space_model():
    """A selective, diagonal linear recurrence, evaluated by an associative scan."""
    params = weights(
        embed=(VOCABULARY, WIDTH),
        step=(WIDTH, WIDTH),
        decay=(WIDTH, 4),
        read=(WIDTH, 4),
        write=(WIDTH, 4),
        head=(WIDTH, VOCABULARY),
    )

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def loss_fn(params, batch):
        x = params["embed"][batch["x"]]
        step = jax.nn.softplus(x @ params["step"])[..., None]
        decay = jnp.exp(-step * jnp.exp(params["decay"]))
        written = step * x[..., None] * (x @ params["write"])[:, :, None]
        _, states = jax.lax.associative_scan(combine, (decay, written), axis=1)
        y = jnp.einsum("btdn,btn->btd", states, x @ params["read"])
        return cross_entropy((x + y) @ params["head"], batch["y"])

    return loss_fn, params, tokens()


def graph_network():
    """Two rounds of messages along edges, summed at their receivers."""
    params = weights(nodes=(4, WIDTH), message=(2 * WIDTH, WIDTH), update=(2 * WIDTH, WIDTH), head=(WIDTH, 1))
    batch = {
        "nodes": normal(0, ROWS, 6, 4),
        "from": integers(1, 6, ROWS, 14),
        "to": integers(2, 6, ROWS, 14),
        "y": normal(3, ROWS, 1),
    }

    def forward(params, graph):
        x = jnp.tanh(graph["nodes"] @ params["nodes"])
        for _ in range(2):
            ends = jnp.concatenate([x[graph["from"]], x[graph["to"]]], axis=-1)
            received = jax.ops.segment_sum(jax.nn.relu(ends @ params["message"]), graph["to"], num_segments=len(x))
            x = x + jnp.tanh(jnp.concatenate([x, received], axis=-1) @ params["update"])
        return x.mean(0) @ params["head"]

    def loss_fn(params, batch):
        predicted = jax.vmap(forward, in_axes=(None, 0))(params, batch)
        return jnp.mean((predicted - batch["y"]) ** 2), predicted

    return loss_fn, params, batch


def attention_weights():
    return weights(
        embed=(VOCABULARY, WIDTH),
        qkv=(WIDTH, 3 * WIDTH),
        out=(WIDTH, WIDTH),
        up=(WIDTH, 4 * WIDTH),
        down=(4 * WIDTH, WIDTH),
        head=(WIDTH, VOCABULARY),
    ) | {"norm_1": jnp.ones(WIDTH), "norm_2": jnp.ones(WIDTH)}


def attention_lm(attend):
    def loss_fn(params, batch):
        x = params["embed"][batch["x"]]
        heads = (*x.shape[:2], 2, WIDTH // 2)
        q, k, v = (h.reshape(heads) for h in jnp.split(rms_norm(x, params["norm_1"]) @ params["qkv"], 3, axis=-1))
        x = x + attend(q, k, v).reshape(x.shape) @ params["out"]
        x = x + jax.nn.silu(rms_norm(x, params["norm_2"]) @ params["up"]) @ params["down"]
        return cross_entropy(x @ params["head"], batch["y"])

    return loss_fn, attention_weights(), tokens()


def rotary(x):
    """Turns each pair of features by an angle that grows with the position."""
    angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def rope_attention():
    def attend(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", rotary(q), rotary(k)) / q.shape[-1] ** 0.5
        scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, jnp.finfo(scores.dtype).min)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    return attention_lm(attend)


def dot_product_attention_lm():
    return attention_lm(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))


CASES = [
    Case(post_ln_transformer, "equinox"),
    Case(wgan_gradient_penalty, "equinox"),
    Case(energy_and_forces, "equinox"),
    Case(hk_lstm, "haiku", check_vma=False),
    Case(contrastive, "haiku", rows_meet="each row is compared with all others"),
    Case(hk_conv_batch_norm, "haiku", has_aux=True, gradient_bound=0.05, rows_meet="BatchNorm"),
    Case(
        mixture_of_experts,
        "jax",
        has_aux=True,
        rows_meet="the balance of the experts is one of the batch",
        vmap_axes=(0, 0),  # JAX cannot map a ragged_dot over its tokens alone ("NYI")
    ),
    Case(state_space_model, "jax"),
    Case(graph_network, "jax", has_aux=True, loss_bound=0.015),
    Case(rope_attention, "jax"),
    Case(dot_product_attention_lm, "jax"),
]
