"""What autocast costs against a model written in bfloat16 by hand, compiled for TPU v5e.

    python benchmarks/autocast_cost.py [--write]

The loss and gradients of a decoder language model in Flax Linen (6 layers, width 512, 512 tokens, batch 32, 256
tokens of vocabulary): in float32, with `dtype=bfloat16` in every module, and the float32 model under
`mp.autocast`; layers unrolled, scanned, and scanned with rematerialisation. --write puts the table into RESULTS.md.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from aot import Cost, compile_for_v5e, write_section  # isort: skip  # before jax: it sets what libtpu reads

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

import mpjax as mp

WIDTH, LAYERS, LENGTH, BATCH, VOCABULARY = 512, 6, 512, 32, 256
MODES = ("unrolled", "scan + remat", "scan")


class Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = nn.LayerNorm(dtype=self.dtype)(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(8, dtype=self.dtype)(h, mask=mask)
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.gelu(nn.Dense(4 * WIDTH, dtype=self.dtype)(h))
        return x + nn.Dense(WIDTH, dtype=self.dtype)(h), None


class LanguageModel(nn.Module):
    dtype: Any
    mode: str

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype)(tokens)
        if self.mode == "unrolled":
            for _ in range(LAYERS):
                x, _ = Block(self.dtype)(x)
        else:
            block = nn.remat(Block, prevent_cse=False) if "remat" in self.mode else Block
            layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = layers(self.dtype)(x, None)
        return nn.Dense(VOCABULARY, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


def loss_of(model: LanguageModel) -> Callable[..., Any]:
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = jax.nn.log_softmax(model.apply(params, tokens).astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logits, jnp.roll(tokens, -1, 1)[..., None], -1))

    return loss


def measure(mode: str) -> dict[str, Cost]:
    float32, by_hand = LanguageModel(None, mode), LanguageModel(jnp.bfloat16, mode)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    params = jax.eval_shape(float32.init, jax.random.key(0), tokens)
    losses = {
        "float32": loss_of(float32),
        "by hand": loss_of(by_hand),
        "autocast": mp.autocast(loss_of(float32), "mixed_bfloat16"),
    }
    costs = {}
    for name, loss in losses.items():
        print(f"compiling: {mode}, {name}", file=sys.stderr)
        costs[name] = compile_for_v5e(jax.value_and_grad(loss), params, tokens)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    rows = ["| layers | model | peak memory | bytes accessed | estimated cycles |", "| --- " * 5 + "|"]
    for mode in MODES:
        costs = measure(mode)
        hand = costs["by hand"]
        for name, cost in costs.items():
            rows.append(
                f"| {mode} | {name} | {cost.peak_bytes / 1e6:.0f} MB ({cost.peak_bytes / hand.peak_bytes:.2f}x) "
                f"| {cost.bytes_accessed / 1e9:.2f} GB ({cost.bytes_accessed / hand.bytes_accessed:.2f}x) "
                f"| {cost.estimated_cycles / 1e6:.1f} M ({cost.estimated_cycles / hand.estimated_cycles:.2f}x) |"
            )
    versions = f"jax {jax.__version__}, flax {flax.__version__}, mpjax {mp.__version__}"
    libtpu = importlib.metadata.version("libtpu")
    text = (
        f"Compiled for one TPU v5e chip by libtpu {libtpu}; {versions}. Command: `python benchmarks/autocast_cost.py`. "
        "The factors are relative to the model written by hand.\n\n" + "\n".join(rows)
    )
    print(text)
    if arguments.write:
        write_section("autocast_cost", text)


if __name__ == "__main__":
    main()
