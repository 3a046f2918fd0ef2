"""`mpjax info`: devices, versions, the hardware table and the policy to train with here."""

import collections
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

from mpjax._hardware import TABLE, UNKNOWN, hardware_of
from mpjax._loss_scale import NoOpLossScale
from mpjax._policy import default_policy
from mpjax.cli._checks import start_backend

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "jmp", "mpjax")


def run(*, as_json: bool) -> None:
    """Prints what is known about this machine, as tables or as JSON."""
    facts = gather(start_backend())
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(facts)


def gather(devices: Sequence[Any]) -> dict[str, Any]:
    """Collects everything that `mpjax info` shows, as JSON values.

    Args:
      devices: `jax.devices()`, or anything with their attributes. The first decides the row and the policy.
    """
    device = devices[0]
    row, policy = hardware_of(device), default_policy(device)
    kinds = collections.Counter((str(d.platform), str(d.device_kind)) for d in devices)
    scaled = not isinstance(policy.loss_scale(), NoOpLossScale)
    has_fp8 = bool(row.has_fp8(device))
    return {
        "devices": [{"platform": p, "kind": kind, "count": count} for (p, kind), count in kinds.items()],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": [
            {
                "family": each.name,
                "compute": each.compute.name,
                "loss_scale": "dynamic" if each.needs_loss_scale else "none",
                "fp8": each.fp8,
                "note": each.note,
                "this_machine": each is row,
            }
            for each in (TABLE if row is not UNKNOWN else (*TABLE, UNKNOWN))
        ],
        "recommended": {
            "policy": str(policy),
            "loss_scale": "dynamic" if scaled else "none",
            "fp8_matmuls": has_fp8,
            "reason": f"{row.name}: {row.note}. This device has {'' if has_fp8 else 'no '}fp8 matmuls.",
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_tables(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in columns:
            # Folded and not cut off: a note that ends in an ellipsis says nothing.
            made.add_column(column, overflow="fold")
        return made

    console = Console(highlight=False, markup=False)
    devices = table("Devices", "platform", "kind", "count")
    for device in facts["devices"]:
        devices.add_row(device["platform"], device["kind"], str(device["count"]))
    versions = table("Versions", *facts["versions"])
    versions.add_row(*(version or "not installed" for version in facts["versions"].values()))
    hardware = table("Precision by hardware (-> this machine)", "", "family", "compute", "loss\nscale", "fp8", "note")
    for row in facts["hardware"]:
        here = row["this_machine"]
        cells = [row[key] for key in ("family", "compute", "loss_scale", "fp8", "note")]
        hardware.add_row("->" if here else "", *cells, style="bold" if here else None)
    for each in (devices, versions, hardware):
        console.print(each)

    recommended = facts["recommended"]
    scale = "mp.DynamicLossScale()" if recommended["loss_scale"] == "dynamic" else "none"
    console.print(f"Recommended policy: {recommended['policy']}", style="bold", soft_wrap=True)
    console.print(f"Loss scale: {scale}. This is mp.default_policy() and its loss_scale().")
    console.print(f"Why: {recommended['reason']}")
