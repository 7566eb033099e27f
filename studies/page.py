"""The page of a report: one HTML file that holds its pictures and tables, loads nothing, and runs no script.

Everything that comes from a study or a result passes through `html.escape` on its way in. May import nothing above
studies; report.py writes the page out.
"""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from hybridzoo.studies.display import format_count, format_seconds
from hybridzoo.studies.findings import Cell, Findings, weighs_memory
from hybridzoo.studies.limits import limits
from hybridzoo.studies.markup import bullets, document, figure, folded, links, listed, section, table_of
from hybridzoo.studies.sentences import (
    CURVES,
    PAIRS,
    between,
    between_rows,
    curve_rows,
    gap,
    headline,
    level_rows,
    pair_rows,
    score,
    training_notes,
)
from hybridzoo.studies.solve import BUDGET_WORDS
from hybridzoo.studies.stats import BOOTSTRAP_FROM
from hybridzoo.studies.tables import Table
from hybridzoo.studies.tasks import Shown
from hybridzoo.training.units import count, size


def page(findings: Findings, pictures: Mapping[str, bytes], tables: Mapping[str, Table], asides: Sequence[str]) -> str:
    """Return the report as HTML. `pictures` are PNG files and `tables` CSV ones by stem; `asides` damaged files."""
    body = [
        _header(findings),
        section("Between budgets", _between(findings, pictures, tables)),
        *(part for budget in findings.plan.budgets for part in _of_budget(findings, budget, pictures, tables)),
        section("Learning rates", _rates(findings)),
        section("Trials without a result", _without(findings, asides)),
        section("What this does not show", bullets(limits(findings))),
        section("Tables", listed(tables)),
        section("How it was made", _made(findings)),
    ]
    return document(f"{findings.plan.study['name']}: hybridzoo study", body)


def _of_budget(
    findings: Findings, budget: str, pictures: Mapping[str, bytes], tables: Mapping[str, Table]
) -> list[str]:
    """The sections that compare stacks: of one budget, since those of another are other stacks."""
    where = ""
    if len(findings.plan.budgets) > 1:
        findings, where = findings.at(budget), f" (equal {BUDGET_WORDS[budget]})"
        prefix = f"{budget}--"
        pictures = {stem.removeprefix(prefix): one for stem, one in pictures.items() if stem.startswith(prefix)}

    def drawn(kind: str) -> str:
        return _figures(pictures, tables, kind)

    sections = {
        "What was found": _found(findings) + links(tables, "comparisons"),
        "How much attention": drawn("ratio"),
        "Where attention stands": drawn("placement"),
        "Mixer against mixer": _pairs(findings, tables),
        "How much is held": drawn("levels") + _by_level(findings, tables),
        "Quality against memory": drawn("frontier") or _not_weighed(findings),
        "Was it trained for long enough?": _training(findings, drawn("learning")),
        "What the gates do": drawn("gates"),
        "What was held equal": _equal(findings, drawn("parameters")),
        "The numbers": _numbers(findings) + links(tables, "stacks", "trials"),
    }
    return [section(f"{title}{where}", content) for title, content in sections.items()]


def _between(findings: Findings, pictures: Mapping[str, bytes], tables: Mapping[str, Table]) -> str:
    """What is best under one budget need not be under another: the curves of all beside each other."""
    if len(findings.plan.budgets) < 2:
        return ""
    said = []
    heads = ["attention beside", *(f"best ratio at equal {BUDGET_WORDS[name]}" for name in findings.plan.budgets)]
    for task in findings.plan.shown:
        rows = between_rows(findings, task)
        table = table_of(heads, rows) if rows else ""
        said.append(f"<h3>{escape(task)}</h3>\n{table}{bullets(between(findings, task))}")
    return "\n".join([*said, links(tables, "optima", "orders"), _figures(pictures, tables, "between")])


