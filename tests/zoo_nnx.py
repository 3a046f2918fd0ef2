"""Models in Flax NNX, as pure functions over `nnx.split` and `nnx.merge`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from zoo_case import LENGTH, ROWS, VOCABULARY, WIDTH, Case, cross_entropy, images, integers, jit, normal, tokens

ONE_KEY = "one key draws the noise of all rows"


def pure(make, loss, *mutable):
    """A loss of a module as a function of its parameters; also returns the state that the call changed."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0, noise=1))))
    params, rest = jit(lambda: nnx.split(make(nnx.Rngs(0, noise=1)), nnx.Param, ...)[1:])()

    def loss_fn(params, batch):
        model = nnx.merge(graph, params, rest, copy=True)
        value = loss(model, batch)
        return (value, nnx.state(model, *mutable)) if mutable else value

    return loss_fn, params


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(12, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.outer = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(nnx.relu(self.norm(self.inner(x)))))


def mlp():
    batch = {"x": normal(0, ROWS, 12), "y": integers(0, 5, ROWS)}
    loss = lambda model, batch: cross_entropy(model(batch["x"]), batch["y"])
    return *pure(MLP, loss, nnx.BatchStat), batch


class GRU(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.rnn(self.embed(tokens)))


def gru():
    loss = lambda model, batch: cross_entropy(model(batch["x"]), batch["y"])
    return *pure(GRU, loss), tokens()


class VAE(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(64, 32, rngs=rngs)
        self.mean = nnx.Linear(32, 4, rngs=rngs)
        self.log_variance = nnx.Linear(32, 4, rngs=rngs)
        self.decoder = nnx.Sequential(nnx.Linear(4, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 64, rngs=rngs))
        self.rngs = rngs

    def __call__(self, x):
        h = nnx.relu(self.encoder(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(self.rngs.noise(), mean.shape)
        return self.decoder(z), mean, log_variance


def vae():
    batch = {"x": (normal(0, ROWS, 64) > 0).astype("float32")}

    def loss(model, batch):
        logits, mean, log_variance = model(batch["x"])
        kl = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), axis=-1)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["x"]).sum(-1) + kl)

    return *pure(VAE, loss), batch


class ActorCritic(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Sequential(nnx.Linear(6, 32, rngs=rngs), nnx.tanh, nnx.Linear(32, 32, rngs=rngs), nnx.tanh)
        self.policy = nnx.Linear(32, 4, rngs=rngs)
        self.value = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        h = self.body(x)
        return self.policy(h), self.value(h)[..., 0]


def ppo():
    batch = {
        "x": normal(0, ROWS, 6),
        "action": integers(1, 4, ROWS),
        "old_log_p": -1.4 + 0.1 * normal(2, ROWS),
        "advantage": normal(3, ROWS),
        "return": normal(4, ROWS),
    }

    def loss(model, batch):
        logits, value = model(batch["x"])
        log_p = jax.nn.log_softmax(logits)
        ratio = jnp.exp(jnp.take_along_axis(log_p, batch["action"][:, None], axis=-1)[:, 0] - batch["old_log_p"])
        advantage = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
        actor = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage).mean()
        critic = 0.5 * jnp.square(value - batch["return"]).mean()
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1).mean()
        return actor + 0.5 * critic - 0.01 * entropy

    return *pure(ActorCritic, loss), batch


class MixerBlock(nnx.Module):
    def __init__(self, tokens, rngs):
        mlp = lambda n: nnx.Sequential(nnx.Linear(n, 2 * n, rngs=rngs), nnx.gelu, nnx.Linear(2 * n, n, rngs=rngs))
        self.tokens, self.channels = mlp(tokens), mlp(WIDTH)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = x + jnp.swapaxes(self.tokens(jnp.swapaxes(self.norms[0](x), 1, 2)), 1, 2)
        return x + self.channels(self.norms[1](x))


class Mixer(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, WIDTH, (2, 2), (2, 2), padding="VALID", rngs=rngs)
        self.block = MixerBlock(16, rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), -1, WIDTH)
        return self.head(self.norm(self.block(x)).mean(1))


def mixer():
    loss = lambda model, batch: cross_entropy(model(batch["x"]), batch["y"])
    return *pure(Mixer, loss), images()


class Denoiser(nnx.Module):
    def __init__(self, rngs):
        self.time = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.inner = nnx.Conv(3, WIDTH, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(WIDTH, num_groups=4, rngs=rngs)
        self.outer = nnx.Conv(WIDTH, 3, (3, 3), rngs=rngs)

    def __call__(self, x, t):
        angles = t[:, None] * jnp.exp(-jnp.log(1e4) * jnp.arange(WIDTH // 2) / (WIDTH // 2))
        time = nnx.silu(self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)))
        return self.outer(nnx.silu(self.norm(self.inner(x)) + time[:, None, None]))


def diffusion():
    batch = {"x": normal(0, ROWS, 8, 8, 3), "noise": normal(1, ROWS, 8, 8, 3), "t": integers(2, 1000, ROWS)}
    alphas = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 1000))

    def loss(model, batch):
        alpha = alphas[batch["t"]][:, None, None, None]
        noisy = jnp.sqrt(alpha) * batch["x"] + jnp.sqrt(1 - alpha) * batch["noise"]
        return jnp.mean((model(noisy, batch["t"].astype(jnp.float32)) - batch["noise"]) ** 2)

    return *pure(Denoiser, loss), batch


class SelfAttention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        mask = nnx.make_causal_mask(jnp.ones((len(tokens), LENGTH)))
        return self.head(x + self.attention(self.norm(x), mask=mask))


def nnx_attention_lm():
    loss = lambda model, batch: cross_entropy(model(batch["x"]), batch["y"])
    return *pure(SelfAttention, loss), tokens()


CASES = [
    Case(mlp, "nnx", has_aux=True, rows_meet="BatchNorm"),
    Case(gru, "nnx", check_vma=False, not_by_hand="the carry starts in float32 and makes the recurrent dots float32"),
    Case(vae, "nnx", rows_meet=ONE_KEY),
    Case(ppo, "nnx", loss_bound=0.015, rows_meet="the advantages are normalised over the batch"),
    Case(mixer, "nnx"),
    Case(diffusion, "nnx"),
    Case(nnx_attention_lm, "nnx"),
]
