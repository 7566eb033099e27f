"""Published layers with the same weights give the same outputs; weights that do not fit load nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hybridzoo.mixers import SpecError, TokenMixer, build_mixer, import_weights

B, T, D_MODEL = 2, 75, 32
Run = Callable[[Tensor, Any, int], Tensor]  # x, cache, tokens before
Case = tuple[nn.Module, Run, TokenMixer, Any]  # theirs, how to run it, ours, their config


def randomise(module: nn.Module) -> None:
    """Give every parameter, norms and gates too, a value that no initialisation would."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * (0.5 if p.ndim < 3 else 0.3))
            if name.endswith("A_log"):
                p.copy_(torch.rand(p.shape, generator=draw) * 2 - 1)
            elif "norm" in name:
                p.add_(1)


ATTENTION: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_implementation": "eager",
}


def llama() -> Case:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**ATTENTION)
    theirs = LlamaAttention(config, 0)
    return theirs, attention(theirs, LlamaRotaryEmbedding(config)), ours_like_attention(), config


def qwen3() -> Case:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = transformers.Qwen3Config(**ATTENTION)
    theirs = Qwen3Attention(config, 0)
    ours = ours_like_attention(qk_norm="rmsnorm", norm_eps=1e-6)
    return theirs, attention(theirs, Qwen3RotaryEmbedding(config)), ours, config


def ours_like_attention(**words: Any) -> TokenMixer:
    return build_mixer("attention", d_model=D_MODEL, n_heads=4, n_kv_heads=2, head_dim=12, rope_base=500.0, **words)


def attention(theirs: nn.Module, rope: nn.Module) -> Run:
    def run(x: Tensor, cache: Any, past: int) -> Tensor:
        places = torch.arange(past, past + x.shape[1])
        mask = torch.zeros(x.shape[1], past + x.shape[1])
        mask.masked_fill_(places[:, None] < torch.arange(past + x.shape[1]), float("-inf"))
        embedding = rope(x, places[None].expand(x.shape[0], -1))
        return theirs(x, embedding, attention_mask=mask[None, None], past_key_values=cache)[0]

    return run


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def recurrent(theirs: nn.Module) -> Run:
    def run(x: Tensor, cache: Any, past: int) -> Tensor:
        return theirs(x, cache_params=cache)

    return run


def qwen3_next() -> Case:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = transformers.Qwen3NextConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    words = {"n_heads": 2, "n_v_heads": 6, "head_dim": 8, "head_v_dim": 12, "norm_eps": 1e-6}
    return theirs, recurrent(theirs), build_mixer("gated_delta_net", d_model=D_MODEL, **words), config


def kimi_linear() -> Case:
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=3,
        linear_head_dim=8,
    )
    theirs = KimiLinearDeltaAttention(config, 0)
    return theirs, recurrent(theirs), build_mixer("kda", d_model=D_MODEL, n_heads=3, head_dim=8), config


def mamba2() -> Case:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=D_MODEL, num_heads=8, head_dim=8, state_size=12, n_groups=2, num_hidden_layers=1, chunk_size=16
    )
    theirs = Mamba2Mixer(config, 0)
    # Whether the published norm has groups depends on the release; ours is told.
    norm_groups = theirs.intermediate_size // getattr(theirs.norm, "group_size", theirs.intermediate_size)
    words = {"head_dim": 8, "state_dim": 12, "n_groups": 2, "norm_groups": norm_groups}
    return theirs, recurrent(theirs), build_mixer("mamba2", d_model=D_MODEL, **words), config


