"""From a study to its trials: every stack resolved, brought to the budget, counted, and crossed with tasks and seeds.

May import architectures and training. A plan is saved with the results, so that a report needs nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hybridzoo.architectures import Spec, account, load_spec
from hybridzoo.architectures.account import DEFAULT_CONTEXT
from hybridzoo.architectures.loader import override_name, spec_from
from hybridzoo.mixers import MixerConfig, build_mixer
from hybridzoo.mixers.registry import GATE_FLAGS, entry_of
from hybridzoo.mixers.schema import SpecError
from hybridzoo.mixers.user_code import import_user_code
from hybridzoo.studies.code import code_digest
from hybridzoo.studies.equalise import equalise, parameters
from hybridzoo.studies.study import Study, axis_name, crossed_label
from hybridzoo.studies.tasks import Shown, StudyTask, build_task
from hybridzoo.studies.trial import Trial
from hybridzoo.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A stack without its ratio and order: the words of its recurrent mixers, of its attention, and of the rest.

    `parallel` says whether some layer holds several mixers side by side.
    """

    recurrent: dict[str, Any]
    attention: dict[str, Any]
    rest: dict[str, Any]
    parallel: bool


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of the study as it is trained, with its costs.

    `family` names its recurrent mixers (`attention` where there are none); `attention` is the share of its mixers that
    keep keys and values; `kind` is all else that may differ between stacks but the order of layers and what met the
    budget, so that a ratio curve joins only what differs in the ratio. Training FLOPs are of the task's own lengths;
    decoding FLOPs and bytes are for one sequence after the study's `context` tokens, in bfloat16 where a cache is.
    """

    label: str
    pattern: str
    family: str
    attention: float
    kind: Kind
    ffn_width: int | None
    specs: dict[str, dict[str, Any]]  # by task: the vocabulary differs
    parameters: dict[str, int]
    train_flops: dict[str, int]
    decode_flops: dict[str, int]
    state_bytes: int
    kv_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study made concrete.

    `excluded` are stacks that cannot meet the budget: label, and why. `lengths` are tokens a sequence in training, by
    task (at its end, where a curriculum changes them). `notes` are for whoever starts the run.
    """

    study: dict[str, Any]
    target: int | None
    lengths: dict[str, int]
    stacks: tuple[Stack, ...]
    excluded: tuple[tuple[str, str], ...]
    shown: dict[str, Shown]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read back what `to_dict` gave; `KeyError` or `TypeError` for anything else."""
        return cls(
            study=dict(data["study"]),
            target=data["target"],
            lengths=dict(data["lengths"]),
            stacks=tuple(Stack(**{**stack, "kind": Kind(**stack["kind"])}) for stack in data["stacks"]),
            excluded=tuple((label, why) for label, why in data["excluded"]),
            shown={label: Shown.from_dict(shown) for label, shown in data["shown"].items()},
            trials=tuple(Trial(**trial) for trial in data["trials"]),
            notes=tuple(data.get("notes", ())),
        )


def make_plan(study: Study, imports: Sequence[str] = ()) -> Plan:
    """Resolve every stack, meet the budget, and list the trials, seeds outermost so that an early stop leaves pairs.

    `imports` are the modules or files of a user's own code: imported where they are not, and part of every trial's key.

    Raises: `SpecError` naming the study, the stack and the key, for a stack that cannot be built or a budget that none
    can meet.
    """
    own = [import_user_code(name) for name in imports]
    tasks = {label: build_task(entry.task, f"tasks.{label}") for label, entry in study.tasks.items()}
    # Absolute differences are the same for any vocabulary, so relative ones are largest at the smallest: solve there.
    smallest = min(task.vocab_size for task in tasks.values())
    specs, notes = _once(study, {label: _resolve(study, label, smallest) for label in study.stacks})
    target, specs, excluded = _hold(study, specs)
    if not specs:
        listed = "; ".join(f"{label}: {why}" for label, why in excluded)
        raise SpecError(study.placed(f"hold.params: no stack can meet the budget ({listed})"))
    lengths = {name: trained_length(task, study.tasks[name].train) for name, task in tasks.items()}
    context = _context(study, specs, lengths)
    vocabularies = {name: task.vocab_size for name, task in tasks.items()}
    stacks = tuple(_stack(label, spec, vocabularies, lengths, context) for label, spec in specs.items())
    code = {
        (label, name): code_digest([*_mixer_classes(spec), type(task)], own)
        for label, spec in specs.items()
        for name, task in tasks.items()
    }
    trials = tuple(
        Trial(
            stack=stack.label,
            task=name,
            seed=seed,
            spec=stack.specs[name],
            task_entry=entry.task,
            fingerprint=tasks[name].fingerprint(),
            train=dataclasses.asdict(replace(entry.train, seed=seed)),
            parameters=stack.parameters[name],
            code=code[stack.label, name],
        )
        for seed in study.seeds
        for name, entry in study.tasks.items()
        for stack in stacks
    )
    shown = {name: task.shown for name, task in tasks.items()}
    plan = Plan(
        study={**study.to_dict(), "context": context},
        target=target,
        lengths=lengths,
        stacks=stacks,
        excluded=excluded,
        shown=shown,
        trials=trials,
        notes=notes,
    )
    # Through JSON once: what workers are given is then exactly what a later run reads from the disk, tuples and all.
    return Plan.from_dict(json.loads(json.dumps(plan.to_dict())))


def _resolve(study: Study, label: str, vocab_size: int) -> Spec:
    overrides = [*_own_words(study, label).values(), f"vocab_size={vocab_size}"]
    try:
        if isinstance(study.spec, str):
            return load_spec(_found(study.spec, study.folder), overrides)
        return spec_from(study.spec, overrides, "spec", study.folder)
    except SpecError as error:
        raise SpecError(study.placed(_in_the_study(study, label, str(error)))) from None


def _own_words(study: Study, label: str) -> dict[str, str]:
    """A stack's own words reach the spec as overrides: these, by their key."""
    return {path: f"{path}={json.dumps(value)}" for path, value in study.stacks[label].items()}


