"""On a GPU, a decode step replayed as a CUDA graph is the step, over pages, rows that come and go, and every mixer."""

from __future__ import annotations

import pytest
import torch
from device_reads import no_device_reads
from torch import Tensor

from hybridzoo.architectures import Batcher, HybridLM, Sampling, Spec, build_model, stream
from hybridzoo.architectures.decoding import WARM, Decoder
from hybridzoo.architectures.model import cast
from hybridzoo.architectures.sampling import Picker
from hybridzoo.mixers import list_mixers
from hybridzoo.mixers.caches import FixedCache
from hybridzoo.mixers.kv_cache import PAGE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MIXERS = [entry.name for entry in list_mixers() if entry.stable]


def small_model(
    layers: str, device: str = "cuda", dtype: torch.dtype = torch.float32, window: int | None = None
) -> HybridLM:
    shared = {"n_heads": 2, "head_dim": 16, "state_dim": 16, "content_chunk": 16, "content_rank": 4}
    mixers = {
        entry.name: {"type": entry.name} | {word: value for word, value in shared.items() if word in entry.words}
        for entry in list_mixers()
        if entry.stable
    }
    mixers["attention"]["window"] = window
    data = {"name": "small", "d_model": 32, "vocab_size": 64, "mixers": mixers, "layers": layers, "init": {"std": 0.5}}
    torch.manual_seed(0)
    model = build_model(Spec.from_dict(data | {"tie_embeddings": False}))
    for name, parameter in model.named_parameters():
        if "content_up" in name:
            torch.nn.init.normal_(parameter)
    cast(model, dtype)
    return model.to(device)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("layers", [*MIXERS, "carve*2 attention", "carve+attention mamba2"])
@pytest.mark.parametrize("window", [None, 40])
@torch.no_grad()
def test_a_replayed_step_is_the_step_over_a_page_s_end(layers: str, window: int | None) -> None:
    if window is not None and "attention" not in layers.replace("linear_attention", ""):
        pytest.skip("no attention, no window")
    model, ids = small_model(layers, window=window), random_ids(3, PAGE + 30)
    start = PAGE - 20
    whole = model(ids).logits
    for graph in (False, True):
        cache = model.init_cache(3)
        model(ids[:, :start], state=cache)
        decoder = Decoder(model, cache, graph)
        found = torch.stack([decoder(ids[:, t]) for t in range(start, ids.shape[1])], 1)
        torch.testing.assert_close(found, whole[:, start:], rtol=2e-3, atol=2e-3)
        assert cache.lengths == [ids.shape[1]] * 3
        for name, tensor in cache.tensors().items():
            assert not name.endswith("length") or tensor.tolist() == [ids.shape[1]] * 3


