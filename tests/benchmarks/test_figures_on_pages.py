"""The figures that pages quote are those that were recorded."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pages import ROOT, lines_after, text_of

from hybridzoo.mixers.softmax.backends import order, usual_call

SHAPES = {
    "B8 T4096 H16 D128": (8, 4096, 16, 128),
    "B1 T32768 H16 D128": (1, 32768, 16, 128),
    "B8 T1024 H12 D64": (8, 1024, 12, 64),
}
LARGE, LONG, SMALL = SHAPES.values()
PASSES = ("forward", "forward_backward")
IN_A_ROW = tuple(f"{which}_in_a_row" for which in PASSES)
NOTES = "benchmarks/NOTES.md"


def results_of(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))["results"]


def recorded() -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
    return {(result["mixer"], tuple(result["shape"].values())): result for result in results_of("triton_backend")}


def figures(page: str, pattern: str) -> tuple[str, ...]:
    """What the groups of `pattern` are in the text of a page, which has it once."""
    found = list(re.finditer(pattern, text_of(page)))
    assert len(found) == 1, (page, pattern, len(found))
    return found[0].groups()


def ratio(result: dict[str, Any], which: str, beside: dict[str, Any] | None = None) -> str:
    if "fla" not in (beside or result)[which]:  # it refuses that backward
        return "-"
    return f"{result[which]['hybridzoo'] / (beside or result)[which]['fla']:.2f}"


def test_the_table_of_times_is_what_was_recorded() -> None:
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    section = page[page.index("## How fast") : page.index("At the last shape the host")]
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


def test_what_is_said_of_that_table_is_what_was_recorded() -> None:
    found = recorded()
    pairs = {(*at, which): r[which] for at, r in found.items() for which in PASSES if "fla" in r[which]}
    slower = {at for at, ms in pairs.items() if ms["hybridzoo"] > ms["fla"]}
    assert slower == {
        ("mamba2", LARGE, PASSES[0]),
        *((mixer, LONG, PASSES[0]) for mixer in ("mamba2", "gated_delta_net")),
    }
    in_a_row = {(*at, which): r for at, r in found.items() for which in IN_A_ROW if "fla" in r[which]}
    slower = {at for at, r in in_a_row.items() if r[at[2]]["hybridzoo"] > r[at[2]]["fla"]}
    assert slower == {(mixer, LONG, IN_A_ROW[0]) for mixer in ("mamba2", "gated_delta_net")}
    by = tuple(ratio(found[mixer, LONG], IN_A_ROW[0]) for mixer in ("mamba2", "gated_delta_net"))
    assert figures("docs/kernels.md", r"`mamba2` at the second by (\S+), and `gated_delta_net` by (\d\.\d\d)") == by
    said = figures(NOTES, r"(\S+) by itself, (\S+) in a row, where gated_delta_net takes (\S+) of")
    assert said == (ratio(found["mamba2", LONG], PASSES[0]), *by)
    said = figures(NOTES, r"mamba2 takes (\S+) of it at the first shape and gated_delta_net (\S+) at the second\.")
    pairs = [("mamba2", LARGE), ("gated_delta_net", LONG)]
    assert said == tuple(ratio(found[pair], PASSES[0]) for pair in pairs)
    pattern = r"takes (\S+) GiB beside the inputs for gdn2 where fla takes ([\d.]+), (\S+) for kda \((\S+)\),"
    peaks = [found[mixer, LARGE]["peak_gib"][side] for mixer in ("gdn2", "kda") for side in ("hybridzoo", "fla")]
    assert figures("docs/kernels.md", pattern) == tuple(f"{peak:.2f}" for peak in peaks)
    costs = tuple(content_cost(found, L) for L in (64, 128))
    pattern = r"and (\S+) for carve\. There a content gate"
    assert figures("docs/kernels.md", pattern) == (f"{found['carve', LARGE]['peak_gib']['hybridzoo']:.2f}",)
    pattern = r"gate makes it (\S+) times as long as with a token gate \(`content_chunk` 64; (\S+) times with 128\)"
    assert figures("docs/kernels.md", pattern) == costs
    pattern = r"against `erase=token`: (\S+) times its forward \+ backward at L = 64 and (\S+) at L = 128"
    assert figures(NOTES, pattern) == costs


def content_cost(found: dict[tuple[str, tuple[int, ...]], dict[str, Any]], L: int) -> str:
    """What a content gate makes of forward + backward at the first shape, of the token gate's."""
    content = found["carve" if L == 64 else f"carve[content_chunk={L}]", LARGE][PASSES[1]]["hybridzoo"]
    return f"{content / found['carve[erase=token]', LARGE][PASSES[1]]['hybridzoo']:.2f}"


