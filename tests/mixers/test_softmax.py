"""The backends of softmax attention: each computes what the reference does, and says why where it cannot."""

from __future__ import annotations

from typing import Any

import attention_stand_ins
import pytest
import torch
from attention_problems import AttentionProblem, apart, make_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex
from torch.utils import _pytree as pytree

from hybridzoo.mixers import memory
from hybridzoo.mixers.attention import Attention
from hybridzoo.mixers.memory import host_bounds, remembered
from hybridzoo.mixers.softmax import BACKENDS, SoftmaxRule, attend, backends, flex
from hybridzoo.mixers.softmax.backends import usual_call
from hybridzoo.mixers.softmax.spans import batched_spans, packed_spans, visible

STAND_INS = {"flash 2": ("flash-attn",), "flash 4": ("flash-attn-4",), "xformers": ("xformers",)}


@st.composite
def problems(draw: st.DrawFn, softcap: bool = True, sizes: tuple[int, ...] = (8, 16)) -> AttentionProblem:
    """A batch or a pack, fresh or behind caches filled to different lengths, windowed or not."""
    cached = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
    if draw(st.booleans()):
        cached = (0,) * len(cached)
    lengths = None
    if draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(0, 9), min_size=len(cached), max_size=len(cached))))
        lengths = lengths if sum(lengths) else (1, *lengths[1:])
    return make_attention(
        T=draw(st.integers(1, 12)),
        heads=draw(st.sampled_from([(2, 2), (4, 2), (3, 1)])),
        D=draw(st.sampled_from(sizes)),
        window=draw(st.none() | st.integers(1, 14)),
        softcap=draw(st.sampled_from([None, 1.5])) if softcap else None,
        cached=cached,
        lengths=lengths,
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=60)
@given(problem=problems(softcap=False))
def test_sdpa_is_the_reference_with_its_gradients(problem: AttentionProblem) -> None:
    errors = apart(problem.results("sdpa"), problem.results("reference"))
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("package", STAND_INS)
def test_a_package_is_asked_for_what_the_reference_computes(package: str) -> None:
    backend = package.partition(" ")[0]
    sizes = (32, 64) if package == "flash 4" else (8, 16)  # flash-attn-4 has no gradients of 8 and 16 here

    @settings(max_examples=25)
    @given(problem=problems(softcap=backend == "flash", sizes=sizes))
    def holds(problem: AttentionProblem) -> None:
        rounded = problem.to(torch.bfloat16)
        packed = problem.lengths is not None or problem.tensors["old_k"].shape[1] > 0
        gradients = not (package == "flash 4" and problem.rule.softcap and packed)
        if not gradients:
            with pytest.raises(ValueError, match="has no gradient of a soft-cap with packed sequences or behind a"):
                rounded.results(backend)
        errors = apart(rounded.results(backend, gradients), rounded.results("reference", gradients))
        assert errors.pop("y") < 6e-3
        assert max(errors.values(), default=0) < 1.5e-2, errors

    with pytest.MonkeyPatch.context() as patched:
        attention_stand_ins.install(patched, *STAND_INS[package])
        holds()


