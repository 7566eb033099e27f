"""`hybridzoo show`: a stack, layer by layer, with what each costs. May import everything."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hybridzoo.cli import names
from hybridzoo.cli.output import command, fail, new_table, print_json, stdout, working

if TYPE_CHECKING:
    from hybridzoo.architectures import Account, Layer, Spec
    from hybridzoo.architectures.account import Cost
    from hybridzoo.mixers import MixerConfig

EPILOG = """[bold]Examples[/]

hybridzoo show carve-hybrid-tiny

hybridzoo show carve-hybrid-tiny "layers=(c*7 a)" mixers.c.erase=token --context 32768

hybridzoo show my-stack.yaml --json"""

LONGEST_ASIDE = 16  # columns of a mixer's label that leave room beside it for what it is


@command
def show_command(
    spec: names.SpecName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as mixers.c.erase=token.", show_default=False),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            "-c",
            help="Tokens at which FLOPs and memory are counted. Default: 4,096, or max_context where that is less.",
            min=1,
        ),
    ] = None,
    imports: names.Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """Print a stack layer by layer: mixers with their flags, parameters, FLOPs a token, state and KV bytes."""
    with working("counting"):
        from hybridzoo.architectures import account, load_spec

        names.import_own(imports)
        loaded = load_spec(spec, overrides or [])
        if context is not None and loaded.max_context is not None and context > loaded.max_context:
            raise fail(f"--context {context} is over the spec's max_context {loaded.max_context}")
        cost = account(loaded, context=context)
    if as_json:
        print_json({"spec": loaded.to_dict(), "account": dataclasses.asdict(cost)})
        return
    console = stdout()
    _print_head(console, loaded, cost)
    _print_layers(console, loaded, cost)
    tokens = f"{cost.context:,} tokens"
    console.print(
        f"[dim]FLOPs a token, a multiply-add as 2: training is forward and backward, the mean over {tokens}; "
        "decoding is one more after them.\n"
        f"Memory is for one sequence of {tokens}, cache in bfloat16, recurrent state in float32.[/]"
    )


def _print_head(console: Console, spec: Spec, cost: Account) -> None:
    from hybridzoo.training.units import count

    console.print(
        f"[bold]{escape(spec.name)}[/]: {len(spec.layers)} layers, {count(cost.parameters)} parameters "
        f"({cost.parameters:,})"
    )
    tied = "tied to the head" if spec.tie_embeddings else "with a head of its own"
    ffn = "none" if spec.ffn.type == "none" else f"{spec.ffn.type} of width {spec.ffn.hidden(spec.d_model):,}"
    console.print(f"  d_model {spec.d_model}, vocabulary {spec.vocab_size:,} {tied}, FFN {ffn}", soft_wrap=True)
    console.print(f"  layers [bold]{escape(spec.pattern)}[/]", soft_wrap=True)
    used = dict(pair for layer in spec.layers for pair in layer.mixers)
    width = max(len(label) for label in used)
    aside = width <= LONGEST_ASIDE
    for label, config in used.items():
        first, *more = _described(config)
        indent = " " * (width + 4 if aside else 4)
        gap = " " * (width + 2 - len(label)) if aside else f"\n{indent}"
        console.print(f"  [bold]{escape(label)}[/]{gap}{escape(first)}", soft_wrap=True)
        for line in more:
            console.print(f"{indent}{escape(line)}", soft_wrap=True)
        if config.caveat is not None:
            console.print(f"{indent}[yellow]{escape(config.caveat)}[/]", soft_wrap=True)


def _print_layers(console: Console, spec: Spec, cost: Account) -> None:
    table = new_table(show_footer=True)
    table.add_column("layer", "all", justify="right", no_wrap=True)
    table.add_column("mixers", overflow="fold")  # what gives way where the line is short
    heads = ("parameters", "train\nFLOPs", "decode\nFLOPs", "state\nbytes", "of them\nKV")
    for head, whole in zip(heads, _costs(cost), strict=True):
        table.add_column(head, whole, justify="right", no_wrap=True)
    for layer, row in zip(spec.layers, cost.layers, strict=True):
        table.add_row(str(row.index), escape(_spaced(layer)), *_costs(row))
    table.add_row("", "[dim]embedding, norm, head[/]", *_costs(cost.ends), end_section=True)
    console.print(table)


def _costs(cost: Cost) -> list[str]:
    from hybridzoo.training.units import count, size

    flops = (count(cost.train_flops_per_token), count(cost.decode_flops_per_token))
    return [count(cost.parameters), *flops, size(cost.state_bytes), size(cost.kv_bytes)]


def _spaced(layer: Layer) -> str:
    """A layer's label with the white space that a pattern may have, where a table can break it."""
    return " + ".join(label.replace(",", ", ") for label, _ in layer.mixers)


def _described(config: MixerConfig) -> list[str]:
    """A mixer with all its flags, changed or not; then its words that differ from their defaults or follow from others.

    The latter are shown as what they come to: a head count, and not that none was given.
    """
    from hybridzoo.mixers.registry import GATE_FLAGS, entry_of

    entry, resolved = entry_of(config), config.resolved
    flags = ",".join(f"{flag}={getattr(config, flag)}" for flag in GATE_FLAGS if flag in entry.flags)
    shown = [
        f"{name}={_said(resolved.get(name, getattr(config, name)))}"
        for name, word in entry.words.items()
        if name not in ("d_model", *GATE_FLAGS)
        and (word.required or name in resolved or getattr(config, name) != word.default)
    ]
    if flags and shown:
        return [f"{entry.name}[{flags}]", " ".join(shown)]
    return [" ".join([f"{entry.name}[{flags}]" if flags else entry.name, *shown])]


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
