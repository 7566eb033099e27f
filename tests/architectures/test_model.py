"""The model of a spec: what its loss is taken of, how it starts, and that every way through it is one function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hybridzoo.architectures import HybridLM, Spec, account, build_model, idle_content_gates, load_spec
from hybridzoo.blocks.ffn import FeedForward

Shallow = Callable[..., HybridLM]


def small_spec(**changes: object) -> Spec:
    data = {
        "name": "small",
        "d_model": 16,
        "vocab_size": 11,
        "mixers": {"a": {"type": "attention", "n_heads": 2}, "k": {"type": "kda", "n_heads": 2, "head_dim": 8}},
        "layers": "k k+a a",
    }
    return Spec.from_dict(data | changes)


def small_model(**changes: object) -> HybridLM:
    torch.manual_seed(0)
    return build_model(small_spec(**changes), dtype=torch.float64)


def random_ids(vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_the_loss_asks_each_position_for_the_next_label() -> None:
    model, ids = small_model(), random_ids(11, 2, 7)
    labels = ids.clone()
    labels[0, 3] = labels[1, 6] = -100
    out = model(ids, labels=labels)
    pairs = [(b, t) for b in range(2) for t in range(6) if labels[b, t + 1] != -100]
    expected = -torch.stack([out.logits[b, t].log_softmax(-1)[labels[b, t + 1]] for b, t in pairs]).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)


def test_a_state_that_is_not_asked_for_is_not_returned_and_changes_nothing_else() -> None:
    model, ids = small_model(), random_ids(11, 2, 7)
    out, without = model(ids, labels=ids), model(ids, labels=ids, return_state=False)
    assert without.state is None
    assert torch.equal(without.loss, out.loss)
    assert torch.equal(without.logits, out.logits)
    cache = model.init_cache(2)
    assert model(ids[:, :4], state=cache, return_state=False).state is None
    torch.testing.assert_close(model(ids[:, 4:], state=cache).logits, out.logits[:, 4:].detach())


def test_the_loss_is_zero_where_no_label_counts() -> None:
    model, ids = small_model(), random_ids(11, 2, 7)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    assert model(ids[:, :1], labels=ids[:, :1]).loss == 0


def test_packed_sequences_have_the_logits_states_and_mean_loss_of_each_alone(tiny_spec: str, shallow: Shallow) -> None:
    model = shallow(tiny_spec)
    parts = [random_ids(model.spec.vocab_size, 1, n) for n in (5, 1, 70, 2)]
    bounds = torch.tensor([0, 5, 6, 76, 78], dtype=torch.int32)
    packed = model(torch.cat(parts, 1), labels=torch.cat(parts, 1), cu_seqlens=bounds)
    alone = [model(part, labels=part) for part in parts]
    torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], 1), rtol=1e-8, atol=1e-10)
    mean = sum(out.loss * (part.shape[1] - 1) for out, part in zip(alone, parts, strict=True)) / (5 + 1 + 70 + 2 - 4)
    torch.testing.assert_close(packed.loss, mean, rtol=1e-5, atol=0)
    more = random_ids(model.spec.vocab_size, 4, 3)
    joint = model(more, state=packed.state).logits
    single = [model(more[n : n + 1], state=out.state).logits for n, out in enumerate(alone)]
    torch.testing.assert_close(joint, torch.cat(single), rtol=1e-8, atol=1e-10)


def test_an_empty_packed_sequence_changes_nothing() -> None:
    model, ids = small_model(), random_ids(11, 1, 6)
    plain = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 4, 6]))
    gaps = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 0, 4, 4, 6, 6]))
    torch.testing.assert_close((gaps.loss, gaps.logits), (plain.loss, plain.logits))


def test_a_split_sequence_goes_on_from_its_state(tiny_spec: str, shallow: Shallow) -> None:
    model = shallow(tiny_spec)
    ids = random_ids(model.spec.vocab_size, 2, 70)
    whole = model(ids).logits
    state, outputs = None, []
    for part in ids.split([1, 2, 66, 1], 1):
        out = model(part, state=state)
        state = out.state
        outputs.append(out.logits)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-8, atol=1e-10)
    fresh = model(ids, state=model.init_state(2, dtype=torch.float64)).logits
    torch.testing.assert_close(fresh, whole, rtol=1e-8, atol=1e-10)


def test_wrapped_blocks_have_states_and_start_as_bare_ones_do() -> None:
    bare, wrapped, ids = small_model(), small_model(), random_ids(11, 2, 7)
    for i, block in enumerate(wrapped.blocks):
        wrapped.blocks[i] = checkpoint_wrapper(block)
    state = wrapped.init_state(2, dtype=torch.float64)
    torch.testing.assert_close(wrapped(ids, state=state).logits, bare(ids).logits)
    for model in (bare, wrapped):
        torch.manual_seed(1)
        model.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(wrapped.parameters(), bare.parameters(), strict=True))


def test_a_changed_suffix_leaves_earlier_logits_alone(tiny_spec: str, shallow: Shallow) -> None:
    model = shallow(tiny_spec)
    ids = random_ids(model.spec.vocab_size, 1, 40)
    changed = ids.clone()
    changed[:, 23:] = (changed[:, 23:] + 1) % model.spec.vocab_size
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :23], before[:, :23], rtol=1e-8, atol=1e-10)
    assert not torch.allclose(after[:, 23:], before[:, 23:])


def test_every_parameter_of_a_tiny_spec_gets_a_gradient(tiny_spec: str, shallow: Shallow) -> None:
    model = shallow(tiny_spec, dtype=torch.float32)
    ids = random_ids(model.spec.vocab_size, 2, 130)
    model(ids, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_building_on_the_meta_device_and_going_on_equals_building_at_once(tiny_spec: str) -> None:
    spec = load_spec(tiny_spec)
    torch.manual_seed(3)
    at_once = build_model(spec)
    deferred = build_model(spec, device="meta")
    assert all(parameter.is_meta for parameter in deferred.parameters())
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.reset_parameters()
    for (name, a), (_, b) in zip(at_once.state_dict().items(), deferred.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_built_from_its_class_starts_initialised() -> None:
    model = HybridLM(small_spec())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0.01 < model.embedding.weight.std() < 0.03


def test_tied_embeddings_are_one_parameter_and_untied_are_two() -> None:
    names = set(small_model(tie_embeddings=True).state_dict())
    untied = small_model(tie_embeddings=False)
    assert set(untied.state_dict()) - names == {"head.weight"}
    ids = random_ids(11, 1, 4)
    hidden, _ = untied.hidden(ids)
    torch.testing.assert_close(untied(ids).logits, hidden @ untied.head.weight.T)


def test_residual_scale_divides_what_is_added_to_the_stream_and_nothing_else() -> None:
    plain, scaled = small_model(init={"residual_scale": False}), small_model(init={"residual_scale": True})
    factor = 6**-0.5  # two additions in each of three layers
    outputs = {"blocks.0.mixers.0.o_proj.weight", "blocks.2.mixers.0.o_proj.weight"}
    outputs |= {f"blocks.{layer}.ffn.down_proj.weight" for layer in range(3)}
    outputs |= {f"blocks.1.branch_norms.{branch}.weight" for branch in range(2)}
    for name, parameter in scaled.named_parameters():
        expected = plain.get_parameter(name) * (factor if name in outputs else 1)
        torch.testing.assert_close(parameter, expected, msg=name)


def test_the_embedding_s_deviation_is_the_spec_s() -> None:
    assert small_model(init={"std": 0.5}, vocab_size=999).embedding.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_bfloat16_leaves_gates_in_float32(tiny_spec: str, shallow: Shallow) -> None:
    model = shallow(tiny_spec, dtype=torch.bfloat16)
    wide = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert wide <= {"A_log", "dt_bias", "content_down", "content_up"}
    assert wide or tiny_spec == "transformer-tiny"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 or name.rpartition(".")[2] in wide, name
    ids = random_ids(model.spec.vocab_size, 1, 9)
    out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.loss.isfinite()


def test_ffn_none_builds_blocks_of_mixers_only() -> None:
    model = small_model(ffn="none")
    assert not any(isinstance(module, FeedForward) for module in model.modules())
    assert model(random_ids(11, 1, 4)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (torch.zeros(2, 3), TypeError, "ids must be int32 or int64, got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"ids must be \[B, T\] with at least one token, got \[3\]"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"with at least one token, got \[2, 0\]"),
        (torch.tensor([[0, 11]]), ValueError, r"ids must lie in 0 to 10 \(vocab_size - 1\), got 11"),
        (torch.tensor([[-1, 10]]), ValueError, "got -1"),
        ([[1, 2]], TypeError, r"ids must be a tensor \[B, T\], got list"),
    ],
)
def test_bad_ids_are_refused(ids: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        small_model()(ids)


def test_bad_labels_states_boundaries_and_lengths_are_refused() -> None:
    model, ids = small_model(max_context=8), random_ids(11, 1, 8)
    with pytest.raises(ValueError, match=r"labels must have the shape of ids \[1, 8\], got \[1, 7\]"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(TypeError, match="labels must be int32 or int64"):
        model(ids, labels=ids.double())
    with pytest.raises(TypeError, match="labels must be a tensor"):
        model(ids, labels=[[1]])
    for bad in (11, -1, -101):
        with pytest.raises(ValueError, match=rf"labels must lie in 0 to 10 \(vocab_size - 1\), or -100, got {bad}"):
            model(ids, labels=torch.tensor([[bad, *[1] * 7]]))
    with pytest.raises(ValueError, match="state: expected one for each of 3 layers, got 1"):
        model(ids, state=model.init_state(1)[:1])
    with pytest.raises(ValueError, match="state"):
        model(ids, state=model.init_state(2))
    with pytest.raises((TypeError, ValueError), match="state"):
        model(ids, state=model.init_state(1)[::-1])
    with pytest.raises(TypeError, match="state: expected the state of a model, got Tensor"):
        model(ids, state=model(ids).logits)
    with pytest.raises(ValueError, match=r"tail must be|state"):
        model(ids, state=small_model(d_model=32).init_state(1))
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        model(ids.expand(2, -1), cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(TypeError, match="cu_seqlens must be a tensor"):
        model(ids, cu_seqlens=[0, 8])
    for bad in ([0, 9], [1, 8], [0, 5, 3, 8], [0]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            model(ids, cu_seqlens=torch.tensor(bad))
    with pytest.raises(ValueError, match="a sequence of 9 tokens is longer than the spec's max_context 8"):
        model(random_ids(11, 1, 9))
    packed = random_ids(11, 1, 12)
    assert model(packed, cu_seqlens=torch.tensor([0, 8, 12])).logits.shape == (1, 12, 11)
    with pytest.raises(ValueError, match="a sequence of 9 tokens"):
        model(packed, cu_seqlens=torch.tensor([0, 9, 12]))


def test_max_context_counts_what_a_state_has_seen() -> None:
    for layers in ("a", "k", "k+a k"):
        model = small_model(layers=layers, max_context=8)
        state = model(random_ids(11, 2, 6)).state
        model(random_ids(11, 2, 2), state=state)
        with pytest.raises(ValueError, match="a sequence of 9 tokens is longer than the spec's max_context 8"):
            model(random_ids(11, 2, 3), state=state)
        packed, bounds = random_ids(11, 1, 4), torch.tensor([0, 1, 4])
        model(packed, state=state, cu_seqlens=torch.tensor([0, 2, 4]))
        with pytest.raises(ValueError, match="a sequence of 9 tokens"):
            model(packed, state=state, cu_seqlens=bounds)


def test_what_is_no_spec_or_no_dtype_for_weights_is_refused() -> None:
    for function in (build_model, account):
        with pytest.raises(TypeError, match=r"expected a Spec, got str; load_spec\('carve-tiny'\) gives one"):
            function("carve-tiny")
    with pytest.raises(TypeError, match=r"dtype must be floating point, got torch\.int8"):
        build_model(small_spec(), dtype=torch.int8)


def test_a_small_model_learns_to_count() -> None:
    torch.manual_seed(0)
    model = build_model(small_spec(layers="k+a"))
    ids = torch.arange(11).repeat(2)[None]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2
    assert model.generate([[3, 4]], 5)[0].tolist() == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("tokens", [7, 8, 9])
def test_a_content_gate_that_is_named_idle_changes_nothing_and_one_that_is_not_does(tokens: int) -> None:
    carve = {"type": "carve", "n_heads": 2, "content_chunk": 8, "content_rank": 2}
    mixers = {"c": carve, "t": {**carve, "erase": "token"}, "unused": {**carve, "content_chunk": 99}}
    model, ids = small_model(mixers=mixers, layers="c t"), random_ids(11, 1, tokens)
    before = model(ids).logits
    for name, parameter in model.named_parameters():
        if "content_up" in name:
            torch.nn.init.normal_(parameter, std=9.0)
    changed = not torch.equal(model(ids).logits, before)
    assert idle_content_gates(model.spec, tokens) == ({} if changed else {"c": 8})
    assert changed == (tokens > 8)