@pytest.mark.parametrize("masks", [True, False])
def test_rows_behind_a_cache_go_packed_to_a_backend_that_masks_no_empty_slots(
    monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    def refused(*_: object) -> torch.Tensor:
        raise AssertionError("not this way")

    problem = make_attention(T=5, window=6, cached=(3, 0, 9))
    expected = problem.results("reference")
    backend = BACKENDS["sdpa"]._replace(masks_empty_slots=masks)
    backend = backend._replace(attend_packed=refused) if masks else backend._replace(attend=refused)
    monkeypatch.setattr(backends, "BACKENDS", {**BACKENDS, "sdpa": backend})
    errors = apart(problem.results("sdpa"), expected)
    assert max(errors.values()) < 1e-10, errors


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as torch computes it uncompiled: whole scores, the mask of each pair, gradients on a CPU too."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    free = BACKENDS["flex"]._replace(refusal=lambda call: None)
    monkeypatch.setattr(backends, "BACKENDS", {**BACKENDS, "flex": free})


def test_flex_masks_and_caps_as_the_reference_does_with_its_gradients(eager_flex: None) -> None:
    @settings(max_examples=40)
    @given(problem=problems())
    def holds(problem: AttentionProblem) -> None:
        errors = apart(problem.results("flex"), problem.results("reference"))
        assert max(errors.values()) < 1e-10, errors

    holds()


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_flex_trains_and_decodes_in_graphs_without_a_break(
    eager_flex: None, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    words: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "window": 5, "softcap": 2.0}
    mixer, reference = (Attention(**words, backend=name) for name in ("flex", "reference"))
    reference.load_state_dict(mixer.state_dict())
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    bounds = torch.tensor([0, 3, 3, 20]) if packed else None
    x, more = torch.randn(1, 20, 32), torch.randn(3 if packed else 1, 1, 32)
    found = []
    for module in (compiled, reference):
        y, state = module(x, cu_seqlens=bounds)
        gradients = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        with torch.no_grad():
            state = pytree.tree_map(torch.detach, state)
            found.append((y, gradients, module(more, state)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@st.composite
def spans_of_a_call(draw: st.DrawFn) -> tuple[torch.Tensor, Any, int]:
    """Spans, the same pair by pair from the definition `[B, T, S]`, and S."""
    window = draw(st.none() | st.integers(1, 9))
    if draw(st.booleans()):
        T, C = draw(st.integers(1, 20)), draw(st.integers(0, 9))
        length = torch.tensor(draw(st.lists(st.integers(0, 12), min_size=2, max_size=2)))
        seen = torch.zeros(2, T, C + T, dtype=torch.bool)
        for b in range(2):
            for t in range(T):
                for s in range(C + T):
                    position, query = int(length[b]) - C + s, int(length[b]) + t
                    seen[b, t, s] = 0 <= position <= query and (window is None or query - position < window)
        return seen, batched_spans(T, C + T, window, length, torch.device("cpu")), C + T
    lengths = torch.tensor([*draw(st.lists(st.integers(0, 8), min_size=2, max_size=4)), 1])
    earlier = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths))))
    bounds, keys = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (lengths, lengths + earlier))
    seen = torch.zeros(1, int(bounds[-1]), int(keys[-1]), dtype=torch.bool)
    for n in range(len(lengths)):
        for t in range(int(lengths[n])):
            last = int(keys[n] + earlier[n]) + t
            first = int(keys[n]) if window is None else max(int(keys[n]), last - window + 1)
            seen[0, int(bounds[n]) + t, first : last + 1] = True
    return seen, packed_spans(seen.shape[1], window, bounds, keys), seen.shape[2]


@settings(max_examples=80)
@given(case=spans_of_a_call())
def test_spans_hold_the_keys_that_a_token_may_see(case: Any) -> None:
    seen, spans, S = case
    torch.testing.assert_close(visible(spans, S).expand(seen.shape), seen)
    assert (spans.first.diff(dim=1) >= 0).all()
    assert (spans.last.diff(dim=1) >= 0).all()


@settings(max_examples=80)
@given(case=spans_of_a_call(), size=st.sampled_from([1, 2, 4]))
def test_blocks_hold_every_pair_that_is_seen_and_whole_ones_no_other(case: Any, size: int) -> None:
    seen, spans, S = case
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flex, "BLOCK", size)
        blocks = flex.blocks_of(spans, S, lambda b, h, q, k: k >= 0)
    assert blocks.shape[-2:] == (seen.shape[1], S)
    part = pairs_of(blocks.kv_num_blocks, blocks.kv_indices, size)
    whole = pairs_of(blocks.full_kv_num_blocks, blocks.full_kv_indices, size)
    T = spans.first.shape[1]
    assert not (part & whole).any()
    assert not whole[:, T:].any()
    assert not whole[:, :, S:].any()
    part, whole = part[:, :T, :S], whole[:, :T, :S]
    assert (visible(spans, S) <= (part | whole)).all()
    assert (whole <= visible(spans, S)).all()
    # What the backward pass walks is the same, by key.
    transposed = pairs_of(blocks.q_num_blocks, blocks.q_indices, size)[:, :S, :T]
    assert torch.equal(transposed.mT, part)


