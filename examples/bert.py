"""BERT in mixed precision: a masked language model of Python's standard library, then fine-tuned to tell its packages.

    pip install "mpjax[examples]"
    python examples/bert.py                                             # the policy for this machine's hardware
    python examples/bert.py --preset base --policy mixed_bfloat16       # BERT-base: 110 million weights, for a GPU
    python examples/bert.py --task package                              # and then a head: which package is it from?
    python examples/bert.py --policy mixed_float16 --loss-scale none    # what loss scaling is for

The model is that of Devlin et al., https://arxiv.org/abs/1810.04805, in Flax Linen: plain float32 code. What mpjax adds
is numbered from 1 to 5. The vocabulary of byte pairs is learnt from the text once and kept under --out; every tenth
module is held out from the vocabulary, from the masked language model and from the head alike.
"""

import argparse
import dataclasses
import hashlib
import heapq
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import mpjax as mp

CLS, MASK, SPECIAL = 0, 1, 2  # the first token of each row, what hides a token, and how many such tokens there are
HELD_OUT_ROWS = 512
PACKAGES = 10
REPORT_EVERY = 10

Batch = dict[str, np.ndarray]
Loss = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the model is, and what it is trained with unless flags say otherwise."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    dropout: float
    hidden: float
    rate: float
    text_bytes: int


PRESETS = {
    "base": Size(12, 768, 12, 30_522, 512, dropout=0.1, hidden=0.15, rate=1e-4, text_bytes=16_000_000),
    # A row teaches more with more of it hidden: Wettig et al., https://arxiv.org/abs/2202.08005.
    "small": Size(2, 64, 4, 1_024, 128, dropout=0.0, hidden=0.4, rate=3e-3, text_bytes=4_000_000),
}


# The model: nothing in it knows about precision ----------------------------------------------------------------------


def waves(key: Any, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """What the embeddings of positions start from: as large as those of words, and neighbours are alike."""
    del key
    rates = 10_000.0 ** (-jnp.arange(0, shape[1], 2, dtype=dtype) / shape[1])
    angles = jnp.arange(shape[0], dtype=dtype)[:, None] * rates
    return 0.02 * 2**0.5 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Layer(nn.Module):
    """Attention to all tokens of a row and a perceptron, each added to the stream and normalised after that."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Maps the stream, of shape (batch, length, width), to the next one."""
        size = self.size
        attention = nn.MultiHeadDotProductAttention(size.heads, dropout_rate=size.dropout, deterministic=deterministic)
        dropout = nn.Dropout(size.dropout, deterministic=deterministic)
        x = nn.LayerNorm(epsilon=1e-12)(x + dropout(attention(x)))
        y = nn.Dense(size.width)(nn.gelu(nn.Dense(4 * size.width)(x)))
        return nn.LayerNorm(epsilon=1e-12)(x + dropout(y))


class Encoder(nn.Module):
    """Embeddings and the stack of layers, which both heads share."""

    size: Size

    def setup(self) -> None:
        """The modules."""
        size, init = self.size, nn.initializers.normal(0.02)
        self.words = nn.Embed(size.vocabulary, size.width, embedding_init=init)
        self.places = nn.Embed(size.positions, size.width, embedding_init=waves)
        self.norm = nn.LayerNorm(epsilon=1e-12)
        self.dropout = nn.Dropout(size.dropout)
        self.layers = [Layer(size) for _ in range(size.layers)]

    def __call__(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        """Maps tokens of shape (batch, length) to a stream of shape (batch, length, width)."""
        x = self.norm(self.words(tokens) + self.places(jnp.arange(tokens.shape[1])))
        x = self.dropout(x, deterministic=deterministic)
        for layer in self.layers:
            x = layer(x, deterministic)
        return x


class MaskedLM(nn.Module):
    """The encoder, and what a hidden token was. The embeddings are the weights of the last layer too."""

    size: Size

    def setup(self) -> None:
        """The modules."""
        self.encoder = Encoder(self.size)
        self.transform = nn.Dense(self.size.width)
        self.norm = nn.LayerNorm(epsilon=1e-12)
        self.bias = self.param("bias", nn.initializers.zeros, (self.size.vocabulary,))

    def __call__(self, tokens: jax.Array, places: jax.Array, deterministic: bool) -> jax.Array:
        """Logits of shape (batch, hidden, vocabulary) at the places, of shape (batch, hidden)."""
        x = self.encoder(tokens, deterministic)
        x = jnp.take_along_axis(x, places[..., None], axis=1)
        return self.encoder.words.attend(self.norm(nn.gelu(self.transform(x)))) + self.bias


class Classifier(nn.Module):
    """The encoder, and a head on the first token of each row."""

    size: Size
    classes: int

    def setup(self) -> None:
        """The modules."""
        self.encoder = Encoder(self.size)
        self.pooler = nn.Dense(self.size.width)
        self.head = nn.Dense(self.classes)

    def __call__(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        """Maps tokens of shape (batch, length) to logits of shape (batch, classes)."""
        return self.head(nn.tanh(self.pooler(self.encoder(tokens, deterministic)[:, 0])))


def loss_of(model: nn.Module, inputs: Sequence[str]) -> Loss:
    """The mean cross entropy as a function of parameters, and the share of right answers. With a key: with dropout."""

    def loss_fn(params: Any, batch: dict[str, jax.Array], key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        rngs = {} if key is None else {"dropout": key}
        arguments = [batch[name] for name in inputs]
        logits: Any = model.apply({"params": params}, *arguments, deterministic=key is None, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["answers"])
        return losses.mean(), (logits.argmax(-1) == batch["answers"]).mean()

    return loss_fn


# The step ------------------------------------------------------------------------------------------------------------


def make_optimizer(scale: mp.LossScale, steps: int, rate: float) -> optax.GradientTransformationExtraArgs:
    """Clipping and AdamW with a warm-up and a linear decay, inside the wrapper that owns the loss scale."""
    warm_up = steps // 10
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, rate, warm_up), optax.linear_schedule(rate, 0.0, steps - warm_up)], [warm_up]
    )
    adamw = optax.adamw(schedule, weight_decay=0.01, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    # 1. Outermost: unscales, and skips a step whose gradients overflowed; nothing inside ever notices.
    return mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), adamw), scale)


