"""What a training run leaves behind: the curve, the scores on the way, and the speed.

May import nothing of hybridzoo; plain numbers only, so that a history is JSON as it stands.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """The task's scores after `step` steps."""

    step: int
    metrics: dict[str, float]


@dataclass
class History:
    """The record of one run.

    `steps[i]` steps had been taken when point i was written; `loss[i]`, `grad_norm[i]` are means over the steps since
    the point before, `lr[i]` the last rate. The last of the `evaluations` is of all that the task holds out, those
    before of less; `quick_at_end` are the scores of that less after the last step, where any came before. `seconds` is
    training alone, without evaluation and without compiling's first step; `tokens` are those trained on in that time.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    quick_at_end: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    device: str = "cpu"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def metrics(self) -> dict[str, float]:
        """The scores after the last step; empty before any evaluation."""
        return dict(self.evaluations[-1].metrics) if self.evaluations else {}

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of one metric over the run, all of them of the same held-out data."""
        points = [(e.step, e.metrics[metric]) for e in self.evaluations if metric in e.metrics]
        if points and metric in self.quick_at_end:
            points[-1] = (points[-1][0], self.quick_at_end[metric])
        return [step for step, _ in points], [value for _, value in points]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """Read back what `to_dict` wrote; `TypeError` or `KeyError` for anything else."""
        evaluations = [Evaluation(int(e["step"]), dict(e["metrics"])) for e in data["evaluations"]]
        return cls(**{**data, "evaluations": evaluations})
