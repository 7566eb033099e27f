"""`hybridzoo list`: what the zoo holds. May import everything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from hybridzoo.cli import names
from hybridzoo.cli.output import command, fail, new_table, print_json, stdout, working

if TYPE_CHECKING:
    from hybridzoo.mixers.registry import Entry, Word
    from hybridzoo.studies import Study

EPILOG = """[bold]Examples[/]

hybridzoo list                  every mixer and the gates it has
hybridzoo list carve            one mixer: every word, what it may be, its default
hybridzoo list --specs          shipped stacks
hybridzoo list --backends       what computes attention and the recurrence on this machine
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
    backends: Annotated[
        bool, typer.Option("--backends", help="List what computes them on this machine, and what cannot and why.")
    ] = False,
    imports: names.Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """List token mixers with their gate flags, allowed values, defaults and source; or specs, studies or backends."""
    if (mixer is not None) + specs + studies + backends > 1:
        raise fail("give one of: a mixer's name, --specs, --studies, --backends")
    if backends:
        _list_backends(as_json)
    elif specs:
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
        from hybridzoo.mixers.registry import GATE_FLAGS, said
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
    for difference in filter(None, map(_differs, entries)):
        console.print(f"Beyond the gates: {difference}")
    console.print("Each flag may be changed: [bold]carve\\[erase=token,predict=decayed][/]. Its values:")
    for flag in GATE_FLAGS:
        # The recurrence's own list; a mixer that fixes its gates, such as Mamba-2, allows a part of it.
        choices = max((entry.flags[flag].choices for entry in entries if flag in entry.flags), key=len)
        console.print(f"  [bold]{flag:<8}[/] {', '.join(said(choice) for choice in choices)}")
    if not all(entry.stable for entry in entries):
        console.print("* unstable: left out of sweeps over the registry")
    console.print("[dim]hybridzoo list NAME shows every word of one mixer.[/]")


def _list_words(name: str, imports: list[str] | None, as_json: bool) -> None:
    with working("reading the registry"):
        names.import_own(imports)
        from hybridzoo.mixers.registry import get_entry, parse_mixer, said
        from hybridzoo.mixers.schema import unknown
    place = "hybridzoo list"
    name, given = parse_mixer(name, place)
    entry = get_entry(name, place)
    for key, value in given.items():
        if key not in entry.words:
            raise unknown(f"{place}: {name}", "word", key, entry.words)
        if (choices := entry.words[key].choices) and value not in choices:
            raise unknown(f"{place}: {name}.{key}", "value", said(value), map(said, choices))
    if as_json:
        print_json(_entry(entry))
        return
    table = new_table()
    table.add_column("word", style="bold", no_wrap=True)
    table.add_column("default")
    table.add_column("may be")
    table.add_column("meaning")
    for key, word in entry.words.items():
        default = "[dim]required[/]" if word.required else said(word.default)
        if key in given:
            default = f"[bold]{escape(said(given[key]))}[/] [dim](of itself {default})[/]"
        table.add_row(key, default, word.type.removeprefix("one of "), escape(word.meaning))
    console = stdout()
    console.print(f"[bold]{entry.name}[/]: {entry.summary} [dim]({entry.source})[/]")
    if difference := _differs(entry):
        console.print(difference)
    console.print(table)


def _list_specs(as_json: bool) -> None:
    with working("reading the shipped specs"):
        from hybridzoo.architectures import account, list_specs, load_spec
        from hybridzoo.training.units import count
    rows = []
    with working("counting"):
        for name in list_specs():
            spec = load_spec(name)
            rows.append((name, spec.pattern, len(spec.layers), account(spec).parameters))
    if as_json:
        print_json([dict(zip(("name", "pattern", "layers", "parameters"), row, strict=True)) for row in rows])
        return
    table = new_table()
    table.add_column("spec", style="bold", no_wrap=True)
    table.add_column("pattern")
    table.add_column("layers", justify="right")
    table.add_column("parameters", justify="right")
    for name, pattern, layers, size in rows:
        table.add_row(name, escape(pattern), str(layers), count(size))
    stdout().print(table)
    stdout().print("[dim]hybridzoo show NAME prints one, layer by layer.[/]")


