"""Jobs as Ray tasks, on one machine or on a cluster: Ray places them, this module says what became of each.

A task whose worker or node is lost is given to Ray again. Its own retries are not used, since whoever watches should
hear of each loss. May import nothing of hybridzoo but its neighbours; Ray (the extra `ray`) only when it is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from hybridzoo.studies.engines.base import RETRIES, Attempts, EngineError, Event, OnEvent, Work, describe, sender

_POLL = 0.5  # seconds between looks at what the tasks have said


class Cluster:
    """Runs each job as a Ray task that asks for `threads` CPUs and `gpu_share` of a GPU.

    `at_once` bounds the tasks that Ray is given at a time; None leaves that to the resources. The address of the
    cluster is RAY_ADDRESS where that is set, else a Ray of this machine is started and ended with this engine. Where
    Ray is already initialised in this process, that one is used and left running.

    Raises: `ModuleNotFoundError` without Ray; `EngineError` where there is no cluster at the address, and where no node
    has what one task asks for.
    """

    name = "ray"

    def __init__(self, threads: int = 1, gpu_share: float | None = None, at_once: int | None = None) -> None:
        import ray

        self.ray = ray
        self.threads, self.at_once = threads, at_once
        self.started = not ray.is_initialized()
        if self.started:
            address = os.environ.get("RAY_ADDRESS") or "local"
            own = {"include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
            except ConnectionError as error:
                raise EngineError(f"ray: no cluster answers at RAY_ADDRESS={address} ({describe(error)})") from None
        try:
            has_gpu = ray.cluster_resources().get("GPU", 0) > 0
            self.gpu_share = (1.0 if has_gpu else 0.0) if gpu_share is None else gpu_share
            self._check()
            self.mailbox = self._start_mailbox()
        except BaseException:
            self._leave()
            raise

    def _check(self) -> None:
        """Refuse what no node could ever run: Ray would wait for it forever."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= self.threads and n.get("GPU", 0) >= self.gpu_share for n in nodes):
            most = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
            raise EngineError(
                f"ray: a trial asks for {self.threads} CPUs and {self.gpu_share:g} of a GPU, and no node has that "
                f"(there are {most})"
            )

    def _start_mailbox(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On this node, so that it is lost only with the study itself.
        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=True)
        return self.ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()

    @property
    def width(self) -> int:
        """As many tasks as the nodes that are here now can run at a time."""
        fitting = 0
        for node in self.ray.nodes():
            if node["Alive"]:
                fitting += places_of(node["Resources"], self.threads, self.gpu_share)
        return max(1, fitting if self.at_once is None else min(fitting, self.at_once))

    def run(self, work: Work, jobs: Sequence[Any], on_event: OnEvent, retries: int = RETRIES) -> None:
        """Give Ray the jobs in their order; which are started first is Ray's to say."""
        _Round(self, work, jobs, on_event, Attempts(retries)).run()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.started:
            self.ray.shutdown()
        elif hasattr(self, "mailbox"):
            self.ray.kill(self.mailbox)


