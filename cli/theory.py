"""`hybridzoo study theory`: what a paper claims, what is measured, and a verdict. May import everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridzoo.cli.output import command, fail, print_json, stdout, working

if TYPE_CHECKING:
    from hybridzoo.studies.theory.result import Size

EPILOG = """[bold]Examples[/]

hybridzoo study theory

hybridzoo study theory capacity stability --out runs/theory

hybridzoo study theory optimality --study runs/quickstart

hybridzoo study theory chunk boundary --device cuda

Probes: capacity, stability, gradient, separation, chunk, optimality, boundary. Every number printed is measured in this
very run; the files under --out hold all of them."""


@command
def theory_command(
    probes: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Which probes. Default: all.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for theory.json, tables and pictures.")] = Path(
        "runs/theory"
    ),
    small: Annotated[bool, typer.Option("--small", help="As little as shows that it runs: seconds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Larger sizes, more seeds, longer training.")] = False,
    study: Annotated[
        Path | None,
        typer.Option("--study", help="A run or kept study, whose ratios are set beside the paper's.", metavar="DIR"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Where all randomness comes from.", min=0)] = 0,
    device: Annotated[
        str, typer.Option(help="cpu or cuda: where chunk trains, and chunk and boundary also time.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print theory.json instead of text.")] = False,
) -> None:
    """Set what the CARVE paper claims beside what is measured here, with a verdict on each statement."""
    if small and full:
        raise fail("--small and --full exclude each other")
    with working("loading"):
        from hybridzoo.studies import read_findings
        from hybridzoo.studies.theory import Settings, find_probes, run_probes, show, show_summary, write_results

        chosen = find_probes(probes or [])
        size: Size = "small" if small else "full" if full else "default"
        settings = Settings(size=size, seed=seed, study=study, device=device)  # type: ignore[arg-type]
        settings.resolve_device()  # what is not there is said now
        if study is not None:
            read_findings(study)  # the last probe to run reads it: a wrong path is said now
    results = []
    found = run_probes(chosen, settings)
    for probe in chosen:
        with working(f"{probe.name}: {probe.about}"):
            results.append(next(found))
        if not as_json:
            show(stdout(), results[-1])
    with working("writing tables and pictures"):
        path = write_results(out, results, settings)
    if as_json:
        import json

        print_json(json.loads(path.read_text(encoding="utf-8")))
        return
    show_summary(stdout(), results)
    stdout().print(f"all numbers: [bold]{path.parent}[/]", soft_wrap=True)