def _in_the_study(study: Study, label: str, message: str) -> str:
    """Say where in the study stands what an error about a stack's spec is about."""
    crossing = study.crossings[label]
    for path, text in _own_words(study, label).items():
        said = message.removeprefix(f"{override_name(text)}: ")
        if said != message and path in crossing.chosen:
            outer = path.rpartition(".")[0]
            return f"axes.{path}: {said.removeprefix(f'{path}: ').removeprefix(f'{outer}: ')}"
        if said != message:
            return f"stacks.{crossing.declared}{': ' if said.startswith('unknown ') else '.'}{said}"
    # What is wrong with the base is wrong with every stack; naming one of them would mislead.
    return message if message.startswith("spec") else f"spec: {message}"


def _once(study: Study, specs: Mapping[str, Spec]) -> tuple[dict[str, Spec], tuple[str, ...]]:
    """List a stack once, without the axis, where an axis changes nothing of it: a window, where there is no attention.

    Returns the specs that are left, by their labels, and a note on each axis that went.
    """
    kept: dict[str, Spec] = {}
    notes: list[str] = []
    for declared in dict.fromkeys(crossing.declared for crossing in study.crossings.values()):
        mine = [label for label in specs if study.crossings[label].declared == declared]
        axes = list(study.crossings[mine[0]].chosen)
        for path in list(axes):
            twins: dict[str, list[str]] = {}  # labels that differ on this axis alone
            for label in mine:
                others = {other: study.crossings[label].chosen[other] for other in axes if other != path}
                twins.setdefault(json.dumps(others), []).append(label)
            groups = list(twins.values())
            same = all(_trained(specs[label]) == _trained(specs[group[0]]) for group in groups for label in group)
            if same and len(groups[0]) > 1:
                mine = [group[0] for group in groups]
                axes.remove(path)
                word = axis_name(path, study.crossings[mine[0]].chosen)
                notes.append(f"{declared}: listed once along {word}, which changes nothing of it")
        kept |= {crossed_label(study.crossings[label], axes): specs[label] for label in mine}
    return kept, tuple(notes)


def _trained(spec: Spec) -> Spec:
    """A spec without what is only said: its name, its pattern, and mixers that no layer has."""
    return replace(spec, name="", pattern="", mixers={})


def _found(name: str, folder: Path) -> str:
    beside = folder / name
    return str(beside) if name.endswith((".yaml", ".yml")) and beside.exists() else name


def _hold(study: Study, specs: dict[str, Spec]) -> tuple[int | None, dict[str, Spec], tuple[tuple[str, str], ...]]:
    if study.hold is None:
        return None, specs, ()
    target = study.hold.params
    if target == "largest":
        target = int(max(parameters(spec) for spec in specs.values()))
    solved = {label: equalise(spec, target, study.hold.tolerance) for label, spec in specs.items()}
    excluded = tuple((label, result.why) for label, result in solved.items() if not result.reached)
    return target, {label: result.spec for label, result in solved.items() if result.reached}, excluded


def trained_length(task: StudyTask, config: TrainConfig) -> int:
    """Return the tokens of a sequence at the end of the training, where a curriculum is over."""
    return task.batch(config.steps - 1, 1, torch.Generator().manual_seed(0)).ids.shape[1]


def too_long(length: int, limit: int | None) -> str:
    """Say that a model of that `max_context` cannot be trained on sequences of `length`; nothing where it can."""
    return f"its sequences of {length} are over max_context {limit}" if limit is not None and length > limit else ""


