"""The batcher: requests that come and go get what each would get alone, in memory that stays flat."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import Tensor

from hybridzoo.architectures import Batcher, Ending, HybridLM, Sampling, account
from hybridzoo.mixers.kv_cache import PAGE


def drained(batcher: Batcher) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for _ in range(200):  # not for ever, should a request never leave
        if not len(batcher):
            return out
        for number, emitted in batcher.step().items():
            out.setdefault(number, []).append(emitted.token)
    raise AssertionError(f"{len(batcher)} requests never ended")


def alone(model: HybridLM, prompt: list[int], n: int, **words: Any) -> list[int]:
    return model.generate([prompt], n, **words)[0][len(prompt) :].tolist()


def test_requests_get_the_tokens_they_would_get_alone_and_wait_for_a_row() -> None:
    model = small_model()
    batcher = Batcher(model, 2)
    prompts = [[1, 2, 3], [4], [5] * 20, [6, 7], [8]]
    numbers = [batcher.add(prompt, 5 + n) for n, prompt in enumerate(prompts)]
    assert (len(batcher), batcher.waiting) == (5, 5)
    first = batcher.step()
    assert set(first) == set(numbers[:2])
    assert batcher.waiting == 3
    assert batcher.tokens(numbers[0]) == [first[numbers[0]].token]
    rest = drained(batcher)
    for n, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        found = ([first[number].token] if number in first else []) + rest[number]
        assert found == alone(model, prompt, 5 + n)
    assert batcher.step() == {}


def test_a_request_draws_by_its_own_words_whatever_its_company() -> None:
    model = small_model()
    words = {"temperature": 1.5, "top_k": 8, "seed": 3}
    batcher = Batcher(model, 3)
    drawn = batcher.add([1, 2], 12, sampling=Sampling(**words))
    batcher.add([4], 12)
    batcher.add([5], 12, sampling=Sampling(temperature=1.0, seed=9))
    assert drained(batcher)[drawn] == alone(model, [1, 2], 12, **words)


def test_no_words_of_a_request_end_a_step_for_the_others() -> None:
    model = small_model()
    batcher, n = Batcher(model, 12), 8
    plain = [batcher.add([1, 2], n), batcher.add([3], n)]
    seen = {}
    for words in (
        {"temperature": 1e-39},
        {"temperature": 1e-45, "top_k": 1},
        {"temperature": 5e-324, "min_p": 1.0},
        {"temperature": 1e300, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_p": 5e-324, "min_p": 5e-324, "top_k": 2**70},
        {"temperature": 1.0, "seed": 2**64 - 1},
        {"temperature": 1.0, "seed": -(2**63)},
    ):
        seen[batcher.add([1, 2], n, sampling=Sampling(**words))] = words
    out = drained(batcher)
    assert [out[number] for number in plain] == [alone(model, [1, 2], n), alone(model, [3], n)]
    for number, words in seen.items():
        assert len(out[number]) == n
        if words["temperature"] < 1e-30 or words.get("top_p", 1) < 1e-30:
            assert out[number] == alone(model, [1, 2], n)


def test_eos_and_stop_strings_end_a_request() -> None:
    model = small_model()
    free = alone(model, [1, 2], 12)
    eos = free[4]
    stop = "".join(map(str, free[2:4]))

    def text(ids: list[int]) -> str:
        return "".join(map(str, ids))

    batcher = Batcher(model, 2)
    first = batcher.add([1, 2], 12, ending=Ending(eos=eos))
    second = batcher.add([1, 2], 12, ending=Ending(stop=(stop,), decode=text))
    out = drained(batcher)
    assert out[first] == free[: free.index(eos) + 1]
    assert out[second] == alone(model, [1, 2], 12, stop=stop, decode=text)
    assert text(out[second]).endswith(stop)
    assert len(out[second]) < 12


def test_one_that_is_removed_gives_up_its_row_or_its_place_in_line() -> None:
    model = small_model()
    batcher = Batcher(model, 1)
    first, second, third = (batcher.add([n], 9) for n in (1, 2, 3))
    batcher.step()
    batcher.step()
    assert batcher.remove(first) == alone(model, [1], 2)
    assert batcher.remove(second) == []
    assert drained(batcher)[third] == alone(model, [3], 9)
    for number in (first, third, 99):
        with pytest.raises(KeyError, match=f"no request {number}"):
            batcher.remove(number)


def test_what_cannot_be_served_is_refused_and_changes_nothing() -> None:
    model = small_model(max_context=16)
    batcher = Batcher(model, 2)
    running = batcher.add([1, 2], 10)
    batcher.step()
    before = {name: x.clone() for name, x in batcher.cache.contents().items()}
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([], {}, ValueError, "prompt 0 is empty"),
        ([11], {}, ValueError, "ids must lie in 0 to 10"),
        ([1] * 10, {"max_new_tokens": 7}, ValueError, "17 tokens are more than max_context 16"),
        ([1], {"max_new_tokens": 0}, ValueError, "at least 1, got 0"),
        ([1], {"max_new_tokens": 2, "ending": Ending(eos=11)}, ValueError, "eos must lie in 0 to 10"),
        ("abc", {}, TypeError, "expected a list of ids"),
        (None, {}, TypeError, "prompt 0: expected a list of ids, got None"),
        ([1], {"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be a whole number, at least 1, got 1.5"),
        ([1], {"sampling": {"seed": 1}}, TypeError, r"sampling must be a Sampling, got {'seed': 1}; Sampling\("),
        ([1], {"ending": "a"}, TypeError, r"ending must be an Ending, got 'a'; Ending\("),
    ]
    for prompt, words, error, says in cases:
        with pytest.raises(error, match=says):
            batcher.add(prompt, **words)
    assert (len(batcher), batcher.waiting) == (1, 0)
    joining = batcher.add([3], 5)
    kept = model.head.weight.detach().clone()
    model.head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"not finite: head\.weight"):
        batcher.step()
    assert all(torch.equal(before[name], x) for name, x in batcher.cache.contents().items())
    with pytest.raises(ValueError, match=r"head\.weight holds values that are not finite"):
        Batcher(model)
    model.head.weight.data.copy_(kept)
    for rows, error in ((2.5, TypeError), (True, TypeError), (0, ValueError)):
        with pytest.raises(error, match=f"max_rows must be a whole number, at least 1, got {rows}"):
            Batcher(model, rows)
    out = drained(batcher)
    assert out[running] == alone(model, [1, 2], 10)[1:]
    assert out[joining] == alone(model, [3], 5)


def text_until(call: int, then: Any) -> Callable[[list[int]], str]:
    """A `decode` that works until its so many-th call."""
    calls = iter(range(1, 1000))

    def decode(ids: list[int]) -> str:
        return then() if next(calls) >= call else "".join(map(str, ids))

    return decode


def half_a_letter() -> str:
    raise UnicodeDecodeError("utf-8", b"", 0, 1, "half a letter")


@pytest.mark.parametrize(("then", "error"), [(half_a_letter, UnicodeDecodeError), (lambda: None, TypeError)])
def test_a_decode_that_fails_ends_its_own_request_and_no_other(then: Any, error: type[Exception]) -> None:
    model = small_model()
    batcher = Batcher(model, 3)
    failing = batcher.add([1, 2], 9, ending=Ending(stop="none", decode=text_until(3, then)))
    other = batcher.add([3], 9)
    steps = [batcher.step() for _ in range(3)]
    assert [type(step[failing].error) for step in steps] == [type(None), type(None), error]
    assert [step[failing].last for step in steps] == [False, False, True]
    assert [step[failing].token for step in steps] == alone(model, [1, 2], 3)
    assert len(batcher) == 1
    late = batcher.add([4], 9)
    out = drained(batcher)
    assert out == {other: alone(model, [3], 9)[3:], late: alone(model, [4], 9)}


def test_a_request_that_overflows_is_named_and_without_it_the_others_go_on() -> None:
    model = small_model(layers="a w")
    model.embedding.register_forward_hook(lambda _, ids, x: x.masked_fill((ids[0] == 7)[..., None], float("inf")))
    batcher = Batcher(model, 3)
    good = batcher.add([1, 2], 4)
    batcher.step()
    bad, late = batcher.add([7, 7], 4), batcher.add([3], 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"requests \[{bad}\]: the logits are not finite.*`remove`.*go on"):
            batcher.step()
    batcher.remove(bad)
    found = drained(batcher)
    assert found[late] == alone(model, [3], 4)
    assert found[good] == alone(model, [1, 2], 4)[1:]
    with pytest.raises(ValueError, match=r"prompt 1 of 2, from 0"):
        model.generate([[1], [7, 7]], 2)


def test_a_step_that_breaks_while_it_is_written_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(small_model(), 2)
    number = batcher.add([1, 2], 9)
    first = batcher.step()[number].token
    monkeypatch.setattr(batcher.cache.layers[1][0], "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        batcher.step()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"a step of this batcher broke off \(KeyboardInterrupt"):
        batcher.step()
    assert batcher.tokens(number) == [first]


def test_a_step_that_breaks_off_loses_no_token_and_is_the_last() -> None:
    model = small_model()

    class Interrupt(BaseException):  # as KeyboardInterrupt is, which would end the tests if it came too early
        pass

    def interrupt() -> str:
        raise Interrupt

    batcher = Batcher(model, 3)
    first = batcher.add([1, 2], 9, ending=Ending(stop=("none",), decode=text_until(3, interrupt)))
    second = batcher.add([3], 9)
    batcher.step()
    batcher.step()
    late = batcher.add([4], 9)
    with pytest.raises(Interrupt):
        batcher.step()
    assert batcher.tokens(first) == alone(model, [1, 2], 3)
    assert batcher.tokens(second) == alone(model, [3], 3)
    assert batcher.tokens(late) == alone(model, [4], 1)
    for again in (batcher.step, lambda: batcher.add([5])):
        with pytest.raises(RuntimeError, match=r"broke off \(Interrupt.* a new Batcher"):
            again()


def held_bytes(without: list[Tensor]) -> int:
    gc.collect()
    kept = {x.untyped_storage().data_ptr() for x in without}
    storages = (x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor)
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in kept}.values())


@torch.no_grad()
def is_as_alone(model: HybridLM, prompt: list[int], new: list[int], logits: list[Tensor]) -> bool:
    """Hold a request's tokens and logits to one pass over all of it; False for one that left while it waited."""
    if not new:
        return False
    alone = model(torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :]
    assert (torch.stack(logits) - alone).norm() <= 1e-5 * alone.norm()
    assert new == alone.argmax(-1).tolist()
    return True


