"""From a study to its trials: every stack resolved, brought to the budget, counted, and crossed with tasks and seeds.

May import architectures and training. A plan is saved with the results, so that a report needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hybridzoo.architectures import Spec
from hybridzoo.architectures.account import DEFAULT_CONTEXT
from hybridzoo.architectures.loader import load_spec, override_name, spec_from
from hybridzoo.mixers import list_mixers
from hybridzoo.mixers.schema import SpecError, nearest, unknown
from hybridzoo.mixers.user_code import import_user_code
from hybridzoo.studies.code import code_digest
from hybridzoo.studies.entries import Entry, listed_once
from hybridzoo.studies.hybrids import AXES
from hybridzoo.studies.reach import idle_stacks, no_curves
from hybridzoo.studies.results import content_key
from hybridzoo.studies.solve import BUDGET_WORDS, Budget, Solved, budget_of, met_on, never_reached, solve
from hybridzoo.studies.stack import Kind, Stack, keeps_keys, make_stack, mixer_classes, trained_part
from hybridzoo.studies.study import Crossing, Study
from hybridzoo.studies.tasks import Shown, StudyTask, build_task
from hybridzoo.studies.trial import Trial
from hybridzoo.training import TrainConfig

_SAMPLES = 16  # batches that are drawn to count the tokens of a trial


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study made concrete.

    `budgets` are what stacks are made equal in, `("",)` where nothing is; each has stacks and trials of its own, and
    they follow each other. `targets` are what each is equal to, and `excluded` the stacks that cannot meet one: budget,
    label, and why. `lengths` are tokens a sequence in training, by task (at its end, where a curriculum changes them),
    and `longest` the most that one has. `notes` are for whoever starts the run, and so are `repeats`: what is listed or
    trained once, a sentence for each stack. `tokens` are those that one trial of each task trains on.
    """

    study: dict[str, Any]
    budgets: tuple[str, ...]
    targets: dict[str, int]
    lengths: dict[str, int]
    stacks: tuple[Stack, ...]
    excluded: tuple[tuple[str, str, str], ...]
    shown: dict[str, Shown]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    tokens: dict[str, int] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)

    def of_budget(self, budget: str) -> tuple[Stack, ...]:
        """The stacks that were made equal in `budget`, in the study's order."""
        return tuple(stack for stack in self.stacks if stack.budget == budget)

    def at(self, budget: str) -> Plan:
        """The part of the plan that is of one budget: stacks of different budgets are not for comparing."""
        if budget not in self.budgets:
            raise ValueError(f"no budget '{budget}' in this study, which has: {', '.join(self.budgets) or 'none'}")
        return replace(
            self,
            budgets=(budget,),
            targets={name: target for name, target in self.targets.items() if name == budget},
            stacks=self.of_budget(budget),
            excluded=tuple(left_out for left_out in self.excluded if left_out[0] == budget),
            trials=tuple(trial for trial in self.trials if trial.budget == budget),
        )

    @property
    def distinct(self) -> tuple[Trial, ...]:
        """The trials to run: where an equal spec stands under several budgets, only the first of them."""
        first: dict[str, Trial] = {}
        for trial in self.trials:
            first.setdefault(trial.key, trial)
        return tuple(first.values())

    def titles(self, trials: Sequence[Trial]) -> dict[str, str]:
        """Return a title for each of these trials or pilots of the plan, by its key.

        The budget is in it where the study has several; where trials would share one, their learning rates tell them
        apart.
        """
        several = len(self.budgets) > 1
        named = [f"{trial.title} · {trial.budget}" if several else trial.title for trial in trials]
        count = Counter(named)
        return {
            trial.key: title if count[title] == 1 else f"{title} · lr {trial.train['lr']:g}"
            for trial, title in zip(trials, named, strict=True)
        }

    def flops(self, trial: Trial) -> int:
        """The FLOPs of a trial's whole training, forward and backward, at its sequences' final length."""
        of = {(stack.budget, stack.label): stack for stack in self.stacks}
        return of[trial.budget, trial.stack].train_flops[trial.task] * self.tokens[trial.task]

    @property
    def met_on(self) -> dict[str, str]:
        """The task that each budget is met on: on the others, stacks may be a little further apart."""
        sizes = {task: self.stacks[0].parameters[task] for task in self.shown}  # apart by the vocabulary alone
        return {budget: met_on(budget, sizes, self.lengths) for budget in self.budgets}

    def held(self, stack: Stack) -> int:
        """What a stack comes to in what its budget holds equal; its parameters, where nothing is."""
        task = self.met_on[stack.budget]
        if stack.budget == "inference_bytes":
            return stack.state_bytes
        return stack.train_flops[task] if stack.budget == "train_flops" else stack.parameters[task]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read back what `to_dict` gave; `KeyError` or `TypeError` for anything else."""
        return cls(
            study=dict(data["study"]),
            budgets=tuple(data["budgets"]),
            targets=dict(data["targets"]),
            lengths=dict(data["lengths"]),
            stacks=tuple(Stack(**{**stack, "kind": Kind(**stack["kind"])}) for stack in data["stacks"]),
            excluded=tuple((budget, label, why) for budget, label, why in data["excluded"]),
            shown={label: Shown.from_dict(shown) for label, shown in data["shown"].items()},
            trials=tuple(Trial(**trial) for trial in data["trials"]),
            notes=tuple(data.get("notes", ())),
            repeats=tuple(data.get("repeats", ())),
            tokens=dict(data.get("tokens", {})),
            longest=dict(data.get("longest", {})),
        )


def listed_stacks(study: Study) -> list[str]:
    """Return the labels of what a study compares, each stack once; those that miss a budget are still among them."""
    vocabulary = 256  # of any size: what is alike is so with every one
    declared, _ = listed_once(study.crossings, {label: _resolve(study, label, vocabulary) for label in study.stacks})
    return list(declared)


def make_plan(study: Study, imports: Sequence[str] = ()) -> Plan:
    """Resolve every stack, meet each budget, and list the trials, seeds outermost so that an early stop leaves pairs.

    `imports` are the modules or files of a user's own code: imported where they are not, and part of every trial's key.

    Raises: `SpecError` naming the study, the stack and the key, for a stack that cannot be built or a budget that none
    can meet.
    """
    own = [import_user_code(name) for name in imports]
    tasks = {label: build_task(entry.task, f"tasks.{label}") for label, entry in study.tasks.items()}
    vocabularies = {name: task.vocab_size for name, task in tasks.items()}
    lengths = {name: trained_length(task, study.tasks[name].train) for name, task in tasks.items()}
    resolved = {label: _resolve(study, label, min(vocabularies.values())) for label in study.stacks}
    context = _context(study, resolved, lengths)
    declared, repeats = listed_once(study.crossings, resolved)
    budgets = [budget_of(name, vocabularies, lengths, context) for name in (study.hold.asked if study.hold else ())]
    held = _hold(study, declared, budgets)
    stacks = tuple(
        make_stack(
            *(label, solved.spec, declared[label].spec, vocabularies, lengths, context),
            budget=budget,
            solved=solved.said,
            placement=declared[label].crossing.placement,
        )
        for budget, met in held.stacks.items()
        for label, solved in met.items()
    )
    code = {
        (label, name): code_digest([*mixer_classes(entry.spec), type(task)], own)
        for label, entry in declared.items()
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
            train=dataclasses.asdict(replace(entry.train, seed=seed).resolved()),
            parameters=stack.parameters[name],
            code=code[stack.label, name],
            budget=stack.budget,
        )
        for seed in study.seeds
        for name, entry in study.tasks.items()
        for stack in stacks
    )
    _check_scored(study, stacks, tasks)
    configs = {name: entry.train for name, entry in study.tasks.items()}
    sizes = {name: trained_sizes(task, configs[name]) for name, task in tasks.items()}
    longest = {name: length for name, (_, length) in sizes.items()}
    shown = {name: task.shown for name, task in tasks.items()}
    plan = Plan(
        study={**study.to_dict(), "context": context},
        budgets=tuple(held.stacks),
        targets=held.targets,
        lengths=lengths,
        stacks=stacks,
        excluded=held.excluded,
        shown=shown,
        trials=trials,
        notes=(*_unreached(held, lengths), *idle_stacks(stacks, longest), *no_curves(configs)),
        repeats=(*repeats, *_made_equal(held)),
        tokens={name: tokens for name, (tokens, _) in sizes.items()},
        longest=longest,
    )
    # Through JSON once: what workers are given is then exactly what a later run reads from the disk, tuples and all.
    return Plan.from_dict(json.loads(json.dumps(plan.to_dict())))


def _resolve(study: Study, label: str, vocab_size: int) -> Spec:
    overrides = [*_own_words(study, label).values(), f"vocab_size={vocab_size}"]
    try:
        if isinstance(study.spec, str):
            spec = load_spec(_found(study.spec, study.folder), overrides)
        else:
            spec = spec_from(study.spec, overrides, "spec", study.folder)
    except SpecError as error:
        raise SpecError(study.placed(_in_the_study(study, label, str(error)))) from None
    if said := _wrong_roles(spec, study.crossings[label]):
        raise SpecError(study.placed(said))
    return spec


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
            told = said.removeprefix(f"{path}: ").removeprefix(f"{outer}: ")
            if told.startswith(f"unknown key '{path}'"):  # of a spec; an axis may have been meant
                told = f"{told}; of hybrids: {', '.join(AXES)}{nearest(path, AXES)}"
            return f"axes.{path}: {told}"
        if said != message and crossing.hybrid and path == "layers":
            return f"stacks.{crossing.declared}.hybrid{_of_a_hybrid(said, *crossing.hybrid)}"
        if said != message:
            return f"stacks.{crossing.declared}{': ' if said.startswith('unknown ') else '.'}{said}"
    # What is wrong with the base is wrong with every stack; naming one of them would mislead.
    return message if message.startswith("spec") else f"spec: {message}"


def _of_a_hybrid(said: str, recurrent: str, attention: str) -> str:
    """Put what is wrong with `layers`, which a hybrid's writer never saw, on the word that it is about."""
    about = re.match(r"layers: (?:column \d+: )?(.*)", said)
    line = about[1] if about else said
    for word, name in (("recurrent", recurrent), ("attention", attention)):
        if line.startswith((f"{name}: ", f"unknown mixer '{name}'")):
            return f".{word}: {line}"
    return f": {said}"


