"""Every mixer of the registry, and every mixer with one gate flag changed: what registry-wide tests iterate over."""

from __future__ import annotations

from typing import Any

from hybridzoo.mixers import SpecError, TokenMixer, build_mixer, list_mixers, mixer_config

# Small sizes under the words that mixers share; each takes those it has.
WORDS: dict[str, Any] = {"d_model": 24, "n_heads": 2, "head_dim": 8, "state_dim": 6, "content_chunk": 16}


def words_for(name: str, **more: Any) -> dict[str, Any]:
    """The shared words, and `more`, that a mixer knows."""
    entry = next(e for e in list_mixers() if e.name == name)
    return {word: value for word, value in {**WORDS, **more}.items() if word in entry.words}


def build(text: str, **more: Any) -> TokenMixer:
    """Build a mixer from a registry string at the shared small sizes."""
    return build_mixer(text, **words_for(text.partition("[")[0], **more))


def default_cases() -> list[str]:
    """The names of every stable mixer."""
    return [entry.name for entry in list_mixers() if entry.stable]


def ablation_cases() -> list[str]:
    """Each stable mixer as it is, and with each gate flag at each other value that is stable."""
    cases = default_cases()
    for entry in list_mixers():
        for flag, word in entry.flags.items():
            for choice in word.choices if entry.stable else ():
                text = f"{entry.name}[{flag}={choice}]"
                if choice != word.default and _is_stable(text, entry.name):
                    cases.append(text)
    return cases


def _is_stable(text: str, name: str) -> bool:
    try:
        return mixer_config(text, words_for(name)).caveat is None  # what diverges has no properties to test
    except SpecError as refused:
        if "triangular solve for each value channel" in str(refused):  # the one pair of flags that the design refuses
            return False
        raise


def flag_rows() -> dict[str, dict[str, Any]]:
    """Each row of gate flags once, under the name of the first mixer that has it, as `gated_delta_rule` takes them."""
    rows: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for entry in list_mixers():
        if entry.flags:
            flags = {name: flag.default for name, flag in entry.flags.items()}
            flags.setdefault("predict", "decayed")  # of no matter without a correction
            if flags["correct"] == "tied":  # a mixer passes one tensor twice
                flags["correct"] = flags["write"] if flags["write"] != "one" else "scalar"
            rows.setdefault(tuple(flags.values()), (entry.name, flags))
    return dict(rows.values())
