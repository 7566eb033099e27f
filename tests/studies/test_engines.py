"""Engines: every job ends in exactly one event, whatever happens to the process that ran it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from engine_cases import collect, ends, work

from hybridzoo.studies import engines
from hybridzoo.studies.engines import Event, Here, Processes, WorkerStartError, cluster, make_engine, processes

SUPPORT = [path for path in sys.path if path.endswith("support")]


def test_jobs_are_shared_out_and_a_failing_or_dying_one_costs_only_itself():
    jobs = [("ok", 0), ("raise", 1), ("die", 2), ("ok", 3), ("exit", 4), ("ok", 5)]
    with Processes(2, threads=1) as engine:
        events = collect(engine, jobs, retries=0)
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


def test_a_job_whose_worker_dies_is_started_again_and_given_up_where_it_dies_each_time(tmp_path):
    with Processes(1, threads=1) as engine:
        outcome = ends(collect(engine, [("die", 0), ("die once", str(tmp_path / "died")), ("ok", 2)], retries=1))
    assert [outcome[i].kind for i in range(3)] == ["failed", "done", "done"]
    assert outcome[0].value == "the worker process ended with SIGKILL (out of memory, perhaps), 2 times in a row"


@pytest.mark.slow
def test_workers_killed_at_random_lose_no_job_and_end_none_twice():
    draw = random.Random(5)
    kills: list[threading.Timer] = []

    def kill_some(event: Event) -> None:
        at_work = event.kind == "progress" and isinstance(event.value, int)  # its process; later, what it was given
        if at_work and len(kills) < 4 and draw.random() < 0.7:
            # From beside, so that the worker is at its job, has just ended it, or is already at another.
            kills.append(threading.Timer(draw.uniform(0, 0.04), _kill, [event.value]))
            kills[-1].start()

    with Processes(2, threads=1) as engine:
        outcome = ends(collect(engine, [("sleep", 0.02)] * 10, kill_some, retries=10))
    assert len(kills) == 4
    assert {event.kind for event in outcome.values()} == {"done"}


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_worker_that_says_nothing_for_long_keeps_nobody_from_being_heard(tmp_path):
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    # The first job ends when the third has begun: for that, the second must be heard to have ended meanwhile.
    jobs = [("wait for", (two, one)), ("wait for", (one, three)), ("wait for", (one, two))]
    with Processes(2, threads=1) as engine:
        outcome = ends(collect(engine, jobs))
    assert [outcome[i].value for i in range(3)] == [True, True, True]


def test_a_broken_pipe_of_the_job_s_own_is_its_error_and_not_the_parent_s_end():
    with Processes(1, threads=1) as engine:
        outcome = ends(collect(engine, [("broken pipe", 0), ("ok", 1)]))
    assert outcome[0].value == "BrokenPipeError: of job 0"
    assert (outcome[0].kind, outcome[1].kind) == ("failed", "done")


def test_a_worker_that_cannot_be_started_again_costs_its_job_and_not_the_study(monkeypatch):
    start = processes.multiprocessing.get_context("spawn").Process
    started = []

    def second_fails(*args, **words):
        started.append(words)
        return start(*args, **words) if len(started) != 2 else start(target=os._exit, args=(5,), daemon=True)

    monkeypatch.setattr(processes.multiprocessing.get_context("spawn"), "Process", second_fails)
    with Processes(1, threads=1) as engine:
        events = collect(engine, [("die", 0), ("ok", 1), ("ok", 2)], retries=0)
    outcome = ends(events)
    assert [outcome[i].kind for i in range(3)] == ["failed", "failed", "done"]
    assert outcome[1].value == "the worker process could not start (exit code 5)"


def test_jobs_can_run_in_this_process_and_leave_its_threads_alone():
    import torch

    before = torch.get_num_threads()
    with Here(threads=1) as engine:
        outcome = ends(collect(engine, [("ok", 0), ("raise", 1), ("ok", 2)]))
    assert outcome[0].value[:2] == (os.getpid(), 1)
    assert outcome[1].value == "ValueError: bad job 1"
    assert outcome[2].kind == "done"
    assert torch.get_num_threads() == before


def test_workers_are_kept_from_one_call_to_the_next_and_deal_out_the_devices():
    with Processes(3, threads=1, devices=["4", "6"]) as engine:
        assert collect(engine, []) == []
        assert not engine.workers
        seen = [ends(collect(engine, [("device", 0)] * 3)) for _ in range(2)]
    by_pid = [{event.value[1]: event.value[0] for event in outcome.values()} for outcome in seen]
    assert len({**by_pid[0], **by_pid[1]}) <= 3
    both = {**by_pid[0], **by_pid[1]}
    assert set(both.values()) <= {"4", "6"}
    assert all(both[pid] == device for one in by_pid for pid, device in one.items())


@pytest.mark.parametrize(
    ("words", "width", "threads"),
    [
        ({}, 8, 1),
        ({"processes": 2}, 2, 4),
        ({"processes": 2, "threads": 3}, 2, 3),
        ({"jobs": 4}, 4, 2),
        ({"devices": ["0"]}, 1, 8),
        ({"devices": ["0", "1"]}, 2, 4),
        ({"devices": ["0", "1"], "gpu_share": 0.25}, 8, 1),
        ({"devices": ["0"], "gpu_share": 1 / 3}, 3, 2),
        ({"devices": ["0"], "processes": 4}, 4, 2),
    ],
)
def test_the_cores_and_gpus_are_shared_out(monkeypatch, words, width, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines, "cores", lambda: 8)
    engine = make_engine(**words)
    assert (engine.name, engine.width, engine.threads) == ("processes", width, threads)


@pytest.mark.parametrize(
    ("resources", "threads", "share", "places"),
    [
        ({"CPU": 64, "GPU": 4}, 1, 0.4, 8),  # two on each GPU, and 0.2 of each left over
        ({"CPU": 64, "GPU": 2}, 1, 0.1, 20),
        ({"CPU": 64, "GPU": 3}, 1, 1.0, 3),
        ({"CPU": 7, "GPU": 4}, 2, 0.25, 3),
        ({"CPU": 7}, 2, 0.5, 0),
        ({"CPU": 7}, 2, 0.0, 3),
    ],
)
def test_a_node_has_as_many_places_as_fit_on_its_gpus_one_by_one(resources, threads, share, places):
    assert cluster.places_of(resources, threads, share) == places


def test_a_single_gpu_keeps_its_number_and_several_are_dealt_out():
    assert make_engine(devices=["3"], processes=2).devices == ()
    assert make_engine(devices=["3", "5"], processes=2).devices == ("3", "5")


@pytest.mark.parametrize(("asked", "threads", "used"), [("1", None, 1), ("3", None, 3), ("3", 2, 2), ("", None, 8)])
def test_as_many_threads_as_are_asked_for(monkeypatch, asked, threads, used):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(engines, "cores", lambda: 8)
    assert make_engine(processes=1, threads=threads).threads == used


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"name": "rya"}, "'rya' is not one of here, processes, ray"),
        ({"name": "here", "processes": 2}, "--engine here runs one trial at a time"),
        ({"name": "processes", "processes": 0}, "0 means this process"),
        ({"processes": -1}, "must not be negative"),
        ({"gpu_share": -0.5}, "from 0 to 1"),
        ({"gpu_share": 2}, "from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        make_engine(**words)


def test_an_interrupt_ends_the_workers():
    class Stop(KeyboardInterrupt):
        pass

    def on_event(event: Event) -> None:
        if event.kind == "progress":
            raise Stop

    start = time.monotonic()
    with Processes(2, threads=1) as engine, pytest.raises(Stop):
        engine.run(work, [("sleep", 60), ("sleep", 60)], on_event)
    assert time.monotonic() - start < 40


def test_a_worker_that_cannot_start_says_what_to_do(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            from hybridzoo.studies.engines import Processes
            Processes(1, 1).run(os.strerror, [1, 2], print)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"{WorkerStartError.__name__}: a worker process could not start" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_workers_leave_when_their_parent_is_killed_whatever_they_are_at(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            from hybridzoo.studies.engines import Processes
            import engine_cases

            def show(event):
                if event.kind == "progress":
                    print(event.value, flush=True)

            if __name__ == "__main__":
                Processes(1, 1).run(engine_cases.work, [("sleep", 600)], show)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*SUPPORT, os.environ.get("PYTHONPATH", "")])}
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
