"""Which matrix products are computed in fp8, and how: an immutable value."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from mpjax import _compat
from mpjax._errors import problem
from mpjax._hardware import hardware_of
from mpjax._path_patterns import check_pattern, matches_path
from mpjax.fp8._formats import Format, format_of

# By the name of a module on the path: embeddings, routers of mixtures of experts, logits.
_EXCLUDED = (
    r"(.*/)?[^/]*embed[^/]*",
    r"(.*/)?([^/]*_)?(router|gating|gate)(_\d+)?",
    r"(.*/)?(to_)?logits(_[^/]*)?|(.*/)?((lm|mlm|cls|output|vocab|classification)_)?head(_\d+)?|(.*/)?classifier(_\d+)?",
)

_CHOICES = {
    "scaling": ("tensor", "channel"),
    "gradients": ("e5m2", "e4m3"),
    "weight_gradient": ("float8", "bfloat16"),
}


class Method(NamedTuple):
    """How a product is computed.

    Attributes:
      forward, backward: the formats of operands and of incoming gradients.
      by_channel: whether each row or column has a scale of its own; else each operand has one.
      emulate: whether 8-bit numbers are multiplied in float32.
      weight_gradient: whether weight gradients are of 8-bit operands; else of 16-bit ones.
    """

    forward: np.dtype[Any]
    backward: np.dtype[Any]
    by_channel: bool = False
    emulate: bool = False
    weight_gradient: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which matrix products the policy `mixed_float8` computes in fp8, and how; `Rules.with_fp8` takes it.

    A candidate is a `dot_general` of which an operand is a weight: a parameter or an input, or made of those alone,
    element by element. All others are as under `mixed_bfloat16`: products of two activations, as in attention;
    convolutions; what the rules, regions or the code itself keep in other dtypes. `mpjax.explain` says why for each.

    A training step brings each weight into 8 bits once, for all iterations of a loop, all microbatches of
    `mpjax.accumulate`, and the backward pass: what `jax.checkpoint` inside of autocast makes again does not include it,
    for one byte a weight. A loop that has no gradient, as in generation, does so in each iteration. Under a sharded
    `jit` sharded weights are gathered in 8 bits; under `shard_map` what `jax.lax.all_gather` makes of them is in 16.

    Convolutions are not in fp8 because their gradients cannot be: JAX has none of operands in two formats, and where
    both are in e4m3 XLA for H100s (jax 0.10.2) calls cuDNN with 8-bit operands for the forward one and the gradient by
    the input, but for the gradient by the weight takes the operands in 16 or 32 bits, without their rounding.

    Attributes:
      include: patterns for module paths; a candidate has to lie in a module that one matches, or in one below it.
        Default: everywhere.
      exclude: patterns for modules that stay in bfloat16, with all below. Default: by their names embeddings, routers
        and logits layers. For first and last blocks too, as Megatron's `first_last_layers_bf16` has it, add
        `r".*/block_(0|11)"`. Without module names, as in Flax NNX, write `jax.named_scope("head")` around the logits.
      min_reuse: how many multiplications there have to be for each number that is brought into 8 bits: m k n /
        (m k + k n + m n) of an (m, k) by (k, n) product. Default: 500, where the time that an H100 saves in the
        products forward and backward, by its data sheet (989 and 1979 TFLOP/s), is the time that it takes to read those
        numbers twice in 16 bits and write them in 8 (3.35 TB/s). An estimate, which says nothing of other devices.
      scaling: `"tensor"` for one scale for each operand; `"channel"` for one for each row of the left and column of the
        right one.
      gradients: `"e5m2"` for incoming gradients in the wider format, as in TransformerEngine's hybrid recipe; `"e4m3"`
        for one more digit, as in DeepSeek-V3 and torchao's recipe by rows.
      weight_gradient: `"float8"` or `"bfloat16"`: the operands of weight gradients, whose result is float32.
      emulate: whether to compute on any device what fp8 units would, in float32 arithmetic: exact up to the order of
        sums, and slow.

    Raises:
      ValueError, TypeError: an option is none of these.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> rules = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True))
    >>> cast = mp.autocast(lambda w, x: x @ w, "mixed_float8", rules)
    >>> cast(jnp.full((16, 16), 1.03), jnp.ones((16, 16)))[0, :2].tolist()  # 1.03 is 1 in e4m3
    [16.0, 16.0]
    """

    include: tuple[str, ...] = (".*",)
    exclude: tuple[str, ...] = _EXCLUDED
    min_reuse: float = 500.0
    scaling: Literal["tensor", "channel"] = "tensor"
    gradients: Literal["e5m2", "e4m3"] = "e5m2"
    weight_gradient: Literal["float8", "bfloat16"] = "float8"
    emulate: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise TypeError(
                    problem(
                        f"{name} is {patterns!r}.",
                        expected="a tuple of patterns",
                        write=f"Recipe({name}=({patterns!r},))",
                    )
                )
            for pattern in patterns:
                check_pattern(pattern)
            object.__setattr__(self, name, tuple(patterns))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    problem(
                        f"{name} is {getattr(self, name)!r}.",
                        expected=" or ".join(map(repr, choices)),
                        write=f"mp.fp8.Recipe({name}={choices[-1]!r})",
                    )
                )
        if not self.min_reuse >= 0:
            raise ValueError(
                problem(
                    f"min_reuse is {self.min_reuse!r}.", expected="a number from 0 up", write="Recipe(min_reuse=500)"
                )
            )

    def method(self, dtype: Any) -> Method:
        """How products are computed under a policy that computes in `dtype`."""
        found = _format_of_weights(dtype, self.emulate)
        gradients = found.backward if self.gradients == "e5m2" else found.dtype
        return Method(found.dtype, gradients, self.scaling == "channel", self.emulate, self.weight_gradient == "float8")

    def why_not(self, path: tuple[str, ...], sizes: tuple[int, int, int]) -> str | None:
        """Why a product of an (m, k) and a (k, n) matrix in a module is not computed in fp8; None if it is."""
        modules = ["/".join(path[:end]) for end in range(len(path) + 1)]
        for pattern in self.exclude:
            if any(matches_path(pattern, module) for module in modules[1:]):
                return "an embedding, router or logits by its name" if pattern in _EXCLUDED else f"excluded: {pattern}"
        if not any(matches_path(pattern, module) for pattern in self.include for module in modules):
            return f"in no module of {', '.join(self.include)}"
        m, k, n = sizes
        shown = f"(m, k, n) = {sizes}"
        if any(size % 16 for size in sizes):
            return f"{shown}: fp8 units take multiples of 16"
        if 0 in sizes:
            return f"{shown}: nothing to compute"
        reuse = 1 / (1 / m + 1 / k + 1 / n)
        if reuse < self.min_reuse:
            return f"{shown}: {reuse:.3g} multiplications for each number to bring into 8 bits, fewer than min_reuse"
        return None