def _wrong_roles(spec: Spec, crossing: Crossing) -> str:
    """Say what is wrong with the two mixers of a hybrid that its layers do not show; nothing where all is well.

    One that no layer has, at a ratio of 0 or 1, may not exist; and the two may be the wrong way round, so that the
    ratio would count layers without attention. Two of one kind are a hybrid too: attention with and without a window.
    """
    if crossing.hybrid is None:
        return ""
    where, (recurrent, attention) = f"stacks.{crossing.declared}.hybrid", crossing.hybrid
    there = dict.fromkeys([*spec.mixers, *(entry.name for entry in list_mixers())])
    for word, name in (("recurrent", recurrent), ("attention", attention)):
        if name not in spec.mixers and name.partition("[")[0] not in there:
            return str(unknown(f"{where}.{word}", "mixer", name, there))
    first, second = spec.mixers.get(recurrent), spec.mixers.get(attention)
    if first is None or second is None or not keeps_keys(first) or keeps_keys(second):
        return ""
    return (
        f"{where}: recurrent is '{recurrent}', which is softmax attention, and attention is '{attention}', which is "
        f"not: are the two swapped? Right would be recurrent: {attention}, attention: {recurrent}"
    )


def _found(name: str, folder: Path) -> str:
    beside = folder / name
    return str(beside) if name.endswith((".yaml", ".yml")) and beside.exists() else name