def test_the_notes_have_every_row_of_that_record() -> None:
    found, lines = recorded(), rows_below(NOTES, "Recorded on one H200: `results/triton_backend.json`")
    assert len(lines) == len(found)
    for mixer, shape, *cells in lines:
        result = found[mixer, tuple(map(int, shape.split()))]
        times = [
            " / ".join(f"{result[which][side]:.2f}" if side in result[which] else "-" for which in PASSES)
            for side in ("hybridzoo", "fla")
        ]
        both = [times[1], " / ".join(ratio(result, which) for which in PASSES)]
        peaks = ", ".join(f"{peak:.2f}" for peak in result["peak_gib"].values())
        assert cells == [times[0], *(both if "fla" in result["forward"] else ("", "")), peaks], (mixer, shape)
    said = figures(
        NOTES, r"which is the nearest, carve takes (\S+) / (\S+) at the first shape and (\S+) / (\S+) at the"
    )
    pairs = [(found["carve", shape], which, found["gdn2", shape]) for shape in (LARGE, SMALL) for which in PASSES]
    assert said == tuple(ratio(*pair) for pair in pairs)


def test_calls_in_a_row_are_what_was_recorded() -> None:
    (_, *cells), found = rows_below("docs/kernels.md", "A call of such a row")[0], recorded()
    for mixer, cell in zip(("gdn2", "kda", "gla", "delta_net"), cells, strict=True):
        result = found[mixer, SMALL]
        times = " / ".join(f"{result[which]['hybridzoo']:.2f}" for which in IN_A_ROW)
        assert cell == f"{times} ({' / '.join(ratio(result, which) for which in IN_A_ROW)})"


def test_the_cold_starts_are_what_was_recorded() -> None:
    found = {result["mixer"]: result for result in results_of("cold_start")}
    first = {mixer: f"{result['first_s']:.1f}" for mixer, result in found.items()}
    said = figures(NOTES, r"first gradient mamba2 takes (\S+) s, carve (\S+), gdn2 (\S+) and kda (\S+), after")
    assert said == tuple(first[mixer] for mixer in ("mamba2", "carve", "gdn2", "kda"))
    said = figures("docs/kernels.md", r"it takes (\d+) s for mamba2 and (\d+) to (\d+) s for gdn2, kda and carve")
    whole = {mixer: round(result["first_s"]) for mixer, result in found.items()}
    mamba2 = whole.pop("mamba2")
    assert tuple(map(int, said)) == (mamba2, min(whole.values()), max(whole.values()))
    then = [(mixer, one) for mixer, result in found.items() for one in result["then"]]
    heads = {(mixer, one["B"] * one["H"]): f"{one['first_ms'] / 1000:.1f}" for mixer, one in then}
    said = figures(NOTES, r"Of 48 heads after 128: gdn2 (\S+) s, carve (\S+) s; of 256 heads: carve (\S+) s\.")
    assert said == (heads["gdn2", 48], heads["carve", 48], heads["carve", 256])