def _header(findings: Findings) -> str:
    plan = findings.plan
    finished = [result for result in findings.results if result["status"] == "finished"]
    done, seconds = len(finished), sum(result["seconds"] for result in finished)
    counted = [
        (len({stack.label for stack in plan.stacks}), "stack"),
        (len(plan.shown), "task"),
        (len(plan.study["seeds"]), "seed"),
    ]
    if len(plan.budgets) > 1:
        counted.insert(1, (len(plan.budgets), "budget"))
    facts = [
        ", ".join(format_count(*pair) for pair in counted),
        f"{done} of {len(plan.distinct)} trials finished"
        + (f", in {format_seconds(seconds)} of training and scoring, summed over them" if done else ""),
    ]
    if findings.others:
        left_out = format_count(findings.others, "result")
        facts.append(f"{left_out} in the folder left out, of other settings, seeds or code")
    warnings = []
    if findings.failed:
        warnings.append(f"{format_count(len(findings.failed), 'trial')} failed.")
    if findings.missing:
        missing = format_count(len(findings.missing), "trial")
        warnings.append(f"Without a result yet: {missing}. This report shows a part of the study.")
    if findings.faults:
        warnings.append(f"Damaged and not used: {format_count(len(findings.faults), 'result file')}.")
    warnings += [f"This study {lack}." for lack in findings.lacks]
    banner = f'<p class="warning">{escape(" ".join(warnings))}</p>\n' if warnings else ""
    about = f'<p class="about">{escape(plan.study["about"])}</p>\n' if plan.study["about"] else ""
    return (
        f"<header>\n<h1>{escape(plan.study['name'])}</h1>\n{about}"
        f'<p class="facts">{escape(" · ".join(facts))}</p>\n{banner}</header>'
    )


_TWO_QUESTIONS = (
    "The interval is of where curves redrawn over the seeds are best; what is not told from the best is asked of each "
    "ratio by the paired t test. So a ratio may be within the one and not among the others."
)


def _found(findings: Findings) -> str:
    said, tables = [], ""
    for task in findings.plan.shown:
        rows = curve_rows(findings, task)
        crowded = len(rows) > 2  # sentences of so many curves are no longer read
        table = table_of(CURVES, rows) if crowded else ""
        tables += table
        said.append(f"<h3>{escape(task)}</h3>\n{bullets(headline(findings, task, ratios=not crowded))}{table}")
    if tables:
        said.append(f"<p>{escape(_TWO_QUESTIONS)}</p>")
    return "\n".join(said)


def _pairs(findings: Findings, tables: Mapping[str, Table]) -> str:
    found = {task: rows for task in findings.plan.shown if (rows := pair_rows(findings, task))}
    if not found:
        return ""
    place = PAIRS.index("at attention")
    shares = {row[place] for rows in found.values() for row in rows}
    heads, alike = list(PAIRS), len(shares) == 1
    if alike:  # said once, not in every row
        found = {task: [[*row[:place], *row[place + 1 :]] for row in rows] for task, rows in found.items()}
        del heads[place]
    said = [f"<h3>{escape(task)}</h3>\n{table_of(heads, rows)}" for task, rows in found.items()]
    at = f", {next(iter(shares))}" if alike else ""
    about = (
        f"<p>Every two mixers at the shares of attention that both were mixed with{at}: the mean over these, seed by "
        "seed. Above 0 the first is better, also where a lower score is. An interval is of its pair alone; two are "
        "told apart where the paired t test is significant at 5 % after Holm's correction for a task's pairs.</p>"
    )
    return "\n".join([about, *said, links(tables, "mixers")])


def _by_level(findings: Findings, tables: Mapping[str, Table]) -> str:
    """Where the best ratio lies may change with the difficulty: a table for each task that is scored at several.

    On text levels are places in sequences of one length: too many, and not harder or easier.
    """
    said = []
    for task, shown in findings.plan.shown.items():
        if shown.percent and (rows := level_rows(findings, task)):
            heads = ["attention beside", *(f"{level:,}" for level, _ in shown.levels)]
            title = f"{task}: the best ratio (95 % interval) by {shown.level_axis}"
            said.append(f"<h3>{escape(title)}</h3>\n{table_of(heads, rows)}")
    return "\n".join([*said, links(tables, "optima")]) if said else ""


