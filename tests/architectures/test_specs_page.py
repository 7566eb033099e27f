"""The page on specs says what is so: its tables list the keys that there are and the costs that account gives."""

from __future__ import annotations

import re
from pathlib import Path

from hybridzoo.architectures import account, list_specs, load_spec
from hybridzoo.architectures.spec import SPEC_KEYS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "specs.md").read_text()
SIZES = ["tiny", "125m", "1.3b"]


def table_under(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, cells stripped, without its rule."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def parameters(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def mebibytes(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"


def test_the_table_of_shipped_specs_holds_what_account_gives() -> None:
    costs = {name: account(load_spec(name), context=4096) for name in list_specs()}
    stacks = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in costs))
    expected = [["spec", *(f"{size}: parameters" for size in SIZES), *(f"{size}: state" for size in SIZES)]]
    for stack in stacks:
        rows = [costs[f"{stack}-{size}"] for size in SIZES]
        cells = [*(parameters(row.parameters) for row in rows), *(mebibytes(row.state_bytes) for row in rows)]
        expected.append([f"`{stack}-*`", *cells])
    lines = [f"| {' | '.join(row)} |" for row in expected]
    lines.insert(1, "|" + "---|" * len(expected[0]))
    assert table_under("Shipped specs") == expected, "docs/specs.md should have:\n" + "\n".join(lines)


def test_the_table_of_keys_lists_every_key_once() -> None:
    keys = [row[0].strip("`") for row in table_under("Keys")[1:]]
    assert sorted(keys) == sorted([*SPEC_KEYS, "base"])


def test_links_within_the_page_lead_to_its_headings() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-") for line in PAGE.splitlines() if line[:3] == "## "
    }
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert links
    assert set(links) <= headings