def test_the_layers_are_what_was_recorded() -> None:
    found = {(result["side"], result["mixer"]): result for result in results_of("layer")}
    ways, lines = ("eager", "compiled", "graph", "compiled graph"), rows_below(NOTES, "(`results/layer.json`)")
    for name, *cells in lines[:4]:
        layer = found["hybridzoo", name]
        peaks = [f"{layer['peak_mib'][way]:.0f}" for way in ways[:2]]
        times = [f"{layer['ms'][way]:.2f}" for way in ways]
        assert cells == [*times, *peaks, f"{layer['kept_mib']:.0f}", f"{layer['parameters']['all']:,}"]
    for (name, eager, *_, peak, _, kept, parameters), mixer in zip(lines[4:], ("kda", "gdn2"), strict=True):
        layer = found["fla", mixer]
        assert name == f"fla's {layer['layer']}, alone with ours ({layer['ms']['hybridzoo']:.2f} eager)"
        assert eager == f"{layer['ms']['fla']:.2f}"
        assert parameters == f"{layer['parameters']['all']:,}"
        assert [peak, kept] == [f"{layer[key]['fla']:.0f}" for key in ("peak_mib", "kept_mib")]
    carve, gdn2, peer = (found[at] for at in (("hybridzoo", "carve"), ("hybridzoo", "gdn2"), ("fla", "gdn2")))

    def more(key: str, way: str) -> str:
        return f"{100 * abs(carve[key][way] / gdn2[key][way] - 1):.2g}"

    said = figures(
        NOTES,
        r"compiled, (\S+) % less memory \(eager (\S+) % less\), but takes longer: (\d+) % eager, (\d+) % compiled, and "
        r"(\d+) % compiled in a CUDA graph",
    )
    times = [more("ms", way) for way in ("eager", "compiled", "compiled graph")]
    assert said == (more("peak_mib", "compiled"), more("peak_mib", "eager"), *times)
    token = found["hybridzoo", "carve[erase=token]"]["ms"]
    said = figures(NOTES, r"The token gate alone takes (\d+), (\d+) and (\d+) % longer than gdn2")
    assert said == tuple(f"{100 * (token[way] / gdn2['ms'][way] - 1):.0f}" for way in (*ways[:2], ways[3]))
    said = figures(NOTES, r"the same carve takes (\S+) of the time and (\S+) of the memory")
    assert said == tuple(f"{carve[key]['eager'] / peer[key]['fla']:.2f}" for key in ("ms", "peak_mib"))


def test_the_notes_say_which_targets_are_met() -> None:
    found, mixers = recorded(), ("gdn2", "kda", "gla", "delta_net")
    lines = rows_below(NOTES, "### Against the targets")
    missed = set()
    for (label, *targets), (_, *cells), shape in zip(lines[:-1:2], lines[1:-1:2], SHAPES.values(), strict=True):
        assert label == f"{' '.join(map(str, shape))}: at most"
        for mixer, target, cell in zip(mixers, targets, cells, strict=True):
            result = found[mixer, shape]
            assert cell == " / ".join(ratio(result, which) for which in PASSES), (mixer, shape)
            most = [float(number) for number in target.split(" / ")] * (1 if "/" in target else 2)
            for which, number in zip(PASSES, most, strict=True):
                if result[which]["hybridzoo"] > number * result[which]["fla"]:
                    missed.add((mixer, shape, which))
    forward = [(mixer, SMALL, PASSES[0]) for mixer in ("gdn2", "delta_net")]
    assert missed == {*forward, *((mixer, SMALL, PASSES[1]) for mixer in ("gdn2", "kda", "delta_net"))}
    said = [found[mixer, shape][which] for mixer, shape, which in forward]
    pattern = r"forward passes of gdn2 \((\S+)\) and delta_net \((\S+)\) by"
    assert figures(NOTES, pattern) == tuple(f"{ms['hybridzoo'] / ms['fla']:.3f}" for ms in said)
    assert lines[-1] == ["found, in a row", *(" / ".join(ratio(found[m, SMALL], w) for w in IN_A_ROW) for m in mixers)]

    def of_kda(mixer: str, shape: tuple[int, ...], which: str = PASSES[1]) -> str:
        return f"{found[mixer, shape][which]['hybridzoo'] / found['kda', shape][which]['hybridzoo']:.2f}"

    steps = steps_of_copies()
    values = [
        [of_kda("gated_delta_net", shape) for shape in (LARGE, LONG)],
        [of_kda("gated_delta_net", SMALL)],
        [of_kda("gated_delta_net", SMALL, IN_A_ROW[1])],
        [of_kda("mamba2", shape) for shape in SHAPES.values()],
        [content_cost(found, L) for L in (64, 128)],
        [steps[mixer] for mixer in ("mamba2", "gdn2", "kda", "carve")],
    ]
    lines = rows_below(NOTES, "forward + backward of gdn2, kda and delta_net")
    for (_, most, cell, verdict), numbers in zip(lines, values, strict=True):
        assert cell == ", ".join(numbers)
        assert {float(number) <= float(most) for number in numbers} == {verdict == "met"}


def steps_of_copies() -> dict[str, str]:
    """A decode step of 256 sequences, of a copy of their states."""
    return {r["mixer"]: f"{r['of_the_copy']:.2f}" for r in results_of("decode") if r["shape"]["B"] == 256}


