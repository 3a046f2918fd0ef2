"""docs/: what pages show runs and prints what they say, and what they name exists."""

import argparse
import contextlib
import doctest
import importlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import mpjax as mp
from mpjax import cli
from mpjax._hardware import TABLE
from mpjax.cli._parser import make_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
ROOMS = ("transforms", "fp8", "nnx", "linen", "diagnostics", "plots", "aot")
each_page = pytest.mark.parametrize("page", PAGES)


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    title: str
    text: str


def blocks(page, language=None):
    found = re.finditer(r'^```(\w+)(?: title="(.*)")?\n((?:.*\n)*?)```$', PAGES[page], re.MULTILINE)
    all_blocks = [Block(PAGES[page].count("\n", 0, m.start(3)), m[1], m[2] or "", m[3]) for m in found]
    return [block for block in all_blocks if language in (None, block.language)]


def inline_code(page):
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```(?:.*\n)*?```$", "", PAGES[page], flags=re.MULTILINE))


# Code -----------------------------------------------------------------------------------------------------------------

# Pages whose code takes more than two seconds.
SLOW = ("diagnostics.md", "fp8.md", "migrating.md", "recipes.md", "troubleshooting.md", "weights.md")


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else ()) for p in PAGES if blocks(p, "python")]
)
def test_code_runs_and_prints_what_is_shown(page, quick_compiles, tmp_path, monkeypatch):
    """From the top of the page to its end in one namespace; what a block prints is the block below it."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    found = blocks(page)
    for block, after in zip(found, [*found[1:], Block(0, "", "", "")], strict=True):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # At its line in the page, for messages.
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
        lines = [line.rstrip() + "\n" for line in printed.getvalue().splitlines()]
        got, shown = "".join(lines), after.text if after.title == "Output" else ""
        agrees = doctest.OutputChecker().check_output(shown, got, doctest.ELLIPSIS)
        assert agrees or got == shown, f"{page}:{block.line}"


@each_page
def test_blocks_say_what_they_are(page):
    """Ours are Python and run; another library's are text with its name as the title."""
    assert len(re.findall(r"^ *```", PAGES[page], re.MULTILINE)) == 2 * len(blocks(page)), "a fence that is not read"
    for block in blocks(page):
        assert block.language in ("python", "bash", "text"), block
        assert block.title or block.language != "text", block


# Names, commands, links -----------------------------------------------------------------------------------------------


@each_page
def test_names_exist(page):
    for dotted in set(re.findall(r"\bmp\.([A-Za-z_][\w.]*\w)", PAGES[page])):
        thing = mp
        for name in dotted.split("."):
            assert hasattr(thing, name), f"mp.{dotted}"
            thing = getattr(thing, name)


def commands(page):
    lines = [line for block in blocks(page, "bash") for line in block.text.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in (*lines, *inline_code(page))]


@each_page
def test_commands_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    subcommands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for command in commands(page):
        for target in re.findall(r"^make ([a-z-]+)", command):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
        for names in re.findall(r"mpjax\[([\w,-]+)\]", command):
            assert set(names.split(",")) <= set(extras), command
        for script in re.findall(r"^python ((?:examples|benchmarks)/\w+\.py)", command):
            source = (ROOT / script).read_text()
            for flag in re.findall(r"--[\w-]+", command):
                assert f'"{flag}"' in source, command
        for subcommand, rest in re.findall(r"^mpjax ([a-z]+)\b(.*)", command):
            assert subcommand in subcommands, command
            for flag in re.findall(r"--[\w-]+", rest):
                assert flag in subcommands[subcommand]._option_string_actions, command


@each_page
def test_commands_in_blocks_are_complete(page):
    for block in blocks(page, "bash"):
        for line in block.text.splitlines():
            command, *rest = shlex.split(line, comments=True) or [""]
            assert command in ("", "pip", "make", "python", "mpjax", "git", "cd"), line
            if command == "mpjax":
                make_parser().parse_args(rest)


@each_page
def test_files_exist(page):
    for path in re.findall(r"\b(?:examples|benchmarks|notebooks|tests|mpjax)/[\w/]+\.(?:py|md|ipynb)\b", PAGES[page]):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path = (DOCS / page).parent / target.split("#")[0]
        assert target.startswith("https://") or path.exists(), target


@pytest.mark.slow
def test_the_commands_run_on_the_module_that_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (module,) = [block for block in blocks("examples.md", "python") if block.title == "model.py"]
    Path("model.py").write_text(module.text)
    for block in blocks("examples.md", "bash"):
        for line in block.text.splitlines():
            if line.startswith("mpjax"):
                assert cli.main(shlex.split(line)[1:]) == 0, line
                assert capsys.readouterr().out.strip()
    assert {path.name for path in tmp_path.glob("errors.*")} == {"errors.json", "errors.png"}


def test_every_example_and_notebook_is_listed():
    for path in (*ROOT.glob("examples/*.py"), *ROOT.glob("notebooks/*.ipynb")):
        assert f"`{path.relative_to(ROOT).as_posix()}`" in PAGES["examples.md"], path.name


def test_the_hardware_table_is_the_one_in_the_code():
    for row in TABLE:
        cells = (row.name, row.compute, "dynamic" if row.needs_loss_scale else "none", row.fp8, row.note)
        assert f"| {' | '.join(map(str, cells))} |" in PAGES["policies.md"], row.name


# The reference --------------------------------------------------------------------------------------------------------


def public_names():
    """What `from ... import x as x` exports, in each namespace, and what a namespace has itself or makes when named."""
    for namespace in ("mpjax", *(f"mpjax.{room}" for room in ROOMS)):
        module = importlib.import_module(namespace)
        source = inspect.getsource(module)
        names = set(re.findall(r"^ *from [\w.]+ import (\w+) as \1$", source, re.MULTILINE))
        own = {n for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == namespace}
        names |= {n for n in own if n[0] != "_"}
        names |= set(dir(module)) - set(vars(module))
        for name in names:
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                yield f"{namespace}.{name}", thing


def referenced():
    """The names that pages of the reference show, and what is behind each."""
    for page, text in PAGES.items():
        for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
            module, name = path.rsplit(".", 1)
            yield path, getattr(importlib.import_module(module), name), page


def test_the_reference_has_every_public_name():
    shown = [thing for _, thing, _ in referenced()]
    missing = [name for name, thing in public_names() if not any(thing is one for one in shown)]
    assert not missing
    assert len(shown) > 100


def test_the_reference_has_no_name_twice():
    paths = [path for path, _, _ in referenced()]
    assert len(paths) == len(set(paths))


@pytest.mark.slow
def test_the_site_builds_without_a_network(tmp_path):
    """Strictly, with every name of the reference, and with pages that fetch nothing from elsewhere."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for path, _, page in referenced():
        assert f'id="{path}"' in pages[page.replace(".md", "/index.html")]
    for page, html in pages.items():
        assert not re.search(r'<(?:script|img)[^>]* src="(?:https?:)?//', html), page
        assert not re.search(r'<link[^>]* rel="stylesheet"[^>]* href="(?:https?:)?//', html), page
        assert "&gt;&gt;&gt;" not in re.sub(r"<(pre|span)(?:.|\n)*?</\1>", "", html), (
            f"{page}: an example that is no code"
        )
