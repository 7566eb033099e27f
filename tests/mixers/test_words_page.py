"""Every word of the zoo's own mixers says what it means, once, and the page on mixers holds what is said."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from hybridzoo.mixers import MixerConfig, get_entry, list_mixers
from hybridzoo.mixers.schema import OTHER_NAMES, meanings_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "mixers.md").read_text()
# A table for each set of words; the first is of the recurrent mixers, which differ in defaults alone.
TABLES = {"Recurrent mixers": "carve", "`mamba2`": "mamba2", "`attention`": "attention"}

# Other tests of this process may have registered mixers of their own.
ZOO = [entry for entry in list_mixers() if entry.cls.__module__.startswith("hybridzoo.")]


def table_of(name: str) -> str:
    rows = [
        f"| `{word}` | {about.type.removeprefix('one of ')} | {about.meaning} |"
        for word, about in get_entry(name).words.items()
    ]
    return "\n".join(["| word | may be | meaning |", "|---|---|---|", *rows])


@pytest.mark.parametrize(("heading", "name"), TABLES.items())
def test_the_page_explains_every_word_as_the_registry_does(heading: str, name: str) -> None:
    section = PAGE.split(f"\n### {heading}\n")[1].split("\n#")[0]
    found = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert found == table_of(name), f"under '{heading}' docs/mixers.md should have:\n{table_of(name)}"


def test_every_mixer_of_the_zoo_takes_the_words_of_one_table() -> None:
    explained = [set(get_entry(name).words) for name in TABLES.values()]
    for entry in ZOO:
        assert set(entry.words) in explained, entry.name


def test_the_words_offered_to_users_of_fla_are_words() -> None:
    page = (DOCS / "comparison.md").read_text().split("\n## Coming from fla\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    words = {word for entry in ZOO for word in entry.words}
    named = {name for row in rows if len(row) == 3 for name in re.findall(r"`(\w+)`", row[1])}
    mixers = {name for row in rows if len(row) == 2 for name in re.findall(r"`(\w+)`", row[1])}
    assert len(named) > 15
    assert named <= words
    for theirs, ours in OTHER_NAMES.items():  # what errors answer with is what the page says
        assert any(f"`{theirs}`" in row[0] and ours in re.findall(r"`(\w+)`", row[1]) for row in rows), theirs
    assert mixers == {entry.name for entry in ZOO if not entry.name.startswith("carve")}


def test_no_word_is_without_a_meaning() -> None:
    silent = [f"{entry.name}.{name}" for entry in ZOO for name, word in entry.words.items() if not word.meaning]
    assert not silent


def test_a_word_declared_again_keeps_its_meaning_unless_it_gets_another() -> None:
    @dataclass(frozen=True, kw_only=True)
    class First(MixerConfig):
        size: Annotated[int, "how large"] = 1
        rank: Annotated[int, "how many"] = 1

    @dataclass(frozen=True, kw_only=True)
    class Second(First):
        size: int = 2
        rank: Annotated[int, "how few"] = 2
        plain: int = 0

    found = meanings_of(Second)
    assert (found["size"], found["rank"]) == ("how large", "how few")
    assert "plain" not in found