def pairs_of(counts: torch.Tensor, indices: torch.Tensor, size: int) -> torch.Tensor:
    """The pairs `[B, T', S']` that listed blocks hold."""
    rank = torch.arange(indices.shape[-1])
    listed = torch.zeros_like(indices, dtype=torch.bool)
    listed.scatter_(-1, indices.long(), rank < counts[..., None])
    return listed[:, 0].repeat_interleave(size, 1).repeat_interleave(size, 2)


def test_what_is_derived_from_a_packing_is_derived_once_until_it_is_written_to() -> None:
    bounds, asked = torch.tensor([0, 2, 5]), []

    def make() -> int:
        asked.append(int(bounds[1]))
        return asked[-1]

    assert [remembered(bounds, "a", make) for _ in range(3)] == [2, 2, 2]
    assert remembered(bounds.clone(), "a", make) == 2
    assert len(asked) == 2
    bounds[1] = 4
    assert [remembered(bounds, "a", make) for _ in range(3)] == [4, 4, 4]
    assert host_bounds(bounds) == [0, 4, 5]
    with torch.inference_mode():
        assert remembered(bounds, "b", make) == remembered(bounds, "b", make) == 4
    assert len(asked) == 5


def test_nothing_is_remembered_of_a_packing_that_is_gone() -> None:
    bounds = torch.tensor([0, 2])
    remembered(bounds, "a", lambda: 1)
    before = len(memory._KNOWN)
    del bounds
    assert len(memory._KNOWN) == before - 1


def test_flex_takes_small_blocks_for_head_sizes_between_powers_of_two() -> None:
    def options(D: int, dtype: torch.dtype) -> Any:
        return flex._kernel_options(torch.empty(1, 1, 1, D, dtype=dtype))

    sizes = (16, 24, 64, 80, 96, 128, 192, 256)
    assert [D for D in sizes if options(D, torch.bfloat16)] == [192]
    assert [D for D in sizes if options(D, torch.float32)] == [80, 96, 192]
    assert options(192, torch.float32)["fwd_BLOCK_M"] * 2 == options(192, torch.bfloat16)["fwd_BLOCK_M"]


@pytest.mark.slow
def test_flex_compiles_on_a_cpu_without_gradients() -> None:
    if (why := BACKENDS["flex"].refusal(usual_call(device="cpu", dtype=torch.float32, gradient=False))) is not None:
        pytest.skip(why)
    problem = make_attention(heads=(4, 2), D=16, window=50, softcap=2.0, cached=(3, 0, 200), lengths=(40, 0, 130)).to(
        torch.float32
    )
    errors = apart(problem.results("flex", gradients=False), problem.results("reference", gradients=False))
    assert errors["y"] < 1e-5


def test_a_kernel_that_torch_cannot_make_for_a_cpu_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException(
            "C++ compile error\n" + 5000 * "error: not declared in this scope\n"
        )

    monkeypatch.setattr(flex, "compiled", lambda: broken)
    monkeypatch.setattr(flex, "_compiler_refusal", lambda: None)
    x = torch.zeros(1, 4, 2, 16)
    with pytest.raises(
        RuntimeError, match=r"backend='flex': torch .* \(C\+\+ compile error\): use backend='sdpa'"
    ) as told:
        attend(x, x, x, SoftmaxRule(1.0, backend="flex"))
    assert len(str(told.value)) < 400
