"""`hybridzoo list`: what the zoo holds. May import everything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridzoo.cli import names
from hybridzoo.cli.output import command, fail, new_table, print_json, stdout, working

if TYPE_CHECKING:
    from hybridzoo.mixers.registry import Entry, Word

EPILOG = """[bold]Examples[/]

hybridzoo list                  every mixer and the gates it has
hybridzoo list carve            one mixer: every word, what it may be, its default
hybridzoo list --specs          shipped stacks
hybridzoo list --json           the registry as data"""


def complete_mixer(incomplete: str) -> list[str]:
    """Registered names; this one needs the registry itself."""
    from hybridzoo.mixers import list_mixers

    return [entry.name for entry in list_mixers() if entry.name.startswith(incomplete)]


@command
def list_command(
    mixer: Annotated[
        str | None, typer.Argument(metavar="MIXER", help="One of them, in full.", autocompletion=complete_mixer)
    ] = None,
    specs: Annotated[bool, typer.Option("--specs", help="List the shipped specs instead.")] = False,
    studies: Annotated[bool, typer.Option("--studies", help="List the shipped studies instead.")] = False,
    imports: names.Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """List token mixers with their gate flags, allowed values, defaults and source; or specs, or studies."""
    if (mixer is not None) + specs + studies > 1:
        raise fail("give one of: a mixer's name, --specs, --studies")
    if specs:
        _list_specs(as_json)
    elif studies:
        list_studies(as_json)
    elif mixer is not None:
        _list_words(mixer, imports, as_json)
    else:
        _list_mixers(imports, as_json)


def _list_mixers(imports: list[str] | None, as_json: bool) -> None:
    with working("reading the registry"):
        names.import_own(imports)
        from hybridzoo.mixers import list_mixers
        from hybridzoo.mixers.registry import GATE_FLAGS
    entries = list_mixers()
    if as_json:
        print_json([_entry(entry) for entry in entries])
        return
    table = new_table()
    table.add_column("mixer", style="bold", no_wrap=True)
    for flag in GATE_FLAGS:
        table.add_column(flag)
    table.add_column("arXiv", style="dim", no_wrap=True)
    for entry in entries:
        flags = entry.flags
        table.add_row(
            entry.name + ("" if entry.stable else " *"),
            *(_default(flags, flag) for flag in GATE_FLAGS),
            _short(entry.source),
        )
    console = stdout()
    console.print(table)
    console.print("Each flag may be changed: [bold]carve\\[erase=token,predict=decayed][/]. Its values:")
    for flag in GATE_FLAGS:
        # The recurrence's own list; a mixer that fixes its gates, such as Mamba-2, allows a part of it.
        choices = max((entry.flags[flag].choices for entry in entries if flag in entry.flags), key=len)
        console.print(f"  [bold]{flag:<8}[/] {', '.join(_said(choice) for choice in choices)}")
    if not all(entry.stable for entry in entries):
        console.print("* unstable: left out of sweeps over the registry")
    console.print("[dim]hybridzoo list NAME shows every word of one mixer.[/]")


def _list_words(name: str, imports: list[str] | None, as_json: bool) -> None:
    with working("reading the registry"):
        names.import_own(imports)
        from hybridzoo.mixers.registry import get_entry
    entry = get_entry(name, "hybridzoo list")
    if as_json:
        print_json(_entry(entry))
        return
    table = new_table()
    table.add_column("word", style="bold", no_wrap=True)
    table.add_column("default")
    table.add_column("may be")
    for key, word in entry.words.items():
        default = "[dim]required[/]" if word.required else _said(word.default)
        table.add_row(key, default, word.type.removeprefix("one of "))
    console = stdout()
    console.print(f"[bold]{entry.name}[/]: {entry.summary} [dim]({entry.source})[/]")
    console.print(table)


def _list_specs(as_json: bool) -> None:
    with working("reading the shipped specs"):
        from hybridzoo.architectures import account, list_specs, load_spec
        from hybridzoo.training.units import count
    rows = []
    with working("counting"):
        for name in list_specs():
            spec = load_spec(name)
            rows.append((name, len(spec.layers), account(spec).parameters))
    if as_json:
        print_json([{"name": name, "layers": layers, "parameters": size} for name, layers, size in rows])
        return
    table = new_table()
    table.add_column("spec", style="bold", no_wrap=True)
    table.add_column("layers", justify="right")
    table.add_column("parameters", justify="right")
    for name, layers, size in rows:
        table.add_row(name, str(layers), count(size))
    stdout().print(table)
    stdout().print("[dim]hybridzoo show NAME prints one, layer by layer.[/]")


def list_studies(as_json: bool) -> None:
    """Print the names of the shipped studies."""
    found = names.shipped("studies")
    if as_json:
        print_json(found)
        return
    for name in found:
        stdout().print(name)


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "source": entry.source,
        "summary": entry.summary,
        "stable": entry.stable,
        "flags": {key: _word(word) for key, word in entry.flags.items()},
        "words": {key: _word(word) for key, word in entry.words.items()},
    }


def _word(word: Word) -> dict[str, Any]:
    return {
        "default": word.default,
        "choices": list(word.choices),
        "type": word.type,
        "required": word.required,
    }


def _default(flags: dict[str, Word], flag: str) -> str:
    # What is not corrected does not predict either: the flag is there, and means nothing yet.
    silent = flag not in flags or (flag == "predict" and flags["correct"].default == "none")
    return "" if silent else _said(flags[flag].default)


def _short(source: str) -> str:
    """The first arXiv number of a source, or its beginning; `list NAME` and --json say it in full."""
    found = re.search(r"\d{4}\.\d{5}", source)
    return found[0] if found else source[:16]


def _said(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
