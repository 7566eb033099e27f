"""The theory probes where there is a GPU: what is timed and trained there, and what that decides: `pytest -m gpu`."""

import pytest
import torch

from hybridzoo.studies.theory import boundary, chunk, find_probes, lengths, run_probes, write_results
from hybridzoo.studies.theory.result import OPEN, Settings
from hybridzoo.studies.theory.rule import F64, started_tokens
from hybridzoo.studies.theory.trained import captures, train_one

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

SMALL = Settings(size="small", device="cuda")
GPU = torch.device("cuda")


def test_both_probes_time_the_gpu_and_name_it(tmp_path):
    results = list(run_probes(find_probes(["chunk", "boundary"]), SMALL))
    name = torch.cuda.get_device_name()
    for result in results:
        assert result.facts["device"] == name
        assert result.facts["triton"] == "taken"
        assert any("cuda" in row for row in result.tables["time"].rows)
        assert any(name in panel.title for panel in result.panels)
        assert any(name in statement.measured for statement in result.statements)
    (saves,) = [statement for statement in results[0].statements if "On a GPU" in statement.text]
    assert saves.verdict != OPEN
    assert (write_results(tmp_path, results, SMALL).parent / "chunk.png").is_file()


def test_on_a_gpu_chunks_are_timed_by_the_fused_kernels_first():
    rows = chunk.time_on(GPU, SMALL)
    assert [(row.backend, row.L) for row in rows] == [(b, L) for b in ("triton", "torch") for L in (0, 16, 32)]
    assert next(row.form for row in boundary.time_on(GPU, SMALL)) == "key-axis, chunkwise (triton)"


def test_chunks_with_a_solve_a_value_channel_equal_the_token_loop_there_too():
    generator = torch.Generator(GPU).manual_seed(0)
    tokens = started_tokens(6, 70, 16, 16, generator)
    mask = torch.randn(6, 70, 16, generator=generator, device=GPU, dtype=F64)
    loop, _ = boundary.by_token(tokens, mask)
    torch.testing.assert_close(boundary.in_chunks(tokens, mask, 32), loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", lengths.STARTS)
@pytest.mark.parametrize("L", [lengths.OFF, 16, 32])
def test_a_model_trained_by_replayed_steps_is_the_one_that_a_cpu_trains(start, L):
    task, steps = lengths.task_of(SMALL), 24  # past those that are not replayed yet
    form = lengths.form_at(start, L, task)
    assert captures(form, GPU)
    here, there = (train_one(lengths.MIXER, task, steps, 0, "", form, 16, device) for device in ("cpu", "cuda"))
    assert there.loss == pytest.approx(here.loss, rel=0.02)
    assert next(there.model.parameters()).device.type == "cpu"


def test_what_the_fused_kernels_do_not_take_is_trained_on_the_cpu():
    rows = lengths.train_curves(SMALL)
    assert {(row.L, row.device) for row in rows} == {(0, "cuda"), (1, "cpu"), (16, "cuda")}