@torch.no_grad()
def test_a_state_that_grows_is_decoded_without_a_graph_or_refused_in_one() -> None:
    model, ids = small_model("attention", window=20), random_ids(2, 40)
    whole = model(ids).logits

    def growing(n: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> FixedCache:
        return FixedCache(mixer.init_state(n, device, dtype))  # its functional state, a token longer every step

    mixer = model.blocks[0].mixers[0]
    mixer.init_cache = growing
    decoder = Decoder(model, model.init_cache(2))
    found = torch.stack([decoder(ids[:, t]) for t in range(40)], 1)
    torch.testing.assert_close(found, whole, rtol=2e-3, atol=2e-3)
    asked = Decoder(model, model.init_cache(2), True)
    for t in range(WARM):
        asked(ids[:, t])
    with pytest.raises(RuntimeError, match="a state that grows"):
        asked(ids[:, WARM])


@torch.no_grad()
def test_rows_that_are_not_live_do_not_grow_in_a_graph() -> None:
    model, ids = small_model("carve attention"), random_ids(2, 40)
    cache = model.init_cache(2)
    decoder = Decoder(model, cache, True)
    for t in range(20):
        decoder(ids[:, t], [True, t < 10])
    lengths = [tensor for name, tensor in cache.tensors().items() if name == "1.0.length"]
    assert [x.tolist() for x in lengths] == [[20, 10]]
    assert cache.lengths == [20, 10]


def test_generation_by_graphs_gives_the_tokens_of_a_cpu() -> None:
    gpu, cpu = small_model("carve*2 attention"), small_model("carve*2 attention", "cpu")
    prompts = [[1, 2, 3], [4] * 50, [7]]
    steps = {graph: [s.tokens.tolist() for s in stream(gpu, prompts, 40, graph=graph)] for graph in (True, False)}
    assert steps[True] == steps[False]
    rows = cpu.generate(prompts, 40)
    assert [list(row) for row in zip(*steps[True], strict=True)] == [row[-40:].tolist() for row in rows]


@pytest.mark.parametrize("graph", [False, True])
def test_requests_that_come_and_go_get_what_they_get_alone(graph: bool) -> None:
    model = small_model("carve*2 attention", window=20)
    batcher, out = Batcher(model, 3, graph=graph), {}
    prompts = {batcher.add([n + 1] * (3 * n + 1), 10 + 7 * n): [n + 1] * (3 * n + 1) for n in range(7)}
    for _ in range(300):  # not for ever, should a request never leave
        for number, emitted in batcher.step().items():
            out.setdefault(number, []).append(emitted.token)
    assert len(batcher) == 0
    for number, prompt in prompts.items():
        assert out[number] == model.generate([prompt], len(out[number]))[0][len(prompt) :].tolist()


@torch.no_grad()
def test_replayed_steps_hold_no_more_memory_and_never_wait_for_the_device() -> None:
    model = small_model("carve*2 attention", window=20)
    cache = model.init_cache(4)
    decoder, tokens = Decoder(model, cache, True), random_ids(4)
    for _ in range(WARM + 3):
        decoder(tokens)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    with no_device_reads():
        for _ in range(100):
            decoder(tokens)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held + 4096


@pytest.mark.parametrize("temperature", [5e-324, 1e-39, 1.0, 1e300])
def test_draws_are_chosen_on_the_device_and_keep_to_their_words(temperature: float) -> None:
    logits = torch.zeros(8, 50, dtype=torch.bfloat16, device="cuda")
    logits[:, 40] = 9.0
    picker = Picker(Sampling(temperature=temperature, top_k=5, top_p=0.99999, min_p=1e-12, seed=1), logits.device, 8)
    with no_device_reads():
        steps = [picker(logits) for _ in range(50)]
    found = set(torch.cat(steps).tolist())
    assert found <= {40, 0, 1, 2, 3}
    assert 40 in found
    assert temperature >= 1 or found == {40}
    again = Picker(picker.sampling, logits.device, 2)
    assert all(torch.equal(again(logits[:2]), step[:2]) for step in steps)


@torch.no_grad()
def test_bfloat16_steps_follow_the_whole_pass() -> None:
    model, ids = small_model("carve*2 attention", dtype=torch.bfloat16), random_ids(2, 60)
    whole, cache = model(ids).logits.float(), model.init_cache(2)
    model(ids[:, :20], state=cache)
    decoder = Decoder(model, cache, True)
    found = torch.stack([decoder(ids[:, t]) for t in range(20, 60)], 1).float()
    assert (found - whole[:, 20:]).norm() < 0.05 * whole[:, 20:].norm()


def test_a_weight_that_is_not_finite_is_an_error_and_not_a_fault_of_the_device() -> None:
    model = small_model("carve attention")
    model.blocks[1].mixers[0].v_proj.weight.data[0, 0] = torch.nan
    for words in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match=r"not finite: blocks\.1\.mixers\.0\.v_proj\.weight"):
            model.generate([[1, 2, 3]], 5, **words)
    torch.cuda.synchronize()  # the process goes on


def test_a_cache_moves_between_devices() -> None:
    gpu, cpu = small_model("carve attention"), small_model("carve attention", "cpu")
    ids = random_ids(2, 20)
    cache = gpu.init_cache(2)
    gpu(ids[:, :12], state=cache)
    with pytest.raises(ValueError, match="the cache is on cuda:0, ids on cpu"):
        cpu(ids[:, 12:].cpu(), state=cache)
    host = cache.to("cpu")
    found = cpu(ids[:, 12:].cpu(), state=host).logits
    torch.testing.assert_close(found, gpu(ids).logits[:, 12:].detach().cpu(), rtol=2e-3, atol=2e-3)
    back = host.to("cuda").select([1])
    assert back.lengths == [20]
