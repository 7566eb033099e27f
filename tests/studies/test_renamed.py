"""Results belong to what was trained, not to what it was called then."""

from __future__ import annotations

from hybridzoo.studies import Execution, read_findings, run_study, study_from
from hybridzoo.studies.display import Display

STUDY = {
    "name": "small",
    "spec": {
        "d_model": 8,
        "mixers": {"a": {"type": "attention", "n_heads": 1}, "d": {"type": "delta_net", "n_heads": 1, "head_dim": 8}},
        "ffn": {"type": "gelu", "width": 8},
    },
    "seeds": [0, 1],
    "train": {"steps": 2, "batch_size": 2},
    "tasks": {"recall": {"type": "mqar", "pairs": 2, "keys": 4, "values": 4, "examples": 8}},
}


class Notes(Display):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def run(folder, **stacks):
    display = Notes()
    study = study_from({**STUDY, "stacks": {label: {"layers": layers} for label, layers in stacks.items()}})
    done = run_study(study, folder, Execution(engine="here"), display=display, estimate=0)
    return (done.finished, done.reused), display.notes


def test_a_stack_that_is_renamed_keeps_its_results(tmp_path):
    assert run(tmp_path, attention="a", delta="d")[0] == (4, 0)
    assert run(tmp_path, softmax="a", delta="d")[0] == (0, 4)
    found = read_findings(tmp_path)
    assert {one.stack.label for one in found.ranked("recall")} == {"softmax", "delta"}
    assert len(found.results) == 4


def test_a_damaged_result_is_set_aside_under_whatever_name_it_has(tmp_path):
    run(tmp_path, attention="a")
    victim = sorted((tmp_path / "trials").iterdir())[0]
    victim.write_text(victim.read_text()[:200])
    counts, notes = run(tmp_path, softmax="a")
    assert counts == (1, 1)
    assert victim.with_suffix(".corrupt").exists()
    assert any(victim.with_suffix(".corrupt").name in note for note in notes)
