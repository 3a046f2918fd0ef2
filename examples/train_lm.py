"""A language model trained in mixed precision over all devices, that can be stopped at any moment and goes on exactly.

    pip install "mpjax[examples]"
    python examples/train_lm.py                                      # the policy for this machine's hardware
    python examples/train_lm.py --policy mixed_bfloat16 --mesh 4x2   # 4 shards of the batch, matrices cut in 2
    python examples/train_lm.py --coordinator host:1234 --processes 2 --process 0   # and --process 1 elsewhere

A decoder-only transformer in Flax NNX on the bytes of Python's standard library. The model is plain float32 code; what
mpjax adds is numbered from 1 to 7. The rest is what a run of weeks needs anyway: a loop over stacked layers that keeps
little for the backward pass, parameters and optimizer state in shards, checkpoints, metrics as JSON lines.

The same command again goes on where the last checkpoint is, to the same parameters, bit for bit, and the same metrics
as a run that nothing stopped. SIGTERM and Ctrl-C end the run after the step, with a checkpoint.

The defaults take some minutes on two cores. With the text of Python 3.11 they reach a held-out loss of 1.55 nats a byte
under float32 and under mixed_bfloat16 alike; the best guess from the last byte alone, a bigram model, has 2.47.
"""

import argparse
import contextlib
import hashlib
import json
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import mpjax as mp

BYTES = 256
HEAD_WIDTH = 32
HELD_OUT_ROWS = 512
REPORT_EVERY = 10
KEPT_CHECKPOINTS = 3


# The model: nothing in it knows about precision ----------------------------------------------------------------------


class Block(nnx.Module):
    """Causal attention and a perceptron, each on the normalised residual stream."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        heads = (width // HEAD_WIDTH, HEAD_WIDTH)
        self.norm_attention = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(width, (3, *heads), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral(heads, width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.norm_mlp = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the stream, of shape (batch, length, width), to the next one."""
        q, k, v = jnp.unstack(self.qkv(self.norm_attention(x)), axis=2)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))
        # Else the partitioner may gather activations in the place of weights, which are far smaller.
        return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))