def test_the_decode_steps_are_what_was_recorded() -> None:
    steps = steps_of_copies()
    pattern = (
        r"(\S+) times a plain copy of the same state for mamba2, (\S+) for gdn2, (\S+) for kda and (\S+) for carve"
    )
    mixers = ("mamba2", "gdn2", "kda", "carve")
    assert figures("docs/kernels.md", pattern) == tuple(steps[mixer] for mixer in mixers)
    _, now = rows_below(NOTES, "(`results/decode.json`)")
    found = {(r["mixer"], r["shape"]["B"]): r for r in results_of("decode")}
    mixers = ("gdn2", "kda", "mamba2", "carve")
    assert now[1:] == [f"{found[m, 256]['graph']['step']['device']:.0f}, {steps[m]}" for m in mixers]
    host = {mixer: round(found[mixer, 1]["eager"]["step"]["device"]) for mixer in mixers}
    carve = host.pop("carve")
    said = figures(NOTES, r"for one sequence: (\d+) to (\d+) us gdn2, kda and mamba2, (\d+) carve")
    assert said == (str(min(host.values())), str(max(host.values())), str(carve))


def test_the_front_page_quotes_it() -> None:
    of = {mixer: result for (mixer, shape), result in recorded().items() if shape == LARGE}
    passed, carve, forward, gated, mamba2 = figures(
        "README.md",
        r"forward \+ backward takes ([^;]*); carve, which it lacks, takes (\S+) of the time of its gdn2, and forward"
        r" alone (\S+), .* forward alone takes (\S+) and (\d\.\d\d)",
    )
    assert re.findall(r"0\.\d\d", passed) == [
        ratio(of[mixer], PASSES[1]) for mixer in ("gdn2", "kda", "gla", "delta_net")
    ]
    assert carve == ratio(of["carve"], PASSES[1], of["gdn2"])
    assert forward == ratio(of["carve"], PASSES[0], of["gdn2"])
    assert (gated, mamba2) == tuple(ratio(of[mixer], PASSES[0]) for mixer in ("gated_delta_net", "mamba2"))


def test_the_page_beside_other_libraries_quotes_it() -> None:
    page = "docs/comparison.md"
    found: dict[str, list[float]] = {}
    for which, mixers in zip(PASSES, (6, 4), strict=True):
        beside = [result for result in recorded().values() if "fla" in result[which]]
        assert (len({result["mixer"] for result in beside}), len(beside)) == (mixers, 3 * mixers)
        found[which] = sorted(float(ratio(result, which)) for result in beside)
    said = figures(
        page,
        r"forward \+ backward of four mixers takes (0\.\d\d) to (\d\.\d\d) of its time, "
        r"forward alone of six (0\.\d\d) to (\d\.\d\d)",
    )
    assert [float(number) for number in said] == [found[which][end] for which in reversed(PASSES) for end in (0, -1)]
    kda = next(layer for layer in results_of("layer") if layer["side"] == "fla" and layer["mixer"] == "kda")
    numbers = [f"{kda[key][side]:.0f}" for key in ("kept_mib", "peak_mib") for side in ("hybridzoo", "fla")]
    gdn2 = next(layer for layer in results_of("layer") if layer["side"] == "fla" and layer["mixer"] == "gdn2")
    numbers += [f"{gdn2[key][side]:.0f}" for key in ("kept_mib", "peak_mib") for side in ("hybridzoo", "fla")]
    pattern = (
        r"(\d+) MiB are kept.*keeps (\d+), with a peak of (\d+) MiB against (\d+); a layer of gdn2 keeps (\d+) against "
        r"(\d+), with a peak of (\d+) against (\d+)"
    )
    assert figures(page, pattern) == tuple(numbers)


def rows_below(page: str, text: str) -> list[list[str]]:
    """The cells of the first table below a text, without its header and rule."""
    return lines_after(text, (ROOT / page).read_text(encoding="utf-8"))[2:]


ATTENTION = ("attention", "attention-xformers", "attention-flash")  # runs, each with its own packages


