"""`mpjax compare`: which operation loses the accuracy of a function."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mpjax as mp
from mpjax.cli._checks import start_backend
from mpjax.cli._show import policy_named, rules_of, show, try_to, write_results
from mpjax.cli._target_function import checked, differentiated, load


def run(
    function: str,
    args_name: str | None,
    *,
    policy: str,
    preset: str,
    reference: str,
    with_gradients: bool,
    seed: int,
    json: Path | None,
    png: Path | None,
) -> None:
    """Runs the function in both precisions and prints.

    Args:
      function: `module:function`, or `path/to/file.py:function`.
      args_name: where the arguments are, if not in `example_args`.
      policy: the policy, by name or in the grammar of `mpjax.get_policy`.
      preset: of `mpjax.default_rules`.
      reference: what errors are measured against, `"float32"` or `"float64"`.
      with_gradients: whether to measure the gradients too.
      seed: of the numbers that take the place of structs.
      json: a file to write everything to, or `None`.
      png: a file to draw to, or `None`.

    Raises:
      CommandError: there is no such policy, function or argument, or the function cannot be run.
    """
    chosen = policy_named(policy)
    start_backend()
    target = load(function, args_name)
    through = differentiated(target) if with_gradients else None
    checked(target, through)
    args, drawn = filled(target.args, seed)
    compare: Any = mp.diagnostics.compare(target.fn, chosen, rules_of(preset), reference=reference, through=through)
    found = try_to(compare, *args)
    show(found)
    if drawn:
        what = "1 array that" if drawn == 1 else f"{drawn} arrays that"
        was = "was" if drawn == 1 else "were"
        print(f"{what} {function} has no values for {was} drawn from seed {seed}: see mpjax compare --help.")

    def draw() -> Any:
        import mpjax.plots

        return mpjax.plots.error_bars(found)

    write_results(found.to_json(), draw, json, png)


def filled(args: tuple[Any, ...], seed: int) -> tuple[tuple[Any, ...], int]:
    """Arguments with numbers in the place of structs, and how many there were.

    Floats are normal with a standard deviation of 1; in the first argument, which are the parameters, those of two and
    more dimensions are divided by the square root of the last but one, as initializers do. Integers are 0 or 1, which
    are labels and tokens of any table.
    """
    leaves, structure = jax.tree.flatten(args)
    parameters = len(jax.tree.leaves(args[:1]))
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    values = [
        _drawn(key, x, is_parameter=i < parameters) if isinstance(x, jax.ShapeDtypeStruct) else x
        for i, (x, key) in enumerate(zip(leaves, keys, strict=True))
    ]
    return jax.tree.unflatten(structure, values), sum(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


def _drawn(key: Any, struct: jax.ShapeDtypeStruct, *, is_parameter: bool) -> Any:
    if jnp.issubdtype(struct.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(key, struct.shape)
    if not jnp.issubdtype(struct.dtype, jnp.inexact):
        return jax.random.bernoulli(key, shape=struct.shape).astype(struct.dtype)
    numbers = jax.random.normal(key, struct.shape)
    if is_parameter and len(struct.shape) > 1:
        numbers = numbers / math.sqrt(struct.shape[-2])
    return numbers.astype(struct.dtype)