def places_of(resources: Mapping[str, float], threads: int, gpu_share: float) -> int:
    """Return how many tasks of that many CPUs and that share of a GPU a node runs at a time; none spans two GPUs."""
    places = int(resources.get("CPU", 0) // threads)
    if gpu_share:
        places = min(places, int(resources.get("GPU", 0)) * int(1 / gpu_share + 1e-9))
    return places


class _Round:
    """One call of `run`: the tasks that Ray has, and what was said of each job so far."""

    def __init__(
        self, cluster: Cluster, work: Work, jobs: Sequence[Any], on_event: OnEvent, attempts: Attempts
    ) -> None:
        self.ray, self.mailbox = cluster.ray, cluster.mailbox
        self.work, self.jobs, self.on_event, self.attempts = work, jobs, on_event, attempts
        self.limit = cluster.at_once or len(jobs)
        self.task = self.ray.remote(_task).options(num_cpus=cluster.threads, num_gpus=cluster.gpu_share, max_retries=0)
        self.threads = cluster.threads
        self.waiting = list(reversed(range(len(jobs))))
        self.pending: dict[Any, tuple[int, int]] = {}  # what Ray will return: which job, which attempt
        self.begun: set[tuple[int, int]] = set()
        self.mail: Any = None  # the letters that were asked for

    def run(self) -> None:
        try:
            while self.waiting or self.pending:
                while self.waiting and len(self.pending) < self.limit:
                    self._submit(self.waiting.pop())
                ready, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=_POLL)
                # What a task said on its way is heard before its end; else nobody waits for mail.
                self._read_mail(wait=5.0 if ready else 0.0)
                for reference in ready:
                    self._end(reference)
        except BaseException:
            for reference in self.pending:
                with contextlib.suppress(Exception):  # it ended meanwhile, or its node is gone
                    self.ray.cancel(reference, force=True)
            raise

    def _submit(self, index: int) -> None:
        attempt = self.attempts.deaths[index]
        reference = self.task.remote(self.work, self.jobs[index], (index, attempt), self.mailbox, self.threads)
        self.pending[reference] = (index, attempt)

    def _read_mail(self, wait: float) -> None:
        if wait and self.mail is not None:  # asked for before; what came since is asked for after it
            self._take_mail(wait)
        self._take_mail(wait)

    def _take_mail(self, wait: float) -> None:
        if self.mail is None:
            self.mail = self.mailbox.take.remote()
        try:
            letters = self.ray.get(self.mail, timeout=wait)
        except self.ray.exceptions.GetTimeoutError:
            return  # it is read at the next look
        except self.ray.exceptions.RayError:
            self.mail = None
            return  # nobody hears how far the tasks are; what they return does not go through here
        self.mail = None
        running = set(self.pending.values())
        for sent, value in letters:
            if sent in running:
                self._begin(sent)
                if value is not None:
                    self.on_event(Event("progress", sent[0], value))

    def _begin(self, sent: tuple[int, int]) -> None:
        if sent not in self.begun:
            self.begun.add(sent)
            self.on_event(Event("started", sent[0]))

    def _end(self, reference: Any) -> None:
        index, attempt = self.pending.pop(reference)
        self._begin((index, attempt))
        try:
            kind, value, trace = self.ray.get(reference)
            event = Event(kind, index, value, trace)
        except self.ray.exceptions.RayTaskError as error:
            # Not the work's own error, which comes back as a value: it could not be unpickled there, for example.
            event = Event("failed", index, describe(error.cause if error.cause is not None else error), str(error))
        except self.ray.exceptions.RayError as error:
            event = self.attempts.died(index, f"the worker or its node was lost ({_reason(error)})")
            if event.kind == "lost":
                self.waiting.append(index)
        self.on_event(event)


class _Mailbox:
    """Holds what the tasks send until the study asks for it."""

    def __init__(self) -> None:
        self.letters: list[tuple[tuple[int, int], Any]] = []

    def put(self, sent: tuple[int, int], value: Any) -> None:
        self.letters.append((sent, value))

    def take(self) -> list[tuple[tuple[int, int], Any]]:
        letters, self.letters = self.letters, []
        return letters


def _task(work: Work, job: Any, sent: tuple[int, int], mailbox: Any, threads: int) -> tuple[str, Any, str]:
    import torch

    torch.set_num_threads(threads)

    last: Any = None

    def put(event: Event | None) -> None:
        nonlocal last
        last = mailbox.put.remote(sent, None if event is None else event.value)

    put(None)
    try:
        told = "done", work(job, sender(put, sent[0])), ""
    except Exception as error:
        told = "failed", describe(error), traceback.format_exc()
    _wait_for(last)  # what was said on the way should arrive before the end
    return told


def _wait_for(reference: Any) -> None:
    import ray

    ray.wait([reference], timeout=5)


def _reason(error: BaseException) -> str:
    return f"Ray says {type(error).__name__}"
