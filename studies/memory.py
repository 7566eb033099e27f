"""The sizes that decide what a sequence keeps at inference, and the search for those that come to a given memory.

Windows of attention, KV heads, and the value head size of recurrent mixers, tried in this order. May import
architectures; solve.py asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from hybridzoo.architectures import Spec
from hybridzoo.mixers import MixerConfig, SpecError, build_mixer
from hybridzoo.mixers.attention import AttentionConfig
from hybridzoo.mixers.delta import DeltaConfig
from hybridzoo.mixers.mamba2 import Mamba2Config
from hybridzoo.studies.equalise import within

MIN_WINDOW = 2  # a window counts the token itself: one of 1 would mix nothing
MAX_VALUE_SIZE = 256  # the largest head that the kernels take

Change = Callable[[MixerConfig], MixerConfig]


def memory(spec: Spec, context: int) -> int:
    """Count the bytes that one sequence keeps after `context` tokens, as `account` does, of the mixers alone."""
    return sum(_bytes(config, context) for layer in spec.layers for _, config in layer.mixers)


@functools.lru_cache(maxsize=4096)
def _bytes(config: MixerConfig, context: int) -> int:
    with torch.device("meta"):
        return build_mixer(config).state_bytes(context)


def fit_memory(spec: Spec, target: int, tolerance: float, context: int) -> Spec:
    """Return `spec` with the sizes that come within `tolerance` of `target` bytes after `context` tokens.

    Of those that do, the first in this order: as declared; another window; fewer or more KV heads, with the window that
    suits them; another value head size, with both. Where none does, that which comes closest.
    """
    best = spec
    if within(memory(spec, context), target, tolerance):
        return spec
    for sizes in _in_order(spec, fewer=memory(spec, context) > target):
        one = _best_window(sizes, spec, target, context)
        if abs(memory(one, context) - target) < abs(memory(best, context) - target):
            best = one
        if within(memory(best, context), target, tolerance):
            break
    return best


def _in_order(spec: Spec, fewer: bool) -> Iterator[Spec]:
    """The sizes to try, apart from windows, the least change first."""
    yield spec
    yield from _kv_heads(spec, fewer)
    for sizes in _value_sizes(spec, fewer):
        yield sizes
        yield from _kv_heads(sizes, fewer)


def with_mixers(spec: Spec, change: Change) -> Spec:
    """Return `spec` with `change` made to every mixer that stands in a layer."""
    used = {label: config for layer in spec.layers for label, config in layer.mixers}
    new = {label: change(config) for label, config in used.items()}
    layers = tuple(
        replace(layer, mixers=tuple((label, new[label]) for label, _ in layer.mixers)) for layer in spec.layers
    )
    return replace(spec, layers=layers, mixers={**spec.mixers, **new})


def window_of(config: MixerConfig) -> int | None:
    """How many tokens a mixer's attention sees; None for all of them, and for other mixers."""
    return config.window if isinstance(config, AttentionConfig) else None


def _best_window(sizes: Spec, declared: Spec, target: int, context: int) -> Spec:
    """Return `sizes` with the window that comes closest to `target`, where that is what the windows are for."""
    seen = [
        min(context, window_of(config) or context)
        for layer in sizes.layers
        for _, config in layer.mixers
        if isinstance(config, AttentionConfig)
    ]
    fewer = memory(declared, context) > target
    if not seen or memory(declared, context) == target:
        return sizes

    def at(window: int) -> Spec:
        # Full attention comes down first, so that at any place no window has become the wider for it.
        def change(config: MixerConfig) -> MixerConfig:
            if not isinstance(config, AttentionConfig):
                return config
            now = min(context, config.window or context)
            new = min(now, window) if fewer else max(now, window)
            return config if new == now else replace(config, window=new)

        return with_mixers(sizes, change)

    low, high = (min(MIN_WINDOW, *seen), max(seen)) if fewer else (min(seen), context)
    if memory(at(low), context) >= target:
        return at(low)
    if memory(at(high), context) <= target:
        return at(high)
    while high - low > 1:
        middle = (low + high) // 2
        if memory(at(middle), context) < target:
            low = middle
        else:
            high = middle
    return min(at(low), at(high), key=lambda one: abs(memory(one, context) - target))


def _kv_heads(spec: Spec, fewer: bool) -> Iterator[Spec]:
    """`spec` with one step fewer (or more) KV heads, two steps, and so on: they divide the query heads."""

    def steps(config: MixerConfig) -> list[int]:
        if not isinstance(config, AttentionConfig):
            return []
        divisors = [n for n in range(1, config.n_heads + 1) if config.n_heads % n == 0]
        below = [n for n in divisors if n < config.kv_heads]
        return below[::-1] if fewer else [n for n in divisors if n > config.kv_heads]

    longest = max(len(steps(config)) for layer in spec.layers for _, config in layer.mixers)
    for taken in range(longest):

        def change(config: MixerConfig, taken: int = taken) -> MixerConfig:
            options = steps(config)
            if not options or not isinstance(config, AttentionConfig):
                return config
            return replace(config, n_kv_heads=options[min(taken, len(options) - 1)])

        yield with_mixers(spec, change)


def value_size(config: MixerConfig) -> int | None:
    """The value head size of a recurrent mixer whose size may move: V of `DeltaConfig` and of `Mamba2Config`."""
    if isinstance(config, DeltaConfig):
        return config.V
    return config.inner // config.heads if isinstance(config, Mamba2Config) else None


def _with_value_size(config: MixerConfig, size: int) -> MixerConfig:
    if isinstance(config, DeltaConfig):
        return replace(config, head_v_dim=size)
    if isinstance(config, Mamba2Config):  # as many heads; what they come to together is no longer `expand`'s to say
        return replace(config, n_heads=config.heads, head_dim=size, expand=None)
    return config


def _value_sizes(spec: Spec, fewer: bool) -> Iterator[Spec]:
    """`spec` with other value head sizes, the nearest first; several mixers keep their proportion.

    First those that keep the roundness of the declared size (a multiple of 16, say, which the fused kernels need),
    then the others.
    """
    sizes = [size for layer in spec.layers for _, config in layer.mixers if (size := value_size(config))]
    if not sizes:
        return
    largest = max(sizes)
    grain = next(step for step in (16, 8, 4, 2, 1) if largest % step == 0)
    options = range(largest - 1, 0, -1) if fewer else range(largest + 1, MAX_VALUE_SIZE + 1)
    for option in sorted(options, key=lambda size: size % grain != 0):  # stable: each part stays in its order

        def change(config: MixerConfig, option: int = option) -> MixerConfig:
            size = value_size(config)
            new = size and max(1, round(size * option / largest))
            return config if not new or new == size else _with_value_size(config, new)

        try:
            yield with_mixers(spec, change)
        except SpecError:  # sizes that do not go together: groups of a norm, say
            continue
