"""What the build of the documentation needs beside mkdocs.yml: a hook of MkDocs, and an extension of Griffe."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Files of the repository that pages show whole.
INCLUDED = ("benchmarks/RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Adds what included files link to beside them, such as pictures, where the page that includes one looks for it."""
    for name in INCLUDED:
        for target in re.findall(r"\]\(([\w/-]+\.\w+)\)", (ROOT / name).read_text()):
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str((ROOT / name).parent / target)))
    return files


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings: examples (`>>>`) that stand without a heading, and powers (2**16)."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is None:
            return
        text = re.sub(r"^>>> (?:.|\n)*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", obj.docstring.value, flags=re.MULTILINE)
        # What is code already stays: fenced, in backticks, or indented under "Examples:".
        code = r"```(?:.|\n)*?```|`[^`]*`|^ +(?:>>>|\.\.\.).*$|(?<=[\w)])\*\*"
        powers = re.sub(code, lambda found: r"\*\*" if found[0] == "**" else found[0], text, flags=re.MULTILINE)
        obj.docstring.value = powers
