"""Trials that go through torch.compile, one after the other in one worker."""

from __future__ import annotations

import functools

import torch

from hybridzoo.studies import make_plan, study_from
from hybridzoo.studies.trial import Job, run_job

STUDY = {
    "name": "compiled",
    "spec": {"d_model": 8, "mixers": {"a": {"type": "attention", "n_heads": 1}}, "ffn": {"type": "gelu", "width": 8}},
    "stacks": {str(depth): {"layers": f"a*{depth}"} for depth in (1, 2, 3)},
    "train": {"compile": True, "device": "cpu", "steps": 1, "batch_size": 2},
    "tasks": {"recall": {"type": "mqar", "pairs": 2, "keys": 4, "values": 4, "examples": 8}},
}


def test_a_worker_compiles_however_many_models_it_trained_before(monkeypatch):
    """torch gives up on a function that it has compiled a number of times, and runs it as it is from then on."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    made = []
    with torch._dynamo.config.patch(recompile_limit=1):
        for trial in make_plan(study_from(STUDY)).trials:
            run_job(Job(trial), lambda progress: None)
            made.append(len(compiled) - sum(made))
    assert all(made), made
