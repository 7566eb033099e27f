"""HTML that holds all it shows: sections, lists, tables, pictures and downloads, every text of it escaped.

May import nothing above studies. page.py and compare_page.py are made of these.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hybridzoo.studies.page_style import STYLE
from hybridzoo.studies.tables import Table

# A reader's browser is told to load nothing at all, whatever a study's texts may contain.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: Iterable[str]) -> str:
    """Return a whole page of parts that are HTML already; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """Return a section of the page, nothing without content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content.strip() else ""


def bullets(sentences: Iterable[str]) -> str:
    """Return plain sentences as a list, nothing without any."""
    items = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences)
    return f"<ul>\n{items}</ul>" if items else ""


def folded(title: str, content: str) -> str:
    """Return content, HTML already, that a reader opens by its title."""
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>" if content else ""


def table_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = "\n".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def figure(stem: str, png: bytes, caption: str = "", behind: str = "") -> str:
    """Return a picture within the page, its caption, and `behind`, links to the numbers it is drawn from."""
    encoded = base64.b64encode(png).decode("ascii")
    alt = stem.replace("--", ", ").replace("-", " ")
    under = f"<figcaption>{escape(caption)}</figcaption>\n" if caption else ""
    return f'<figure>\n<img alt="{escape(alt)}" src="data:image/png;base64,{encoded}">\n{under}{behind}</figure>'


def links(tables: Mapping[str, Table], *stems: str) -> str:
    """Return links to where the page holds these tables, which `listed` put there; of empty tables none."""
    named = [f'<a href="#{escape(stem)}.csv">{escape(stem)}.csv</a>' for stem in stems if _rows(tables, stem)]
    return f'<p class="downloads">The numbers: {", ".join(named)}</p>\n' if named else ""


def listed(tables: Mapping[str, Table]) -> str:
    """Return a list of all tables that have rows, each once, to be saved as the CSV file that the page holds."""
    items = []
    for stem, table in tables.items():
        if table.rows:
            encoded = base64.b64encode(table.to_csv().encode()).decode("ascii")
            name = f"{escape(stem)}.csv"
            items.append(
                f'<li id="{name}"><a download="{name}" href="data:text/csv;base64,{encoded}">{name}</a>: '
                f"{escape(table.about)} ({len(table.rows):,} rows)</li>\n"
            )
    return f"<ul>\n{''.join(items)}</ul>" if items else ""


def _rows(tables: Mapping[str, Table], stem: str) -> bool:
    return stem in tables and bool(tables[stem].rows)
