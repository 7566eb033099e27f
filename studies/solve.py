"""Bring a stack to a budget by the few sizes that may move, and say what moved, how close it came, or why it cannot.

`params` and `train_flops` are met by the width of the FFN. `inference_bytes` is met by the window of the attention
layers, then by their KV heads, then by the recurrent mixers' value head size; the width of the FFN then restores the
parameters. Every size moves in one direction, away from what was declared, and no further than it must. May import
architectures; plan.py calls `solve` once for each stack and budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hybridzoo.architectures import Spec, account
from hybridzoo.mixers import MixerConfig
from hybridzoo.mixers.attention import AttentionConfig
from hybridzoo.studies.equalise import Count, Equalised, distance, equalise, parameters, within
from hybridzoo.studies.memory import fit_memory, memory, value_size
from hybridzoo.studies.reach import some

# What stacks of a budget have equal; where nothing is, they are as declared.
BUDGET_WORDS = {
    "params": "parameters",
    "train_flops": "training FLOPs",
    "inference_bytes": "inference memory",
}
UNITS = {"params": "parameters", "train_flops": "training FLOPs a token", "inference_bytes": "bytes"}


@dataclass(frozen=True)
class Budget:
    """What stacks are made equal in: `count` is of any spec, at the task, the length or the context it is met at."""

    name: str
    count: Count
    context: int


@dataclass(frozen=True)
class Solved:
    """A spec at a budget: `said` is what moved and how close it came; `why`, where it cannot be met, what is wrong."""

    spec: Spec
    said: str = ""
    why: str = ""


def budget_of(name: str, vocabularies: Mapping[str, int], lengths: Mapping[str, int], context: int) -> Budget:
    """Return a budget of a study with such tasks.

    Vocabularies add the same to every stack, so relative differences are largest at the smallest: parameters are met
    there. Training FLOPs are met at the task of the longest sequences, where attention costs most.
    """
    smallest, longest = met_on("params", vocabularies, lengths), met_on("train_flops", vocabularies, lengths)

    def flops(spec: Spec) -> int:
        spec = replace(spec, vocab_size=vocabularies[longest])
        return account(spec, context=lengths[longest]).train_flops_per_token

    counts: dict[str, Count] = {
        "params": lambda spec: parameters(replace(spec, vocab_size=vocabularies[smallest])),
        "train_flops": flops,
        "inference_bytes": lambda spec: memory(spec, context),
    }
    return Budget(name, counts[name], context)


def met_on(budget: str, vocabularies: Mapping[str, int], lengths: Mapping[str, int]) -> str:
    """Return the task that a budget is met on; on the others stacks may differ by a little more.

    Of equal ones it is the first by name: a plan that is read back has its tasks in another order.
    """
    if budget == "train_flops":
        return max(sorted(lengths), key=lambda task: lengths[task])
    return min(sorted(vocabularies), key=lambda task: vocabularies[task])


def solve(spec: Spec, budget: Budget, target: int, tolerance: float, params: int | None = None) -> Solved:
    """Bring `spec` to `target` within `tolerance`, a share, by the sizes that this budget moves.

    For `inference_bytes`, the parameters are brought back to `params`, or to what they were.
    """
    if budget.name != "inference_bytes":
        met = equalise(spec, target, tolerance, budget.count)
        return _solved(spec, met, [_close(met.value, target, UNITS[budget.name])])
    fitted = fit_memory(spec, target, tolerance, budget.context)
    value = budget.count(fitted)
    said = _close(value, target, UNITS[budget.name])
    if not within(value, target, tolerance):
        changed = ", ".join(changes(spec, fitted)) or "no size of its mixers that could change it"
        return Solved(fitted, why=f"{said}, tolerance {100 * tolerance:g} %: the closest, by {changed}")
    goal = parameters(spec) if params is None else params
    met = equalise(fitted, goal, tolerance)
    solved = _solved(spec, met, [said, _close(met.value, goal, UNITS["params"])])
    if solved.why:
        moved = ", ".join(changes(spec, fitted))
        return replace(
            solved, why=f"the memory fits{f' by {moved}' if moved else ''}, not the parameters: {solved.why}"
        )
    return solved


def _solved(declared: Spec, met: Equalised, close: list[str]) -> Solved:
    moved = ", ".join(changes(declared, met.spec)) or "as declared"
    return Solved(met.spec, f"{moved}: {', '.join(close)}", met.why)


def _close(value: int, target: int, unit: str) -> str:
    return f"{value:,} {unit} against {target:,} ({distance(value, target)})"


def changes(declared: Spec, solved: Spec) -> list[str]:
    """Say what differs between a stack as declared and as solved: `window 512 -> 384`, `FFN 96 -> 101`."""
    pairs = dict.fromkeys(zip(_mixers(declared), _mixers(solved), strict=True))
    listed: list[str] = []
    for word, place in (("window", 0), ("KV heads", 1), ("value head size", 2)):
        moves = {
            label: f"{before or 'full'} -> {after}"
            for (label, old), (_, new) in pairs
            if (before := _sizes(old)[place]) != (after := _sizes(new)[place])
        }
        if len(set(moves.values())) == 1:
            listed.append(f"{word} {next(iter(moves.values()))}")
        else:
            listed += [f"{word} of {label} {move}" for label, move in moves.items()]
    widths = [one.ffn.hidden(one.d_model) for one in (declared, solved)]
    if declared.ffn.type != "none" and widths[0] != widths[1]:
        listed.append(f"FFN {widths[0]} -> {widths[1]}")
    return listed


def never_reached(solved: Mapping[str, Solved], lengths: Mapping[str, int]) -> list[str]:
    """Say where windows that met a budget are no shorter than a task's sequences in training, so change nothing there.

    `solved` are stacks by label, `lengths` tokens a sequence by task.
    """
    windows = {
        label: min(
            config.window for _, config in _mixers(one.spec) if isinstance(config, AttentionConfig) and config.window
        )
        for label, one in solved.items()
        if one.said.startswith("window ")
    }
    said = []
    for task, length in lengths.items():
        wide = [label for label, window in windows.items() if window >= length]
        if wide:
            said.append(
                f"on {task}, whose sequences of training have {length:,} tokens, windows as wide or wider change "
                f"nothing: {'; '.join(some(wide))}"
            )
    return said


def _mixers(spec: Spec) -> list[tuple[str, MixerConfig]]:
    return [mixer for layer in spec.layers for mixer in layer.mixers]


def _sizes(config: MixerConfig) -> tuple[int | None, int | None, int | None]:
    if isinstance(config, AttentionConfig):
        return config.window, config.kv_heads, None
    return None, None, value_size(config)
