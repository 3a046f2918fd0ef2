"""`mpjax explain`: which operation of a function runs in which precision, and why."""

from pathlib import Path
from typing import Any

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
    with_gradients: bool,
    json: Path | None,
    png: Path | None,
) -> None:
    """Traces and prints.

    Args:
      function: `module:function`, or `path/to/file.py:function`.
      args_name: where the arguments are, if not in `example_args`.
      policy: the policy, by name or in the grammar of `mpjax.get_policy`.
      preset: of `mpjax.default_rules`.
      with_gradients: whether to list the backward pass too.
      json: a file to write everything to, or `None`.
      png: a file to draw to, or `None`.

    Raises:
      CommandError: there is no such policy, function or argument, or the function cannot be traced.
    """
    chosen = policy_named(policy)
    start_backend()
    target = load(function, args_name)
    through = differentiated(target) if with_gradients else None
    checked(target, through)
    explain: Any = mp.explain(target.fn, chosen, rules_of(preset), through=through)
    found = try_to(explain, *target.args)
    show(found)

    def draw() -> Any:
        from mpjax.cli._explain_figure import draw

        return draw(found)

    write_results(found.to_json(), draw, json, png)
