"""A user's own modules: a worker that finds other text in them than the plan did refuses its trials."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from hybridzoo.studies import Execution, make_plan, run_study, study_from
from hybridzoo.studies.code import changed_modules, own_digests
from hybridzoo.studies.display import Display
from hybridzoo.studies.trial import Job, OtherCodeError, task_of

STUDY = {
    "name": "own",
    "spec": {"d_model": 8, "mixers": {"a": {"type": "attention", "n_heads": 1}}, "ffn": {"type": "gelu", "width": 8}},
    "stacks": {"one": {"layers": "a"}},
    "tasks": {"recall": {"type": "mqar", "pairs": 2, "keys": 4, "values": 4, "examples": 8, "train": {"steps": 2}}},
}


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("X = 1\n")
    return path


def test_a_worker_of_other_user_code_refuses_its_trial(module):
    imports = (str(module),)
    own = own_digests(imports)
    job = Job(make_plan(study_from(STUDY), imports).trials[0], imports, own=own)
    module.write_text("X = 2\n")  # before this process, as a worker, looks for the first time
    with pytest.raises(OtherCodeError, match=r"mine\.py: not the same code here as where the study was planned"):
        task_of(job)


def test_what_was_imported_counts_and_not_what_is_written_later(module):
    imports = (str(module),)
    job = Job(make_plan(study_from(STUDY), imports).trials[0], imports, own=own_digests(imports))
    task_of(job)
    module.write_text("X = 2\n")
    task_of(job)


def test_what_a_module_imports_is_judged_too_and_what_is_not_here_is_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / "helper_own_code.py"
    helper.write_text("X = 1\n")
    (tmp_path / "asks_own_code.py").write_text("import helper_own_code\n")
    importlib.import_module("asks_own_code")
    own = own_digests(["asks_own_code"])
    assert set(own) == {"asks_own_code", "helper_own_code"}
    helper.write_text("X = 3\n")
    assert changed_modules({**own, "elsewhere_own_code": "other"}, ["asks_own_code"]) == ["helper_own_code"]


def test_comments_change_nothing(module):
    own = own_digests([str(module)])
    module.write_text("# said in passing\nX = 1\n")
    assert changed_modules(own, [str(module)]) == []


def test_a_study_of_a_users_own_code_runs_on_workers(module, tmp_path):
    done = run_study(
        study_from(STUDY),
        tmp_path / "run",
        Execution(processes=1, imports=[str(module)]),
        display=Display(),
        estimate=0,
    )
    assert (done.finished, done.failed) == (1, ())


def test_a_script_that_names_itself_is_left_out(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from hybridzoo.studies.code import own_digests\nprint(own_digests([__file__]))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