class Decoder(nnx.Module):
    """Predicts each next byte. The parameters of all blocks are stacked along a first axis, which is looped over."""

    def __init__(self, layers: int, width: int, length: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.vmap(lambda rngs: Block(width, rngs=rngs))(rngs.split(layers))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens of shape (batch, length) to logits of shape (batch, length, 256)."""

        # One compiled body for all layers; what is inside a block is computed again on the way back.
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(through(x, self.blocks)))


def loss_of(graph: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """The loss as a function of parameters: the mean cross entropy of each next byte, in nats."""

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    return loss_fn


# The text ------------------------------------------------------------------------------------------------------------


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the standard library's modules, without its tests, in order of their paths; every tenth held out."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test"}
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    paths = [path for path in paths if not left_out & set(path.split("/"))]
    train, held_out = (
        b"".join((root / path).read_bytes() for i, path in enumerate(paths) if (i % 10 == 9) == held)
        for held in (False, True)
    )
    return np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)


def rows_at(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Rows of length + 1 bytes, int32: inputs and, one further, what they are to predict."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


class Reader:
    """Rows of the text in a random order, another in each epoch, as a function of the position alone.

    A position is the number of rows read so far. It is all there is to save.
    """

    def __init__(self, text: np.ndarray, length: int, seed: int):
        self.text, self.length, self.seed = text, length, seed
        self.rows = len(text) // length - 1
        self.epoch, self.starts = -1, np.zeros(0, np.int64)

    def batch(self, position: int, size: int) -> np.ndarray:
        """The next `size` rows from a position on, of shape (size, length + 1)."""
        starts = np.array([self._start(*divmod(position + i, self.rows)) for i in range(size)])
        return rows_at(self.text, starts, self.length)

    def _start(self, epoch: int, i: int) -> int:
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            # The cuts are elsewhere in each epoch.
            self.starts = random.integers(self.length) + self.length * random.permutation(self.rows)
            self.epoch = epoch
        return int(self.starts[i])


def bigram_loss(text: np.ndarray, rows: np.ndarray) -> float:
    """What the best guess from the last byte alone reaches on the rows: counts in the text, each and one more."""
    counts = np.bincount(BYTES * text[:-1].astype(np.int64) + text[1:], minlength=BYTES**2).reshape(BYTES, BYTES) + 1.0
    return float(-np.log(counts / counts.sum(1, keepdims=True))[rows[:, :-1], rows[:, 1:]].mean())


# The shards ----------------------------------------------------------------------------------------------------------

# Matrices are cut over "data", which is FSDP, and over "model" along heads and hidden units, which is tensor
# parallelism. The first axis of those in blocks is that of the layers.
SPECS = {
    "embed/embedding": PartitionSpec("model", "data"),
    "positions/embedding": PartitionSpec(None, "data"),
    "qkv/kernel": PartitionSpec(None, "data", None, "model"),
    "out/kernel": PartitionSpec(None, "model", None, "data"),
    "up/kernel": PartitionSpec(None, "data", "model"),
    "down/kernel": PartitionSpec(None, "model", "data"),
    "head/kernel": PartitionSpec("data", "model"),
}


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf. Moments and averages have their parameter's path in their own, and so its shards."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        specs = [spec for end, spec in SPECS.items() if f"/{end}/" in f"/{name}/"]
        return NamedSharding(mesh, specs[0] if specs else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def make_mesh(data: int, model: int) -> Mesh:
    """A mesh of axes "data" and "model" over the first devices."""
    if data * model > jax.device_count():
        raise SystemExit(f"--mesh {data}x{model} needs {data * model} devices; there are {jax.device_count()}.")
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


# The step ------------------------------------------------------------------------------------------------------------


def make_optimizer(policy: mp.Policy, steps: int, rate: float) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW and the average of the weights, inside the wrapper that owns the loss scale."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=steps // 10, decay_steps=steps)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2))
    # 1. The average sees the weights after each step, in float32 whatever they are stored in.
    averaged = mp.transforms.params_ema(chain, decay=0.98)
    # 2. Outermost: unscales, and skips a step whose gradients overflowed, on all devices alike.
    return mp.loss_scaled(averaged, policy.loss_scale())


def make_train_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformationExtraArgs, microbatches: int, shardings: Any
) -> Callable[..., Any]:
    """The jitted step. It gives up the buffers of the old state for the new one."""

    def train_step(state: dict[str, Any], rows: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        params, opt_state = state["params"], state["opt_state"]
        # 3. The true loss, and the gradients of the loss times the scale.
        grad_fn = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))
        # 4. Over the batch in pieces, summed in float32. Each device keeps its own rows of every piece.
        loss, grads = mp.accumulate(grad_fn, microbatches)(params, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        scale = mp.get_loss_scale(opt_state).loss_scale
        metrics = {"loss": loss, "scale": scale, "skips": opt_state.skip_state.skips_total}
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


# Checkpoints, metrics and signals ------------------------------------------------------------------------------------


class Checkpoints:
    """The last few states of a run, each with the position in the text and the settings.

    Orbax writes into a temporary directory and renames it when all is there: a kill or a full disk in the middle
    leaves the checkpoints before it as they were. Saves are synchronous, so that a failure is seen where it happens.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.directory, self.settings = directory, settings
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT_CHECKPOINTS, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: Any, position: int) -> None:
        """Writes a checkpoint, or ends the run with a message that says where it can go on."""
        run = {"position": position, "settings": self.settings}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        last = self.manager.latest_step()
        try:
            self.manager.save(step, args=items)
        except Exception as error:
            raise SystemExit(
                f"The checkpoint of step {step} could not be written to {self.directory}:\n{error}\n"
                f"The last good one is of step {last}. Make room, then the same command goes on from there."
            ) from error

    def restore(self, shapes: Any) -> tuple[int, Any, int]:
        """The newest checkpoint: its step, state and position; (0, None, 0) when there is none."""
        step = self.manager.latest_step()
        if step is None:
            return 0, None, 0
        saved = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        before, now = saved["settings"], self.settings
        changed = [f"  {name}: {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            raise SystemExit(
                f"{self.directory} holds a run with other settings:\n" + "\n".join(changed) + "\n"
                "Go on with the same settings, or start a new run in another --directory."
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return step, self.manager.restore(step, args=items)["state"], saved["position"]


class Metrics:
    """One JSON line a step. A resumed run cuts the file back to its checkpoint, so that no step is there twice.

    The numbers stay on the device until `flush`: reading one waits for all steps before it.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.pending: list[dict[str, Any]] = []
        if jax.process_index() == 0:
            kept = 0
            with path.open("a+b") as file:
                file.seek(0)
                for line in file:
                    # The last line of a killed run may be half a line.
                    if not line.endswith(b"\n") or b"held_out" in line or json.loads(line)["step"] > step:
                        break
                    kept += len(line)
                file.truncate(kept)

    def add(self, step: int, numbers: dict[str, Any]) -> None:
        """Keeps the numbers of a step."""
        self.pending.append({"step": step, **numbers})

    def flush(self) -> dict[str, Any]:
        """Appends what was kept, and returns the last of it."""
        lines = [{name: np.asarray(x).item() for name, x in line.items()} for line in self.pending]
        self.pending = []
        try:
            if jax.process_index() == 0:
                with self.path.open("ab") as file:
                    file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        except OSError as error:
            raise SystemExit(
                f"{self.path} could not be written: {error}\n"
                "Make room, then the same command goes on from the last checkpoint."
            ) from error
        return lines[-1]


class Stop:
    """Whether SIGTERM or SIGINT has come; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, step: int) -> bool:
        """Whether to stop after this step. Several processes ask each other now and then: all stop, or none does."""
        if jax.process_count() == 1:
            return self.asked
        return step % REPORT_EVERY == 0 and bool(multihost_utils.process_allgather(np.array(self.asked)).any())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles both signals inside the context."""
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(number, before[number] or signal.SIG_DFL)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


# The run -------------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A flag's value that counts something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def mesh_shape(text: str) -> tuple[int, int]:
    """Two sizes from text like "4x2"."""
    data, model = map(positive, text.split("x"))
    return data, model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="A language model on the source of Python.")
    parser.add_argument("--policy", help='"mixed_bfloat16", "mixed_float16", "float32" ...; default: by hardware')
    parser.add_argument(
        "--mesh", type=mesh_shape, help='shards of the batch x shards of a matrix, as "4x2"; default: all devices x 1'
    )
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--batch", type=positive, default=32, help="rows of text a step, over all devices")
    parser.add_argument("--length", type=positive, default=128, help="bytes in a row")
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--width", type=positive, default=128, help=f"of the residual stream, in heads of {HEAD_WIDTH}")
    parser.add_argument("--microbatches", type=positive, default=2, help="pieces that a batch is worked through in")
    parser.add_argument("--rate", type=float, default=3e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=positive, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--directory", type=Path, default=Path("out/train_lm"), help="of checkpoints and metrics.jsonl")
    parser.add_argument("--coordinator", help="address:port of process 0, for a run of several processes")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or goes on training, and compares held-out losses. Returns 0, also when a signal ended the run early."""
    args = parse(argv)
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    mesh = make_mesh(*(args.mesh or (jax.device_count(), 1)))
    stop = Stop()
    with jax.set_mesh(mesh), stop.listening():
        return run(args, mesh, stop)