def _format_of_weights(dtype: Any, emulate: bool) -> Format:
    """A format for weights and activations; on AMD's gfx94x the one that its units have."""
    found = format_of(dtype)
    if found.backward == found.dtype:
        raise ValueError(
            problem(
                f"the compute dtype is {found.dtype}, a format for gradients: its 2 digits are too few for weights.",
                expected="float8_e4m3fn, or float8_e4m3fnuz on AMD's MI300; gradients are then in e5m2",
                write='mp.get_policy("mixed_float8")',
            )
        )
    if not emulate and str(getattr(jax.local_devices()[0], "compute_capability", "")).startswith("gfx94"):
        found = format_of("float8_e4m3fnuz")
    return found


def has_float8() -> bool:
    """Whether the device that programs are traced for has fp8 units."""
    told = _compat.target_has_float8()
    if told is not None:
        return told
    device = jax.local_devices()[0]
    return bool(hardware_of(device).has_fp8(device))


def sizes_of(eqn: Any) -> tuple[int, int, int]:
    """The sizes (m, k, n) of a `dot_general`, of one product where there is a batch of them."""
    left, right = (atom.aval.shape for atom in eqn.invars)
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    m = math.prod(n for i, n in enumerate(left) if i not in (*left_sum, *left_batch))
    n = math.prod(n for i, n in enumerate(right) if i not in (*right_sum, *right_batch))
    return m, math.prod(left[i] for i in left_sum), n