@pytest.mark.slow
def test_two_thousand_steps_of_coming_and_going_leave_memory_flat_and_every_output_as_alone() -> None:
    # A window of more than a page: its ring grows first, and is written around by the longer requests alone.
    carve = {"type": "carve", "n_heads": 2, "head_dim": 8, "content_chunk": 8, "content_rank": 2}
    attention = {"type": "attention", "n_heads": 2}
    mixers = {"c": carve, "w": attention | {"window": PAGE + 20}, "a": attention}
    model, draw = small_model(mixers=mixers), random.Random(0)
    batcher, rows = Batcher(model, 4), 4
    longest = crossed = wrapped = 0
    prompts: dict[int, list[int]] = {}
    logits: dict[int, list[Tensor]] = {}
    tokens: dict[int, list[int]] = {}
    held, checked, left = [], 0, 0
    for taken in range(2000):
        while len(batcher) < rows + 1 and draw.random() < 0.3:
            prompt = [draw.randrange(11) for _ in range(draw.choice([1, 2, 9, 30, 60, PAGE - 40, 2 * PAGE - 40]))]
            number = batcher.add(prompt, draw.randint(1, 120))
            prompts[number], logits[number], tokens[number] = prompt, [], []
        ended = []
        for number, emitted in batcher.step().items():
            logits[number].append(emitted.logits)
            tokens[number].append(emitted.token)
            if emitted.last:
                ended.append(number)
        if prompts and draw.random() < 0.01:
            number = draw.choice(sorted(set(prompts) - set(ended)) or sorted(prompts))
            if number not in ended:
                assert batcher.remove(number) == tokens[number]
                ended.append(number)
                left += 1
        longest = max([longest, *(len(prompts[n]) + len(tokens[n]) - 1 for n in prompts if tokens[n])])
        for number in ended:
            start, end = len(prompts[number]), len(prompts[number]) + len(tokens[number])
            crossed += start // PAGE < (end - 1) // PAGE
            wrapped += start <= PAGE + 20 < end - 1
            checked += is_as_alone(model, prompts.pop(number), tokens.pop(number), logits.pop(number))
        if taken in (500, 1999):
            held.append(held_bytes([x for found in logits.values() for x in found]))
            room = -(-longest // PAGE) * PAGE
            assert room == 3 * PAGE
            assert batcher.cache.state_bytes == rows * account(model.spec, room, torch.float32).state_bytes
    assert checked > 50
    assert min(crossed, wrapped) > 5
    assert left > 5
    assert held[1] <= held[0] + (rows + 1) * 2 * PAGE * 8  # prompts of whoever is there at the moment
