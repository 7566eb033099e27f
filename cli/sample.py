"""`hybridzoo generate`: text from a trained folder, byte by byte as it comes. May import everything."""

from __future__ import annotations

import codecs
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridzoo.cli import names
from hybridzoo.cli.output import command, fail, note, print_json, working

if TYPE_CHECKING:
    from hybridzoo.architectures import HybridLM

EPILOG = """[bold]Examples[/]

hybridzoo generate runs/carve-hybrid-tiny-bytes --prompt "def "

echo "class Node:" | hybridzoo generate runs/carve-hybrid-tiny-bytes --prompt - --temperature 0"""


def complete_source(incomplete: str) -> list[str]:
    """Trained folders first, then specs."""
    return [*names.complete_run(incomplete), *names.complete_spec(incomplete)]


@command
def generate_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_SPEC",
            help="A folder that [bold]hybridzoo train[/] wrote; or a spec, whose weights are then untrained.",
            autocompletion=complete_source,
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to a spec.", show_default=False)
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="The text to go on from; - reads it from stdin. Default: a line break.",
            show_default=False,
        ),
    ] = "\n",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Bytes to add.", min=0)] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            help="0 takes the likeliest byte (the default of [bold]generate[/] in Python), 1 draws as trained.", min=0.0
        ),
    ] = 0.8,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest bytes that hold this probability: above 0, at most 1."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest bytes.", min=1)] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw from bytes at least this share as probable as the likeliest: above 0, at most 1."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Make the draw repeatable.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End with this text, which is printed too. May be given more than once.", show_default=False),
    ] = None,
    imports: names.Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt and continuation as data, at the end.")] = False,
) -> None:
    """Go on from a prompt with a byte-level model, printing each byte as it is drawn."""
    given = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)  # bytes of any kind, as they came
    if not given:
        raise fail("the prompt is empty: give at least one character to go on from")
    with working("loading the model"):
        import torch

        from hybridzoo.architectures import Ending, Sampling, stream
        from hybridzoo.mixers.schema import SpecError

        names.import_own(imports)
        model = _load(source, overrides or [])
    ids = torch.frombuffer(bytearray(given), dtype=torch.uint8).long()[None]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(given)
    pieces: list[str] = []

    def say(piece: str) -> None:
        if not as_json:
            typer.echo(piece if pieces else text + piece, nl=False)
            sys.stdout.flush()
        pieces.append(piece)

    started = time.perf_counter()
    model.eval()
    added = 0
    try:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        ending = Ending(stop=tuple(stop or ()), decode=lambda new: bytes(new).decode(errors="replace"))
        for step in stream(model, ids, max_new_tokens, sampling=sampling, ending=ending):
            say(decoder.decode(bytes(step.tokens.tolist())))
            added += 1
    except ValueError as error:  # options that do not go together, or more tokens than the model takes
        raise SpecError(str(error)) from error
    seconds = time.perf_counter() - started
    say(decoder.decode(b"", final=True))
    if as_json:
        print_json({"prompt": text, "continuation": "".join(pieces), "tokens": added, "seconds": seconds})
        return
    typer.echo()
    note(f"{added} bytes in {seconds:.1f} s")


def _load(source: str, overrides: list[str]) -> HybridLM:
    from hybridzoo.architectures import build_model, list_specs, load_spec
    from hybridzoo.cli.runs import SPEC, WEIGHTS, is_run, load_run
    from hybridzoo.mixers.schema import SpecError, nearest

    folder = Path(source)
    if is_run(folder):
        if overrides:
            raise SpecError(f"{folder}: a trained model is as it was trained: '{overrides[0]}' cannot change it")
        model = load_run(folder)
    elif folder.is_dir():
        raise SpecError(f"{folder}: no trained model here (it would hold {WEIGHTS} and {SPEC})")
    elif os.sep in source and folder.suffix not in (".yaml", ".yml") and not folder.exists():
        raise SpecError(f"{source}: no such folder, and no such spec (the path of one ends in .yaml)")
    elif folder.suffix not in (".yaml", ".yml") and not _known(source):
        near = nearest(source, [*list_specs(), *names.complete_run("")])
        raise SpecError(
            f"{source}: neither a run's folder nor a spec has this name{near}; specs: `hybridzoo list --specs`"
        )
    else:
        model = build_model(load_spec(source, overrides))
        note("these weights are untrained, so what follows is noise; train them first with: hybridzoo train")
    if model.spec.vocab_size != 256:
        raise SpecError(f"{source}: vocab_size is {model.spec.vocab_size}; only byte-level models (256) speak text")
    return model


def _known(name: str) -> bool:
    """Whether something has this name, be it no spec: `load_spec` then says what it is."""
    return name in names.shipped("architectures") + names.shipped("studies") or Path(f"{name}.yaml").exists()
