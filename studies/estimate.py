"""How long a study will take: some kinds of trial are timed, the others follow by their FLOPs, and all are added up.

Arithmetic over what probe.py measures. May import architectures and training; runner.py asks before anything starts.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybridzoo.studies.display import format_count, format_seconds
from hybridzoo.studies.engines import Engine, Event
from hybridzoo.studies.probe import Probe, ProbeJob, kind_of, run_probe
from hybridzoo.studies.results import content_key
from hybridzoo.studies.trial import Job, Trial

UNKNOWN = 0.5  # how far off a scaled time may be where nothing is there to judge it by
_LEAST = 0.1  # a few steps on a machine that does other things too are never a better guide than this


@dataclass(frozen=True)
class TrialCost:
    """One trial before it runs: what it trains on, and how long that will take, where that could be found.

    `flops` are those of the whole training. `timed` is whether its own steps were timed.
    """

    trial: Trial
    parameters: int
    flops: int
    seconds: float | None = None
    timed: bool = False


@dataclass(frozen=True)
class Estimate:
    """What lies ahead. `seconds` is the time on the clock with `width` trials at a time, None where nothing is known.

    `error` is the share by which that may be off, `without` what is not in it at all. Of `kinds` kinds of trial (stacks
    on tasks) `timed` were timed.
    """

    costs: tuple[TrialCost, ...]
    width: int
    seconds: float | None
    error: float
    kinds: int
    timed: int
    without: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    def __str__(self) -> str:
        """Say it in a sentence: `about 4 min 10 s (± 20 %) for 28 trials, 2 at a time: ...`."""
        trials = format_count(len(self.costs), "trial")
        if self.seconds is None:
            return f"{trials} to run, for which no time could be estimated: no step of any could be timed"
        at_once = f", {self.width} at a time" if self.width > 1 else ""
        if self.timed == self.kinds:
            how = f"timed a few steps of {'its kind' if self.kinds == 1 else f'each of the {self.kinds} kinds'}"
        else:
            how = f"timed a few steps of {self.timed} of {self.kinds} kinds, the others by their FLOPs"
        missing = f"; without {' and '.join(self.without)}, which could not be timed" if self.without else ""
        share = f"± {100 * self.error:.0f} %"
        return f"about {format_seconds(self.seconds)} ({share}) for {trials}{at_once}: {how}{missing}"


def estimate(
    engine: Engine,
    trials: Sequence[Trial],
    flops: Mapping[str, int],
    imports: Sequence[str] = (),
    zoo: str = "",
    seconds: float = 2.0,
) -> Estimate:
    """Time a few steps of as many kinds of trial as fit into about `seconds`, and estimate the rest from these.

    `flops` are those of each trial, by key. At least as many kinds are timed as run at a time.
    """
    kinds: dict[str, Trial] = {}
    of_trial = {trial.key: content_key(kind_of(trial)) for trial in trials}
    for trial in trials:
        kinds.setdefault(of_trial[trial.key], trial)
    order = _spread_out(kinds, {name: flops[trial.key] for name, trial in kinds.items()})
    probes: dict[str, Probe] = {}
    left = seconds
    while order and (left > 0 or not probes):
        count = engine.width if not probes else _fitting(probes.values(), left, engine.width)
        if count == 0:
            break
        now, order = order[:count], order[count:]
        found = _probe(engine, [Job(kinds[name], tuple(imports), zoo) for name in now], limit=max(0.2, seconds / 4))
        probes |= {now[index]: probe for index, probe in found.items()}
        left -= sum(probe.took for probe in found.values()) / engine.width
    by_kind = {name: (trial.task, flops[trial.key]) for name, trial in kinds.items()}
    known = scaled(by_kind, {name: probe.seconds for name, probe in probes.items()})
    costs = tuple(
        TrialCost(
            trial,
            trial.parameters,
            flops[trial.key],
            known.get(of_trial[trial.key]),
            of_trial[trial.key] in probes,
        )
        for trial in trials
    )
    return total(costs, engine.width, probes, scaling_error(by_kind, {n: p.seconds for n, p in probes.items()}))


def total(costs: Sequence[TrialCost], width: int, probes: Mapping[str, Probe], scaling: float) -> Estimate:
    """Add the trials up to a time on the clock, and their errors to one."""
    kinds = len({content_key(kind_of(cost.trial)) for cost in costs})
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    if not seconds or len(seconds) < len(costs):
        return Estimate(tuple(costs), width, None, 0.0, kinds, len(probes))
    noise = max(_LEAST, statistics.median(probe.spread for probe in probes.values()))
    errors = [(noise if cost.timed else max(noise, scaling)) * (cost.seconds or 0.0) for cost in costs]
    return Estimate(
        costs=tuple(costs),
        width=width,
        seconds=clock_time(seconds, width),
        error=sum(errors) / sum(seconds),
        kinds=kinds,
        timed=len(probes),
        without=tuple(dict.fromkeys(name for probe in probes.values() for name in probe.without)),
    )


def clock_time(seconds: Iterable[float], width: int) -> float:
    """Return when the last job ends, if each starts as soon as one of `width` places is free."""
    places = [0.0] * max(1, width)
    for one in seconds:
        heapq.heappush(places, heapq.heappop(places) + one)
    return max(places)


def scaled(kinds: Mapping[str, tuple[str, int]], known: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of every kind: its own where known, else by its FLOPs from known ones of the same task.

    `kinds` are a task and FLOPs each. Where no kind of a task is known, all that are known stand in; where none is,
    nothing is returned.
    """
    if not known:
        return {}
    result = {}
    for name, (task, flops) in kinds.items():
        alike = [other for other in known if kinds[other][0] == task] or list(known)
        rate = sum(known[other] for other in alike) / sum(kinds[other][1] for other in alike)
        result[name] = known[name] if name in known else rate * flops
    return result


