"""The specs that are shipped: the sizes their names promise, and the same stack under every mixer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from hybridzoo.architectures import Spec, account, build_model, list_specs, load_spec, spec_path

RECURRENT = ["carve", "gdn2", "kda", "gated_delta_net", "mamba2"]
SIZES = ["tiny", "125m", "1.3b"]


def kinds(spec: Spec) -> list[tuple[str, ...]]:
    """The mixers of each layer by registry name."""
    return [row.mixers for row in account(spec).layers]


def test_every_mixer_comes_pure_and_hybrid_in_every_size() -> None:
    expected = {f"{name}-{size}" for name in (*RECURRENT, "transformer") for size in SIZES}
    expected |= {f"{name}-hybrid-{size}" for name in RECURRENT for size in SIZES}
    assert set(list_specs()) == expected


def test_a_file_s_name_is_its_spec_s(any_spec: str) -> None:
    assert spec_path(any_spec).stem == load_spec(any_spec).name == any_spec


def test_a_shipped_spec_builds_without_memory_and_saves_as_itself(any_spec: str, tmp_path: Path) -> None:
    spec = load_spec(any_spec)
    model = build_model(spec, device="meta")
    assert len(model.blocks) == len(spec.layers)
    logits = model(torch.zeros(1, 2, dtype=torch.int64, device="meta")).logits
    assert logits.shape == (1, 2, spec.vocab_size)
    saved = tmp_path / "saved.yaml"
    saved.write_text(spec.to_yaml())
    assert load_spec(str(saved)) == spec


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RECURRENT)
def test_a_hybrid_has_one_attention_layer_in_four_and_is_its_pure_spec_otherwise(name: str, size: str) -> None:
    pure, hybrid = load_spec(f"{name}-{size}"), load_spec(f"{name}-hybrid-{size}")
    assert kinds(pure) == [(name,)] * len(pure.layers)
    assert kinds(hybrid) == [(name,), (name,), (name,), ("attention",)] * (len(pure.layers) // 4)
    assert hybrid.layers[0] == pure.layers[0]
    assert hybrid.layers[3].mixers[0][1].window == (256 if size == "tiny" else 1024)
    assert {**hybrid.to_dict(), "name": "", "layers": "", "mixers": ""} == {
        **pure.to_dict(),
        "name": "",
        "layers": "",
        "mixers": "",
    }


@pytest.mark.parametrize(
    ("size", "d_model", "layers", "heads", "width", "chunk", "rank"),
    [("125m", 768, 12, 12, 2048, 64, 16), ("1.3b", 2048, 24, 16, 5632, 128, 32)],
)
def test_sizes_are_those_of_carve_s_paper(
    size: str, d_model: int, layers: int, heads: int, width: int, chunk: int, rank: int
) -> None:
    for name in [name for name in list_specs() if name.endswith(size)]:
        spec = load_spec(name)
        assert (spec.d_model, len(spec.layers), spec.vocab_size) == (d_model, layers, 32_000)
        assert (spec.ffn.type, spec.ffn.hidden(d_model)) == ("swiglu", width)
    carve = load_spec(f"carve-{size}").mixers["c"]
    assert (carve.n_heads, carve.K, carve.V) == (heads, d_model // heads, d_model // heads)
    assert (carve.content_chunk, carve.content_rank) == (chunk, rank)
    attention = load_spec(f"transformer-{size}").mixers["a"]
    assert (attention.n_heads, attention.dim, attention.window) == (heads, d_model // heads, None)


@pytest.mark.parametrize(("size", "promised"), [("125m", 125e6), ("1.3b", 1.3e9)])
def test_carve_has_the_parameters_of_its_name_and_the_others_those_of_carve_within_a_tenth(
    size: str, promised: float
) -> None:
    counts = {name: account(load_spec(name)).parameters for name in list_specs() if name.endswith(size)}
    carve = counts[f"carve-{size}"]
    assert carve == pytest.approx(promised, rel=0.1)
    assert {name: count for name, count in counts.items() if abs(count / carve - 1) > 0.1} == {}


def test_tiny_specs_read_bytes_and_have_six_to_eight_million_parameters(tiny_spec: str) -> None:
    spec = load_spec(tiny_spec)
    assert spec.vocab_size == 256
    assert round(account(spec).parameters / 1e6) in (6, 7, 8)


def test_shipped_files_hold_data_only(any_spec: str) -> None:
    folder = spec_path(any_spec).parent
    assert {path.suffix for path in folder.iterdir()} == {".yaml"}
    assert isinstance(yaml.safe_load(spec_path(any_spec).read_text()), dict)  # for any reader of YAML


@torch.no_grad()
def test_a_shipped_hybrid_generates_what_recomputing_everything_would_say() -> None:
    torch.manual_seed(0)
    model = build_model(load_spec("carve-hybrid-tiny", ["init.std=0.2", "tie_embeddings=false"]))
    prompts = [torch.randint(256, (n,)) for n in (5, 61)]
    for row, prompt in zip(model.generate(prompts, 4), prompts, strict=True):
        ids = prompt
        for _ in range(4):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        assert row.tolist() == ids.tolist()
