"""Studies: stacks compared on tasks that need memory and on text, with what is held equal said and held.

Start with `run_study(load_study("quickstart"), "runs/quickstart")` and `write_report("runs/quickstart")`. May import
training and everything below it; the command line comes next. docs/studies.md explains a study's YAML.
"""

from __future__ import annotations

from hybridzoo.studies.compare import SideBySide, compare_studies
from hybridzoo.studies.compare_page import write_comparison
from hybridzoo.studies.findings import Cell, Findings, gather
from hybridzoo.studies.plan import Plan, make_plan
from hybridzoo.studies.report import read_findings, write_report
from hybridzoo.studies.results import CorruptResultError
from hybridzoo.studies.runner import Execution, Preview, Run, preview_study, read_plan, read_trials, run_study
from hybridzoo.studies.stack import Stack
from hybridzoo.studies.study import Hold, Study, Tune, list_studies, load_study, study_from, study_path
from hybridzoo.studies.tasks import Shown, StudyTask, build_task, list_tasks, register_task
from hybridzoo.studies.tuning import read_tuned

__all__ = [
    "Cell",
    "CorruptResultError",
    "Execution",
    "Findings",
    "Hold",
    "Plan",
    "Preview",
    "Run",
    "Shown",
    "SideBySide",
    "Stack",
    "Study",
    "StudyTask",
    "Tune",
    "build_task",
    "compare_studies",
    "gather",
    "list_studies",
    "list_tasks",
    "load_study",
    "make_plan",
    "preview_study",
    "read_findings",
    "read_plan",
    "read_trials",
    "read_tuned",
    "register_task",
    "run_study",
    "study_from",
    "study_path",
    "write_comparison",
    "write_report",
]