LAYERS = {"llama": llama, "qwen3": qwen3, "qwen3-next": qwen3_next, "kimi linear": kimi_linear, "mamba-2": mamba2}


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_a_published_layer_and_its_import_give_equal_outputs(layer: str) -> None:
    theirs, run, ours, _ = LAYERS[layer]()
    randomise(theirs)
    import_weights(ours, theirs.state_dict(), source="transformers")
    x = torch.randn(B, T, D_MODEL, generator=torch.Generator().manual_seed(1))
    assert relative(ours(x)[0], run(x, None, 0)) < 1e-5


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_both_go_on_equally_from_their_caches(layer: str) -> None:
    theirs, run, ours, config = LAYERS[layer]()
    randomise(theirs)
    import_weights(ours, theirs.state_dict(), source="transformers")
    x = torch.randn(B, T, D_MODEL, generator=torch.Generator().manual_seed(1))
    cache, state, past = transformers.DynamicCache(config=config), None, 0
    for piece in x.split([T - 3, 1, 1, 1], 1):
        expected = run(piece, cache, past)
        y, state = ours(piece, state)
        assert relative(y, expected) < 1e-5
        past += piece.shape[1]


def test_time_step_limits_are_words() -> None:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=D_MODEL, num_heads=8, head_dim=8, state_size=12, n_groups=1, num_hidden_layers=1,
        chunk_size=16, time_step_limit=(0.3, 0.9),
    )  # fmt: skip
    theirs = Mamba2Mixer(config, 0)
    randomise(theirs)
    ours = build_mixer("mamba2", d_model=D_MODEL, head_dim=8, state_dim=12, dt_limit_min=0.3, dt_limit_max=0.9)
    import_weights(ours, theirs.state_dict(), source="transformers")
    x = torch.randn(B, T, D_MODEL)
    with torch.no_grad():
        assert relative(ours(x)[0], theirs(x)) < 1e-5


def wide(rows: int, columns: int = D_MODEL) -> tuple[int, ...]:
    return (rows, columns)


