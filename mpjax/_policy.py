"""Policies: which dtype parameters, computation and outputs have, as an immutable value."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

import jmp
import numpy as np

from mpjax._apply_to import AppliedPolicy, apply_to_module
from mpjax._dtypes import BFLOAT16, FLOAT16, FLOAT32, canonical_dtype, is_float8
from mpjax._dynamic_loss_scale import DynamicLossScale
from mpjax._errors import problem
from mpjax._hardware import hardware_of
from mpjax._loss_scale import LossScale, NoOpLossScale
from mpjax._overrides import cast_by_path
from mpjax._path_patterns import check_pattern
from mpjax._policy_grammar import EXAMPLE, parse_policy
from mpjax._tree import cast_floats
from mpjax._typing import T


@dataclasses.dataclass(frozen=True, repr=False)
class Policy(jmp.Policy):  # type: ignore[misc]  # jmp has no types
    """The dtypes of parameters, computation and outputs, and of gradient sums across devices.

    It is a `jmp.Policy`, so haiku and everything else that takes one takes it. Frozen and hashable: equal
    policies have equal hashes, whichever spelling of a dtype made them, and `get_policy(str(p)) == p`.

    Attributes:
      param_dtype: what `cast_to_param` casts to.
      compute_dtype: what `cast_to_compute` casts to. An 8-bit dtype names the operands of matmuls, which each
        need a scale of their own; a tree has none, so `cast_to_compute` then casts to bfloat16.
      output_dtype: what `cast_to_output` casts to.
      reduce_dtype: the dtype that gradients are summed in across devices; see `cast_to_reduce`. A sharded `jit` sums
        in the compute dtype, if it is that, else in float32 (on CPUs always in the compute dtype).
      overrides: pairs of a path pattern and the policy of the parameters there; see `with_overrides`.

    The dtypes are `numpy.dtype`s; jmp's are scalar types, so `policy.compute_dtype(1.0)` is `jnp.asarray(1.0,
    policy.compute_dtype)` here.

    Raises:
      TypeError: a dtype is not floating (integers, booleans, complex numbers).
      ValueError: a dtype's name is unknown, or one that is not for compute has 8 bits.

    Examples:
      >>> import jax.numpy as jnp, mpjax as mp
      >>> policy = mp.Policy(jnp.float32, jnp.bfloat16, jnp.float32)
      >>> policy.cast_to_compute({"w": jnp.ones(2), "step": jnp.array(3)})
      {'step': Array(3, dtype=int32...), 'w': Array([1, 1], dtype=bfloat16)}
      >>> str(policy)
      'params=float32,compute=bfloat16,output=float32'

    References:
      jmp.Policy, https://github.com/google-deepmind/jmp; FSDP2's MixedPrecisionPolicy for `reduce_dtype`.
    """

    param_dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    output_dtype: np.dtype[Any]
    reduce_dtype: np.dtype[Any] = FLOAT32
    overrides: tuple[tuple[str, "Policy"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("param_dtype", "compute_dtype", "output_dtype", "reduce_dtype"):
            dtype = canonical_dtype(getattr(self, name), name)
            if is_float8(dtype) and name != "compute_dtype":
                raise ValueError(
                    problem(
                        f"{name} is {dtype}, which without a scale is inf, NaN or 0 for most values.",
                        expected="an 8-bit dtype for compute alone; 16 bits or more for all others",
                        write='mp.get_policy("mixed_float8"), or params=float32,compute=float8_e4m3fn,output=float32',
                    )
                )
            object.__setattr__(self, name, dtype)
        object.__setattr__(self, "overrides", _checked_overrides(self.overrides))

    def __str__(self) -> str:
        text = f"params={self.param_dtype},compute={self.compute_dtype},output={self.output_dtype}"
        if self.reduce_dtype != FLOAT32:
            text += f",reduce={self.reduce_dtype}"
        if self.overrides:
            text += ",overrides=" + json.dumps({pattern: str(policy) for pattern, policy in self.overrides})
        return text

    def __repr__(self) -> str:
        return f"mpjax.get_policy({str(self)!r})"

    def cast_to_param(self, x: T) -> T:
        """Casts the float leaves of a tree to `param_dtype`, or to what `overrides` say for their path.

        Integers, booleans, PRNG keys, complex numbers, fp8 leaves, `None` and Python numbers stay as they are.
        """
        return self._cast(x, "param_dtype")

    def cast_to_compute(self, x: T) -> T:
        """Casts the float leaves of a tree to `compute_dtype`, or to what `overrides` say for their path."""
        return self._cast(x, "compute_dtype")

    def cast_to_output(self, x: T) -> T:
        """Casts the float leaves of a tree to `output_dtype`. Outputs are no parameters: no overrides apply."""
        return cast_floats(x, self.output_dtype)

    def cast_to_reduce(self, x: T) -> T:
        """Casts the float leaves of a tree to `reduce_dtype`: gradients, before a collective sums them up.

        For code that sums them itself, under `shard_map` or `pmap`. What a gradient sums over devices inside
        `mpjax.autocast` is summed in `reduce_dtype` already. `mpjax.loss_scaled` widens the result to float32. No
        overrides apply: gradients are no parameters.

        >>> import jax, jax.numpy as jnp, mpjax as mp
        >>> policy = mp.get_policy("params=float32,compute=bfloat16,output=float32,reduce=bfloat16")
        >>> mean = jax.vmap(lambda g: jax.lax.pmean(policy.cast_to_reduce(g), "data"), axis_name="data")
        >>> mean(jnp.array([1.0, 3.0]))
        Array([2, 2], dtype=bfloat16)
        """
        return cast_floats(x, self.reduce_dtype)

    def loss_scale(self) -> LossScale:
        """The loss scale that the compute dtype needs: dynamic for float16, none for all others.

        >>> import mpjax as mp
        >>> type(mp.get_policy("mixed_float16").loss_scale()).__name__
        'DynamicLossScale'
        >>> type(mp.get_policy("mixed_bfloat16").loss_scale()).__name__
        'NoOpLossScale'
        """
        return DynamicLossScale() if self.compute_dtype == FLOAT16 else NoOpLossScale()

    def apply_to(self, module: Any) -> AppliedPolicy:
        """Sets the dtypes of a Flax NNX module and of all modules in it, for those who prefer that to `mpjax.autocast`.

        `dtype` becomes the compute dtype and `param_dtype` the parameters' dtype, where a module has such an attribute;
        the `nnx.Param`s that it has are cast. Batch statistics, random number states and all other variables stay. The
        module is changed in place, what is shared once; it computes as its code makes of `dtype`: Flax's norms take
        their statistics in float32, its attention takes the softmax in `dtype`, which `mpjax.autocast` does not.

        An override holds for the modules whose whole path its pattern matches and for their own parameters, or for the
        parameters or attributes that it matches: `.*norm`, `.*norm/scale`, `.*norm/dtype`. Paths are those of
        `nnx.state`, which gives what is shared one path, the first.

        Args:
          module: an `nnx.Module`, abstract ones (`nnx.eval_shape`) too.

        Returns:
          What was set, and which modules with parameters have no `dtype`; `print` it.

        Raises:
          TypeError: `module` is no NNX module.
          ValueError: overrides that match one path disagree. Nothing was set then.

        Warns:
          UserWarning: an override matches no path.

        >>> import mpjax as mp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)))
        >>> print(mp.get_policy("mixed_bfloat16").apply_to(model))
        path             module  attribute    before   after
        layers/0         Linear  dtype        None     bfloat16
        layers/0         Linear  param_dtype  float32  float32
        layers/0/kernel  Param   value        float32  float32
        """
        return apply_to_module(
            module,
            self,
            self.overrides,
            lambda policy: _tree_dtype(policy, "compute_dtype"),
            lambda policy: policy.param_dtype,
        )

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """Returns this policy with exceptions for parameters at some paths.

        A pattern is a regular expression that must match a leaf's whole path, ignoring case. Paths are written
        `"params/encoder/LayerNorm_0/scale"`, for dicts, Linen, NNX states, tuples and dataclasses alike. They
        may come from anywhere: none takes more than polynomial time, and what could is refused.

        Args:
          overrides: maps patterns to a `Policy`, a policy string or a dtype (which then is the dtype of
            parameters and computation there). They replace any overrides there were.

        Raises:
          ValueError: a pattern is not a regular expression, has more than 10,000 characters, a backreference, a
            condition, an atomic group or a possessive repeat; or a policy has overrides of its own. On a cast, when
            two patterns that match one path name different policies.

        Warns:
          UserWarning: on a cast of a tree (not of a bare array), when a pattern matches no path in it.

        >>> import jax.numpy as jnp, mpjax as mp
        >>> policy = mp.get_policy("mixed_bfloat16").with_overrides({r".*(norm|bn).*": "float32"})
        >>> params = {"dense": {"kernel": jnp.ones(1)}, "LayerNorm_0": {"scale": jnp.ones(1)}}
        >>> cast = policy.cast_to_compute(params)
        >>> cast["dense"]["kernel"].dtype.name, cast["LayerNorm_0"]["scale"].dtype.name
        ('bfloat16', 'float32')
        """
        if not isinstance(overrides, Mapping):
            raise TypeError(
                problem(
                    f"overrides is {overrides!r}.",
                    expected="a mapping from patterns to policies or dtypes",
                    write='policy.with_overrides({r".*norm.*": "float32"})',
                )
            )
        return dataclasses.replace(self, overrides=tuple(overrides.items()))

    def _cast(self, tree: T, kind: str) -> T:
        return cast_by_path(tree, self, self.overrides, lambda policy: _tree_dtype(policy, kind))


def get_policy(policy: Any) -> Policy:
    """Reads a policy from its name: a preset, one dtype for all, or jmp's `key=dtype` grammar.

    Spaces and case do not matter. Keys are `params`, `compute`, `output` and `reduce` (or `p c o r`); left out,
    params is float32, compute follows params, output follows compute, as in jmp, and reduce is float32.

    Args:
      policy: `"mixed_bfloat16"`, `"mixed_float16"`, `"mixed_float8"`, a dtype's name (`"half"` means this
        machine's, see `half_dtype`), `"params=float32,compute=bfloat16,output=float32"`, what `str(policy)`
        gave, or a policy already (a `jmp.Policy` is converted).

    Raises:
      ValueError: the name, a key or a dtype is unknown, a key is given twice, or there are more than 100,000
        characters.
      TypeError: a dtype is not floating, or `policy` is neither a string nor a policy.

    >>> import mpjax as mp
    >>> mp.get_policy("c = BF16")
    mpjax.get_policy('params=float32,compute=bfloat16,output=bfloat16')
    >>> mp.get_policy("mixed_float16").compute_dtype
    dtype('float16')
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, jmp.Policy):
        return Policy(policy.param_dtype, policy.compute_dtype, policy.output_dtype)
    if not isinstance(policy, str):
        raise TypeError(
            problem(f"policy is {policy!r}, a {type(policy).__name__}.", expected="a string or a policy", write=EXAMPLE)
        )
    parsed = parse_policy(policy)
    return Policy(*parsed[:4], tuple(parsed.overrides.items()))


def default_policy(device: Any = None) -> Policy:
    """The policy to train with on a device: bfloat16 on TPUs and recent GPUs, float16 on a V100 or T4.

    `mpjax info` prints the whole table with this machine's row marked. Parameters and outputs are float32.

    Args:
      device: a `jax.Device`, or anything with its `platform`, `device_kind` and `compute_capability`.
        Default: the first local device.

    >>> import jax, mpjax as mp
    >>> mp.default_policy(jax.devices("cpu")[0])
    mpjax.get_policy('params=float32,compute=float32,output=float32')
    """
    return Policy(FLOAT32, hardware_of(device).compute, FLOAT32)


def _tree_dtype(policy: Policy, kind: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = getattr(policy, kind)
    return BFLOAT16 if kind == "compute_dtype" and is_float8(dtype) else dtype


def _as_policy(value: Any) -> Policy:
    if isinstance(value, str | jmp.Policy):
        return get_policy(value)
    dtype = canonical_dtype(value, "override")
    return Policy(dtype, dtype, dtype)


def _checked_overrides(overrides: Any) -> tuple[tuple[str, Policy], ...]:
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    rules = {}
    for pattern, value in pairs:
        check_pattern(pattern)
        policy = rules[pattern] = _as_policy(value)
        if policy.overrides:
            raise ValueError(
                problem(
                    f"the policy for {pattern!r} has overrides of its own.",
                    expected="a policy or dtype without exceptions",
                    write="one with_overrides call with all patterns",
                )
            )
    # Sorted, since their order has no meaning: equal sets of rules make equal policies.
    return tuple(sorted(rules.items()))
