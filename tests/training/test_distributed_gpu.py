"""Training on GPUs with the Triton kernels: torch's own machinery around a whole hybrid. `pytest -m gpu`

DDP and FSDP2 run in one process a GPU over NCCL, and one GPU will do; the rest runs here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import ranks
import torch
import torch.distributed
from torch import Tensor

from hybridzoo.architectures import HybridLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LIMIT = 540.0  # seconds; a first run compiles kernels


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        pytest.skip("this torch is built without NCCL")
    return ranks.run(torch.cuda.device_count(), "cuda", tmp_path_factory.mktemp("ranks"), LIMIT)


@pytest.mark.xdist_group("a process a GPU")
@pytest.mark.parametrize("name", ranks.CHECKS)
def test_with_a_process_a_gpu_it_holds_that(raised: dict[str, str | None], name: str) -> None:
    assert raised[name] is None, raised[name]


def random_ids(*shape: int) -> Tensor:
    return torch.randint(ranks.VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).cuda()


def model_of(dtype: torch.dtype | None = None) -> HybridLM:
    return ranks.model_of(ranks.spec_of("triton"), "cuda", dtype)


def loss_and_gradients(model: HybridLM, call: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = call(random_ids(4, 70))
    loss.backward()
    return loss.detach(), ranks.whole(model, gradients=True)


def plain_loss(model: HybridLM) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids, labels=ids).loss


def autocast_loss(model: HybridLM) -> Callable[[Tensor], Tensor]:
    def call(ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(ids, labels=ids).loss

    return call


LOSSES = {"float32": plain_loss, "autocast": autocast_loss}


@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic:UserWarning")
@pytest.mark.parametrize("kind", ranks.KINDS)
@pytest.mark.parametrize("precision", LOSSES)
def test_checkpointing_gives_the_same_bits(precision: str, kind: str) -> None:
    with ranks.deterministic():
        bare, wrapped = model_of(), ranks.checkpointed(model_of(), kind)
        loss, expected = loss_and_gradients(bare, LOSSES[precision](bare))
        again, found = loss_and_gradients(wrapped, LOSSES[precision](wrapped))
    assert torch.equal(again, loss)
    ranks.assert_equal(found, expected)


def test_autocast_loses_only_its_rounding_and_leaves_float32_gradients() -> None:
    model = model_of()
    exact, expected = loss_and_gradients(model, plain_loss(model))
    loss, found = loss_and_gradients(model, autocast_loss(model))
    assert abs(loss - exact) < 0.01 * exact
    assert ranks.apart(found, expected) < 0.1
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore::UserWarning")  # the code generator's advice
@pytest.mark.parametrize("precision", LOSSES)
def test_a_whole_model_compiles_as_one_graph_forward_and_backward(precision: str) -> None:
    torch._dynamo.reset()
    model = model_of()
    loss, expected = loss_and_gradients(model, LOSSES[precision](model))
    compiled = torch.compile(model, fullgraph=True)
    again, found = loss_and_gradients(model, LOSSES[precision](compiled))
    # The compiler fuses what autocast rounds in between, and so rounds less.
    near, apart = (1e-5, 1e-4) if precision == "float32" else (1e-2, 0.1)
    assert abs(again - loss) < near * loss
    assert ranks.apart(found, expected) < apart


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_sequences_compile_as_one_graph_with_checkpointed_blocks() -> None:
    torch._dynamo.reset()
    model = ranks.checkpointed(model_of(), "not reentrant")
    bounds = torch.tensor([0, 3, 3, 66, 280], dtype=torch.int32, device="cuda")

    def packed(run: Callable[..., object]) -> Callable[[Tensor], Tensor]:
        return lambda ids: run(ids.reshape(1, -1), labels=ids.reshape(1, -1), cu_seqlens=bounds).loss  # type: ignore[attr-defined]

    loss, expected = loss_and_gradients(model, packed(model))
    again, found = loss_and_gradients(model, packed(torch.compile(model, fullgraph=True)))
    assert abs(again - loss) < 1e-5 * loss
    assert ranks.apart(found, expected) < 1e-4
