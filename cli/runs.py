"""A trained model's folder: `spec.yaml` (resolved), `model.safetensors`, `run.json`. May import everything.

`hybridzoo train` writes one, `hybridzoo generate` reads it. Weights are stored as safetensors, which holds tensors and
cannot run code; each file is written beside its place and renamed, so a killed process leaves no half under its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridzoo.architectures.whole_file import remove_halves, whole_file, write_text
from hybridzoo.mixers.schema import SpecError

if TYPE_CHECKING:
    from hybridzoo.architectures import HybridLM, Spec

SPEC, WEIGHTS, RECORD = "spec.yaml", "model.safetensors", "run.json"


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a trained model."""
    return (folder / WEIGHTS).is_file() and (folder / SPEC).is_file()


def holds_model(folder: Path) -> bool:
    """Whether any part of a trained model is in `folder`."""
    return (folder / WEIGHTS).exists() or (folder / RECORD).exists()


def require_safetensors() -> None:
    """Raise `ModuleNotFoundError` now, and not after an hour of training."""
    import safetensors.torch  # noqa: F401


def save_run(folder: Path, model: HybridLM, spec: Spec, record: dict[str, Any]) -> None:
    """Write weights, resolved spec and record; `run.json` comes last, so a folder that has it is complete."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    remove_halves(folder / WEIGHTS)
    with whole_file(folder / WEIGHTS) as half:
        save_model(model, str(half))  # knows tied weights: each is stored once
    write_text(folder / SPEC, spec.to_yaml())
    write_text(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")


def load_run(folder: Path) -> HybridLM:
    """Build the model of a run's folder and load its weights.

    Raises: `SpecError` that names the file, where weights are unreadable or do not fit the spec.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from hybridzoo.architectures import build_model, load_spec

    model = build_model(load_spec(folder / SPEC))
    weights = folder / WEIGHTS
    try:
        load_model(model, str(weights))
    except SafetensorError as error:
        raise SpecError(f"{weights}: cut short, or not safetensors ({error})") from None
    except RuntimeError as error:  # torch's: names missing, left over, or of another shape
        raise SpecError(f"{weights}: does not fit {folder / SPEC}: {error}") from None
    return model
