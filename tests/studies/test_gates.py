"""Gate statistics are of the gates that the recurrence receives, and looking at them changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from hybridzoo.architectures import build_model
from hybridzoo.architectures.loader import spec_from
from hybridzoo.kernels import ContentGate, gated_delta_rule
from hybridzoo.mixers import delta, mamba2
from hybridzoo.studies import gates as gates_module
from hybridzoo.studies import make_plan, study_from
from hybridzoo.studies.gates import QUANTILES, content_logits, gate_statistics, summary
from hybridzoo.studies.tasks import build_task
from hybridzoo.studies.trial import Job, run_job

CPU = torch.device("cpu")
TASK = {"type": "mqar", "pairs": 8, "keys": 16, "values": 8, "examples": 4, "quick_examples": 3}


def model_of(layers, **mixers):
    torch.manual_seed(0)
    model = build_model(
        spec_from(
            {
                "name": "small",
                "d_model": 16,
                "vocab_size": 25,
                "mixers": {"a": {"type": "attention", "n_heads": 2}, **mixers},
                "layers": layers,
                "ffn": {"type": "swiglu", "width": 16},
            }
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # gates that start at zero would hide a mistake
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def small(kind, **words):
    return {"type": kind, "n_heads": 2, "head_dim": 8, **words}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gla", {"decay": "log_decay"}),
        ("delta_net", {"correct": "correct"}),
        ("delta_net[allow_neg_eigval]", {"correct": "correct"}),
        ("gated_delta_net", {"decay": "log_decay", "correct": "correct"}),
        ("gdn2", {"decay": "log_decay", "correct": "correct", "write": "write"}),
        ("carve[erase=token]", {"decay": "log_decay", "erase": "erase_logits", "correct": "correct"}),
        ("mamba2", {"decay": "log_decay", "write": "write"}),
    ],
)
def test_the_values_are_those_that_the_recurrence_receives(monkeypatch, kind, expected):
    received = []

    def recorded(*args, **words):
        received.append(words)
        return gated_delta_rule(*args, **words)

    monkeypatch.setattr(delta, "gated_delta_rule", recorded)
    monkeypatch.setattr(mamba2, "gated_delta_rule", recorded)
    name, _, flags = kind.partition("[")
    words = {"allow_neg_eigval": True} if "neg" in flags else {"erase": "token"} if flags else {}
    sizes = {"expand": 1} if name == "mamba2" else {}
    if name == "mamba2":
        words |= {"state_dim": 8, "n_heads": 2}
    entry = {"type": name, **sizes, **words} if name == "mamba2" else small(name, **words)
    model = model_of("m a m", m=entry)
    task = build_task(TASK)
    rows = gate_statistics(model, task, CPU)
    assert {row["layer"] for row in rows} == {0, 2}
    assert {(row["layer"], row["gate"]) for row in rows} == {(layer, gate) for layer in (0, 2) for gate in expected}
    for row in rows:
        values = received[row["layer"] // 2][expected[row["gate"]]]
        values = {"decay": torch.exp, "erase": torch.sigmoid}.get(row["gate"], lambda value: value)(values)
        assert row["mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        for key, level in QUANTILES.items():
            assert row[key] == pytest.approx(torch.quantile(values.flatten(), level).item(), rel=1e-5)
        assert row["mixer"] == name


def test_content_is_what_the_state_of_the_memory_says():
    draw = torch.Generator().manual_seed(1)
    B, T, H, K, V, L = 2, 23, 2, 4, 6, 5

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    content = ContentGate(normal(H, 3, V), normal(H, K, 3), L)
    q, k, v, erase = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), normal(B, T, H, K)
    words = {"content": content, "qk_l2norm": True, "backend": "reference", "predict": "stored"}
    o, _ = gated_delta_rule(q, k, v, erase_logits=erase, **words)
    added = content_logits(o.float(), content)
    assert added.shape == (B, T, H, K)
    for t in range(T):
        read = t - t % L
        expected = torch.zeros(B, H, K)
        if read:
            _, state = gated_delta_rule(q[:, :read], k[:, :read], v[:, :read], erase_logits=erase[:, :read], **words)
            inner = torch.einsum("bhv,hrv->bhr", state.o_mean, content.down).tanh()
            expected = torch.einsum("bhr,hkr->bhk", inner, content.up).float()
        torch.testing.assert_close(added[:, t], expected, rtol=1e-4, atol=1e-5)


def test_the_content_gate_has_a_row_where_there_is_more_than_one_chunk():
    model = model_of("c", c=small("carve", content_chunk=16, content_rank=2))
    rows = gate_statistics(model, build_task(TASK), CPU)  # sequences of 24 tokens
    assert [row["gate"] for row in rows] == ["decay", "content", "erase", "correct"]
    short = gate_statistics(model_of("c", c=small("carve", content_chunk=32)), build_task(TASK), CPU)
    assert "content" not in {row["gate"] for row in short}


def test_looking_changes_neither_the_model_nor_chance():
    model = model_of("c (a+g)", c=small("carve"), g=small("gdn2"))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chance = torch.random.get_rng_state()
    rows = gate_statistics(model, build_task(TASK), CPU)
    assert {row["mixer"] for row in rows} == {"carve", "gdn2"}
    assert torch.equal(chance, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_batch_is_enough():
    calls = []
    task = build_task({**TASK, "quick_examples": 100})
    model = model_of("g", g=small("gdn2"))
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert gate_statistics(model, task, CPU)
    assert len(calls) == 1


def test_quantiles_of_very_many_values_are_of_an_even_sample(monkeypatch):
    monkeypatch.setattr(gates_module, "MOST", 1000)
    values = torch.linspace(0, 1, 30_000)
    found = summary(values)
    assert found["mean"] == pytest.approx(0.5)
    assert found["q05"] == pytest.approx(0.05, abs=0.01)
    assert found["median"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="nan"):
        summary(torch.tensor([float("nan")]))


@pytest.fixture
def job():
    spec = {"d_model": 16, "mixers": {"c": small("carve")}, "layers": "c", "ffn": {"type": "swiglu", "width": 16}}
    train = {"steps": 3, "batch_size": 2, "device": "cpu"}
    study = study_from({"name": "one", "spec": spec, "tasks": {"recall": {**TASK, "train": train}}})
    trial = make_plan(study).trials[0]
    return Job(trial)


def test_a_result_holds_the_gates_and_is_otherwise_the_same_without(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = run_job(job, lambda _: None)
    assert json.loads(json.dumps(whole))["gates"] == whole["gates"] != []
    assert whole["gates_error"] == ""

    def breaks(*_):
        raise KeyError("odd")

    monkeypatch.setattr("hybridzoo.studies.trial.gate_statistics", breaks)
    bare = run_job(job, lambda _: None)
    assert (bare["status"], bare["gates"], bare["gates_error"]) == ("finished", [], "KeyError: 'odd'")
    assert bare["metrics"] == whole["metrics"]
    assert bare["history"]["loss"] == whole["history"]["loss"]