@dataclass(frozen=True)
class _Held:
    """What came of the budgets: of each the stacks that meet it, by label, and its target; and the stacks left out."""

    stacks: dict[str, dict[str, Solved]]
    targets: dict[str, int]
    excluded: tuple[tuple[str, str, str], ...]


def _hold(study: Study, entries: Mapping[str, Entry], budgets: Sequence[Budget]) -> _Held:
    """Bring every stack to every budget, each from its spec as declared."""
    if study.hold is None:
        return _Held({"": {label: Solved(entry.spec) for label, entry in entries.items()}}, {}, ())
    stacks: dict[str, dict[str, Solved]] = {}
    targets: dict[str, int] = {}
    excluded: list[tuple[str, str, str]] = []
    for budget in budgets:
        target = study.hold.asked[budget.name]
        if isinstance(target, str):
            counts = [budget.count(entry.spec) for entry in entries.values()]
            target = max(counts) if target == "largest" else min(counts)
        targets[budget.name] = target
        solved = {
            label: solve(entry.spec, budget, target, study.hold.tolerance, targets.get("params"))
            for label, entry in entries.items()
        }
        stacks[budget.name] = {label: one for label, one in solved.items() if not one.why}
        left_out = [(label, one.why) for label, one in solved.items() if one.why]
        excluded += [(budget.name, label, why) for label, why in left_out]
        if not stacks[budget.name]:
            listed = "; ".join(f"{label}: {why}" for label, why in left_out)
            raise SpecError(study.placed(f"hold.{budget.name}: no stack can meet the budget ({listed})"))
    return _Held(stacks, targets, tuple(excluded))