_RATIO = (
    "Marks are means over seeds, dots the seeds themselves, and bars the 95 % intervals of the means, as far as a "
    "score can be; a line joins the mixtures of one recurrent mixer with attention. The ratios that were tried are the "
    "ticks, and stacks at one ratio stand side by side. Below, the fitted best ratio of each curve with its 95 % "
    "interval."
)
# Of each kind of picture: what it says, and the tables that it is drawn from.
_CAPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ratio": (_RATIO, ("stacks", "optima")),
    "between": (
        _RATIO + " Each panel holds something else equal, so its stacks are other stacks.",
        ("stacks", "optima"),
    ),
    "placement": (
        "Mean score by the share of attention and by where it stands, with half the 95 % interval. The full frame is "
        "around the best of a map, dashed ones around those that the seeds do not tell from it.",
        ("stacks",),
    ),
    "levels": (
        "The models at the end of training, scored at every difficulty or, on text, by how much stands before what is "
        "to be told: means, and dots for the seeds. At each difficulty stacks stand side by side, so that equal ones "
        "are seen too. Of very many, each panel has some, and the rest in grey. On text each point is of other bytes: "
        "stacks may be compared at a point, but a line's fall is not its stack's gain from context alone.",
        ("levels",),
    ),
    "frontier": (
        "What one sequence must keep at inference, on a logarithmic axis. The line joins the stacks that no other "
        "beats on both axes, by their means. Stacks that keep the same, or nearly, stand side by side.",
        ("stacks",),
    ),
    "learning": (
        "Scores on held-out data during training, one line a seed, the other stacks in grey. A line that still "
        "rises (or, where lower is better, falls) at its end belongs to a stack that was not trained to its limit. A "
        "score that is no percentage is drawn at the scale of the training's second half: its start leaves the panel.",
        ("learning",),
    ),
    "gates": (
        "The trained models' gates on one held-out batch: marks are medians over its tokens, heads and channels, bars "
        "the middle half, both averaged over seeds. A decay is shown as the tokens after which half is left. Where "
        "write and correct are tied they are one gate, shown under correct. Layers without a mark are attention.",
        ("gates",),
    ),
    "parameters": ("Where every stack stands in what was held equal, and the width of its FFN.", ("stacks",)),
}


def _figures(pictures: Mapping[str, bytes], tables: Mapping[str, Table], kind: str) -> str:
    caption, behind = _CAPTIONS[kind]
    wanted = {stem: content for stem, content in pictures.items() if stem.partition("-")[0] == kind}
    if not wanted:
        return ""
    said = caption if len(wanted) == 1 else ""  # of several each names its task itself
    shown = "\n".join(figure(stem, content, said, links(tables, *behind)) for stem, content in wanted.items())
    return shown if said else f"<p>{escape(caption)}</p>\n{shown}"


def _not_weighed(findings: Findings) -> str:
    (budget,) = findings.plan.budgets
    if weighs_memory(budget):
        return ""
    return (
        "<p>Not drawn: all stacks keep the same at inference, within the tolerance, so there is no memory to weigh "
        "quality against.</p>"
    )


def _training(findings: Findings, drawn: str) -> str:
    notes = [note for task in findings.plan.shown for note in training_notes(findings, task)]
    return bullets(notes) + "\n" + drawn if notes else ""


