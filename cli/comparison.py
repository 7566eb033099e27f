"""Two studies side by side on the terminal: a table a task, and what only one of them has. May import everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from hybridzoo.cli.output import new_table, note, stdout

if TYPE_CHECKING:
    from hybridzoo.studies import SideBySide

LISTED = 12  # things that only one study has: of more the page tells
WORD = 30  # letters of a label that are never cut


def show_comparison(side: SideBySide) -> None:
    """Print what two studies share and how it differs; remarks go to stderr."""
    from hybridzoo.studies.compare_page import grouped, row, summary
    from hybridzoo.studies.solve import BUDGET_WORDS

    console = stdout()
    for said in side.notes:
        note(said)
    for (budget, task), pairs in grouped(side).items():
        shown = side.findings[0].shown(task)
        console.print(f"[bold]{escape(task)}[/]" + (f", equal {BUDGET_WORDS[budget]}" if budget else ""))
        table = new_table()
        rows = [row(shown, pair) for pair in pairs]
        # On a narrow terminal intervals are wrapped and labels keep their words, by which stacks are told apart.
        longest = max(len(word) for label, *_ in rows for word in label.split())
        table.add_column("stack", min_width=min(longest, WORD), overflow="fold")
        for name in (*map(escape, side.names), "", "difference (95 %)", "seeds"):
            table.add_column(name)
        for *means, apart, seeds, outcome in rows:
            table.add_row(*map(escape, (*means, outcome, apart, seeds)))
        console.print(table)
        for said in summary(side, pairs):
            console.print(escape(said), soft_wrap=True)
        console.print()
    if not side.pairs:
        console.print("no stack of a task is in both studies")
    for name, things in zip(side.names, side.only, strict=True):
        if things:
            more = f", and {len(things) - LISTED} more" if len(things) > LISTED else ""
            console.print(escape(f"only in {name}: {', '.join(things[:LISTED])}{more}"), soft_wrap=True)
    if side.changed:
        console.print(escape(f"settings that differ: {', '.join(key for key, *_ in side.changed)}"), soft_wrap=True)