def _list_backends(as_json: bool) -> None:
    with working("looking for backends"):
        from hybridzoo.mixers import softmax
        from hybridzoo.mixers.softmax.backends import usual_call
    rows, auto = softmax.found(), softmax.chosen()
    recurrence = _recurrence()
    serving = "torch" if recurrence["triton"] else "triton"
    if as_json:
        print_json(
            {"attention": [row._asdict() for row in rows], "auto": auto, "serving": serving, "recurrence": recurrence}
        )
        return
    table = new_table()
    table.add_column("attention", style="bold", no_wrap=True)
    table.add_column("package", no_wrap=True)
    table.add_column("here")
    for row in rows:
        here = row.summary
        if row.inference is not None:
            here = f"[red]refused:[/] {escape(row.inference)}"
        elif row.training is not None:
            here = f"[yellow]inference only:[/] {escape(row.training)}"
        packages = (f"{name} {version or 'not installed'}" for name, version in row.versions.items())
        table.add_row(row.name, "\n".join(packages), here)
    console = stdout()
    console.print(table)
    taken = ", ".join(f"[bold]{name}[/] for {case}" for case, name in auto.items())
    console.print(f"with heads of {usual_call().head_dim}, auto takes {taken}")
    by = "products of matrices" if serving == "torch" else "a [bold]triton[/] kernel, but for reference"
    console.print(f"generate and the server attend from one token a row by {by}, whatever backend is named")
    for name, refusal in recurrence.items():
        said = "yes" if refusal is None else f"[red]refused:[/] {escape(refusal)}"
        console.print(f"recurrent mixers by [bold]{name}[/]: {said}")


def _recurrence() -> dict[str, str | None]:
    """The backends of the recurrence, and why each cannot run here, if so."""
    import torch

    from hybridzoo.kernels.fused.support import device_refusal
    from hybridzoo.kernels.gated_delta_rule import BACKENDS

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: device_refusal(kind, None) if name == "triton" else None for name in BACKENDS if name != "auto"}


def list_studies(as_json: bool) -> None:
    """Print the shipped studies: what each is about, and what it trains, budgets and pilots not counted."""
    with working("reading the shipped studies"):
        from hybridzoo.studies import list_studies, load_study

        found = [load_study(name) for name in list_studies()]
    if as_json:
        print_json([{"name": study.name, "about": study.about, **_parts(study)} for study in found])
        return
    table = new_table()
    table.add_column("study", style="bold", no_wrap=True)
    table.add_column("about")
    for part in _parts(found[0]):
        table.add_column(part, justify="right", no_wrap=True)
    for study in found:
        table.add_row(study.name, escape(study.about), *(str(len(part)) for part in _parts(study).values()))
    stdout().print(table)
    stdout().print("[dim]hybridzoo study run NAME --dry-run lists the trials of one, with sizes and times.[/]")


def _parts(study: Study) -> dict[str, list[Any]]:
    """What is trained: each stack on each task from each seed."""
    from hybridzoo.studies.plan import listed_stacks

    return {"stacks": listed_stacks(study), "tasks": list(study.tasks), "seeds": list(study.seeds)}


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
        "meaning": word.meaning,
    }


def _default(flags: dict[str, Word], flag: str) -> str:
    from hybridzoo.mixers.registry import said

    # What is not corrected does not predict either: the flag is there, and means nothing yet.
    silent = flag not in flags or (flag == "predict" and flags["correct"].default == "none")
    return "" if silent else said(flags[flag].default)


def _short(source: str) -> str:
    """The first arXiv number of a source, or its beginning; `list NAME` and --json say it in full."""
    found = re.search(r"\d{4}\.\d{5}", source)
    return found[0] if found else source[:16]


def _differs(entry: Entry) -> str:
    """Tell a mixer from the one it extends, whose gates may be the same; nothing where it extends none."""
    from hybridzoo.mixers.registry import said

    if entry.differs is None:
        return ""
    parent, words = entry.differs
    changes = ", ".join(f"{name}={said(value)}" for name, value in words.items())
    return f"[bold]{entry.name}[/] is {parent} with {changes or 'code of its own'}"
