"""The style sheet of a report's page, in the colours of its pictures; fonts are the reader's own."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5c6b7a; --faint: #dfe5ea; --accent: #1f4e8c; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .75rem; font-size: 1.25rem; }
h3 { margin: 1.25rem 0 .35rem; font-size: 1rem; }
p, ul { margin: .5rem 0; max-width: 52rem; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; overflow-wrap: anywhere; }
.about { font-size: 1.1rem; }
.facts, .downloads, figcaption { color: var(--soft); font-size: .9rem; }
.warning { background: #fdf3e1; border-left: 4px solid #d8a03a; padding: .6rem .9rem; }
section { background: #fff; border: 1px solid var(--faint); border-radius: 8px; padding: 1.4rem 1.6rem;
  margin-top: 1.4rem; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .4rem; max-width: 52rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--faint); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; min-width: 4.5rem; }
td:first-child { font-weight: 600; white-space: nowrap; }
pre { overflow-x: auto; background: #f6f8fa; padding: .9rem; border-radius: 6px; font-size: .82rem; line-height: 1.45; }
summary { cursor: pointer; overflow-wrap: anywhere; }
a { color: var(--accent); }
@media print { body { background: #fff; } section { border: 0; padding: 0; break-inside: avoid; } }
"""
