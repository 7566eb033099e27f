"""Workers: every job ends in exactly one event, whatever happens to the process that ran it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import pytest

from hybridzoo.studies.pool import Event, WorkerStartError, run_jobs

# Workers import their work by name, so it must be a module on the path.
WORK = """
import os, signal, time
import torch

def work(job, send):
    kind, value = job
    if kind == "raise":
        raise ValueError(f"bad\\njob {value}")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(3)
    if kind == "sleep":
        send("asleep")
        time.sleep(value)
    send(value)
    return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "pool_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    import pool_work

    yield pool_work.work
    del sys.modules["pool_work"]


def collect(work, jobs, processes, threads=1):
    events: list[Event] = []
    run_jobs(work, jobs, processes, threads, events.append)
    ends = Counter(event.index for event in events if event.kind in ("done", "failed"))
    assert ends == Counter(range(len(jobs)))  # each job ended once
    return events


def ends(events):
    return {event.index: event for event in events if event.kind in ("done", "failed")}


def test_jobs_are_shared_out_and_a_failing_or_dying_one_costs_only_itself(work):
    jobs = [("ok", 0), ("raise", 1), ("die", 2), ("ok", 3), ("exit", 4), ("ok", 5)]
    events = collect(work, jobs, processes=2)
    outcome = ends(events)
    assert [outcome[i].kind for i in range(6)] == ["done", "failed", "failed", "done", "failed", "done"]
    assert outcome[1].value == "ValueError: bad job 1"
    assert "in work" in outcome[1].traceback
    assert outcome[2].value == "the worker process ended with SIGKILL (out of memory, perhaps)"
    assert outcome[4].value == "the worker process ended with exit code 3"
    assert [event.value for event in events if event.kind == "progress" and event.index == 3] == [3]
    pids = {outcome[i].value[0] for i in (0, 3, 5)}
    assert os.getpid() not in pids
    assert {outcome[i].value[1:] for i in (0, 3, 5)} == {(1, "1")}


def test_jobs_can_run_in_this_process_and_leave_its_threads_alone(work):
    import torch

    before = torch.get_num_threads()
    outcome = ends(collect(work, [("ok", 0), ("raise", 1), ("ok", 2)], processes=0, threads=1))
    assert outcome[0].value[:2] == (os.getpid(), 1)
    assert outcome[1].value == "ValueError: bad job 1"
    assert outcome[2].kind == "done"
    assert torch.get_num_threads() == before


def test_no_jobs_is_no_work(work):
    assert collect(work, [], processes=2) == []


def test_an_interrupt_ends_the_workers(work):
    class Stop(KeyboardInterrupt):
        pass

    def on_event(event: Event) -> None:
        if event.kind == "progress":
            raise Stop

    start = time.monotonic()
    with pytest.raises(Stop):
        run_jobs(work, [("sleep", 60), ("sleep", 60)], 2, 1, on_event)
    assert time.monotonic() - start < 40


def test_a_worker_that_cannot_start_says_what_to_do(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            from hybridzoo.studies.pool import run_jobs
            run_jobs(os.strerror, [1, 2], 1, 1, print)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"{WorkerStartError.__name__}: a worker process could not start" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_workers_leave_when_their_parent_is_killed(tmp_path, work):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            from hybridzoo.studies.pool import run_jobs
            import pool_work

            def show(event):
                if event.kind == "progress":
                    print(*[child.pid for child in multiprocessing.active_children()], flush=True)

            if __name__ == "__main__":
                run_jobs(pool_work.work, [("sleep", 3)], 1, 1, show)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(150):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