def _made_equal(held: _Held) -> list[str]:
    """Name the stacks that a budget made equal: by a window that was varied, say."""
    said: list[str] = []
    for budget, solved in held.stacks.items():
        groups: dict[str, list[str]] = {}
        for label, one in solved.items():
            groups.setdefault(content_key(trained_part(one.spec.to_dict())), []).append(label)
        found = [f"one stack, trained once: {'; '.join(same)}" for same in groups.values() if len(same) > 1]
        said += [f"at equal {BUDGET_WORDS[budget]}, {what}" for what in found if budget]
    return said


def _unreached(held: _Held, lengths: Mapping[str, int]) -> list[str]:
    """Name the stacks that meet a memory by windows which no task reaches."""
    solved = held.stacks.get("inference_bytes", {})
    return [f"at equal {BUDGET_WORDS['inference_bytes']}, {what}" for what in never_reached(solved, lengths)]


def _check_scored(study: Study, stacks: Sequence[Stack], tasks: Mapping[str, StudyTask]) -> None:
    """Refuse levels that a stack takes no sequences of: else they would be found at the end of its training."""
    for name, task in tasks.items():
        for stack in stacks:
            if said := too_long(task.longest, stack.specs[name].get("max_context")):
                raise SpecError(study.placed(f"tasks.{name}: at its hardest level {said} of stacks.{stack.label}"))


def trained_length(task: StudyTask, config: TrainConfig) -> int:
    """Return the tokens of a sequence at the end of the training, where a curriculum is over."""
    return task.batch(config.steps - 1, 1, torch.Generator().manual_seed(0)).ids.shape[1]


def trained_sizes(task: StudyTask, config: TrainConfig) -> tuple[int, int]:
    """Return the tokens that a trial trains on, and the most that one of its sequences has.

    Exact where all batches are of one size, else from an even sample of them, the first and the last among it.
    """
    steps = sorted({round(i * (config.steps - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)})
    generator = torch.Generator().manual_seed(0)
    drawn = [task.batch(step, config.batch_size, generator).ids for step in steps]
    tokens = round(config.steps * sum(ids.numel() for ids in drawn) / len(drawn))
    return tokens, max(ids.shape[1] for ids in drawn)


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
