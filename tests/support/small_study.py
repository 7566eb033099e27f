"""A study that trains in a second, run with what it says and ends kept."""

from __future__ import annotations

from hybridzoo.studies import Execution, read_plan, read_trials, run_study, study_from
from hybridzoo.studies.display import Display

SMALL = {
    "name": "small",
    "spec": {
        "d_model": 8,
        "mixers": {"a": {"type": "attention", "n_heads": 1}, "d": {"type": "delta_net", "n_heads": 1, "head_dim": 8}},
        "ffn": {"type": "gelu", "width": 8},
    },
    "stacks": {"attention": {"layers": "a"}, "delta": {"layers": "d"}},
    "seeds": [0, 1],
    "tasks": {
        "recall": {
            "type": "mqar",
            "pairs": 2,
            "keys": 4,
            "values": 4,
            "examples": 8,
            "quick_examples": 8,
            "train": {"steps": 4, "batch_size": 2, "eval_every": 2, "log_every": 1, "lr": 1e-2},
        }
    },
}
# One stack whose training diverges at once, since no float32 is as large as its weights; the other trains as ever.
DIVERGING = {**SMALL, "stacks": {"fine": {"layers": "a"}, "burst": {"layers": "a", "init.std": 1e39}}}


class Recorder(Display):
    """Keeps the names of trials that ended, and every note."""

    def __init__(self):
        self.ran, self.notes = [], []

    def ended(self, trial, result):
        self.ran.append(trial.title)

    def note(self, text):
        self.notes.append(text)


def run(data, folder, *, estimate=2.0, display=None, **words):
    display = Recorder() if display is None else display
    execution = Execution(**{"processes": 0, **words})
    return run_study(study_from(data), folder, execution, display=display, estimate=estimate), display


def scores(folder):
    results, faults = read_trials(folder, read_plan(folder))
    assert not faults
    return {(r["stack"], r["task"], r["seed"]): r["metrics"] for r in results}