@pytest.mark.parametrize(
    ("name", "text", "backends"),
    [
        ("attention-flash", "With flash-attn-4 4.0.0b15", ("flash", "sdpa", "flex")),
        ("attention", "Without it, in an earlier run", ("sdpa", "flex")),
        ("attention-xformers", "has a run of its own beside `sdpa`", ("xformers", "sdpa")),
    ],
)
def test_the_times_of_attention_are_what_was_recorded(name: str, text: str, backends: tuple[str, ...]) -> None:
    for result, (_, *cells) in zip(results_of(name).values(), rows_below("docs/attention.md", text), strict=True):
        for backend, cell in zip(backends, cells, strict=True):
            said = " / ".join(f"{result['ms'][which][backend]:.2f}" for which in PASSES if which in result["ms"])
            marked = name != "attention-xformers" and result["auto"] == backend  # `flex` was not timed in that run
            assert cell == (f"**{said}**" if marked else said)
        assert name == "attention-xformers" or result["auto"] == result["fastest"]


def test_the_records_of_attention_are_of_the_packages_that_are_named() -> None:
    found = {
        name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")) for name in ATTENTION
    }
    assert [one["packages"]["flash-attn-4"] for one in found.values()] == [None, None, "4.0.0b15"]
    assert [one["packages"]["xformers"] for one in found.values()] == [None, "0.0.35", None]
    assert {one["packages"]["flash-attn"] for one in found.values()} == {None}  # flash-attn 2 was not run
    assert {one["environment"]["device_name"] for one in found.values()} == {"NVIDIA H200"}
    for key in ("shape", "decoding", "dtype"):
        first, *others = (one[key] for one in found.values())
        assert all(other == first for other in others)


def attention_ms(call: str, which: str) -> dict[str, list[float]]:
    """Every backend's times in the runs that had it."""
    times: dict[str, list[float]] = {}
    for name in ATTENTION:
        for backend, ms in results_of(name)[call]["ms"].get(which, {}).items():
            times.setdefault(backend, []).append(ms)
    return times


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("full", {}),
        ("window", {"window": 1024}),
        ("packed", {"packed": True, "tokens": 8 * 4096}),
        ("decoding", {"cached": True, "tokens": 1}),
    ],
)
def test_auto_tries_backends_in_the_order_of_their_recorded_times(call: str, words: dict[str, Any], which: str) -> None:
    best = {backend: min(times) for backend, times in attention_ms(call, which).items()}
    if not best:
        assert (call, which) == ("decoding", "forward_backward")
        return
    tried = order(usual_call(device="cuda", head_dim=128, gradient=which == "forward_backward", **words))
    fastest = sorted(best, key=lambda backend: best[backend])
    if (call, which) == ("full", "forward"):  # the one exception, of which the page says so
        assert fastest[:2] == ["sdpa", "flash"]
        fastest[:2] = ["flash", "sdpa"]
    assert [backend for backend in tried if backend in best] == fastest


def test_what_is_said_of_those_times_is_what_was_recorded() -> None:
    page, flash, xformers = "docs/attention.md", results_of("attention-flash"), results_of("attention-xformers")
    full = flash["full"]["ms"]["forward"]
    less = f"{100 * (1 - full['sdpa'] / full['flash']):.0f}"
    assert figures(page, r"without gradients takes `sdpa` (\d+) % less time than `flash`") == (less,)
    packed = attention_ms("packed", "forward_backward")
    less = f"{100 * (1 - packed['xformers'][0] / min(packed['flex'])):.0f}"
    apart = f"{100 * (max(packed['sdpa']) / min(packed['sdpa']) - 1):.0f}"
    pattern = r"packed sequences takes xformers (\d+) % less time than `flex` .* three runs differ by (\d+) %:"
    assert figures(page, pattern) == (less, apart)
    assert figures(NOTES, r"(\d+) % where runs are (\d+) % apart: `auto` now") == (less, apart)
    said = figures(NOTES, r"took (\S+) ms; `flex` (\S+) and (\S+) in its two runs; `sdpa`, .*, (\S+) to (\d+\.\d+)\.")
    assert said == tuple(
        f"{ms:.2f}" for ms in (*packed["xformers"], *packed["flex"], min(packed["sdpa"]), max(packed["sdpa"]))
    )
    forward = attention_ms("packed", "forward")
    said = figures(NOTES, r"Without gradients `flex` stays first, (\S+) against (\S+),")
    assert said == (f"{min(forward['flex']):.2f}", f"{min(forward['xformers']):.2f}")
    peaks = [run["packed"]["peak_mib"]["forward_backward"] for run in (xformers, flash)]
    said = figures(page, r"It holds (\d+) MiB at most in that call, `flex` (\d+)")
    assert said == (f"{peaks[0]['xformers']:.0f}", f"{peaks[1]['flex']:.0f}")

    def share(call: str, which: str, peer: str) -> str:
        ms = flash[call]["ms"][which]
        return f"{ms['flash'] / ms[peer]:.2f}"

    said = figures(
        NOTES,
        r"it takes (\S+) of `sdpa`'s time in full attention, (\S+) of `flex`'s with a window and (\S+) of it with "
        r"packed sequences; forward alone, full attention, (\S+) of",
    )
    trained = [share(*at) for at in (("full", PASSES[1], "sdpa"), ("window", PASSES[1], "flex"))]
    assert said == (*trained, share("packed", PASSES[1], "flex"), share("full", PASSES[0], "sdpa"))
    for backend, found, pattern in (
        ("xformers", xformers, r"query head: (\S+) GiB and (\S+) ms a token, where `sdpa` takes (\S+) ms"),
        ("flash", flash, r"all rows end to end: (\S+) GiB and (\S+) ms a token, where `sdpa` takes (\S+) ms"),
    ):
        decoding = found["decoding"]
        times = [f"{decoding['ms']['forward'][name]:.1f}" for name in (backend, "sdpa")]
        held = f"{decoding['peak_mib']['forward'][backend] / 1024:.1f}"
        assert figures(NOTES, pattern) == (held, *times)


