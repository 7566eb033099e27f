"""A run that was stopped anywhere goes on to the same end, and a kept run is never taken for another."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import pytest
import torch

from hybridzoo.training import Checkpoint, CheckpointError, DivergedError, TrainConfig, train
from hybridzoo.training.checkpoint import stop_signals

CONFIG = TrainConfig(steps=23, batch_size=4, lr=3e-2, warmup=5, eval_every=8, log_every=5, device="cpu")


def run(model_class, task, config=CONFIG, checkpoint=None, on_progress=None):
    torch.manual_seed(3)
    model = model_class()
    return model, train(model, task, config, on_progress, checkpoint)


def told_at(monkeypatch, task, step, number=signal.SIGINT):
    """Have the process told to stop while the batch of `step`, from 0, is drawn."""
    batch = task.batch

    def telling(at, *rest):
        if at == step:
            os.kill(os.getpid(), number)
        return batch(at, *rest)

    monkeypatch.setattr(task, "batch", telling)


def without_time(history):
    return dataclasses.replace(history, seconds=0.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("stops", [(0,), (4,), (7,), (6, 7, 15), (21,), (22,)], ids=str)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tiny_model, counting_task, monkeypatch, tmp_path, stops, number
):
    """Before a point of the history and at one, at an evaluation and between, once and again."""
    whole, expected = run(tiny_model, counting_task)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    path = tmp_path / "unfinished.pt"
    for stop in stops:
        with monkeypatch.context() as patched:
            told_at(patched, counting_task, stop, number)
            checkpoint = Checkpoint(path, CONFIG)
            with pytest.raises(KeyboardInterrupt):
                run(tiny_model, counting_task, checkpoint=checkpoint)
        assert checkpoint.step == stop + 1
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    checkpoint = Checkpoint(path, CONFIG)
    assert checkpoint.step == stops[-1] + 1
    model, history = run(tiny_model, counting_task, checkpoint=checkpoint)
    assert without_time(history) == without_time(expected)
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name]), name
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_a_run_is_kept_as_often_as_was_asked_and_before_the_last_evaluation(
    tiny_model, counting_task, monkeypatch, tmp_path
):
    written = []
    write = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self, kept: written.append(kept.step) or write(self, kept))
    _, often = run(tiny_model, counting_task, checkpoint=Checkpoint(tmp_path / "a.pt", CONFIG, every=0))
    assert written == list(range(1, CONFIG.steps + 1))
    written.clear()
    _, seldom = run(tiny_model, counting_task, checkpoint=Checkpoint(tmp_path / "b.pt", CONFIG, every=3600))
    assert written == [CONFIG.steps]  # before the last evaluation, which takes longest
    assert without_time(often) == without_time(seldom)


def test_what_broke_off_within_a_step_goes_on_from_what_was_kept_before(
    tiny_model, counting_task, monkeypatch, tmp_path
):
    whole, expected = run(tiny_model, counting_task)
    with monkeypatch.context() as patched:
        batch = counting_task.batch

        def breaking(step, *rest):
            if step == 9:
                raise OSError("the disk is gone")
            return batch(step, *rest)

        patched.setattr(counting_task, "batch", breaking)
        with pytest.raises(OSError, match="disk is gone"):
            run(tiny_model, counting_task, checkpoint=Checkpoint(tmp_path / "a.pt", CONFIG, every=0))
    model, history = run(tiny_model, counting_task, checkpoint=Checkpoint(tmp_path / "a.pt", CONFIG))
    assert without_time(history) == without_time(expected)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))


def test_no_weights_are_kept_that_are_not_finite(tiny_model, counting_task, tmp_path):
    class Breaking(tiny_model):
        calls = 0

        def forward(self, ids, labels=None):
            out = super().forward(ids, labels)
            self.calls += self.training
            if self.calls == 4:
                out.loss = out.loss * float("nan")
            return out

    checkpoint = Checkpoint(tmp_path / "a.pt", CONFIG, every=0)
    with pytest.raises(DivergedError, match="step 4 of 23"):
        run(Breaking, counting_task, checkpoint=checkpoint)
    assert Checkpoint(tmp_path / "a.pt", CONFIG).step == 3


def test_the_second_signal_is_not_waited_for():
    with stop_signals() as told:
        assert not told()
        os.kill(os.getpid(), signal.SIGTERM)
        assert told()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_tells_it_to_stop_does_not_wait_for_the_last_evaluation(tiny_model, counting_task, monkeypatch, tmp_path):
    _, expected = run(tiny_model, counting_task)
    evaluate = counting_task.evaluate

    def told(model, device, quick=False):
        if not quick:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, device, quick)

    for _ in range(2):  # also where there is nothing left to do but to evaluate
        with monkeypatch.context() as patched:
            patched.setattr(counting_task, "evaluate", told)
            with pytest.raises(KeyboardInterrupt):
                run(tiny_model, counting_task, checkpoint=Checkpoint(tmp_path / "a.pt", CONFIG))
    checkpoint = Checkpoint(tmp_path / "a.pt", CONFIG)
    assert checkpoint.step == CONFIG.steps
    _, history = run(tiny_model, counting_task, checkpoint=checkpoint)
    assert without_time(history) == without_time(expected)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as told:
            os.kill(os.getpid(), signal.SIGINT)
            assert not told()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_disk_that_is_full_ends_no_training_but_one_that_is_told_to_stop(
    tiny_model, counting_task, monkeypatch, tmp_path
):
    _, expected = run(tiny_model, counting_task)

    def full(*_, **__):
        raise RuntimeError("unexpected pos 19202688 vs 19202640")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match=r"a\.pt: cannot be written: unexpected pos .*; the training goes on"):
        _, history = run(tiny_model, counting_task, checkpoint=Checkpoint(tmp_path / "a.pt", CONFIG, every=0))
    assert without_time(history) == without_time(expected)
    assert not list(tmp_path.iterdir())
    told_at(monkeypatch, counting_task, 5)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written"):
        run(tiny_model, counting_task, checkpoint=Checkpoint(tmp_path / "a.pt", CONFIG))


def test_a_folder_that_is_not_there_is_found_before_training(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        Checkpoint(tmp_path / "nowhere" / "a.pt", CONFIG)


def test_beside_the_main_thread_signals_are_left_alone():
    found = []

    def beside():
        before = signal.getsignal(signal.SIGINT)
        with stop_signals() as told:
            found.append((told(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_a_kept_run_is_not_taken_for_another(tiny_model, counting_task, tmp_path):
    path, settings = tmp_path / "a.pt", {"spec": {"d_model": 8, "layers": ["a"]}}
    run(tiny_model, counting_task, checkpoint=Checkpoint(path, CONFIG, settings, every=0))
    elsewhere = dataclasses.replace(CONFIG, device="auto", log_every=1)
    assert Checkpoint(path, elsewhere, settings).step == CONFIG.steps
    for config, words, said in (
        (dataclasses.replace(CONFIG, lr=1e-3), settings, r"train\.lr is 0\.03 there, 0\.001 here"),
        (CONFIG, {"spec": {"d_model": 16, "layers": ["a"]}}, r"spec\.d_model is 8 there, 16 here"),
        (CONFIG, {"spec": {"d_model": 8, "layers": ["b"]}}, r"spec\.layers is \['a'\] there, \['b'\] here"),
        (CONFIG, None, r"spec is \{.*\} there, None here"),
    ):
        with pytest.raises(CheckpointError, match=rf"a\.pt: kept of another training: {said}"):
            Checkpoint(path, config, words)


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "text", "cut short"])
def test_a_damaged_file_is_said_to_be_damaged(tiny_model, counting_task, tmp_path, content):
    path = tmp_path / "a.pt"
    if content is None:
        run(tiny_model, counting_task, checkpoint=Checkpoint(path, CONFIG, every=0))
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt: not a run that was kept, or damaged"):
        Checkpoint(path, CONFIG)


def test_a_file_of_another_format_is_refused(tmp_path):
    torch.save({"format": 99, "settings": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="of format 99, and this version reads 1"):
        Checkpoint(tmp_path / "a.pt", CONFIG)
