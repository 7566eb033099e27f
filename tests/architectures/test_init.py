"""How a model starts: each mixer as its source draws it, and nothing that the model does undoes a mixer's words."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from registry_cases import default_cases, words_for
from torch import nn

from hybridzoo.architectures import HybridLM, Spec, build_model
from hybridzoo.mixers import TokenMixer, build_mixer, mixer_config

RECALL = {"conv_size": 4, "conv_init": "mean", "qk_init": "equal"}  # what studies of recall give every mixer


def model_of(name: str, layers: int = 2, **more: object) -> HybridLM:
    words = words_for(name, **more)
    data = {
        "name": "one-mixer",
        "d_model": words.pop("d_model"),
        "vocab_size": 11,
        "mixers": {"m": {"type": name, **words}},
        "layers": f"m*{layers}",
    }
    torch.manual_seed(0)
    return build_model(Spec.from_dict(data))


def mixers_of(model: HybridLM) -> list[TokenMixer]:
    return [module for module in model.modules() if isinstance(module, TokenMixer)]


@pytest.mark.parametrize("more", [{}, RECALL], ids=["default", "recall"])
@pytest.mark.parametrize("name", default_cases())
def test_a_mixer_starts_in_a_model_as_it_does_alone_but_for_its_scaled_output(name: str, more: dict[str, str]) -> None:
    model = model_of(name, layers=1, **more)
    with torch.device("meta"):
        alone = build_mixer(mixer_config(name, words_for(name, **more), name))
    alone.to_empty(device="cpu")
    torch.manual_seed(0)
    torch.empty(11, 24).normal_()  # the embedding is drawn first
    alone.reset_parameters()
    for key, parameter in mixers_of(model)[0].named_parameters():
        scale = 2**-0.5 if key in ("o_proj.weight", "out_proj.weight") else 1.0  # two additions to the stream
        assert torch.equal(parameter, alone.get_parameter(key) * scale), key


@pytest.mark.parametrize("name", default_cases())
def test_equal_queries_and_keys_and_mean_taps_hold_in_a_built_model(name: str) -> None:
    for mixer in mixers_of(model_of(name, **RECALL)):
        if name == "mamba2":
            inner, K = mixer.config.inner, mixer.config.state_dim
            starts = (mixer.in_proj.weight[2 * inner :], mixer.conv1d.weight[inner:])  # B, then C
            pairs = [(rows[:K], rows[K : 2 * K]) for rows in starts]
            convolutions = [mixer.conv1d]
        else:
            pairs = [(mixer.q_proj.weight, mixer.k_proj.weight), (mixer.q_conv1d.weight, mixer.k_conv1d.weight)]
            convolutions = [mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d]
            assert not torch.equal(mixer.q_proj.weight, mixer.v_proj.weight)
        for query, key in pairs:
            assert query.numel() > 0
            assert torch.equal(query, key)
        for convolution in convolutions:
            assert (convolution.weight - 1 / 4).abs().max() < 0.2
            assert 0.01 < convolution.weight.std() < 0.05  # a tenth of a tap


@pytest.mark.parametrize("name", default_cases())
def test_independent_queries_and_keys_differ(name: str) -> None:
    for mixer in mixers_of(model_of(name)):
        if name != "mamba2":
            assert not torch.equal(mixer.q_proj.weight, mixer.k_proj.weight)


@pytest.mark.parametrize(
    ("name", "lowest"), [("gated_delta_net", 0.0), ("kda", 1.0), ("gdn2", 1.0), ("carve", 1.0), ("mamba2", 1.0)]
)
def test_decays_start_in_their_source_s_range(name: str, lowest: float) -> None:
    gates = [mixer.gates for mixer in mixers_of(model_of(name, layers=50))]
    rates = torch.cat([gate.A_log.exp().flatten() for gate in gates])
    steps = torch.cat([F.softplus(gate.dt_bias) for gate in gates])
    assert lowest - 1e-4 <= rates.min() < lowest + 1
    assert 15 < rates.max() <= 16.001
    assert 0.9e-3 < steps.min() < 1.5e-3
    assert 0.07 < steps.max() < 0.101
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.3)  # uniform in the logarithm


def test_carve_starts_with_a_shut_erase_gate_and_a_silent_readout() -> None:
    for mixer in mixers_of(model_of("carve", erase_bias_init=-4.0)):
        assert mixer.z_proj.bias.tolist() == [-4.0] * len(mixer.z_proj.bias)
        assert mixer.z_proj.weight.std() > 0
        assert mixer.gates.content_up.abs().max() == 0
        assert mixer.gates.content_down.std() > 0


def test_at_gpt_2_s_width_projections_start_with_gpt_2_s_deviation() -> None:
    torch.manual_seed(0)
    spec = {"name": "wide", "d_model": 768, "vocab_size": 50, "layers": "attention[n_heads=12]"}
    model = build_model(Spec.from_dict(spec))
    plain = [
        m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(("o_proj", "down_proj"))
    ]
    for linear in plain:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.06)


def test_a_head_of_its_own_may_start_at_a_deviation_of_its_own() -> None:
    spec = {
        "name": "untied",
        "d_model": 64,
        "vocab_size": 500,
        "layers": "attention[n_heads=4]",
        "tie_embeddings": False,
    }
    model = build_model(Spec.from_dict({**spec, "init": {"std": 1.0, "head_std": 0.1}}))
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.1, rel=0.05)


def carve_of(erase: str, seed: int = 0, **words: object) -> HybridLM:
    words = {"n_heads": 2, "head_dim": 8, "content_rank": 3, "erase": erase, **words}
    data = {"name": "s", "d_model": 16, "vocab_size": 11, "mixers": {"c": {"type": "carve", **words}}, "layers": "c*3"}
    torch.manual_seed(seed)
    return build_model(Spec.from_dict({**data, "tie_embeddings": False}))


def test_carve_starts_as_its_token_gate_alone_in_every_parameter_of_the_model() -> None:
    content, token = dict(carve_of("content").named_parameters()), dict(carve_of("token").named_parameters())
    after = torch.rand(3)
    assert token.keys() < content.keys()
    assert {name.rpartition(".")[2] for name in content.keys() - token.keys()} == {"content_down", "content_up"}
    for name, parameter in token.items():
        assert torch.equal(parameter, content[name]), name
    carve_of("content")
    assert torch.equal(torch.rand(3), after), "what is drawn after the model is the same too"


def test_readouts_differ_between_layers_and_seeds_and_repeat_with_a_seed() -> None:
    downs = [mixer.gates.content_down for seed in (0, 1) for mixer in mixers_of(carve_of("content", seed))]
    assert len({tuple(down.flatten().tolist()) for down in downs}) == 6
    again = [mixer.gates.content_down for mixer in mixers_of(carve_of("content"))]
    assert all(torch.equal(one, two) for one, two in zip(again, downs[:3], strict=True))
    drawn = torch.cat(
        [mixer.gates.content_down.flatten() for mixer in mixers_of(carve_of("content", content_rank=300))]
    )
    assert drawn.std().item() == pytest.approx(8**-0.5, rel=0.05)


def test_a_readout_without_memory_can_be_drawn_anew() -> None:
    with torch.device("meta"):
        mixer = build_mixer(mixer_config("carve", words_for("carve")))
    mixer.reset_parameters()
    assert mixer.gates.content_down.is_meta
