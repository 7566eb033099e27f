"""Generation: the tokens of recomputing everything, whatever the company, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridzoo.architectures import Ending, HybridCache, HybridLM, Sampling, Spec, build_model, stream


@pytest.fixture(scope="module")
def model() -> HybridLM:
    torch.manual_seed(0)
    data = {
        "name": "small",
        "d_model": 16,
        "vocab_size": 11,
        "mixers": {
            "a": {"type": "attention", "n_heads": 2, "window": 4},
            "k": {"type": "kda", "n_heads": 2, "head_dim": 8},
        },
        "layers": "k a",
        "init": {"std": 0.5},  # far from uniform
        "tie_embeddings": False,  # tied, an untrained model says its last token again
        "max_context": 64,
    }
    return build_model(Spec.from_dict(data), dtype=torch.float64)


def recomputed(model: HybridLM, prompt: Tensor, steps: int) -> Tensor:
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids


@torch.no_grad()
def test_greedy_tokens_of_several_prompts_are_those_of_recomputing_each(
    tiny_spec: str, shallow: Callable[..., HybridLM]
) -> None:
    model = shallow(tiny_spec, ["init.std=0.2", "tie_embeddings=false"])
    prompts = [torch.randint(256, (n,)) for n in (1, 3, 62, 130)]
    rows = model.generate(prompts, 6)
    assert len({tuple(row[-6:].tolist()) for row in rows}) == 4
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.tolist() == recomputed(model, prompt, 6).tolist()


@pytest.mark.parametrize(
    ("prompts", "packed"), [([[1, 2, 3]], False), ([[1, 2], [3, 4]], False), ([[1], [2, 3]], True)]
)
def test_only_prompts_of_different_lengths_are_packed(
    model: HybridLM, prompts: list[list[int]], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, seen = HybridLM.stage, []

    def watched(self: HybridLM, ids: Tensor, cache: HybridCache, cu_seqlens: Tensor | None = None) -> Tensor:
        seen.append((list(ids.shape), cu_seqlens is not None))
        return stage(self, ids, cache, cu_seqlens)

    monkeypatch.setattr(HybridLM, "stage", watched)
    rows = model.generate(prompts, 4)
    shape = [1, 3] if packed else [len(prompts), len(prompts[0])]
    assert seen[0] == (shape, packed)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.tolist() == recomputed(model, torch.tensor(prompt), 4).tolist()


def test_lists_tensors_and_padded_ids_mean_the_same(model: HybridLM) -> None:
    rows = model.generate([[1, 2, 3], [4]], 6)
    padded = torch.tensor([[1, 2, 3], [4, 9, 9]])
    for other in (
        model.generate([torch.tensor([1, 2, 3]), torch.tensor([4], dtype=torch.uint8)], 6),
        model.generate(padded, 6, lengths=[3, 1]),
        model.generate(padded, 6, lengths=torch.tensor([3, 1])),
        model.generate(torch.tensor([[1, 2, 3], [9, 9, 4]]), 6, lengths=[3, 1], padding="left"),
    ):
        assert [row.tolist() for row in other] == [row.tolist() for row in rows]


def test_arrays_and_whole_numbers_of_numpy_are_prompts_and_counts(model: HybridLM) -> None:
    rows = model.generate([[1, 2, 3], [4]], np.int64(6))
    read_only = np.array([3, 2, 1], dtype=np.uint16)
    read_only.flags.writeable = False
    for other in (
        model.generate([read_only[::-1], np.array([4])], 6),
        model.generate([[np.int64(1), 2, np.uint8(3)], (4,)], 6),
        model.generate(np.array([[1, 2, 3], [4, 9, 9]], dtype=np.int32), 6, lengths=np.array([3, 1])),
    ):
        assert [row.tolist() for row in other] == [row.tolist() for row in rows]
    batch = model.generate(np.array([[1, 2, 3]]), 6)
    assert isinstance(batch, Tensor)
    assert batch.tolist() == [rows[0].tolist()]


def test_a_tensor_of_prompts_gives_a_tensor(model: HybridLM) -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    out = model.generate(ids, 3)
    assert isinstance(out, Tensor)
    assert out.shape == (2, 5)
    assert torch.equal(out[:, :2], ids)


def test_no_new_tokens_gives_the_prompts_back(model: HybridLM) -> None:
    assert [row.tolist() for row in model.generate([[1, 2], [3]], 0)] == [[1, 2], [3]]


def test_eos_ends_each_row_by_itself_and_stays_in_it(model: HybridLM) -> None:
    free = model.generate([[1], [2, 5], [7]], 8)
    eos = int(free[0][3])
    ended = model.generate([[1], [2, 5], [7]], 8, eos=eos)
    for long, short, size in zip(free, ended, (1, 2, 1), strict=True):
        new = long[size:].tolist()
        kept = new[: new.index(eos) + 1] if eos in new else new
        assert short[size:].tolist() == kept
    filled = model.generate(torch.tensor([[1], [7]]), 8, eos=eos)
    first = filled[0].tolist()
    assert set(first[first.index(eos, 1) :]) == {eos}


def test_a_seed_repeats_a_draw_and_leaves_the_global_generator_alone(model: HybridLM) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.generate(torch.tensor([[1]]), 20, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, model.generate(torch.tensor([[1]]), 20, temperature=1.0, seed=3))
    assert not torch.equal(first, model.generate(torch.tensor([[1]]), 20, temperature=1.0, seed=4))


def test_what_a_prompt_draws_does_not_depend_on_the_others(model: HybridLM) -> None:
    words = {"temperature": 1.5, "seed": 3}
    alone = model.generate([[1, 2]], 12, **words)[0].tolist()
    several = model.generate([[1, 2], [3], [5] * 7], 12, **words)
    assert several[0].tolist() == alone
    others = model.generate([[4, 4, 4, 4], [3]], 12, **words)
    assert others[1].tolist() == several[1].tolist()
    equal = model.generate([[1, 2]] * 4, 12, **words)
    assert len({tuple(row.tolist()) for row in equal}) == 4  # a place is part of a draw
    assert equal[0].tolist() == alone


def test_each_step_s_tokens_are_handed_out_as_soon_as_they_are_chosen(model: HybridLM) -> None:
    steps: list[Tensor] = []
    ids = torch.tensor([[1, 2], [3, 4]])
    out = model.generate(ids, 5, temperature=1.0, seed=0, on_tokens=steps.append)
    assert torch.equal(torch.stack(steps, 1), out[:, 2:])

    def stop(tokens: Tensor) -> None:
        raise KeyboardInterrupt  # a reader may leave in the middle

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, 5, on_tokens=stop)


def test_a_row_that_has_ended_hands_out_its_eos(model: HybridLM) -> None:
    eos = int(model.generate([[1], [7]], 8)[0][3])
    steps: list[Tensor] = []
    rows = model.generate([[1], [7]], 8, eos=eos, on_tokens=steps.append)
    handed = torch.stack(steps, 1)
    assert handed.shape[1] > len(rows[0]) - 1  # the other row went on
    for row, prompt_and_new in zip(handed.tolist(), rows, strict=True):
        new = prompt_and_new[1:].tolist()
        assert row == new + [eos] * (len(row) - len(new))


def test_a_stream_gives_the_steps_of_generate_one_by_one(model: HybridLM) -> None:
    words = {"temperature": 1.0, "top_p": 0.9, "seed": 4}
    rows = model.generate([[1, 2], [3]], 6, **words)
    steps = list(stream(model, [[1, 2], [3]], 6, sampling=Sampling(**words)))
    assert torch.stack([step.tokens for step in steps], 1).tolist() == [row[-6:].tolist() for row in rows]
    assert all(step.new.all() for step in steps)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        stream(model, [[]])  # at once, not at the first step
    with pytest.raises(ValueError, match="65 tokens are more than max_context 64"):
        stream(model, [[1]], 64)
    with pytest.raises(ValueError, match="eos must lie in 0 to 10"):
        stream(model, [[1]], 2, ending=Ending(eos=11))
    for given, kind in (({"sampling": {"seed": 1}}, "Sampling"), ({"ending": ("a",)}, "Ending")):
        with pytest.raises(TypeError, match=rf"must be an? {kind}, got .*; {kind}\("):
            stream(model, [[1]], 2, **given)
    assert next(stream(model, [[1]], 60)).tokens.shape == (1,)  # a reader may leave


def test_a_stream_says_which_tokens_are_new(model: HybridLM) -> None:
    eos = int(model.generate([[1], [7]], 8)[0][3])
    rows = model.generate([[1], [7]], 8, eos=eos)
    steps = list(stream(model, [[1], [7]], 8, ending=Ending(eos=eos)))
    for n, row in enumerate(rows):
        assert [int(step.tokens[n]) for step in steps if step.new[n]] == row[1:].tolist()


def letters(ids: list[int]) -> str:
    return "".join("abcdefghijk"[i] for i in ids)


def test_a_stop_string_ends_a_row_where_it_first_stands_and_stays_in_it(model: HybridLM) -> None:
    prompts = [[1], [2, 5], [7]]
    free = [row[len(p) :].tolist() for p, row in zip(prompts, model.generate(prompts, 12), strict=True)]
    for stop in (letters(free[0][4:6]), [letters(free[0][:1]), letters(free[2][5:8])], "none of it"):
        rows = model.generate(prompts, 12, stop=stop, decode=letters)
        for prompt, row, whole in zip(prompts, rows, map(letters, free), strict=True):
            ends = [whole.find(s) + len(s) for s in ([stop] if isinstance(stop, str) else stop) if s in whole]
            assert letters(row[len(prompt) :].tolist()) == whole[: min(ends, default=len(whole))]
    seen: list[Tensor] = []
    rows = model.generate(prompts, 12, stop=letters(free[0][4:6]), decode=letters, on_tokens=seen.append)
    ended = [row[0].item() for row in seen]
    assert set(ended[len(rows[0]) - 1 :]) <= {rows[0][-1].item()}  # an ended row repeats its last token


def drawn(model: HybridLM, **words: Any) -> set[int]:
    prompts = torch.tensor([[1, 2]]).expand(3000, 2)
    return set(model.generate(prompts, 1, seed=0, **words)[:, -1].tolist())


def test_top_k_top_p_and_temperature_draw_from_the_tokens_they_say(model: HybridLM) -> None:
    with torch.no_grad():
        probability = model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    ranked = probability.argsort(descending=True).tolist()
    assert drawn(model, temperature=1.0, top_k=3) == set(ranked[:3])
    assert drawn(model, temperature=1.0, top_k=1) == {ranked[0]}
    cumulative = probability[ranked].cumsum(0)
    held = float((cumulative[1] + cumulative[2]) / 2)  # needs the third to be reached
    assert drawn(model, temperature=1.0, top_p=held) == set(ranked[:3])
    assert drawn(model, temperature=1.0, top_p=1e-9) == {ranked[0]}
    share = float((probability[ranked[2]] + probability[ranked[3]]) / 2 / probability[ranked[0]])
    assert drawn(model, temperature=1.0, min_p=share) == set(ranked[:3])
    assert drawn(model, temperature=1.0, min_p=1.0) == {ranked[0]}
    assert drawn(model, temperature=1e-4) == {ranked[0]}
    assert drawn(model, temperature=5.0) == set(range(11))


def test_draws_follow_the_softmax(model: HybridLM) -> None:
    prompts = torch.tensor([[1, 2]]).expand(20_000, 2)
    counts = torch.bincount(model.generate(prompts, 1, temperature=2.0, seed=0)[:, -1], minlength=11)
    with torch.no_grad():
        expected = (model(torch.tensor([[1, 2]])).logits[0, -1] / 2).softmax(-1)
    torch.testing.assert_close(counts / 20_000, expected.float(), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("ids", "words", "error", "says"),
    [
        ([], {}, ValueError, "no prompts"),
        ([[1], []], {}, ValueError, "prompt 1 is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, ValueError, "prompt 0 is empty"),
        ([[1, 11]], {}, ValueError, r"prompt 0: ids must lie in 0 to 10 \(vocab_size - 1\), got 11"),
        ([[1], [-1]], {}, ValueError, "prompt 1: ids must lie in 0 to 10"),
        ([[1.5]], {}, TypeError, "prompt 0: ids must be integers, got torch.float32"),
        ([["a"]], {}, TypeError, r"prompt 0: expected integers, got 'a' in it"),
        ([[1], [2, None]], {}, TypeError, "prompt 1: expected integers, got None in it"),
        ([[2, [3]]], {}, TypeError, r"prompt 0: expected integers, got \[3\] in it"),
        ([[2**70]], {}, ValueError, rf"prompt 0: ids must lie in 0 to 10 \(vocab_size - 1\), got {2**70}"),
        ([[1, -(2**63) - 1]], {}, ValueError, rf"prompt 0: ids must lie in 0 to 10 .* got -{2**63 + 1}"),
        (None, {}, TypeError, r"ids must be a tensor \[N, T\] or a list of prompts, as in \[\[1, 2, 3\]\]; got None"),
        (5, {}, TypeError, r"ids must be a tensor \[N, T\] or a list of prompts, as in \[\[1, 2, 3\]\]; got 5"),
        ([None], {}, TypeError, "prompt 0: expected a list of ids, got None"),
        (np.array([1, 2]), {}, ValueError, r"ids must be \[N, T\], or a list of one-dimensional prompts, got \[2\]"),
        (np.array([[1.0]]), {}, TypeError, "ids must be integers, got torch.float"),
        ([np.array([1, 11], dtype=np.uint16)], {}, ValueError, "prompt 0: ids must lie in 0 to 10 .* got 11"),
        ([np.array([[1]])], {}, ValueError, r"prompt 0: expected one dimension, got \[1, 1\]"),
        (list(np.array([1, 2])), {}, TypeError, "ids must be a list of prompts, each a list of ids"),
        (["abc"], {}, TypeError, "prompt 0: expected a list of ids, got 'abc'"),
        ([3, 4], {}, TypeError, r"ids must be a list of prompts, each a list of ids, as in \[\[1, 2, 3\]\]; got 3"),
        ([[True]], {}, TypeError, "prompt 0: ids must be integers, got torch.bool"),
        (torch.zeros(1, 2), {}, TypeError, "ids must be integers, got torch.float32"),
        (
            torch.tensor([1, 2]),
            {},
            ValueError,
            r"ids must be \[N, T\], or a list of one-dimensional prompts, got \[2\]",
        ),
        ([torch.tensor([[1]])], {}, ValueError, r"prompt 0: expected one dimension, got \[1, 1\]"),
        ([[1]], {"lengths": [1]}, ValueError, "a list of prompts has its own"),
        (torch.tensor([[1, 2]]), {"lengths": [3]}, ValueError, "prompt 0 has 2 tokens with padding, got length 3"),
        (torch.tensor([[1, 2]]), {"lengths": [0]}, ValueError, "prompt 0 is empty"),
        (torch.tensor([[1, 2]]), {"lengths": [1, 1]}, ValueError, "expected one for each of 1 prompts, got 2"),
        ([[1]], {"max_new_tokens": -1}, ValueError, "max_new_tokens must be a whole number, at least 0"),
        ([[1]], {"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be a whole number, at least 0, got 2.5"),
        ([[1]], {"max_new_tokens": True}, TypeError, "max_new_tokens must be a whole number, at least 0, got True"),
        (torch.tensor([[1, 2]]), {"lengths": [1.5]}, TypeError, "lengths must be whole numbers, one a prompt, got 1.5"),
        (torch.tensor([[1, 2]]), {"lengths": 2}, TypeError, "lengths must be whole numbers, one a prompt, got 2"),
        ([[1]], {"max_new_tokens": 64}, ValueError, "65 tokens are more than max_context 64"),
        ([[1]], {"temperature": -1.0}, ValueError, "temperature must be 0"),
        ([[1]], {"temperature": float("nan")}, ValueError, "temperature must be 0"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, ValueError, "top_k must be a whole number, at least 1, got 0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1"),
        ([[1]], {"top_p": 0.5}, ValueError, "give a temperature above 0"),
        ([[1]], {"temperature": 1.0, "min_p": 1.5}, ValueError, "min_p must be above 0 and at most 1"),
        ([[1]], {"min_p": 0.5}, ValueError, "give a temperature above 0"),
        ([[1]], {"eos": 11}, ValueError, "eos must lie in 0 to 10"),
        ([[1]], {"eos": "a"}, TypeError, "eos must be a whole number, at least 0, got 'a'"),
        ([[1]], {"stop": "a", "decode": lambda ids: None}, TypeError, "decode must return .* a str, got None"),
        ([[1]], {"stop": "a"}, ValueError, "stop strings need decode"),
        ([[1]], {"stop": ["a", ""], "decode": str}, ValueError, r"at least one character, got"),
        (torch.tensor([[1]]), {"lengths": [1], "padding": "middle"}, ValueError, "padding must be 'right' or 'left'"),
    ],
)
def test_bad_prompts_and_words_are_refused(
    model: HybridLM, ids: Any, words: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        model.generate(ids, **words)


def test_logits_that_are_not_finite_are_an_error_that_names_the_weight() -> None:
    torch.manual_seed(0)
    data = {"name": "nan", "d_model": 8, "vocab_size": 5, "layers": "attention[n_heads=2]", "tie_embeddings": False}
    model = build_model(Spec.from_dict(data))
    assert model.head is not None
    model.head.weight.data[2, 2] = torch.inf
    for words in ({}, {"temperature": 1.0}):
        with pytest.raises(
            ValueError, match=r"are not finite: head\.weight holds values that are not \(NaN or infinite\)$"
        ):
            model.generate([[1, 2]], 3, **words)
    model.head.weight.data[2, 2] = 1.0
    model.norm.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=r"though all parameters are: something overflows$"):
        model.generate([[1, 2]], 3)


def test_logits_that_stop_being_finite_say_nothing_of_a_cache(model: HybridLM) -> None:
    kept = model.head.weight.detach().clone()

    def spoil(tokens: Tensor) -> None:
        model.head.weight.data[3, 3] = torch.nan

    try:
        with pytest.raises(ValueError, match=r"head\.weight holds values that are not \(NaN or infinite\)$"):
            model.generate([[1, 2]], 3, on_tokens=spoil)
    finally:
        model.head.weight.data.copy_(kept)


def test_a_graph_needs_a_gpu(model: HybridLM) -> None:
    with pytest.raises(ValueError, match="graph=True needs a GPU, and the cache is on cpu"):
        next(stream(model, [[1]], graph=True))
