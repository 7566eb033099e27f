"""Properties that every registered mixer has, and every mixer with one of its gate flags changed.

A new mixer is tested here the day it is registered, with no line edited.
"""

import dataclasses
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_cases import ablation_cases, build, default_cases
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from hybridzoo.mixers import TokenMixer, build_mixer

LENGTHS = [1, 2, 15, 16, 17, 33, 40]
every_case = pytest.mark.parametrize("text", ablation_cases())
every_mixer = pytest.mark.parametrize("text", default_cases())


def make(text: str, **words: object) -> TokenMixer:
    torch.manual_seed(0)
    mixer = build(text, **words).double()
    with torch.no_grad():  # content gates start at zero, where they do nothing
        for name, parameter in mixer.named_parameters():
            if "content_up" in name:
                parameter.normal_()
    return mixer


def tokens(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randn(B, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(found: object, expected: object, tolerance: float = 1e-10) -> None:
    leaves, others = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(leaves) == len(others)
    for x, y in zip(leaves, others, strict=True):
        assert x.shape == y.shape
        assert torch.allclose(x.double(), y.double(), atol=tolerance, rtol=tolerance)


@every_case
def test_output_has_the_shape_of_the_input_and_every_parameter_a_gradient(text: str) -> None:
    mixer = make(text)
    x = tokens(2, 20).requires_grad_()
    y, _ = mixer(x)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    for name, value in [("x", x), *mixer.named_parameters()]:
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
        assert value.grad.abs().max() > 0, name


@every_case
@settings(max_examples=4)
@given(cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted), T=st.sampled_from(LENGTHS))
def test_any_split_into_calls_equals_one_call(text: str, cuts: list[int], T: int) -> None:
    mixer, x = make(text), tokens(2, T)
    whole, end = mixer(x)
    state, pieces = None, []
    edges = [0, *(min(cut, T) for cut in cuts), T]
    for start, stop in pairwise(edges):
        y, state = mixer(x[:, start:stop], state=state)
        pieces.append(y)
    assert_same(torch.cat(pieces, 1), whole)
    assert_same(state, end)


@every_case
def test_prefill_then_one_token_at_a_time_equals_one_call(text: str) -> None:
    mixer, x = make(text), tokens(2, 36)
    whole, end = mixer(x)
    y, state = mixer(x[:, :29])
    pieces = [y]
    for t in range(29, 36):
        y, state = mixer(x[:, t : t + 1], state=state)
        pieces.append(y)
    assert_same(torch.cat(pieces, 1), whole)
    assert_same(state, end)


@every_case
def test_packed_prompts_of_any_lengths_then_decoded_as_a_batch_equal_each_alone(text: str) -> None:
    mixer = make(text)
    prompts = [tokens(1, T, seed=T) for T in (3, 1, 17, 0, 32)]
    more = tokens(5, 2, seed=99)
    lengths = torch.tensor([p.shape[1] for p in prompts])
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed, state = mixer(torch.cat(prompts, 1), cu_seqlens=bounds)
    decoded, end = mixer(more, state=state)
    assert end.length.tolist() == (lengths + 2).tolist()
    for n, prompt in enumerate(prompts):
        alone, _ = mixer(torch.cat([prompt, more[n : n + 1]], 1))
        assert_same(packed[:, bounds[n] : bounds[n + 1]], alone[:, :-2])
        assert_same(decoded[n], alone[0, -2:])


@every_case
def test_packed_calls_may_go_on_from_a_state(text: str) -> None:
    mixer, x = make(text), tokens(2, 30)
    _, state = mixer(x[:, :11])
    bounds = torch.tensor([0, 19, 38])
    packed, end = mixer(x[:, 11:].reshape(1, 38, 24), state=state, cu_seqlens=bounds)
    whole, expected = mixer(x)
    assert_same(packed.reshape(2, 19, 24), whole[:, 11:])
    assert_same(end.length, expected.length)


@every_case
def test_a_token_sees_none_after_it(text: str) -> None:
    mixer, x = make(text), tokens(1, 40)
    changed = x.clone()
    changed[:, 32:] += 1
    before, after = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(before[:, :32], after[:, :32])  # 32 is a boundary of tiles and of content chunks
    assert not torch.allclose(before[:, 32:], after[:, 32:])
    changed = x.clone()
    changed[:, 21:] += 1
    assert_same(mixer(changed)[0][:, :21], before[:, :21])


@every_case
def test_state_bytes_are_the_bytes_held(text: str) -> None:
    mixer = make(text).float()
    for T in (1, 20, 40):
        _, state = mixer(tokens(3, T).float())
        held = sum(x.numel() * x.element_size() for x in pytree.tree_leaves(state))
        assert held == 3 * mixer.state_bytes(T, torch.float32)
        assert 0 <= mixer.kv_bytes(T, torch.float32) <= mixer.state_bytes(T, torch.float32)


@every_case
def test_a_mixer_builds_without_memory_and_is_drawn_later(text: str) -> None:
    real = build(text)
    torch.manual_seed(0)
    real.reset_parameters()
    with torch.device("meta"):
        mixer = build(text)
    assert all(p.is_meta for p in mixer.parameters())
    mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(0)
    mixer.reset_parameters()
    for (name, drawn), expected in zip(mixer.named_parameters(), real.parameters(), strict=True):
        assert torch.equal(drawn, expected), name


@every_mixer
def test_a_fresh_state_is_no_state(text: str) -> None:
    mixer, x = make(text), tokens(2, 20)
    assert_same(mixer(x, state=mixer.init_state(2)), mixer(x))


@every_mixer
def test_a_state_of_another_batch_or_mixer_is_refused(text: str) -> None:
    mixer = make(text)
    with pytest.raises(ValueError, match="must be"):
        mixer(tokens(2, 4), state=mixer.init_state(3))
    other = make("attention" if text != "attention" else "carve")
    with pytest.raises((ValueError, TypeError), match="another mixer"):
        mixer(tokens(2, 4), state=other.init_state(2))


@every_mixer
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 4, 23), ValueError, r"x must be \[B, T, d_model\] = \[B, T, 24\], got \[2, 4, 23\]"),
        (torch.zeros(4, 24), ValueError, r"x must be \[B, T, d_model\]"),
        (torch.zeros(2, 4, 24, dtype=torch.long), TypeError, "x must be floating point, got torch.int64"),
        (torch.zeros(2, 4, 24), TypeError, "x must be torch.float64, as the mixer's weights are, got torch.float32"),
        (torch.zeros(2, 4, 24, device="meta"), ValueError, "x is on meta, but the mixer is on cpu"),
    ],
)
def test_a_wrong_input_is_refused(text: str, x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(text)(x)


@every_mixer
def test_an_empty_sequence_gives_an_empty_output(text: str) -> None:
    y, state = make(text)(tokens(2, 0))
    assert y.shape == (2, 0, 24)
    assert state.length.tolist() == [0, 0]


@every_mixer
def test_flops_of_decoding_and_training_are_positive_and_differ_only_by_the_mixing(text: str) -> None:
    mixer = make(text)
    linears = 2 * sum(m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    for context in (1, 64, 4096):
        assert mixer.flops_per_token(context) > linears
        assert mixer.flops_per_token(context, decode=True) > linears


@every_mixer
def test_sixteen_bit_modules_give_finite_sixteen_bit_outputs(text: str) -> None:
    mixer = make(text).bfloat16()
    y, state = mixer(tokens(2, 20).bfloat16())
    mixer(tokens(2, 1).bfloat16(), state=state)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


@every_mixer
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast_rounds_projections_and_nothing_of_the_recurrence(text: str, inside: bool) -> None:
    mixer, x = make(text).float(), tokens(2, 40).float()
    exact = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        loss = y.float().square().sum()
        if inside:
            loss.backward()
        with torch.no_grad():
            mixer(x[:, :1], state=state)
    if not inside:
        loss.backward()
    assert (y - exact).norm() < 0.05 * exact.norm()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


@every_mixer
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_gives_the_same_gradients_bit_for_bit(text: str, reentrant: bool) -> None:
    mixer, gradients = make(text), []
    for again in (False, True):
        mixer.zero_grad()
        x = tokens(2, 20).requires_grad_()
        y, _ = checkpoint(mixer, x, use_reentrant=reentrant) if again else mixer(x)
        y.square().sum().backward()
        gradients.append([leaf.grad.clone() for leaf in (x, *mixer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_mixer
def test_a_state_passes_its_gradient_between_checkpointed_calls(text: str) -> None:
    mixer, x = make(text), tokens(2, 20)
    gradients = []
    for again in (False, True):
        call = partial(checkpoint, mixer, use_reentrant=False) if again else mixer
        mixer.zero_grad()
        _, state = call(x[:, :9])
        call(x[:, 9:], state=state)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in mixer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_mixer
def test_training_compiles_as_one_graph_with_equal_results(text: str) -> None:
    eager, x = make(text), tokens(2, 20)
    compiled = torch.compile(make(text), fullgraph=True, backend="aot_eager")
    for mixer in (eager, compiled):
        mixer(x)[0].square().sum().backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert_same(a.grad, b.grad), name


@pytest.mark.parametrize("text", [case for case in ablation_cases() if hasattr(build(case).config, "predict")])
def test_the_chunkwise_backend_is_the_reference_through_a_whole_mixer(text: str) -> None:
    x = tokens(2, 40)
    gradients = []
    for backend in ("torch", "reference"):
        mixer = make(text, backend=backend)
        mixer(x)[0].square().sum().backward()
        gradients.append([p.grad for p in mixer.parameters()])
    assert_same(*gradients)


def test_the_config_alone_rebuilds_a_mixer() -> None:
    for text in ablation_cases():
        mixer = build(text)
        assert type(build_mixer(mixer.config)) is type(mixer)


@every_mixer
def test_a_printed_mixer_shows_its_words_and_the_sizes_they_came_to(text: str) -> None:
    mixer = make(text)
    shown = dict(word.split("=") for word in mixer.extra_repr().split(", "))
    assert list(shown) == [field.name for field in dataclasses.fields(mixer.config)]
    for name, value in mixer.config.resolved.items():
        assert value is not None
        assert shown[name] == str(value)
