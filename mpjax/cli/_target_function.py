"""The function that a subcommand looks at, named as `module:function`, and the arguments to look at it with.

The arguments are the module's `example_args`, or what `--args` names: a tuple of arguments, a dict of keyword
arguments, or a function without parameters that returns one of them. `jax.ShapeDtypeStruct`s do for arrays.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._errors import problem
from mpjax.cli._checks import CommandError

EXAMPLE_ARGS = "example_args"
_LINES = """def example_args():
                return jax.ShapeDtypeStruct((512, 10), "float32"), jax.ShapeDtypeStruct((64, 512), "float32")"""
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class TargetFunction:
    """A function and what to call it with.

    Attributes:
      name: as the user wrote it.
      module: the module that it is in.
      fn: the function, of the positional arguments `args`.
      args: pytrees of arrays and structs. Other leaves, such as Python numbers and strings, are in `fn` already.
    """

    name: str
    module: ModuleType
    fn: Callable[..., Any]
    args: tuple[Any, ...]


def load(text: str, args_name: str | None) -> TargetFunction:
    """Imports a function and its example arguments.

    Args:
      text: `package.module:function` or `path/to/file.py:function`.
      args_name: what `--args` says: a name in the same module, or in another as `module:name`.

    Raises:
      CommandError: it cannot be imported, is not there or is no function; or the same of the arguments.
    """
    module, name, fn = _found(text, "the function", "mpjax explain my_model:loss_fn")
    if not callable(fn):
        raise CommandError(
            problem(
                f"{text} is no function: it is of type {type(fn).__name__}.",
                expected=f"a function in {module.__name__}",
                write=_suggestions(module),
            )
        )
    args, parameters = _example_args(module, name, args_name)
    if parameters is not None:
        by_position, fn = fn, lambda *values: by_position(**dict(zip(parameters, values, strict=True)))
    return TargetFunction(text, module, *_arrays_only(fn, args))


def _found(text: str, what: str, example: str) -> tuple[ModuleType, str, Any]:
    place, colon, name = text.rpartition(":")
    if not (place and colon and name):
        raise CommandError(
            problem(f"{what} is {text!r}.", expected="module:name or path/to/file.py:name", write=example)
        )
    module = _module(place)
    try:
        return module, name, functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        raise CommandError(
            problem(f"{place} has no {name}.", expected=f"a name in {place}", write=_suggestions(module))
        ) from None


def _module(place: str) -> ModuleType:
    path = Path(place)
    is_file = path.suffix == ".py" or os.sep in place
    # Where `python -m` and `python file.py` look first.
    for folder in (Path.cwd(), *([path.resolve().parent] if is_file else [])):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    if not is_file:
        return _imported(place, lambda: importlib.import_module(place))
    if not path.is_file():
        raise CommandError(
            problem(
                f"there is no file {place} (the current folder is {Path.cwd()}).",
                expected="a Python file",
                write="path/to/file.py:function",
            )
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(
            problem(f"{place} is no Python file.", expected="a file that ends in .py", write="file.py:function")
        )
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    # Dataclasses and pickles look their module up by name.
    sys.modules.setdefault(path.stem, module)
    _imported(place, lambda: loader.exec_module(module))
    return module


def _imported(place: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise CommandError(
                problem(
                    f"there is no module {error.name} (the current folder is {Path.cwd()}).",
                    expected="a module of this environment or of the current folder, or a file",
                    write="package.module:function, or path/to/file.py:function",
                )
            ) from error
        raise CommandError(_told(error, f"{place} cannot be imported")) from error
    except (Exception, SystemExit) as error:
        raise CommandError(_told(error, f"{place} cannot be imported")) from error


def _suggestions(module: ModuleType) -> str:
    own = [
        name
        for name, thing in vars(module).items()
        if callable(thing) and not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]
    found = [f"{module.__name__}:{name}" for name in own if name != EXAMPLE_ARGS]
    return ", ".join(found[:8]) or f"a function into {module.__name__}"


def _example_args(
    module: ModuleType, function: str, args_name: str | None
) -> tuple[tuple[Any, ...], tuple[str, ...] | None]:
    """The arguments, and their names if they are keyword arguments."""
    if args_name is None:
        where, found = f"{module.__name__}:{EXAMPLE_ARGS}", getattr(module, EXAMPLE_ARGS, _MISSING)
    elif ":" in args_name:
        where, found = args_name, _found(args_name, "--args", f"--args {EXAMPLE_ARGS}")[2]
    else:
        where, found = f"{module.__name__}:{args_name}", getattr(module, args_name, _MISSING)
    if found is _MISSING:
        raise CommandError(
            problem(
                f"there are no arguments to try {function} with: {where} is not there.",
                expected=f"{EXAMPLE_ARGS} beside the function, or another name given by --args",
                write=_LINES,
            )
        )
    if callable(found):
        found = called(found, where)
    if type(found) is tuple:
        return found, None
    if isinstance(found, dict):
        return tuple(found.values()), tuple(found)
    raise CommandError(
        problem(
            f"{where} is of type {type(found).__name__}.",
            expected="a tuple of arguments, a dict of keyword arguments, or a function that returns one",
            write="return (x,), for the one argument x",
        )
    )


def _arrays_only(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    leaves, structure = jax.tree.flatten(args)
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]
    if all(is_array):
        return fn, args

    def of_arrays(*arrays: Any) -> Any:
        moving = iter(jax.tree.leaves(arrays))
        merged = [next(moving) if m else x for x, m in zip(leaves, is_array, strict=True)]
        return fn(*jax.tree.unflatten(structure, merged))

    # None has no leaves: it keeps a place empty.
    kept = jax.tree.unflatten(structure, [x if m else None for x, m in zip(leaves, is_array, strict=True)])
    return of_arrays, kept


def called(fn: Callable[..., Any], name: str, *args: Any) -> Any:
    """Calls a function of the user's.

    Raises:
      CommandError: it raises something; the message has its type, its text and the line.
    """
    try:
        return fn(*args)
    except (Exception, SystemExit) as error:
        raise CommandError(_told(error, f"{name} raised an error")) from error


def _told(error: BaseException, what: str) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{what}{at}: {type(error).__name__}: {error}"


_OURS, _PACKAGES = Path(__file__).parents[1], Path(jax.__file__).parents[1]
_LIBRARIES = (f"{_OURS}{os.sep}", f"{_PACKAGES}{os.sep}", f"{Path(importlib.__file__).parent}{os.sep}", "<")


def differentiated(target: TargetFunction) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The transformation that `--grad` asks for: value and gradients with respect to the first argument.

    Raises:
      CommandError: the function returns no scalar, and no pair of a scalar and anything else; or raises an error.
    """
    out = called(jax.eval_shape, target.name, target.fn, *target.args)
    has_aux = isinstance(out, tuple) and len(out) == 2
    loss = out[0] if has_aux else out
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        shown = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", out)
        raise CommandError(
            problem(
                f"--grad differentiates a loss, and {target.name} returns {shown}.",
                expected="a function that returns a scalar, or a pair of a scalar and anything else",
                write="return losses.mean()",
            )
        )
    return functools.partial(jax.value_and_grad, has_aux=has_aux)


def checked(target: TargetFunction, through: Callable[[Callable[..., Any]], Callable[..., Any]] | None) -> None:
    """Traces the function as it is, so that an error of its own is told as such.

    Raises:
      CommandError: it raises an error.
    """
    fn = through(target.fn) if through else target.fn
    called(jax.eval_shape, target.name, fn, *target.args)