def _equal(findings: Findings, drawn: str) -> str:
    plan = findings.plan
    parts = []
    (budget,) = plan.budgets
    if not budget:
        parts.append("<p>Nothing: the stacks are compared as they were declared.</p>")
    else:
        target, task = plan.targets[budget], escape(plan.met_on[budget])
        apart = max(abs(plan.held(stack) / target - 1) for stack in plan.stacks)
        what = {
            "params": f"Parameters, by the width of the FFN: {target:,} with the vocabulary of {task}",
            "train_flops": f"Training FLOPs a token, by the width of the FFN: {target:,} on {task}",
            "inference_bytes": "What one sequence keeps at inference, by windows, KV heads and value head sizes, after "
            f"which the width of the FFN restores the parameters: {target:,} bytes after "
            f"{plan.study['context']:,} tokens",
        }[budget]
        parts.append(
            f"<p>{what}, and no stack further off than {100 * apart:.2f} % (allowed: "
            f"{100 * plan.study['hold']['tolerance']:g} %). Training steps, batches and their order are the same for "
            "every stack.</p>"
        )
        solved = bullets(f"{stack.label}: {stack.solved}" for stack in plan.stacks)
        parts.append(folded("How each stack was brought there", solved))
    if plan.excluded:
        parts.append("<p>Left out, since they cannot meet the budget:</p>")
        parts.append(bullets(f"{label}: {why}" for _, label, why in plan.excluded))
    return "\n".join([*parts, drawn])


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
        parts.append(f"<h3>{escape(task)}</h3>\n<p>{escape(shown.about)}</p>\n{table_of(heads, rows)}")
    if parts:
        parts.append(
            "<p>The interval is Student's t over seeds (– for one seed), which assumes nothing but normal scatter; of "
            "two seeds it is wide, since two values say little of how far a third may lie. From "
            f"{BOOTSTRAP_FROM} seeds on it is a bootstrap (BCa). Training FLOPs are counted at the length of the "
            "training's own sequences.</p>"
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


def _rates(findings: Findings) -> str:
    """The learning rate that pilots chose for every stack, and what each rate of the grid scored."""
    rows = []
    for row in findings.tuned:
        shown = findings.shown(row["task"])
        scores = ", ".join(
            f"{float(rate):g}: {'failed' if value is None else score(shown, value)}"
            for rate, value in row["scores"].items()
        )
        told = f"{row['lr']:g}" + (" (edge of the grid)" if row["edge"] else "")
        rows.append([BUDGET_WORDS.get(row["budget"], "–"), row["task"], row["stack"], told, scores])
    if not rows:
        return ""
    said = (
        "<p>Each stack's own, by the best mean score of pilots, which train as long as trials do. A pilot at the rate "
        "that was chosen is the trial of its seed: this seed's score is the best of as many as there are rates.</p>"
    )
    return said + "\n" + folded("All of them", table_of(["equal", "task", "stack", "rate", "pilots"], rows))


def _without(findings: Findings, asides: Sequence[str]) -> str:
    parts = []
    plan = findings.plan
    planned = {(trial.budget, trial.stack, trial.task) for trial in plan.trials}
    unrated = [
        f"{stack.label} on {task}{f', at equal {BUDGET_WORDS[stack.budget]}' if stack.budget else ''}"
        for stack in plan.stacks
        for task in plan.shown
        if (stack.budget, stack.label, task) not in planned
    ]
    if unrated:
        parts.append(
            "<p>A pilot failed, so there was no learning rate to choose and nothing was trained for these; running the "
            "study again in the same folder tries the pilot again.</p>"
        )
        parts.append(bullets(unrated))
    if findings.failed:
        titles = plan.titles(plan.distinct)
        parts.append("<p>These failed; running the study again in the same folder tries them again.</p>")
        parts += [
            f"<details><summary>{escape(titles[result['key']])}: {escape(result['error'])}</summary>\n"
            f"<pre>{escape(result['traceback'] or 'no traceback')}</pre></details>"
            for result in findings.failed
        ]
    if findings.missing:
        parts.append("<p>These have no result yet; running the study again in the same folder goes on with them:</p>")
        parts.append(bullets(findings.missing))
    if findings.faults:
        parts.append("<p>These files are damaged and were not used; running the study again replaces them:</p>")
        parts.append(bullets(findings.faults))
    if asides:
        parts.append("<p>Damaged files that an earlier run found, set aside and replaced:</p>")
        parts.append(bullets(asides))
    return "\n".join(parts)


def _made(findings: Findings) -> str:
    parts = []
    if findings.environments:
        names = list(dict.fromkeys(name for each in findings.environments for name in each))
        rows = [[str(each.get(name, "")) for name in names] for each in findings.environments]
        parts.append(table_of(names, rows))
        if len(rows) > 1:
            parts.append("<p>The trials were not all made alike: speeds, and last digits, may differ between them.</p>")
    study = {key: value for key, value in findings.plan.study.items() if key != "overrides"}
    text = yaml.safe_dump(_plain(study), sort_keys=False, allow_unicode=True, width=110)
    if laid := findings.plan.study.get("overrides"):
        words = " ".join(map(shlex.quote, laid))
        parts.append(f"<p>Laid over the study's file: <code>{escape(words)}</code></p>")
    parts.append(
        "<p>Below is the study as given, its axes crossed and the defaults of training filled in. Every stack as it "
        "was trained, with all that its spec left out, is in <code>specs/</code> beside this page, and in "
        "<code>study.json</code>.</p>"
    )
    parts.append(f"<details><summary>The study as given</summary>\n<pre>{escape(text)}</pre></details>")
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
