"""The page of a report: one HTML file that holds its pictures and tables, loads nothing, and runs no script.

Everything that comes from a study or a result passes through `html.escape` on its way in. May import nothing above
studies; report.py writes the page out.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from hybridzoo.studies.display import format_seconds
from hybridzoo.studies.findings import Cell, Findings
from hybridzoo.studies.page_style import STYLE
from hybridzoo.studies.sentences import gap, headline, limits, score, training_notes
from hybridzoo.studies.tables import Table
from hybridzoo.studies.tasks import Shown
from hybridzoo.training.units import count, size

# A reader's browser is told to load nothing at all, whatever a study's texts may contain.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(findings: Findings, pictures: Mapping[str, bytes], tables: Mapping[str, Table], asides: Sequence[str]) -> str:
    """Return the report as HTML. `pictures` are PNG files and `tables` CSV ones by stem; `asides` damaged files."""
    study = findings.plan.study
    body = [
        _header(findings),
        _section("What was found", _found(findings)),
        _section("How much attention", _figures(findings, pictures, "ratio") + _downloads(tables, "stacks")),
        _section("How much is held", _figures(findings, pictures, "levels-") + _downloads(tables, "levels")),
        _section("Quality against memory", _figures(findings, pictures, "frontier") + _downloads(tables, "stacks")),
        _section("Was it trained for long enough?", _training(findings, pictures) + _downloads(tables, "learning")),
        _section("What was held equal", _equal(findings, pictures)),
        _section("The numbers", _numbers(findings) + _downloads(tables, *tables)),
        _section("Trials without a result", _without(findings, asides)),
        _section("What this does not show", _list(limits(findings))),
        _section("How it was made", _made(findings)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study['name'])}: hybridzoo study</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences)
    return f"<ul>\n{items}</ul>" if items else ""


def _header(findings: Findings) -> str:
    plan = findings.plan
    done = sum(len(cell.scores) for cells in findings.cells.values() for cell in cells.values())
    seconds = sum(second for cells in findings.cells.values() for cell in cells.values() for second in cell.seconds)
    counted = ((len(plan.stacks), "stack"), (len(plan.shown), "task"), (len(plan.study["seeds"]), "seed"))
    facts = [
        ", ".join(_several(*pair) for pair in counted),
        f"{done} of {len(plan.trials)} trials finished"
        + (f", in {format_seconds(seconds)} of training and scoring" if done else ""),
    ]
    warnings = []
    if findings.failed:
        warnings.append(f"{_several(len(findings.failed), 'trial')} failed.")
    if findings.missing:
        missing = _several(len(findings.missing), "trial")
        warnings.append(f"Without a result yet: {missing}. This report shows a part of the study.")
    if findings.faults:
        warnings.append(f"Damaged and not used: {_several(len(findings.faults), 'result file')}.")
    banner = f'<p class="warning">{escape(" ".join(warnings))}</p>\n' if warnings else ""
    about = f'<p class="about">{escape(plan.study["about"])}</p>\n' if plan.study["about"] else ""
    return (
        f"<header>\n<h1>{escape(plan.study['name'])}</h1>\n{about}"
        f'<p class="facts">{escape(" · ".join(facts))}</p>\n{banner}</header>'
    )


def _found(findings: Findings) -> str:
    return "\n".join(f"<h3>{escape(task)}</h3>\n{_list(headline(findings, task))}" for task in findings.plan.shown)


_CAPTIONS = {
    "ratio": (
        "Marks are means over seeds, ticks the seeds themselves; the grey line joins the mixtures of one recurrent "
        "mixer with attention. Stacks at one ratio are set side by side to be seen."
    ),
    "levels": "The models at the end of training, scored at every difficulty; shades span the seeds.",
    "frontier": (
        "What one sequence must keep at inference, on a logarithmic axis. The line joins the stacks that no other "
        "beats on both axes, by their means."
    ),
    "learning": (
        "Scores on held-out data during training, one line a seed, the other stacks in grey. A line that still "
        "rises (or, where lower is better, falls) at its end belongs to a stack that was not trained to its limit."
    ),
    "parameters": "Every stack's parameters, and the width of the FFN that brought them there.",
}


def _figures(findings: Findings, pictures: Mapping[str, bytes], prefix: str) -> str:
    parts = []
    for stem, content in pictures.items():
        if stem == prefix or (prefix.endswith("-") and stem.startswith(prefix)):
            kind, _, rest = stem.partition("-")
            encoded = base64.b64encode(content).decode("ascii")
            alt = f"{kind} {rest}".strip()
            parts.append(
                f'<figure>\n<img alt="{escape(alt)}" src="data:image/png;base64,{encoded}">\n'
                f"<figcaption>{escape(_CAPTIONS[kind])}</figcaption>\n</figure>"
            )
    return "\n".join(parts)


def _downloads(tables: Mapping[str, Table], *stems: str) -> str:
    links = []
    for stem in stems:
        table = tables[stem]
        if table.rows:
            encoded = base64.b64encode(table.to_csv().encode()).decode("ascii")
            links.append(
                f'<a download="{escape(stem)}.csv" href="data:text/csv;base64,{encoded}" '
                f'title="{escape(table.about)}">{escape(stem)}.csv</a>'
            )
    return f'<p class="downloads">The numbers: {", ".join(links)}</p>' if links else ""


def _training(findings: Findings, pictures: Mapping[str, bytes]) -> str:
    notes = [note for task in findings.plan.shown for note in training_notes(findings, task)]
    return _list(notes) + "\n" + _figures(findings, pictures, "learning-") if notes else ""


def _equal(findings: Findings, pictures: Mapping[str, bytes]) -> str:
    plan = findings.plan
    parts = []
    if plan.target is None:
        parts.append("<p>Nothing: the stacks are compared as they were declared.</p>")
    else:
        smallest = min(plan.shown, key=lambda task: plan.stacks[0].parameters[task])
        counts = [stack.parameters[smallest] for stack in plan.stacks]
        apart = max(abs(one / plan.target - 1) for one in counts)
        parts.append(
            f"<p>Parameters, by the width of the FFN: {plan.target:,} with the vocabulary of {escape(smallest)}, and "
            f"no stack further off than {100 * apart:.2f} % (allowed: {100 * plan.study['hold']['tolerance']:g} %). "
            "Training steps, batches and their order are the same for every stack.</p>"
        )
    if plan.excluded:
        parts.append("<p>Left out, since they cannot meet the budget:</p>")
        parts.append(_list(f"{label}: {why}" for label, why in plan.excluded))
    return "\n".join([*parts, _figures(findings, pictures, "parameters")])


def _numbers(findings: Findings) -> str:
    parts = []
    for task, shown in findings.plan.shown.items():
        cells = findings.ranked(task)
        if not cells:
            continue
        rows = [_row(shown, cell) for cell in cells]
        better = "higher is better" if shown.maximise else "lower is better"
        context, length = findings.plan.study["context"], findings.plan.lengths[task]
        heads = [
            *("stack", "layers", "attention"),
            *(f"{shown.label}, {better}", "95 % interval", "each seed"),
            *(
                "parameters",
                f"training FLOPs a token at {length:,}",
                f"memory at {context:,} tokens",
                "of it keys and values",
            ),
            "seconds a trial",
        ]
        parts.append(f"<h3>{escape(task)}</h3>\n<p>{escape(shown.about)}</p>\n{_table(heads, rows)}")
    if parts:
        parts.append(
            "<p>The interval is Student's t over seeds (– for one seed), which assumes nothing but normal scatter; of "
            "two seeds it is wide, since two values say little of how far a third may lie. Training FLOPs are counted "
            "at the length of the training's own sequences.</p>"
        )
    return "\n".join(parts)


def _row(shown: Shown, cell: Cell) -> list[str]:
    summary, stack = cell.summary, cell.stack
    half = "–" if summary.n == 1 else f"± {gap(shown, (summary.high - summary.low) / 2)}"
    return [
        *(stack.label, stack.pattern, f"{100 * stack.attention:.3g} %"),
        *(score(shown, cell.mean), half, ", ".join(score(shown, value) for value in cell.scores)),
        *(f"{stack.parameters[cell.task]:,}", count(stack.train_flops[cell.task])),
        *(size(stack.state_bytes), size(stack.kv_bytes), f"{sum(cell.seconds) / len(cell.seconds):.1f}"),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = "\n".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def _without(findings: Findings, asides: Sequence[str]) -> str:
    parts = []
    if findings.failed:
        parts.append("<p>These failed; running the study again in the same folder tries them again.</p>")
        for result in findings.failed:
            title = f"{result['stack']} · {result['task']} · seed {result['seed']}"
            parts.append(
                f"<details><summary>{escape(title)}: {escape(result['error'])}</summary>\n"
                f"<pre>{escape(result['traceback'] or 'no traceback')}</pre></details>"
            )
    if findings.missing:
        parts.append("<p>These have no result yet; running the study again in the same folder goes on with them:</p>")
        parts.append(_list(findings.missing))
    if findings.faults:
        parts.append("<p>These files are damaged and were not used; running the study again replaces them:</p>")
        parts.append(_list(findings.faults))
    if asides:
        parts.append("<p>Damaged files that an earlier run found, set aside and replaced:</p>")
        parts.append(_list(asides))
    return "\n".join(parts)


def _made(findings: Findings) -> str:
    parts = []
    if findings.environments:
        names = list(dict.fromkeys(name for each in findings.environments for name in each))
        rows = [[str(each.get(name, "")) for name in names] for each in findings.environments]
        parts.append(_table(names, rows))
        if len(rows) > 1:
            parts.append("<p>The trials were not all made alike: speeds, and last digits, may differ between them.</p>")
    text = yaml.safe_dump(_plain(findings.plan.study), sort_keys=False, allow_unicode=True, width=110)
    parts.append(f"<details><summary>The study, with every default</summary>\n<pre>{escape(text)}</pre></details>")
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts.append(f'<p class="facts">Written {written}.</p>')
    return "\n".join(parts)


def _plain(data: Any) -> Any:
    """Return `data` with every mapping and sequence as YAML's own."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return data