def scaling_error(kinds: Mapping[str, tuple[str, int]], known: Mapping[str, float]) -> float:
    """Return by how much scaling is off, as a share: each known kind is predicted from the others of its task.

    Two that agree may do so by chance, so below three the answer is `UNKNOWN`, or what they show if that is more.
    """
    off = []
    for name, seconds in known.items():
        others = {other: known[other] for other in known if other != name and kinds[other][0] == kinds[name][0]}
        if others:
            off.append(abs(scaled({name: kinds[name], **{o: kinds[o] for o in others}}, others)[name] / seconds - 1))
    return statistics.mean(off) if len(off) > 2 else max([UNKNOWN, *off])


def _fitting(probes: Iterable[Probe], left: float, width: int) -> int:
    each = statistics.mean(probe.took for probe in probes)
    return width * int(left / each) if left > each else 0


def _spread_out(kinds: Mapping[str, Trial], flops: Mapping[str, int]) -> list[str]:
    """Order kinds so that the first few say most of the rest: tasks in turn, and of each the most unlike first."""
    by_task: dict[str, list[str]] = {}
    for name in sorted(kinds, key=lambda name: flops[name]):
        by_task.setdefault(kinds[name].task, []).append(name)
    queues = [_from_the_ends(names) for names in by_task.values()]
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[place] for place in range(longest) for queue in queues if place < len(queue)]


def _from_the_ends(names: Sequence[str]) -> list[str]:
    """The last, the first, the middle, then the middles of what lies between."""
    ordered, spans = [], [(0, len(names) - 1)]
    for place in (len(names) - 1, 0):
        if names[place] not in ordered:
            ordered.append(names[place])
    while spans:
        low, high = spans.pop(0)
        middle = (low + high) // 2
        if low < middle:
            ordered.append(names[middle])
            spans += [(low, middle), (middle, high)]
        elif middle + 1 < high:
            spans.append((middle + 1, high))
    return ordered


def _probe(engine: Engine, jobs: Sequence[Job], limit: float) -> dict[int, Probe]:
    found: dict[int, Probe] = {}

    def on_event(event: Event) -> None:
        if event.kind == "done":
            found[event.index] = event.value

    # One that fails is not timed, and will fail again where its error is kept.
    engine.run(run_probe, [ProbeJob(job, limit) for job in jobs], on_event, retries=0)
    return found
