"""The documentation is executable: its Python runs, its YAML builds, its commands exist and its links lead somewhere.

On a page, ```python blocks run in order and share their names; a ```yaml block whose first line is `# NAME.yaml` is
written to that file first, so that later blocks may load it; in ```console blocks, lines that start with `$ ` are
commands.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# Commands that only print, quickly: these are run, not just looked up.
QUICK = {"list", "show", "--version", "--help"}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]


def commands_of(page: Path) -> list[str]:
    lines = [line for block in blocks_of(page) if block.language == "console" for line in block.text.splitlines()]
    return [line[2:].split("#")[0].strip() for line in lines if line.startswith("$ ")]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


@pytest.fixture
def written(request, tmp_path, monkeypatch):
    """A directory of its own, holding the YAML files that the page shows."""
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(request.param):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        if block.language == "yaml" and name:
            Path(name[1]).write_text(block.text)
    return request.param


@pytest.mark.parametrize("written", PAGES, ids=named, indirect=True)
def test_the_python_on_a_page_runs(written):
    # All of it is one script, in a process of its own: what a page registers is gone afterwards. Every other line is
    # left empty, so that a traceback names the line of the page.
    lines = [""] * len(written.read_text().splitlines())
    for block in blocks_of(written):
        if block.language == "python":
            code = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    if any(lines):
        script = Path(f"{written.name}.py")
        script.write_text("\n".join(lines) + "\n")
        done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def find(words: list[str]) -> None:
    """Walk a command line through the real parsers, running nothing; a bad word raises what the shell would show."""
    command, name = typer.main.get_command(app()), "hybridzoo"
    context = command.make_context(name, list(words), resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        assert rest, f"'{' '.join(words)}' stops before a command"
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None, f"no command '{name}'"
        context = command.make_context(name, rest, parent=context, resilient_parsing=hasattr(command, "commands"))


def app() -> typer.Typer:
    from hybridzoo.cli import app

    return app


@pytest.mark.parametrize(
    ("written", "command"), COMMANDS, ids=[f"{page.name}:{text}" for page, text in COMMANDS], indirect=["written"]
)
def test_a_command_on_a_page_exists(written, command):
    words = shlex.split(command)
    while "=" in words[0]:  # environment variables given in front
        words.pop(0)
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= MAKE_TARGETS
    elif words[0] == "hybridzoo" and words[1] in QUICK:
        result = CliRunner().invoke(app(), words[1:])
        assert result.exit_code == 0, result.output
    elif words[0] == "hybridzoo":
        find(words[1:])
    else:
        assert words[0] in {"git", "cd", "pip", "source", "pytest", "python"}, f"a reader cannot run '{command}'"


def anchors_of(page):
    """What a link may name on a page: its headings, as they become anchors."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_link_leads_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
