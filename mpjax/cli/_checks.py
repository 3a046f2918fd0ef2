"""What a subcommand needs before it starts: packages, a JAX backend, a place to write to."""

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from mpjax._errors import problem

_PIP_NAMES = {"sklearn": "scikit-learn"}


class CommandError(Exception):
    """An error with a message for the user: the command prints it and ends with exit code 1."""


def require(command: str, *modules: str) -> None:
    """Imports the modules of a subcommand.

    Raises:
      CommandError: some are not installed; the message is one line with the pip command to run.
    """
    missing: dict[str, None] = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # A package that is there but lacks one of its own needs says so better itself.
            if error.name not in modules:
                raise
            missing[_PIP_NAMES.get(error.name, error.name)] = None
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise CommandError(
            f'`mpjax {command}` needs {", ".join(missing)}, which {verb} not installed: pip install "mpjax[examples]"'
        )


def start_backend() -> list[Any]:
    """Starts JAX and returns its devices.

    Raises:
      CommandError: no backend starts.
    """
    try:
        return list(jax.devices())
    # Whatever it is: JAX 0.10 and 0.12 fail with a bare AssertionError where JAX_PLATFORMS names a missing plugin.
    except Exception as error:
        raise CommandError(
            problem(
                f"JAX found no device to run on: {str(error) or type(error).__name__}"
                f" (JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r})",
                expected="a backend that starts; JAX_PLATFORMS and the plugins installed decide which",
                write="JAX_PLATFORMS=cpu mpjax info",
            )
        ) from error


def figure_path(out: Path, name: str) -> Path:
    """Turns `--out` into the path of a PNG file in a folder that exists and can be written to.

    Args:
      out: a folder, made if it is not there, or a path that ends in `.png`.
      name: the file's name where `out` is a folder.

    Raises:
      CommandError: nothing can be written there, or `out` has the suffix of another image format.
    """
    example = f"mpjax demo --out out/{name}"
    suffix = out.suffix.lower()
    if suffix in (".pdf", ".svg", ".jpg", ".jpeg") and not out.is_dir():
        raise CommandError(problem(f"--out is {out}.", expected="a folder or a path that ends in .png", write=example))
    path = out if suffix == ".png" and not out.is_dir() else out / name
    _try_to_write(path, f"--out is {out}", example)
    return path


def output_file(option: str, path: Path | None) -> Path | None:
    """Checks that the file of `--json` or `--png` can be written, and makes its folder.

    Raises:
      CommandError: it cannot, or `--png` has the suffix of another image format.
    """
    if path is None:
        return None
    suffix = f".{option.removeprefix('--')}"
    example = f"{option} out/result{suffix}"
    if option == "--png" and path.suffix.lower() != suffix:
        raise CommandError(problem(f"--png is {path}.", expected="a path that ends in .png", write=example))
    _try_to_write(path, f"{option} is {path}", example)
    return path


def _try_to_write(path: Path, what: str, example: str) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if path.exists() and not path.is_file():  # a device, which writing whole would put a file in the place of
            raise OSError(f"{path} is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Permission bits do not say it all (read-only mounts, quotas): only writing shows that one can write.
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CommandError(
            problem(
                f"{what}: cannot write {path} ({error.strerror or error}).",
                expected="a folder that can be written to",
                write=example,
            )
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there entirely or not at all.

    Raises:
      CommandError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CommandError(
            problem(
                f"cannot write {path} ({error.strerror or error}).",
                expected="a folder that can be written to",
                write=f"out/{path.name}",
            )
        ) from error
