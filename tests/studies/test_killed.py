"""A study whose process or workers are killed, or that is interrupted, loses no trial and doubles none."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import SMALL, Recorder, run, scores

from hybridzoo.studies import engines, make_plan, read_plan, read_trials, study_from
from hybridzoo.studies import runner as runner_module
from hybridzoo.studies.engines import Event
from hybridzoo.studies.trial import Job, OtherCodeError, run_job

SCRIPT = """
import json, sys
from hybridzoo.studies import Execution, run_study, study_from
from hybridzoo.studies.display import PlainDisplay
if __name__ == "__main__":
    data = json.loads(sys.argv[2])
    execution = Execution(processes=int(sys.argv[3]), threads=1)
    run_study(study_from(data), sys.argv[1], execution, display=PlainDisplay(sys.stdout))
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_a_study_killed_in_the_middle_goes_on_where_it_stopped(tmp_path, processes):
    data = {**SMALL, "stacks": {"attention": {"layers": "a"}}, "seeds": list(range(12))}
    script, folder = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "-P", str(script), str(folder), json.dumps(data), str(processes)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[ 3/12]"):
                break
        os.kill(process.pid, signal.SIGKILL)
    # Workers whose parent was killed find their pipe closed; until then they may still finish what they were given.
    deadline = time.monotonic() + 60
    while _running(process.pid):
        assert time.monotonic() < deadline, "workers outlive the study that was killed"
        time.sleep(0.05)
    kept = {path.name: path.read_bytes() for path in (folder / "trials").glob("*.json")}
    assert 3 <= len(kept) < 12
    done, display = run(data, folder)
    assert done.reused == len(kept)
    assert done.finished == 12 - len(kept)
    assert len(display.ran) == done.finished
    for name, content in kept.items():
        assert (folder / "trials" / name).read_bytes() == content
    assert not list((folder / "trials").glob(".*.tmp"))
    assert len(scores(folder)) == 12


@pytest.mark.slow
def test_workers_killed_in_the_middle_of_trials_lose_none_and_double_none(tmp_path, finished):
    draw = random.Random(2)

    class Killer(Recorder):
        """Kills a worker, whichever, three times while trials are at work."""

        kills, losses, ended_keys = 0, 0, []

        def progress(self, trial, progress):
            if self.kills < 3 and draw.random() < 0.3:
                victim = draw.choice(multiprocessing.active_children())
                self.kills += 1
                os.kill(victim.pid, signal.SIGKILL)

        def lost(self, trial, why):
            assert "SIGKILL" in why  # while at work, or as it started
            self.losses += 1

        def ended(self, trial, result):
            super().ended(trial, result)
            self.ended_keys.append(trial.key)

    display = Killer()
    data = {**SMALL, "seeds": [0, 1, 2]}
    done, _ = run(data, tmp_path, processes=2, threads=1, display=display, estimate=0)
    assert display.losses > 0
    assert (done.finished, done.reused, done.failed) == (6, 0, ())
    assert sorted(display.ended_keys) == sorted(trial.key for trial in read_plan(tmp_path).trials)
    files = sorted(path.name for path in (tmp_path / "trials").iterdir())
    assert files == sorted(trial.file_name for trial in read_plan(tmp_path).trials)
    for trial, metrics in scores(tmp_path).items():
        assert metrics == pytest.approx(finished.get(trial, metrics))


def test_a_trial_whose_worker_dies_each_time_is_recorded_with_the_reason(tmp_path, monkeypatch):
    class Deadly:
        """Runs jobs as workers do that die of one of them."""

        name, width = "deadly", 1

        def run(self, work, jobs, on_event, retries=engines.RETRIES):
            attempts = engines.base.Attempts(retries)
            for index, job in enumerate(jobs):
                on_event(Event("started", index))
                if job.trial.stack == "delta":
                    while (event := attempts.died(index, "the worker process ended with SIGKILL")).kind == "lost":
                        on_event(event)
                        on_event(Event("started", index))
                    on_event(event)
                else:
                    on_event(Event("done", index, work(job, lambda value: None)))

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(runner_module, "make_engine", lambda *_, **__: Deadly())
    done, _ = run(SMALL, tmp_path, estimate=0)
    assert done.finished == 2
    assert {error for _, error in done.failed} == {"the worker process ended with SIGKILL, 3 times in a row"}
    results, _ = read_trials(tmp_path, read_plan(tmp_path))
    assert [one["error"] for one in results if one["status"] == "failed"] == [error for _, error in done.failed]


def test_a_worker_of_other_code_or_data_refuses_its_trial():
    trial = make_plan(study_from(SMALL)).trials[0]
    with pytest.raises(OtherCodeError, match="the code of hybridzoo is not the same here"):
        run_job(Job(trial, zoo="of another version"), print)
    other = replace(trial, fingerprint={**trial.fingerprint, "data_seed": 1, "text": "another"})
    with pytest.raises(OtherCodeError, match=r"tasks\.recall: its data are not the same .*\(data_seed, text\)"):
        run_job(Job(other), print)


def _running(group):
    """Whether any process of a group runs; where the system can tell, those that have ended do not count."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return not Path("/proc/self/stat").exists() or any(_belongs(path, group) for path in Path("/proc").glob("[0-9]*"))


def _belongs(process, group):
    try:
        state, _, its_group, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended while we looked
        return False
    return its_group == str(group) and state != "Z"


def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(tmp_path):
    class Impatient(Recorder):
        def ended(self, trial, result):
            super().ended(trial, result)
            if len(self.ran) == 2:
                raise KeyboardInterrupt

    display = Impatient()
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path, display=display)
    assert any("2 of 4 trials are on disk, and the same command goes on from there" in note for note in display.notes)
    done, _ = run(SMALL, tmp_path)
    assert (done.finished, done.reused) == (2, 2)
