"""The figures that pages quote are those that were recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "B8 T4096 H16 D128": (8, 4096, 16, 128),
    "B1 T32768 H16 D128": (1, 32768, 16, 128),
    "B8 T1024 H12 D64": (8, 1024, 12, 64),
}
PASSES = ("forward", "forward_backward")


def recorded() -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
    record = json.loads((ROOT / "benchmarks/results/triton_backend.json").read_text(encoding="utf-8"))
    return {(result["mixer"], tuple(result["shape"].values())): result for result in record["results"]}


def ratio(result: dict[str, Any], which: str, beside: dict[str, Any] | None = None) -> str:
    if "fla" not in (beside or result)[which]:  # it refuses that backward
        return "-"
    return f"{result[which]['hybridzoo'] / (beside or result)[which]['fla']:.2f}"


def test_the_table_of_times_is_what_was_recorded() -> None:
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    section = page[page.index("## How fast") :]
    header, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    shapes = [SHAPES[cell.strip()] for cell in header.strip("|").split("|")[1:]]
    found, cells = recorded(), 0
    for line in lines:
        mixer, *written = (cell.strip() for cell in line.strip("|").split("|"))
        for shape, cell in zip(shapes, written, strict=True):
            result = found.get((mixer, shape))
            if result is None:
                assert not cell
                continue
            cells += 1
            said = " / ".join(f"{result[which]['hybridzoo']:.2f}" for which in PASSES)
            if "fla" in result["forward"]:
                said += f" ({' / '.join(ratio(result, which) for which in PASSES)})"
            assert cell == said, (mixer, shape)
    assert cells > 20


def test_the_front_page_quotes_it() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    found, shape = recorded(), SHAPES["B8 T4096 H16 D128"]
    sentence = re.search(
        r"forward \+ backward takes ([^;]*); carve, which it\s+lacks, takes (\S+)"
        r" of the time of its gdn2, and forward alone (\S+),",
        page,
    )
    assert sentence
    of = {mixer: found[mixer, shape] for mixer in ("gdn2", "kda", "gla", "delta_net", "carve")}
    assert re.findall(r"0\.\d\d", sentence[1]) == [
        ratio(of[mixer], PASSES[1]) for mixer in ("gdn2", "kda", "gla", "delta_net")
    ]
    assert sentence[2] == ratio(of["carve"], PASSES[1], of["gdn2"])
    assert sentence[3] == ratio(of["carve"], PASSES[0], of["gdn2"])


def test_the_page_beside_other_libraries_quotes_it() -> None:
    page = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    beside = [result for result in recorded().values() if all("fla" in result[which] for which in PASSES)]
    assert (len({result["mixer"] for result in beside}), len(beside)) == (4, 12)
    both, forward = (sorted(float(ratio(result, which)) for result in beside) for which in reversed(PASSES))
    said = re.search(r"takes (0\.\d\d) to (\d\.\d\d) of its\s+time, forward alone (0\.\d\d) to (\d\.\d\d)", page)
    assert said
    assert [float(number) for number in said.groups()] == [both[0], both[-1], forward[0], forward[-1]]
    layers = json.loads((ROOT / "benchmarks/results/layer.json").read_text(encoding="utf-8"))["results"]
    kda = next(layer for layer in layers if layer["side"] == "fla" and layer["mixer"] == "kda")
    numbers = [f"{kda[key][side]:.0f}" for key in ("kept_mib", "peak_mib") for side in ("hybridzoo", "fla")]
    assert re.search(
        r"(\d+) MiB are kept.*keeps (\d+),.*?(\d+) MiB against\s+(\d+)", page, re.DOTALL
    ).groups() == tuple(numbers)


def rows_below(page: str, text: str) -> list[list[str]]:
    """The cells of the first table below a text, without its header and rule."""
    lines = (ROOT / page).read_text(encoding="utf-8").partition(text)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i, line in enumerate(lines[start:], start) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def test_the_times_of_attention_are_what_was_recorded() -> None:
    results = json.loads((ROOT / "benchmarks/results/attention.json").read_text(encoding="utf-8"))["results"]
    lines = rows_below("docs/attention.md", "`auto`'s choice in bold")
    for result, (_, *cells) in zip(results.values(), lines, strict=True):
        for backend, cell in zip(("sdpa", "flex"), cells, strict=True):
            said = " / ".join(f"{result['ms'][which][backend]:.2f}" for which in PASSES if which in result["ms"])
            assert cell == (f"**{said}**" if result["auto"] == backend else said)
        assert result["auto"] == result["fastest"]  # of those that were there


def test_the_tokens_a_second_are_what_was_recorded() -> None:
    results = json.loads((ROOT / "benchmarks/results/inference.json").read_text(encoding="utf-8"))["results"]
    lines = {model: cells for model, *cells in rows_below("docs/inference.md", "MiB that a sequence keeps")}
    assert set(lines) == {result["model"] for result in results}
    for model, cells in lines.items():
        mine = [result for result in results if result["model"] == model]
        speeds = [f"{one['tokens_per_s']['graph']:,.0f}" if "tokens_per_s" in one else "-" for one in mine]
        assert cells == [*speeds, *(f"{one['bytes_a_sequence'] / 2**20:,.0f}" for one in mine[:3])]
        if "carve" in model:  # its decode step does not slow with context
            times = [one["ms_a_step"]["graph"] for one in mine if one["B"] == 1]
            assert max(times) < 1.01 * min(times)
