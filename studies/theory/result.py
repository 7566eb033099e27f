"""What a probe hands back: claims, what was measured, verdicts; plain data that the renderer and the tests read.

May import tables, and torch to ask for a GPU. A verdict is about the statement as printed: a statement with a
counterexample does not hold, however close to the truth it is, and its neighbour that does hold is said in words. Where
the print was not at hand, the verdict is about our reading of it, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch

from hybridzoo.mixers.schema import SpecError, unknown
from hybridzoo.studies.tables import Table

Verdict: TypeAlias = Literal["holds", "does not hold as printed", "does not hold as we read it", "cannot be told"]
Size: TypeAlias = Literal["small", "default", "full"]
Device: TypeAlias = Literal["cpu", "cuda"]

HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold as printed"
UNSEEN: Verdict = "does not hold as we read it"  # the statement was not seen as it is printed
OPEN: Verdict = "cannot be told"

PAPER = "arXiv 2606.27229"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much a run measures, from which seed, where, and whose measured ratios stand beside the paper's.

    `small` takes seconds in all and is for tests, `default` some minutes on two cores, `full` some tens. `study` is the
    folder of a study's run. With `device` cuda a GPU is timed and trained on as well.

    Raises: `SpecError` for a `device` that is none of them.
    """

    size: Size = "default"
    seed: int = 0
    study: Path | None = None
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if self.device not in get_args(Device):
            raise unknown("theory", "device", self.device, get_args(Device))

    def resolve_device(self) -> torch.device:
        """Return the device that `device` stands for here.

        Raises: `SpecError` where a GPU is asked for and torch sees none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SpecError("theory: device 'cuda' is asked for, but torch sees no GPU here")
        return torch.device(self.device)

    @property
    def device_name(self) -> str:
        """What a person calls the device: the GPU's own name, or `cpu`."""
        device = self.resolve_device()
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def pick(self, small: T, default: T, full: T | None = None) -> T:
        """Return the value of this run's size; `full` is as `default` unless given."""
        if self.size == "small":
            return small
        return default if self.size == "default" or full is None else full


@dataclass(frozen=True)
class Statement:
    """One sentence that can be true or false, the verdict on it, and the numbers that decide."""

    text: str
    verdict: Verdict
    measured: str


@dataclass(frozen=True)
class Line:
    """One curve of a picture; `kind` `points` draws marks without a line, `dashes` is for what was claimed.

    `spans`, where given, are the ends of each point's interval.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: Literal["line", "points", "dashes"] = "line"
    spans: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One set of axes. `names` stand at 0, 1, 2, ... of the x axis in place of numbers; `least` cuts the y axis off."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    marks: tuple[tuple[float, str], ...] = ()  # places on the x axis with a word each
    names: tuple[str, ...] = ()
    least: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one probe found.

    `claim` is the paper's statement in our words, `source` where it stands. `shown` names the tables that a terminal
    prints, `finding` says in a sentence or two what was measured.
    """

    name: str
    title: str
    claim: str
    source: str
    statements: tuple[Statement, ...]
    finding: str
    tables: Mapping[str, Table]
    shown: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The least favourable verdict among the statements: one that fails decides, one that is open comes next."""
        verdicts = {statement.verdict for statement in self.statements}
        return next((verdict for verdict in (FAILS, UNSEEN, OPEN) if verdict in verdicts), HOLDS)

    def to_dict(self) -> dict[str, Any]:
        """Return all but tables and pictures, which have files of their own."""
        return {
            "name": self.name,
            "title": self.title,
            "claim": self.claim,
            "source": self.source,
            "verdict": self.verdict,
            "finding": self.finding,
            "statements": [asdict(statement) for statement in self.statements],
            "facts": dict(self.facts),
            "tables": {stem: f"{self.name}-{stem}.csv" for stem in self.tables},
            "figure": f"{self.name}.png" if self.panels else None,
            "seconds": self.seconds,
        }
