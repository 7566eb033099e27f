"""Names a user may give, and what Tab makes of them: specs, studies, files, trained folders, code of their own.

Reads the package's data folders by name only, without the modules that understand them: a shell asks at every key press
and should not wait for torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer


def shipped(folder: str) -> list[str]:
    """Names of the YAML files shipped in one folder of `yaml/`."""
    entries = (files("hybridzoo") / "yaml" / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def complete_spec(incomplete: str) -> list[str]:
    """Shipped specs, and the YAML files that lie where the user is."""
    return [name for name in [*shipped("architectures"), *_local(incomplete)] if name.startswith(incomplete)]


def complete_study(incomplete: str) -> list[str]:
    """Shipped studies, and the YAML files that lie where the user is."""
    return [name for name in [*shipped("studies"), *_local(incomplete)] if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Folders that hold saved weights, below the usual place for runs."""
    return [str(path.parent) for path in Path("runs").glob("**/model.safetensors") if str(path).startswith(incomplete)]


SpecName = Annotated[
    str,
    typer.Argument(
        metavar="SPEC", help="A shipped spec or a YAML file.", autocompletion=complete_spec, show_default=False
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A shipped study or a YAML file.", autocompletion=complete_study, show_default=False
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        "-i",
        metavar="MODULE_OR_FILE",
        help="Python that registers mixers or tasks of your own: a path that ends in .py, or a module. Repeatable.",
        show_default=False,
    ),
]


def import_own(imports: list[str] | None) -> list[str]:
    """Import what `--import` named, and return it."""
    from hybridzoo.mixers.user_code import import_user_code

    for name in imports or []:
        import_user_code(name)
    return imports or []


def _local(incomplete: str) -> Iterator[str]:
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix in {".yaml", ".yml"} or (path.is_dir() and not path.name.startswith(".")):
            yield f"{path}/" if path.is_dir() else str(path)
