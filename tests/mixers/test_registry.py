"""Registration and the one parser: strings, keywords and mappings mean the same, and mistakes are named."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import hybridzoo.mixers as mixers
from hybridzoo.mixers import (
    Carve,
    MixerConfig,
    SpecError,
    TokenMixer,
    build_mixer,
    list_mixers,
    mixer_config,
    parse_mixer,
    register_mixer,
)

EXPECTED_FLAGS = {  # design: decay, erase, correct, write, predict
    "linear_attention": ("none", "none", "none", "one", "decayed"),
    "gla": ("channel", "none", "none", "one", "decayed"),
    "mamba2": ("scalar", "none", "none", "scalar"),
    "delta_net": ("none", "none", "tied", "scalar", "decayed"),
    "gated_delta_net": ("scalar", "none", "tied", "scalar", "decayed"),
    "kda": ("channel", "none", "tied", "scalar", "decayed"),
    "gdn2": ("channel", "none", "channel", "channel", "decayed"),
    "carve": ("channel", "content", "tied", "scalar", "stored"),
    "carve-paper": ("channel", "content", "tied", "scalar", "stored"),
    "attention": (),
}


def test_the_registry_holds_the_rows_of_the_recurrence() -> None:
    found = {e.name: tuple(w.default for w in e.flags.values()) for e in list_mixers()}
    assert {name: found[name] for name in EXPECTED_FLAGS} == EXPECTED_FLAGS


def test_every_entry_says_where_it_comes_from_and_what_it_is() -> None:
    for entry in list_mixers():
        assert entry.source, entry.name
        assert entry.summary, entry.name
        assert inspect.getdoc(entry.cls), entry.name


def test_strings_keywords_and_mappings_give_the_same_config() -> None:
    words = {"d_model": 32, "n_heads": 2, "erase": "token", "correct": "scalar", "write": "channel"}
    by_string = build_mixer("carve[erase=token, correct=scalar,write=channel]", d_model=32, n_heads=2).config
    assert by_string == Carve(**words).config == mixer_config("carve", words)


def test_words_given_beside_a_string_win_over_those_in_it() -> None:
    config = mixer_config("carve[erase=token]", {"erase": "none", "d_model": 8, "n_heads": 1})
    assert config.erase == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "crave",
            r"unknown mixer 'crave' \(did you mean 'carve'\?\); known: attention, .*; one of your own .* --import",
        ),
        ("carve[erase=tokn]", r"carve\.erase: 'tokn' is not one of none, token, content \(did you mean 'token'\?\)"),
        ("carve[hidden_size=8]", r"carve: unknown key 'hidden_size' \(did you mean 'd_model'\?\)"),
        ("gdn2[expand_v=2]", r"gdn2: unknown key 'expand_v' \(did you mean 'head_v_dim'\?\)"),
        ("attention[gate_fn=silu]", r"attention: unknown key 'gate_fn'; known: "),  # not what is spelt like it
        ("carve[eras=token]", r"carve: unknown key 'eras'.*did you mean 'erase'"),
        ("attention[decay=none]", r"attention\.decay: 'attention' has no gate 'decay'; these have: mamba2, "),
        ("attention[erase=token]", r"has no gate 'erase'; these have: linear_attention, .*, carve, carve-paper$"),
        ("mamba2[erase=token]", r"mamba2\.erase: 'mamba2' has erase=none alone; these have a choice: .*carve"),
        ("carve[erase=token", r"expected one closing '\]'"),
        ("carve[erase]", r"'erase' is not word=value"),
        ("carve[erase=token,erase=none]", r"'erase' is given twice"),
        ("", r"is not a mixer"),
        ("carve[correct=tied,write=channel]", r"carve\.correct: 'tied' with write=channel .* use correct=scalar"),
        ("carve[allow_neg_eigval=true]", r"allow_neg_eigval: needs predict=decayed"),
        ("gla[allow_neg_eigval=true]", r"allow_neg_eigval: doubles the correction, and correct is none"),
        ("carve[n_heads=3]", r"carve\.n_heads: 3 does not divide d_model 32"),
        ("carve[n_v_heads=3]", r"carve\.n_v_heads: 3 is not a multiple of n_heads 2"),
        ("carve[content_chunk=0]", r"carve\.content_chunk: must be at least 1, got 0"),
        ("carve[conv_size=-1]", r"carve\.conv_size: must be 0 \(none\) or more"),
        ("carve[norm_eps=-1.0]", r"carve\.norm_eps: must be a finite number above 0, got -1"),
        ("attention[rope_base=0]", r"attention\.rope_base: must be a finite number above 0, got 0"),
        ("mamba2[dt_min=-1]", r"mamba2\.dt_min: must be a finite number above 0"),
    ],
)
def test_a_mistake_in_a_string_is_named_with_the_nearest_choice(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        mixer_config(text, {"d_model": 32} if "n_heads" in text else {"d_model": 32, "n_heads": 2})


def test_no_constructor_swallows_unknown_words() -> None:
    for entry in list_mixers():
        with pytest.raises(SpecError, match="unknown key 'hed_dim'"):
            entry.cls(d_model=32, hed_dim=3)
        assert "hed_dim" not in inspect.signature(entry.cls).parameters
        assert list(inspect.signature(entry.cls).parameters)[1:] == list(entry.words)


def test_unnormalised_keys_under_a_correction_are_marked_unstable() -> None:
    words = {"d_model": 8, "n_heads": 1}
    assert "unstable" in mixer_config("carve-paper[qk_norm=none]", words).caveat
    assert mixer_config("carve-paper", words).caveat is None
    assert mixer_config("gla", words).caveat is None


def _mixer(name: str = "Halver", **body: object) -> type[TokenMixer]:
    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        factor: float = 0.5

    def forward(self: TokenMixer, x: Tensor, state: object = None, cu_seqlens: object = None) -> tuple[Tensor, None]:
        return x * self.config.factor, None

    members = {"Config": Config, "_build": lambda self: None, "reset_parameters": lambda self: None, "forward": forward}
    return type(name, (TokenMixer,), {**members, **body})


def test_a_config_that_is_no_dataclass_is_refused_with_the_class() -> None:
    with pytest.raises(TypeError, match=r"Halver\.Config must be a frozen dataclass"):
        _mixer(Config=dict)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers.registry, "_REGISTRY", dict(mixers.registry._REGISTRY))


@pytest.mark.usefixtures("registry")
def test_a_users_own_mixer_is_built_by_name_and_by_string() -> None:
    register_mixer("halver", source="nobody", summary="halves")(_mixer())
    y, _ = build_mixer("halver[factor=0.25]", d_model=4)(torch.ones(1, 2, 4))
    assert torch.equal(y, torch.full((1, 2, 4), 0.25))
    assert parse_mixer("halver[factor=0.25]") == ("halver", {"factor": 0.25})


@pytest.mark.usefixtures("registry")
def test_a_users_own_mixer_may_have_a_gate_of_any_type() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        decay: bool = False

    register_mixer("own", source="nobody", summary="fades or not")(_mixer("Own", Config=Config))
    assert mixer_config("own[decay=true]", {"d_model": 4}) == Config(d_model=4, decay=True)
    with pytest.raises(SpecError, match=r"own\.decay: expected true or false, got 'scalar'"):
        mixer_config("own[decay=scalar]", {"d_model": 4})


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("name", "cls", "error", "message"),
    [
        ("carve", _mixer(), ValueError, "'carve' is taken by Carve"),
        ("two words", _mixer(), ValueError, "letters, digits"),
        ("a", torch.nn.Linear, TypeError, "not a subclass of TokenMixer"),
        ("a", _mixer(Config=MixerConfig), TypeError, "must be a frozen dataclass extending MixerConfig"),
        ("a", _mixer(forward=lambda self, x: x), TypeError, r"forward must take \(x, state=None, cu_seqlens=None\)"),
        ("a", _mixer(forward=lambda self, x, state, cu_seqlens: x), TypeError, "forward must take"),
        ("a", _mixer(forward=lambda self, x, state=None, *, cu_seqlens=None: x), TypeError, "forward must take"),
        ("a", _mixer(forward=lambda self, x, state=None, cu_seqlens=None, *, mask: x), TypeError, "forward must take"),
        ("a", type("Own", (Carve,), {}), TypeError, r"Config is that of 'carve'; declare one of its own"),
        ("a", Carve, ValueError, "Carve is registered already, as 'carve'"),
        ("a", _mixer(Config=type("Config", (MixerConfig,), {})), TypeError, "must be a frozen dataclass"),
    ],
)
def test_registration_is_strict(name: str, cls: type, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register_mixer(name, source="s", summary="s")(cls)
