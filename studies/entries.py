"""The stacks of a study as declared, each listed once: what an axis does not change is no second stack.

May import architectures; plan.py brings what is left here to the budgets.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hybridzoo.architectures import Spec
from hybridzoo.studies.hybrids import AXES as HYBRID_AXES
from hybridzoo.studies.results import content_key
from hybridzoo.studies.stack import mixer_name, trained_part
from hybridzoo.studies.study import Crossing, axis_name, crossed_label


@dataclass(frozen=True)
class Entry:
    """A stack as declared: what it was crossed from, the axes that its label says, and its spec."""

    crossing: Crossing
    axes: tuple[str, ...]
    spec: Spec

    @property
    def label(self) -> str:
        return crossed_label(self.crossing, self.axes)


def listed_once(crossings: Mapping[str, Crossing], specs: Mapping[str, Spec]) -> tuple[dict[str, Entry], list[str]]:
    """Return the stacks that differ, by label, and a note on each that went.

    Where an axis changes nothing of a stack (a window, where there is no attention; a placement, where all layers are
    alike), its label does not say the axis. Hybrids of several recurrent mixers meet at attention alone: one stack too.
    """
    entries = [Entry(crossings[label], tuple(crossings[label].chosen), spec) for label, spec in specs.items()]
    kept: list[Entry] = []
    notes: list[str] = []
    for declared in dict.fromkeys(entry.crossing.declared for entry in entries):
        mine, said = _along_axes([entry for entry in entries if entry.crossing.declared == declared])
        kept += mine
        notes += said
    kept, said = _ends(kept)
    return {entry.label: entry for entry in kept}, notes + said


def _along_axes(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Of one declared stack: drop the axes that change nothing, and what is left of equal stacks."""
    notes: list[str] = []
    for path in entries[0].axes:
        groups = _grouped(entries, functools.partial(_others, path))
        alike = [len(group) > 1 and len({_made_as(entry) for entry in group}) == 1 for group in groups]
        word = axis_name(path, entries[0].crossing.chosen)
        if all(alike):
            notes.append(f"{entries[0].crossing.declared}: listed once along {word}, which changes nothing of it")
        left: list[Entry] = []
        for group, same in zip(groups, alike, strict=True):
            if same:
                left.append(replace(group[0], axes=tuple(other for other in group[0].axes if other != path)))
                if not all(alike):
                    notes.append(f"{left[-1].label}: listed once along {word}, which changes nothing of it")
                continue
            for first, *twins in _grouped(group, _made_as):
                left.append(first)
                notes += [f"{twin.label}: is {first.label} again, and listed once" for twin in twins]
        order = {id(entry.crossing): place for place, entry in enumerate(entries)}
        entries = sorted(left, key=lambda entry: order[id(entry.crossing)])
    return entries, notes


def _others(path: str, entry: Entry) -> str:
    return json.dumps({other: entry.crossing.chosen[other] for other in entry.axes if other != path})


def _ends(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """List the stacks of one mixer alone at which several hybrids meet once, under a name of its own."""
    taken = {entry.label for entry in entries}
    kept: list[Entry] = []
    notes: list[str] = []
    for group in _grouped(entries, _made_as):
        ends = [entry for entry in group if entry.crossing.alone]
        others = [entry for entry in group if not entry.crossing.alone]
        if len(ends) + min(1, len(others)) < 2:
            kept += group
            continue
        one = others[0] if others else _named(ends[0], taken)
        taken.add(one.label)
        kept += others or [one]
        notes += [f"{end.label}: is {one.label}, and listed once" for end in ends]
    order = {id(entry.crossing.chosen): place for place, entry in enumerate(entries)}
    return sorted(kept, key=lambda entry: order[id(entry.crossing.chosen)]), notes


def _named(end: Entry, taken: Iterable[str]) -> Entry:
    """A stack of one mixer alone, named by it and no longer by the hybrid that it is an end of."""
    axes = tuple(path for path in end.axes if path not in HYBRID_AXES)
    family = mixer_name(end.spec.layers[0].mixers[0][1])
    names = (f"all {family}", f"all {end.crossing.alone}")
    found = [replace(end, axes=axes, crossing=replace(end.crossing, declared=name)) for name in names]
    return next((entry for entry in found if entry.label not in set(taken)), end)


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], str]) -> list[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _made_as(entry: Entry) -> str:
    """Equal for entries that are one model, as their trials' keys have it."""
    return content_key(trained_part(entry.spec.to_dict()))