DELTA = {
    "q_proj.weight": wide(16), "k_proj.weight": wide(16), "v_proj.weight": wide(24),
    "q_conv1d.weight": (16, 1, 4), "k_conv1d.weight": (16, 1, 4), "v_conv1d.weight": (24, 1, 4),
    "o_norm.weight": (6,), "o_proj.weight": (32, 24),
}  # fmt: skip
LOW_RANK = {
    "f_proj.0.weight": wide(6), "f_proj.1.weight": (16, 6),
    "g_proj.0.weight": wide(6), "g_proj.1.weight": (24, 6), "g_proj.1.bias": (24,),
}  # fmt: skip
# Names and shapes of fla's layers at hidden_size 32, with 2 key heads of 8 and, where not said, 4 value heads of 6.
FLA: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "GatedDeltaNet": (
        "gated_delta_net",
        {"n_v_heads": 4},
        DELTA | {"a_proj.weight": wide(4), "b_proj.weight": wide(4), "g_proj.weight": wide(24), "A_log": (4,),
                 "dt_bias": (4,)},
    ),
    "KimiDeltaAttention": (
        "kda",
        {"n_v_heads": 4},
        DELTA | LOW_RANK | {"f_proj.1.weight": (32, 6), "b_proj.weight": wide(4), "A_log": (4,), "dt_bias": (32,)},
    ),
    "GatedDeltaNet2": (
        "gdn2",
        {"n_v_heads": 4},
        DELTA | LOW_RANK | {"b_proj.weight": wide(16), "w_proj.weight": wide(24), "A_log": (2,), "dt_bias": (16,)},
    ),
    "DeltaNet with 2 value heads of 12": (
        "delta_net",
        {"head_v_dim": 12},
        DELTA | {"b_proj.weight": wide(2), "o_norm.weight": (12,)},
    ),
    "DeltaNet with a gate": (
        "delta_net",
        {"head_v_dim": 12, "output_gate": "full", "gate_activation": "silu"},
        DELTA | {"b_proj.weight": wide(2), "o_norm.weight": (12,), "g_proj.weight": wide(24)},
    ),
    "GatedLinearAttention with 2 value heads of 12": (
        "gla",
        {"head_v_dim": 12},
        {"q_proj.weight": wide(16), "k_proj.weight": wide(16), "v_proj.weight": wide(24), "g_proj.weight": wide(24),
         "gk_proj.0.weight": wide(16), "gk_proj.1.weight": (16, 16), "gk_proj.1.bias": (16,),
         "g_norm_swish_gate.weight": (12,), "o_proj.weight": (32, 24)},
    ),
    "Mamba2": (
        "mamba2",
        {"n_heads": None, "head_dim": 8, "state_dim": 5, "n_groups": 2},
        {"in_proj.weight": wide(64 + 84 + 8), "conv1d.weight": (84, 1, 4), "conv1d.bias": (84,), "A_log": (8,),
         "dt_bias": (8,), "D": (8,), "norm.weight": (64,), "out_proj.weight": (32, 64)},
    ),
    "Attention": (
        "attention",
        {"n_heads": 4, "n_kv_heads": 2, "qk_norm": "rmsnorm", "qkv_bias": True},
        {"q_proj.weight": wide(32), "k_proj.weight": wide(16), "v_proj.weight": wide(16), "q_proj.bias": (32,),
         "k_proj.bias": (16,), "v_proj.bias": (16,), "q_norm.weight": (8,), "k_norm.weight": (8,),
         "o_proj.weight": wide(32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", FLA)
def test_fla_names_and_shapes_fill_every_parameter(layer: str) -> None:
    name, words, shapes = FLA[layer]
    head_sizes = {"head_dim": 8, "head_v_dim": 6} if name not in ("mamba2", "attention") else {}
    mixer = build_mixer(name, d_model=D_MODEL, **{"n_heads": 2, **head_sizes, **words})
    given = {key: torch.randn(shape) for key, shape in shapes.items()}
    import_weights(mixer, given, source="fla")
    renamed = {"f_proj": "gk_proj", "o_norm": "g_norm_swish_gate"} if name == "gla" else {}
    for key, parameter in mixer.named_parameters():
        head, dot, rest = key.removeprefix("gates.").partition(".")
        assert torch.equal(parameter, given.pop(renamed.get(head, head) + dot + rest))
    assert not given


def kimi_weights() -> tuple[TokenMixer, dict[str, Tensor]]:
    theirs, _, ours, _ = kimi_linear()
    return ours, dict(theirs.state_dict())


def test_keys_that_do_not_fit_are_all_named_and_nothing_is_loaded() -> None:
    ours, weights = kimi_weights()
    before = {name: p.clone() for name, p in ours.named_parameters()}
    del weights["b_proj.weight"]
    weights["beta.weight"] = torch.zeros(3)
    weights["o_norm.weight"] = torch.zeros(9)
    message = (
        r"kda from transformers: the state dict does not hold this layer: missing b_proj.weight; "
        r"unexpected beta.weight; o_norm.weight is \[9\], expected \[8\]"
    )
    with pytest.raises(ValueError, match=message):
        import_weights(ours, weights, source="transformers")
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def test_words_that_differ_from_the_layer_are_named() -> None:
    _, weights = kimi_weights()
    bare = build_mixer("kda", d_model=D_MODEL, n_heads=3, head_dim=8, output_gate="none")
    with pytest.raises(ValueError, match=r"the mixer has no g_proj.0.weight for g_a_proj.weight"):
        import_weights(bare, weights, source="transformers")
    carve = build_mixer("carve", d_model=D_MODEL, n_heads=3, head_dim=8)
    with pytest.raises(ValueError, match=r"the layer has nothing for z_proj.weight, z_proj.bias, gates.content_down"):
        import_weights(carve, weights, source="fla")
    with pytest.raises(ValueError, match="transformers has no layer of this kind"):
        import_weights(build_mixer("delta_net", d_model=D_MODEL, n_heads=4), weights, source="transformers")


def test_an_unknown_source_and_a_mixer_without_memory_are_refused() -> None:
    ours, weights = kimi_weights()
    with pytest.raises(SpecError, match=r"unknown source 'transformer'.*did you mean 'transformers'"):
        import_weights(ours, weights, source="transformer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="meta device"):
        import_weights(ours.to("meta"), weights, source="transformers")