def _context(study: Study, specs: Mapping[str, Spec], lengths: Mapping[str, int]) -> int:
    """The length at which inference is counted: as asked for, else the usual, within what every stack takes."""
    limits = {label: spec.max_context for label, spec in specs.items() if spec.max_context is not None}
    for label, limit in limits.items():
        if study.context is not None and study.context > limit:
            raise SpecError(study.placed(f"context: {study.context} is over max_context {limit} of stacks.{label}"))
        for name, length in lengths.items():
            if said := too_long(length, limit):
                raise SpecError(study.placed(f"tasks.{name}: {said} of stacks.{label}"))
    return study.context or min([DEFAULT_CONTEXT, *limits.values()])


def _mixer_classes(spec: Spec) -> set[type]:
    return {entry_of(config).cls for layer in spec.layers for _, config in layer.mixers}


def _stack(label: str, spec: Spec, vocabularies: Mapping[str, int], lengths: Mapping[str, int], context: int) -> Stack:
    by_task = {name: replace(spec, name=label, vocab_size=size) for name, size in vocabularies.items()}
    accounts = {name: account(one, context=context) for name, one in by_task.items()}
    trained = {name: account(one, context=lengths[name]) for name, one in by_task.items()}
    first = next(iter(accounts.values()))
    return Stack(
        label=label,
        pattern=spec.pattern,
        family=_family(spec),
        attention=_attention(spec),
        kind=_kind(spec),
        ffn_width=None if spec.ffn.type == "none" else spec.ffn.hidden(spec.d_model),
        specs={name: one.to_dict() for name, one in by_task.items()},
        parameters={name: a.parameters for name, a in accounts.items()},
        train_flops={name: a.train_flops_per_token for name, a in trained.items()},
        decode_flops={name: a.decode_flops_per_token for name, a in accounts.items()},
        state_bytes=first.state_bytes,
        kv_bytes=first.kv_bytes,
    )


@functools.cache
def _keeps_keys(config: MixerConfig) -> bool:
    """Whether a mixer is attention, whoever wrote it: what it keeps grows with the context as keys and values."""
    with torch.device("meta"):
        return build_mixer(config).kv_bytes(64) > 0


def _attention(spec: Spec) -> float:
    # Mixers in parallel share their layer, so each counts for its part of it.
    shares = [sum(_keeps_keys(config) for _, config in layer.mixers) / len(layer.mixers) for layer in spec.layers]
    return sum(shares) / len(shares)


def _family(spec: Spec) -> str:
    names = dict.fromkeys(
        mixer_name(config) for layer in spec.layers for _, config in layer.mixers if not _keeps_keys(config)
    )
    return " + ".join(names) or "attention"


def _kind(spec: Spec) -> Kind:
    # What the task, the budget and the order of layers decide is not the stack's kind, nor is its name.
    chosen = {name: value for name, value in spec.to_dict().items() if name not in _NOT_OF_A_KIND}
    configs = {config for layer in spec.layers for _, config in layer.mixers}
    return Kind(
        # d_model is every mixer's, so it is among the rest.
        recurrent=_words(config for config in configs if not _keeps_keys(config)),
        attention=_words(config for config in configs if _keeps_keys(config)),
        rest={key: value for key, value in _flat(chosen).items() if key not in ("ffn.width", "ffn.expand")},
        parallel=any(len(layer.mixers) > 1 for layer in spec.layers),
    )


_NOT_OF_A_KIND = ("name", "layers", "mixers", "vocab_size")


def _words(configs: Iterable[MixerConfig]) -> dict[str, Any]:
    """The words of distinct mixers as one flat mapping, whatever order they come in."""
    entries: dict[str, dict[str, Any]] = {}
    for name, words in sorted(((entry_of(one).name, dataclasses.asdict(one)) for one in configs), key=json.dumps):
        place = name if name not in entries else f"{name} {len(entries) + 1}"
        entries[place] = {key: value for key, value in words.items() if key != "d_model"}
    return _flat(entries)


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        flat.update({f"{name}.{key}".rstrip("."): one for key, one in inner})
    return flat


def mixer_name(config: MixerConfig) -> str:
    """Return a mixer as a registry string: its name, and the gate flags that are not its defaults."""
    entry = entry_of(config)
    changed = [f"{flag}={getattr(config, flag)}" for flag in GATE_FLAGS if flag in entry.flags]
    defaults = [f"{flag}={entry.flags[flag].default}" for flag in GATE_FLAGS if flag in entry.flags]
    words = [word for word, default in zip(changed, defaults, strict=True) if word != default]
    return f"{entry.name}[{','.join(words)}]" if words else entry.name