def test_the_times_of_the_convolution_are_what_was_recorded() -> None:
    results = {result["operation"]: result for result in results_of("conv")}
    sides = ("hybridzoo", "pytorch", "pytorch, compiled", "fla", "copy")

    def times(operation: str, side: str) -> list[float]:
        return [results[operation][which][side] for which in PASSES if side in results[operation][which]]

    expected = [[name, *(" / ".join(f"{ms:.2f}" for ms in times(name, side)) for side in sides)] for name in results]
    assert rows_below("docs/kernels.md", "benchmarks/results/conv.json") == expected
    assert rows_below(NOTES, "results/conv.json") == expected

    def ratios(operation: str, side: str, of: str, digits: int) -> tuple[str, ...]:
        pairs = zip(times(operation, side), times(operation, of), strict=True)
        return tuple(f"{ms / peer:.{digits}f}" for ms, peer in pairs)

    plain, packed, norm, gate = results
    of_copy = ratios(plain, "hybridzoo", "copy", 1)
    pattern = r"The convolution takes (\S+) times its copy forward and (\S+) times forward \+ backward"
    assert figures("docs/kernels.md", pattern) == of_copy
    pattern = (
        r"convolution takes (\S+) / (\S+), packed (\S+) / (\S+), and of the compiled one's (\S+) / (\S+)\. Of its copy"
    )
    of_peers = [ratios(name, "hybridzoo", "fla", 2) for name in (plain, packed)]
    assert figures(NOTES, pattern) == sum([*of_peers, ratios(plain, "hybridzoo", "pytorch, compiled", 2)], ())
    compiled = [ratios(name, "pytorch, compiled", "copy", 1) for name in (norm, gate)]
    pattern = r"gated RMSNorm takes (\S+) / (\S+) times its copy, the decay gate (\S+) / (\d\.\d)"
    assert figures(NOTES, pattern) == sum(compiled, ())
    assert figures(NOTES, r"Of its copy it takes (\S+) / (\S+) times") == of_copy


def test_the_check_on_a_gpu_has_as_many_tests_as_is_said() -> None:
    check = json.loads((ROOT / "benchmarks/results/triton_check.json").read_text(encoding="utf-8"))
    said = figures("docs/kernels.md", r"such a FILE: of (\d+) tests on an H200, (\d+) passed")
    assert said == (str(len(check["passed"]) + len(check["failed"])), str(len(check["passed"])))


def test_the_tokens_a_second_are_what_was_recorded() -> None:
    results = results_of("inference")
    lines = {model: cells for model, *cells in rows_below("docs/inference.md", "MiB that a sequence keeps")}
    assert set(lines) == {result["model"] for result in results}
    for model, cells in lines.items():
        mine = [result for result in results if result["model"] == model]
        speeds = [f"{one['tokens_per_s']['graph']:,.0f}" if "tokens_per_s" in one else "-" for one in mine]
        assert cells == [*speeds, *(f"{one['bytes_a_sequence'] / 2**20:,.0f}" for one in mine[:3])]
        if "carve" in model:  # its decode step does not slow with context
            times = [one["ms_a_step"]["graph"] for one in mine if one["B"] == 1]
            assert max(times) < 1.01 * min(times)


