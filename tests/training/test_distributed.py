"""Training over two processes on the CPU: DDP and FSDP2 around a whole hybrid, alone and with what people add."""

from __future__ import annotations

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.torch_version import TorchVersion

from hybridzoo.training.sharding import shard

LIMIT = 240.0  # seconds; far above what it takes, so that only a rank that hangs meets it


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return ranks.run(2, "cpu", tmp_path_factory.mktemp("ranks"), LIMIT)


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", ranks.CHECKS)
def test_over_two_processes_it_holds_that(raised: dict[str, str | None], name: str) -> None:
    if name == "a_state_and_its_gradient_pass_between_calls" and TorchVersion(torch.__version__) < (2, 11):
        pytest.skip(f"needs torch 2.11, got {torch.__version__}, whose FSDP2 recomputes no block of two calls")
    assert raised[name] is None, raised[name]


def test_a_rank_that_never_ends_is_ended_and_said_so(tmp_path) -> None:
    results = ranks.run(1, "cpu", tmp_path, limit=0.5)
    assert all("not finished within 0.5 s" in raised for raised in results.values())


def test_what_has_no_blocks_is_not_sharded() -> None:
    with pytest.raises(TypeError, match=r"must have `blocks`, an nn\.ModuleList; Linear has none"):
        shard(nn.Linear(2, 2))


def test_a_policy_that_casts_outputs_is_refused() -> None:
    model = ranks.model_of(ranks.spec_of("torch"), "cpu")
    with pytest.raises(ValueError, match=r"output_dtype is torch\.float32, which would cast the states"):
        shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))
