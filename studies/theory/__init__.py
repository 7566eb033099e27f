"""Theory next to measurement: the results of the CARVE paper (arXiv 2606.27229) as probes that anyone can run.

Start with `run_probes(find_probes(["capacity"]), Settings())`. Each probe says what was claimed, what is measured in
this very run, and whether the statement as printed holds. May import training and everything below it, and the rest of
studies; docs/theory.md explains each one.
"""

from __future__ import annotations

from hybridzoo.studies.theory.registry import Probe, find_probes, list_probes, run_probes
from hybridzoo.studies.theory.render import show, show_summary, write_results
from hybridzoo.studies.theory.result import Line, Panel, Result, Settings, Statement

__all__ = [
    "Line",
    "Panel",
    "Probe",
    "Result",
    "Settings",
    "Statement",
    "find_probes",
    "list_probes",
    "run_probes",
    "show",
    "show_summary",
    "write_results",
]
