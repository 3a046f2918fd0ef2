"""A small language model's training run: the same on one device, on meshes of them and in several processes."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

WIDTH, HEADS, LENGTH, WORDS, ROWS, STEPS = 32, 4, 8, 32, 8, 12
# One row of one step has the weight inf and one of another 1e9, whose gradients are past float16's range alone: by
# orders of magnitude, in the mean over all rows as in that over one row. All others are as far below it, so that no
# history hangs on a rounding, nor on whether a device takes the mean of its own rows or of all.
INF_STEP, LARGE_STEP, BAD_ROW = 4, 8, 5
HISTORY = {"mixed_float16": "....X...X...", "mixed_bfloat16": "....X.......", "float32": "....X......."}
# Half the distance from 1 to the next number of the compute dtype. Sums in another order differ in float32's last bits,
# by which now and then a weight or an activation is rounded to the other side: losses of two runs differ by some of it.
ROUNDING = {"mixed_float16": 2.0**-11, "mixed_bfloat16": 2.0**-8, "float32": 2.0**-24}

LAYOUTS = ("data", "fsdp", "tensor", "shard_map", "shard_map unchecked")
# Megatron's: whole heads and columns on a device, then the rows that take them.
TENSOR = {"qkv": P(None, None, "model"), "out": P("model"), "up": P(None, "model"), "down": P("model")}


def loss_scale():
    """A function, since an array starts a backend, and `jax.distributed.initialize` has to come before that."""
    return mp.DynamicLossScale(2.0**7, period=3)


def new_params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    def layer():
        return {
            "norm": np.ones(WIDTH, np.float32),
            "qkv": normal(WIDTH, 3, HEADS, WIDTH // HEADS),
            "out": normal(WIDTH, WIDTH),
            "up": normal(WIDTH, 4 * WIDTH),
            "down": normal(4 * WIDTH, WIDTH),
        }

    return {"embed": normal(WORDS, WIDTH), "layers": [layer(), layer()], "head": normal(WIDTH, WORDS)}


def batches():
    """Each word is the one before and five; each row has a weight."""
    rng = np.random.default_rng(1)
    for i in range(STEPS):
        words = (rng.integers(0, WORDS, (ROWS, 1)) + 5 * np.arange(LENGTH + 1)) % WORDS
        weights = np.ones(ROWS, np.float32)
        weights[BAD_ROW] = {INF_STEP: np.inf, LARGE_STEP: 1e9}.get(i, 1.0)
        yield {"words": words.astype(np.int32), "weights": weights}


def normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def loss_fn(params, batch):
    x = params["embed"][batch["words"][:, :-1]]
    for layer in params["layers"]:
        q, k, v = jnp.unstack(jnp.einsum("btd,dchk->cbthk", normed(x) * layer["norm"], layer["qkv"]))
        heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + heads.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(normed(x) @ layer["up"]) @ layer["down"]
    logits = normed(x) @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["words"][:, 1:])
    return jnp.mean(losses * batch["weights"][:, None])


class Run:
    """The canonical loop, over all devices of all processes.

    Args:
      policy: of autocast.
      layout: one of LAYOUTS, or None for one device.
      between: is called with a device's own gradients, before their mean over all, and returns them (shard_map only).
    """

    def __init__(self, policy, layout=None, between=lambda grads: grads):
        self.loss_fn, self.layout, self.between = mp.autocast(loss_fn, policy), layout, between
        self.explicit = bool(layout) and layout.startswith("shard_map")
        # Clipping takes effect where a weight is 1e9 alone: else it would hide gradients that are a factor too large.
        # Epsilon is no smaller than rounding errors of gradients, of which Adam would make whole steps.
        inner = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(1e-2, eps=1e-3))
        self.tx = mp.loss_scaled(inner, loss_scale(), axis_name="data" if self.explicit else None)
        model = max(jax.device_count() // 2, 2) if layout == "tensor" else 1
        shape = jax.device_count() // model, model
        self.mesh = layout and jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        step = self._step
        if self.explicit:
            step = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(P(), P(), P("data")),
                out_specs=P(),
                check_vma=layout == "shard_map",
            )
        self.shardings = self.shardings_of(jax.eval_shape(self._new))
        self.step = jax.jit(step, out_shardings=(*self.shardings, self.sharding(P())))

    def _new(self):
        params = jax.tree.map(jnp.asarray, new_params())
        return params, self.tx.init(params)

    def _step(self, params, opt_state, batch):
        # Where JAX checks what varies it sums gradients of replicated parameters, unless those are made to vary.
        local = jax.lax.pcast(params, "data", to="varying") if self.layout == "shard_map" else params
        loss, grads = mp.value_and_grad(self.loss_fn, mp.get_loss_scale(opt_state))(local, batch)
        if self.explicit:
            loss, grads = jax.lax.pmean((loss, self.between(grads)), "data")
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def sharding(self, spec):
        return NamedSharding(self.mesh, spec) if self.mesh else SingleDeviceSharding(jax.local_devices()[0])

    def shardings_of(self, tree):
        def spec(path, x):
            if self.layout == "fsdp" and x.ndim > 1:
                return P("data")
            return TENSOR.get(getattr(path[-1], "key", ""), P()) if self.layout == "tensor" else P()

        return jax.tree_util.tree_map_with_path(lambda path, x: self.sharding(spec(path, x)), tree)

    def place(self, tree, shardings):
        """Arrays of NumPy on the mesh: a process reads those parts alone that its own devices need."""
        make = lambda x, sharding: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i])
        return jax.tree.map(make, tree, shardings)

    def on_devices(self, batch):
        return self.place(batch, jax.tree.map(lambda x: self.sharding(P("data")), batch))

    def start(self):
        return jax.jit(self._new, out_shardings=self.shardings)()

    def advance(self, state, batch):
        """The next state, and the loss."""
        *state, loss = self.step(*state, self.on_devices(batch))
        return tuple(state), float(loss)


def scale_and_skips(state):
    return float(mp.get_loss_scale(state[1]).loss_scale), int(state[1].skip_state.skips_total)


def digests(state):
    """Digests of the parts of a state that this process has, by array and place in it: a set of one, if they agree."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in leaf.addressable_shards:
            digest = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
            found.setdefault(f"{jax.tree_util.keystr(path)} {shard.index}", set()).add(digest)
    return found
