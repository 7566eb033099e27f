"""How the command speaks: results on stdout, everything else on stderr, and errors as one readable message.

May import everything, but nothing heavy until it is needed: `hybridzoo --help` must not wait for torch. The commands
live in the modules beside this one.

Exit codes: 0 done, 1 a run failed, 2 what was asked for cannot be done as written, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

P = ParamSpec("P")
R = TypeVar("R")

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

TRACEBACK = "HYBRIDZOO_TRACEBACK"


def stdout() -> Console:
    """The console for results. Made anew each time, since tests and pipes exchange the stream underneath."""
    return Console(highlight=False, soft_wrap=False)


def stderr() -> Console:
    """The console for progress, notes and errors."""
    return Console(stderr=True, highlight=False)


def new_table(show_footer: bool = False) -> Table:
    """An empty table in the house's look: a rule under the head, and no lines else."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=show_footer)


def print_json(data: Any) -> None:
    """Write `data` to stdout as JSON and nothing else; infinities become text, since JSON has none."""
    typer.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def note(text: str) -> None:
    """Say something in passing, on stderr."""
    stderr().print(escape(text), style="dim", soft_wrap=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show a spinner with `text` on stderr while something takes a moment; nothing where stderr is not a terminal."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(escape(text)):
        yield


def fail(message: str, code: int = BAD_INPUT) -> typer.Exit:
    """Print an error the way every command does, and return what to raise."""
    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return typer.Exit(code)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into one message and an exit code; with HYBRIDZOO_TRACEBACK=1, show where it rose."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise fail("interrupted", INTERRUPTED) from None
        except BrokenPipeError:  # `hybridzoo list | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            if os.environ.get(TRACEBACK, "0") not in ("", "0"):
                stderr().print_exception()
            raise fail(*_explain(error)) from None

    return run


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code for an exception."""
    from hybridzoo.mixers.extras import EXTRAS, how_to_install
    from hybridzoo.mixers.schema import SpecError  # by now something heavy has run, or the input was bad anyway
    from hybridzoo.training import DivergedError

    if isinstance(error, SpecError):
        return str(error), BAD_INPUT
    if isinstance(error, DivergedError):
        return str(error), FAILED
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        if package in EXTRAS:
            return f"this needs {package}: {how_to_install(package)}", BAD_INPUT
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", BAD_INPUT
    said = str(error) or "no message"
    return f"{type(error).__name__}: {said}\n(set {TRACEBACK}=1 to see where it happened)", FAILED
