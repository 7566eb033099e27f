"""What the training of a study never brings into play: content gates without a second chunk, curves without points.

Such a stack trains without complaint, and would pass for one that shows what the word does. May import nothing above
studies; plan.py makes notes of it, limits.py says it in a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hybridzoo.architectures.spec import idle_content
from hybridzoo.studies.stack import Stack, trained_part
from hybridzoo.training import TrainConfig

MOST = 8  # names that a sentence lists


def idle_stacks(stacks: Iterable[Stack], longest: Mapping[str, int]) -> list[str]:
    """Say on which tasks the content gate of which stacks never acts, a sentence's middle for each.

    `longest` are the most tokens of a sequence in training, by task.
    """
    said = []
    each = list(stacks)
    for task, length in longest.items():
        idle = dict.fromkeys(stack.label for stack in each if _chunks(stack, task, length))
        chunks = sorted({chunk for stack in each for chunk in _chunks(stack, task, length)})
        if idle:
            sizes = " or ".join(f"{chunk:,}" for chunk in chunks)
            said.append(
                f"on {task}, whose sequences of training have at most {length:,} tokens, a content_chunk of {sizes} "
                f"has no second chunk, so the content gate never acts (it is a token gate): {'; '.join(some(idle))}"
            )
    return said


def _chunks(stack: Stack, task: str, length: int) -> set[int]:
    """The content chunks of a stack's mixers that hold the longest sequence whole."""
    words = [mixer for layer in trained_part(stack.specs[task])["layers"] for _, mixer in layer]
    return {chunk for mixer in words if (chunk := idle_content(mixer, length))}


def no_curves(configs: Mapping[str, TrainConfig]) -> list[str]:
    """Say of which tasks `eval_every`, though it is given, leaves no point of a learning curve before the last."""
    return [
        f"on {task}, train.eval_every {config.eval_every} is not below the {config.steps} steps: there is no learning "
        "curve, only the score at the end"
        for task, config in configs.items()
        if config.eval_every >= config.steps
    ]


def some(names: Iterable[str]) -> Sequence[str]:
    """Return names for a sentence: of very many the first, and how many more there are."""
    every = list(names)
    return [*every[:MOST], f"{len(every) - MOST} more"] if len(every) > MOST + 1 else every