def test_what_is_said_of_whole_models_is_what_was_recorded() -> None:
    results = [result for result in results_of("inference") if "ms_a_step" in result]
    step = {(result["model"], result["B"], result["context"]): result["ms_a_step"]["graph"] for result in results}
    ours, peer, carve = "transformer-1.3b", "transformers Llama", "carve-1.3b"
    said = figures("docs/inference.md", r"it takes (\S+) ms for our Transformer, (\S+) for Llama and (\S+) for carve")
    assert said == tuple(f"{step[model, 1, 1024]:.1f}" for model in (ours, peer, carve))
    eager = [result["ms_a_step"]["eager"] for result in results]
    said = figures("docs/inference.md", r"the host is what counts, a step takes (\d+) to (\d+) ms")
    assert said == (f"{min(eager):.0f}", f"{max(eager):.0f}")
    more = [step[peer, B, C] / step[model, B, C] - 1 for model, B, C in step if model == ours]
    said = figures("docs/inference.md", r"Ours makes (\d+) to (\d+) % more tokens a second than Llama")
    assert said == (f"{100 * min(more):.0f}", f"{100 * max(more):.0f}")
    shorter = [1 - step[model, B, C] / step[peer, B, C] for model, B, C in step if model == ours]
    said = figures(NOTES, r"now (\d+) to (\d+) % shorter than Llama's, at every context")
    assert said == (f"{100 * min(shorter):.0f}", f"{100 * max(shorter):.0f}")

    shown = ((1, 1024), (1, 65536), (64, 1024), (64, 8192))
    for model, *cells in rows_below(NOTES, "## Whole models that decode"):
        times = [step[model.replace("transformers' ", "transformers "), *at] for at in shown]
        assert cells == [f"{ms:#.3g}" for ms in times]
    longer = {model: step[model, 1, 65536] - step[model, 1, 1024] for model in (ours, peer)}
    said = figures(NOTES, r"recorded: (\S+) ms from 1k to 64k, (\S+) TB/s, Llama's ([\d.]+);")
    held = {result["context"]: result["kv_bytes_a_sequence"] for result in results if result["model"] == ours}
    rate = (held[65536] - held[1024]) / longer[ours] / 1e9
    assert said == (f"{longer[ours]:.2f}", f"{rate:.1f}", f"{longer[peer]:.2f}")
    rates = [64 * held[8192] / step[model, 64, 8192] / 1e9 for model in (ours, peer)]
    said = figures(NOTES, r"in a step of (\S+) ms, (\S+) TB/s, where Llama has ([\d.]+)\. A step")
    assert said == (f"{step[ours, 64, 8192]:.1f}", *(f"{rate:.1f}" for rate in rates))


def test_the_front_page_says_how_fast_models_are_served() -> None:
    made = {
        result["model"]: f"{result['tokens_per_s']['graph']:,.0f}"
        for result in results_of("inference")
        if (result["B"], result["context"]) == (64, 8192)
    }
    pattern = (
        r"64 sequences of 8,192 tokens each, models of 1\.3B make ([\d,]+) tokens a second as a Transformer "
        r"\(transformers' Llama of that size: ([\d,]+)\), ([\d,]+) as three CARVE .* and ([\d,]+) as CARVE alone"
    )
    models = ("transformer-1.3b", "transformers Llama", "carve-hybrid-1.3b", "carve-1.3b")
    assert figures("README.md", pattern) == tuple(made[model] for model in models)


def test_the_check_of_flash_attn_4_is_what_pytest_said() -> None:
    said = (ROOT / "benchmarks" / "results" / "attention-flash-check.txt").read_text(encoding="utf-8")
    before = re.search(r"^(\d+) failed, (\d+) passed, (\d+) skipped", said, re.M)
    since = re.search(r"^(\d+) passed, (\d+) skipped", said, re.M)
    assert before
    assert since
    pattern = (
        r"Of the (\d+) tests .{1,60} has of it, (\d+) passed and (\d+) were skipped: "
        r".{1,120} Before they were, (\d+) of (\d+) tests failed"
    )
    every, once = (str(sum(map(int, run.groups()))) for run in (since, before))
    assert figures("docs/attention.md", pattern) == (every, *since.groups(), before[1], once)
    assert set(re.findall(r"test_every_head_size\[flash-\w+-(\d+)\]", said)) == {"80", "192"}