def settings_of(args: argparse.Namespace, policy: mp.Policy, *texts: np.ndarray) -> dict[str, Any]:
    """What a run that goes on has to have in common with the one before: all but the mesh and where it is kept."""
    names = ("steps", "batch", "length", "layers", "width", "microbatches", "rate", "seed")
    digest = hashlib.sha256(b"".join(text.tobytes() for text in texts)).hexdigest()
    return {"policy": str(policy), **{name: getattr(args, name) for name in names}, "text": digest[:16]}


def on_devices(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch over the devices. Every process has read all of it, and hands on what its own devices need."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def check(args: argparse.Namespace, mesh: Mesh) -> None:
    """Ends the program when the numbers do not fit each other, before anything is compiled."""
    data, model = mesh.devices.shape
    rows = args.microbatches * data
    heads = args.width // HEAD_WIDTH
    wrong = [
        f"--batch {args.batch} is no multiple of {rows}, the microbatches times the shards of the batch"
        if args.batch % rows
        else "",
        f"--width {args.width} is no multiple of {np.lcm(HEAD_WIDTH, data)}, for whole heads and even shards"
        if args.width % np.lcm(HEAD_WIDTH, data)
        else "",
        f"--width {args.width} makes {heads} heads, which {model} shards cannot have evenly" if heads % model else "",
    ]
    if any(wrong):
        raise SystemExit(";\n".join(filter(None, wrong)) + ".")


def run(args: argparse.Namespace, mesh: Mesh, stop: Stop) -> int:
    """The run on a mesh, from its start or its last checkpoint to its end or a signal."""
    check(args, mesh)
    console = Console(highlight=False, quiet=jax.process_index() > 0)
    policy = mp.get_policy(args.policy) if args.policy else mp.default_policy()
    tx = make_optimizer(policy, args.steps, args.rate)

    def make_model() -> Decoder:
        return Decoder(args.layers, args.width, args.length, rngs=nnx.Rngs(args.seed))

    def init() -> dict[str, Any]:
        # 5. Parameters in the policy's dtype: float32 for the mixed policies.
        params = policy.cast_to_param(nnx.state(make_model()))
        return {"params": params, "opt_state": tx.init(params)}

    # 6. The same function with its matrix work in the compute dtype, and losses and statistics in float32.
    loss_fn = mp.autocast(loss_of(nnx.graphdef(nnx.eval_shape(make_model))), policy)
    shapes = jax.eval_shape(init)
    shardings = shardings_of(shapes, mesh)
    train_step = make_train_step(loss_fn, tx, args.microbatches, shardings)

    text, held_out_text = load_text()
    reader = Reader(text, args.length, args.seed)
    checkpoints = Checkpoints(args.directory / "checkpoints", settings_of(args, policy, text, held_out_text))
    step, state, position = checkpoints.restore(
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    )
    if state is None:
        state = jax.jit(init, out_shardings=shardings)()
    else:
        console.print(f"going on after step {step}")
    metrics = Metrics(args.directory / "metrics.jsonl", step)

    weights = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    console.print(f"{policy}\n{weights:,} weights over {dict(mesh.shape)}, {len(text):,} bytes of text")
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task("compiling" if step < args.steps else "trained", total=args.steps, completed=step)
        while step < args.steps:
            state, numbers = train_step(state, on_devices(reader.batch(position, args.batch), mesh))
            step, position = step + 1, position + args.batch
            metrics.add(step, numbers)
            stopping = stop(step)
            saving = stopping or step % args.save_every == 0 or step == args.steps
            if saving or step % REPORT_EVERY == 0:
                shown = "loss {loss:.3f}, scale {scale:g}, {skips} skipped".format(**metrics.flush())
                progress.update(bar, completed=step, description=shown)
            if saving:
                checkpoints.save(step, state, position)
            if stopping and step < args.steps:
                console.print(f"stopped after step {step}, which is saved in {args.directory}")
                return 0

    count = max(HELD_OUT_ROWS // args.batch, 1)
    starts = np.linspace(0, len(held_out_text) - args.length - 1, count * args.batch, dtype=int)
    rows = rows_at(held_out_text, starts, args.length)
    held_out_loss = jax.jit(loss_fn)

    def evaluate(params: Any) -> float:
        return float(np.mean([held_out_loss(params, on_devices(part, mesh)) for part in np.split(rows, count)]))

    # 7. The averages in the place of the parameters; they are in the optimizer state, and so in its checkpoints.
    averaged = mp.transforms.ema_params(state["opt_state"], state["params"])
    found = {"held_out": evaluate(state["params"]), "held_out_average": evaluate(averaged)}
    found["held_out_bigram"] = bigram_loss(text, rows)
    metrics.add(step, found)
    metrics.flush()
    console.print(
        "held-out loss {held_out:.3f}, with averaged weights {held_out_average:.3f}, "
        "of a bigram model {held_out_bigram:.3f}".format(**found)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