def make_train_step(loss_fn: Loss, tx: optax.GradientTransformationExtraArgs, seed: int) -> Callable[..., Any]:
    """The jitted step. It gives up the buffers of the old parameters and state for the new ones."""

    def train_step(params: Any, opt_state: Any, batch: dict[str, jax.Array], step: jax.Array) -> tuple[Any, Any, Any]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        # 2. Like jax.value_and_grad: the loss is the true one, the gradients are those of the loss times the scale.
        grad_fn = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state), has_aux=True)
        (loss, _), grads = grad_fn(params, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        scale = mp.get_loss_scale(opt_state).loss_scale
        metrics = {"loss": loss, "scale": scale, "skips": opt_state.skip_state.skips_total}
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


def fit(what: str, loss_fn: Loss, params: Any, batches: Iterator[Batch], steps: int, rate: float, run: "Run") -> Any:
    """Trains on the batches. Returns the parameters, the loss of each step and how many steps were skipped."""
    tx = make_optimizer(run.loss_scale, steps, rate)
    # 3. The same function with its matrix work in the compute dtype, and losses and statistics in float32.
    train_step = make_train_step(mp.autocast(loss_fn, run.policy), tx, run.seed)
    opt_state, metrics = tx.init(params), []
    columns = (TextColumn("{task.description:52}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=run.console, disable=run.console.quiet) as progress:
        bar = progress.add_task(f"{what}: compiling", total=steps)
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            params, opt_state, numbers = train_step(params, opt_state, batch, np.int32(step))
            metrics.append(numbers)
            if step % REPORT_EVERY == 0 or step == steps:  # reading a number waits for the device
                shown = "loss {loss:.3f}, scale {scale:g}, {skips} skipped".format(**jax.device_get(numbers))
                progress.update(bar, completed=step, description=f"{what}: {shown}")
    losses = [float(numbers["loss"]) for numbers in jax.device_get(metrics)]
    return params, losses, int(metrics[-1]["skips"])


def evaluate(loss_fn: Loss, params: Any, batches: Sequence[Batch], run: "Run") -> tuple[float, float]:
    """The mean loss and share of right answers on batches of one size."""
    low_loss_fn = jax.jit(mp.autocast(loss_fn, run.policy))
    loss, accuracy = np.mean([jax.device_get(low_loss_fn(params, batch)) for batch in batches], axis=0)
    return float(loss), float(accuracy)


# The text ------------------------------------------------------------------------------------------------------------

# What byte pairs never cross: a word or a number with the space before it, punctuation, blanks, the end of a line.
WORD = re.compile(rb" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?=\s)|\s")


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of modules, one after the other.

    Attributes:
      paths: of each module, relative to the standard library.
      tokens: of each module, an array of int32.
      held_out: whether each module is.
    """

    paths: list[str]
    tokens: list[np.ndarray]
    held_out: list[bool]

    def chosen(self, held_out: bool) -> list[tuple[str, np.ndarray]]:
        """Path and tokens of the modules that are held out, or of those that are not."""
        return [
            (path, tokens)
            for path, tokens, held in zip(self.paths, self.tokens, self.held_out, strict=True)
            if held == held_out
        ]


def read_modules(limit: int) -> dict[str, bytes]:
    """The standard library's modules without its tests, in an order shuffled once and for all, up to `limit` bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "pydoc_data"}
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    paths = [path for path in paths if not left_out & set(path.split("/"))]
    modules, total = {}, 0
    for i in np.random.default_rng(0).permutation(len(paths)):
        module = (root / paths[i]).read_bytes()
        total += len(module)
        if total > limit:
            break
        modules[paths[i]] = module
    return modules


def byte_pairs(words: dict[bytes, int], tokens: int) -> dict[bytes, list[int]]:
    """Each word in tokens: bytes at first, then again and again the most frequent pair of neighbours becomes one.

    A word that is counted 0 times is spelled in the tokens that the others have led to.
    """
    spelled, counts = [list(word) for word in words], list(words.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where = defaultdict(set)

    def count(i: int, sign: int) -> set[tuple[int, int]]:
        found = list(zip(spelled[i], spelled[i][1:], strict=False))
        for pair in found:
            pairs[pair] += sign * counts[i]
            where[pair].add(i)
        return set(found)

    for i in range(len(spelled)):
        count(i, 1)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    made = 256
    while made < tokens and heap:
        n, best = heapq.heappop(heap)
        if n == 0 or pairs[best] != -n:
            continue  # its count has changed since
        changed = set()
        for i in list(where.pop(best)):
            changed |= count(i, -1)
            old, new, j = spelled[i], [], 0
            while j < len(old):
                both = tuple(old[j : j + 2]) == best
                new.append(made if both else old[j])
                j += 1 + both
            spelled[i] = new
            changed |= count(i, 1)
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
        made += 1
    return dict(zip(words, spelled, strict=True))


def load_text(size: Size, out: Path) -> Text:
    """The text in tokens, from --out if it is there. Every tenth module is held out, from the vocabulary too."""
    modules = read_modules(size.text_bytes)
    held_out = [i % 10 == 9 for i in range(len(modules))]
    digest = hashlib.sha256(str(size.vocabulary).encode() + b"".join(modules.values())).hexdigest()
    kept = out / f"text-{digest[:16]}.npz"
    if not kept.exists():
        words: Counter[bytes] = Counter()
        for module, held in zip(modules.values(), held_out, strict=True):
            for word in WORD.findall(module):
                words[word] += not held
        spelled = byte_pairs(words, size.vocabulary - SPECIAL)
        texts = [[token for word in WORD.findall(module) for token in spelled[word]] for module in modules.values()]
        out.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        with part.open("wb") as file:
            tokens = np.concatenate([np.array(text, np.int32) + SPECIAL for text in texts])
            np.savez(file, tokens=tokens, ends=np.cumsum([len(text) for text in texts]))
        part.replace(kept)
    with np.load(kept) as saved:
        return Text(list(modules), np.split(saved["tokens"], saved["ends"][:-1]), held_out)


def rows_at(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Rows of shape (starts, length): CLS, and the tokens from each start on."""
    rows = tokens[starts[:, None] + np.arange(length - 1)]
    return np.concatenate([np.full((len(rows), 1), CLS, np.int32), rows], axis=1)


def masked(rows: np.ndarray, size: Size, random: np.random.Generator) -> Batch:
    """Hides a share of each row's tokens: 80% of those behind MASK, 10% behind one drawn at random, 10% not at all."""
    rows = rows.copy()
    count = max(round(size.hidden * rows.shape[1]), 1)
    places = 1 + np.sort(random.random((len(rows), rows.shape[1] - 1)).argsort(1)[:, :count], axis=1)
    answers = np.take_along_axis(rows, places, 1)
    chance = random.random(answers.shape)
    drawn = random.integers(SPECIAL, size.vocabulary, answers.shape, np.int32)
    shown = np.where(chance < 0.8, np.int32(MASK), np.where(chance < 0.9, drawn, answers))
    np.put_along_axis(rows, places, shown, 1)
    return {"tokens": rows, "places": places.astype(np.int32), "answers": answers}


def masked_batches(text: Text, size: Size, args: argparse.Namespace) -> Iterator[Batch]:
    """Rows from everywhere in the text, hidden differently each time; a function of the seed alone."""
    tokens = np.concatenate([tokens for _, tokens in text.chosen(held_out=False)])
    random = np.random.default_rng(args.seed)
    while True:
        starts = random.integers(len(tokens) - args.length + 2, size=args.batch)
        yield masked(rows_at(tokens, starts, args.length), size, random)


def masked_held_out(text: Text, size: Size, args: argparse.Namespace) -> list[Batch]:
    """The same rows, hidden in the same way, for every seed."""
    tokens = np.concatenate([tokens for _, tokens in text.chosen(held_out=True)])
    random = np.random.default_rng(0)
    count = max(HELD_OUT_ROWS // args.batch, 1)
    starts = np.linspace(0, len(tokens) - args.length + 1, count * args.batch, dtype=int).reshape(count, args.batch)
    return [masked(rows_at(tokens, these, args.length), size, random) for these in starts]


def unigram_loss(text: Text, size: Size, batches: Sequence[Batch]) -> float:
    """What the best guess without the rest of the row reaches: counts of the tokens learnt from, each and one more."""
    tokens = np.concatenate([tokens for _, tokens in text.chosen(held_out=False)])
    counts = np.bincount(tokens, minlength=size.vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[np.stack([batch["answers"] for batch in batches])].mean())


def package_rows(text: Text, length: int) -> tuple[list[str], list[list[np.ndarray]]]:
    """The packages with most text, and the rows of each: those to learn from, then those held out."""
    rows: tuple[dict[str, list[np.ndarray]], ...] = (defaultdict(list), defaultdict(list))
    for held_out in (False, True):
        for path, tokens in text.chosen(held_out):
            package, _, inside = path.partition("/")
            if inside and len(tokens) >= length:
                rows[held_out][package].append(rows_at(tokens, np.arange(0, len(tokens) - length + 2, length), length))
    counts = {package: sum(map(len, found)) for package, found in rows[False].items() if package in rows[True]}
    names = sorted(counts, key=lambda package: (-counts[package], package))[:PACKAGES]
    if len(names) < 2:
        raise SystemExit("Less than two packages have modules to learn from and modules held out: raise --text-bytes.")
    return names, [[np.concatenate(part[name]) for name in names] for part in rows]


def package_batches(rows: list[np.ndarray], size: int, seed: int) -> Iterator[Batch]:
    """A package drawn at random, each as often as any other, and a row of it."""
    random = np.random.default_rng(seed)
    while True:
        answers = random.integers(len(rows), size=size).astype(np.int32)
        yield {"tokens": np.stack([random.choice(rows[answer]) for answer in answers]), "answers": answers}


# The run -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What both trainings of a run have in common."""

    policy: mp.Policy
    loss_scale: mp.LossScale
    seed: int
    console: Console


def loss_scale_of(text: str, policy: mp.Policy) -> mp.LossScale:
    """4. The policy knows: float16 needs a dynamic scale, bfloat16 and float32 none. Any other is for experiments."""
    if text == "policy":
        return policy.loss_scale()
    if text == "dynamic":
        return mp.DynamicLossScale()
    return mp.NoOpLossScale() if text == "none" else mp.StaticLossScale(float(text))


def train(args: argparse.Namespace, console: Console | None = None) -> dict[str, Any]:
    """Trains, and fine-tunes if asked to.

    Args:
      args: what `parse` returns.
      console: where to print; nowhere, if there is none.

    Returns:
      "losses" of all steps, "held_out" and "accuracy" on the held-out rows, where a guess from counts alone has
      "unigram", and "skips", how many steps were skipped; with a task "task_losses", "task_accuracy", "task_skips" and
      "classes".
    """
    console = console or Console(quiet=True)
    size = PRESETS[args.preset]
    size = dataclasses.replace(size, text_bytes=args.text_bytes or size.text_bytes, rate=args.rate or size.rate)
    policy = mp.get_policy(args.policy) if args.policy else mp.default_policy()
    run = Run(policy, loss_scale_of(args.loss_scale, policy), args.seed, console)
    text = load_text(size, args.out)

    model, inputs = MaskedLM(size), ("tokens", "places")
    batches, held_out = masked_batches(text, size, args), masked_held_out(text, size, args)
    first = [held_out[0][name][:1] for name in inputs]
    # 5. Parameters in the policy's dtype: float32 for the mixed policies.
    init = jax.jit(lambda key: policy.cast_to_param(model.init(key, *first, deterministic=True)["params"]))
    params = init(jax.random.key(args.seed))
    weights, total = sum(x.size for x in jax.tree.leaves(params)), sum(map(len, text.tokens))
    console.print(f"{policy}, {type(run.loss_scale).__name__}\n{weights:,} weights")
    console.print(f"{len(text.paths)} modules of the standard library, {total:,} tokens")
    loss_fn = loss_of(model, inputs)
    params, losses, skips = fit("masked", loss_fn, params, batches, args.steps, size.rate, run)
    loss, accuracy = evaluate(loss_fn, params, held_out, run)
    unigram = unigram_loss(text, size, held_out)
    console.print(f"held-out loss {loss:.3f} nats a hidden token, {accuracy:.1%} right; {skips} skipped")
    console.print(f"the best guess without the rest of the row has {unigram:.3f}")
    result = {"losses": losses, "held_out": loss, "accuracy": accuracy, "unigram": unigram, "skips": skips}
    return result | fine_tune(params["encoder"], text, size, args, run) if args.task == "package" else result


def fine_tune(encoder: Any, text: Text, size: Size, args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Goes on from the masked language model's encoder, with a new head: which package is a row from?"""
    names, (rows, held_out_rows) = package_rows(text, args.length)
    classifier = Classifier(size, len(names))
    new = jax.jit(lambda key: run.policy.cast_to_param(classifier.init(key, rows[0][:1], deterministic=True)["params"]))
    params = {**new(jax.random.key(args.seed)), "encoder": encoder}
    loss_fn = loss_of(classifier, ("tokens",))
    batches = package_batches(rows, args.batch, args.seed)
    params, losses, skips = fit("package", loss_fn, params, batches, args.task_steps, size.rate / 4, run)
    held_out = package_batches(held_out_rows, args.batch, 0)
    count = max(HELD_OUT_ROWS // args.batch, 1)
    _, accuracy = evaluate(loss_fn, params, [next(held_out) for _ in range(count)], run)
    run.console.print(f"{accuracy:.1%} of held-out rows in the right one of {', '.join(names)}; {skips} skipped")
    return {"task_losses": losses, "task_accuracy": accuracy, "task_skips": skips, "classes": names}


def positive(text: str) -> int:
    """A flag's value that counts something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def scale_name(text: str) -> str:
    """A flag's value that names a loss scale."""
    if text not in ("policy", "none", "dynamic"):
        float(text)
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="BERT on the source of Python.")
    parser.add_argument("--policy", help='"mixed_bfloat16", "mixed_float16", "float32" ...; default: by hardware')
    parser.add_argument("--preset", choices=PRESETS, default="small", help="base has 110 million weights")
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--batch", type=positive, default=64, help="rows of text a step")
    parser.add_argument("--length", type=positive, default=32, help="tokens in a row")
    parser.add_argument("--rate", type=float, help="the largest learning rate; default: the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--loss-scale", type=scale_name, default="policy", help='"none", "dynamic" or a number; default: the policy\'s'
    )
    parser.add_argument("--task", choices=("none", "package"), default="none", help="what to fine-tune for afterwards")
    parser.add_argument("--task-steps", type=positive, default=200)
    parser.add_argument("--text-bytes", type=positive, help="how much text to read; default: the preset's")
    parser.add_argument("--out", type=Path, default=Path("out/bert"), help="where the text in tokens is kept")
    args = parser.parse_args(argv)
    positions = PRESETS[args.preset].positions
    if not 2 <= args.length <= positions:
        parser.error(f"--length {args.length} is not within 2 and {positions}, the positions of {args.preset}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints, and returns what `train` does."""
    return train(parse(argv), Console(highlight=False))


if __name__ == "__main__":
    main()
