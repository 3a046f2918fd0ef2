"""The grammar of policy strings: text in, dtypes out. Nothing else in the package reads such strings."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mpjax._dtypes import FLOAT32, HALF_NAMES, canonical_dtype, known_names
from mpjax._errors import problem, shortened
from mpjax._hardware import half_dtype
from mpjax._path_patterns import LONGEST_PATTERN

PRESETS: Mapping[str, str] = {
    "mixed_bfloat16": "params=float32,compute=bfloat16,output=float32",
    "mixed_float16": "params=float32,compute=float16,output=float32",
    "mixed_float8": "params=float32,compute=float8_e4m3fn,output=float32",
}
LONGEST_POLICY = 100_000
EXAMPLE = 'mp.get_policy("params=float32,compute=bfloat16,output=float32")'

_KEYS = {
    "p": "param_dtype",
    "param": "param_dtype",
    "params": "param_dtype",
    "c": "compute_dtype",
    "compute": "compute_dtype",
    "o": "output_dtype",
    "output": "output_dtype",
    "r": "reduce_dtype",
    "reduce": "reduce_dtype",
}
_OVERRIDES = re.compile(r"\boverrides\s*=", re.IGNORECASE)


class ParsedPolicy(NamedTuple):
    """What a policy string says, with jmp's defaults filled in; overrides still hold strings."""

    param_dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    output_dtype: np.dtype[Any]
    reduce_dtype: np.dtype[Any]
    overrides: dict[str, str]


def parse_policy(text: str) -> ParsedPolicy:
    """Reads a preset's name, one dtype's name, or `key=dtype` pairs with `overrides={JSON}` at the end."""
    if len(text) > LONGEST_POLICY:
        raise ValueError(
            problem(
                f"policy {shortened(text)} is no policy.",
                expected=f"{LONGEST_POLICY} characters at most, with at most {LONGEST_PATTERN} in a pattern",
                write=EXAMPLE,
            )
        )
    head, *tail = _OVERRIDES.split(text, maxsplit=1)
    head = head.strip().removesuffix(",") if tail else head
    head = PRESETS.get(head.strip().lower(), head)
    overrides = _parse_overrides(tail[0]) if tail else {}
    if "=" in head or (not head.strip() and tail):
        dtypes = _parse_pairs(head, text)
        param = dtypes.get("param_dtype", FLOAT32)
        compute = dtypes.get("compute_dtype", param)
        output = dtypes.get("output_dtype", compute)
        return ParsedPolicy(param, compute, output, dtypes.get("reduce_dtype", FLOAT32), overrides)
    try:
        dtype = _parse_dtype(head, "policy")
    except ValueError:
        raise ValueError(
            problem(
                f"unknown policy {shortened(text)}.",
                expected=f"a preset ({', '.join(PRESETS)}), a dtype (half, {known_names()}), or key=dtype pairs",
                write=EXAMPLE,
            )
        ) from None
    return ParsedPolicy(dtype, dtype, dtype, FLOAT32, overrides)


def _parse_dtype(text: str, what: str) -> np.dtype[Any]:
    return canonical_dtype(half_dtype() if text.strip().lower() in HALF_NAMES else text, what)


def _parse_pairs(text: str, whole: str) -> dict[str, np.dtype[Any]]:
    dtypes: dict[str, np.dtype[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        name = _KEYS.get(key.strip().lower())
        if name is None or name in dtypes:
            raise ValueError(
                problem(
                    f"{'unknown key' if name is None else 'second value for'} {shortened(key.strip())} in policy "
                    f"{shortened(whole)}.",
                    expected="params, compute, output, reduce (or p, c, o, r) once each at most, then overrides={JSON}",
                    write=EXAMPLE,
                )
            )
        dtypes[name] = _parse_dtype(value, name)
    return dtypes


def _parse_overrides(text: str) -> dict[str, str]:
    try:
        pairs = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, brackets without end
        pairs = None
    if not isinstance(pairs, dict) or not all(isinstance(value, str) for value in pairs.values()):
        raise ValueError(
            problem(
                f"overrides={shortened(text)} is not a JSON object.",
                expected="a JSON object that maps patterns to policies, at the end of the string",
                write='overrides={".*norm.*": "float32"}',
            )
        )
    return pairs
