"""How a token is chosen from logits, and what ends a continuation: the words of generation that are not its prompts.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridzoo.mixers.arguments import real, whole

Decode = Callable[[list[int]], str]

# Characters that text shows at most in place of one that it begins within, as of UTF-8 in bytes: three go on after the
# first.
_BROKEN = 3

_SEEDS = -(2**63), 2**64 - 1  # those that torch's generators take
_MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest; above, tokens come from `softmax(logits / temperature)`.

    top_k: of exactly this many likeliest tokens; of equals the lower ids are taken.
    top_p: of the fewest likeliest that hold this much of the probability (arXiv 1904.09751), of equals the lower ids.
    min_p: of those at least this share as probable as the likeliest (arXiv 2407.01082).
    seed: makes the draw repeatable; None draws from torch's global generator.

    Raises: `TypeError` for words that are not numbers, `ValueError` for words out of range or that do not go together.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        # All that could fail is asked here: a step that draws is shared with other requests.
        likeliest = "0 (the likeliest token) or above"
        temperature = real("temperature", self.temperature, likeliest)
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be {likeliest}, got {temperature}")
        object.__setattr__(self, "temperature", temperature)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole("top_k", self.top_k, 1))
        for name, given in (("top_p", self.top_p), ("min_p", self.min_p)):
            if given is not None:
                share = real(name, given, "above 0 and at most 1")
                if not 0 < share <= 1:
                    raise ValueError(f"{name} must be above 0 and at most 1, got {share}")
                object.__setattr__(self, name, share)
        if self.seed is not None:
            object.__setattr__(self, "seed", whole("seed", self.seed, *_SEEDS))
        if temperature == 0 and not self.top_k is self.top_p is self.min_p is None:
            raise ValueError("top_k, top_p and min_p choose among drawn tokens: give a temperature above 0 with them")

    @staticmethod
    def of(given: Sampling | None) -> Sampling:
        """Return what a caller gave, the default for None. Raises `TypeError` for anything but a `Sampling`."""
        if given is not None and not isinstance(given, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {given!r}; Sampling(temperature=0.8) is one")
        return given or Sampling()


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What ends a continuation besides its length: the token `eos`, or a string of `stop` in its text.

    stop: a string, or several.
    decode: makes text of tokens; stop strings need it. What ends a continuation belongs to it.

    Raises: `TypeError` for words of another kind, `ValueError` for an `eos` below 0, an empty stop string, and stop
    strings without `decode`. Where `decode` gives no string, `ends` raises `TypeError`.
    """

    eos: int | None = None
    stop: str | Sequence[str] | None = ()  # once made, a tuple
    decode: Decode | None = None

    def __post_init__(self) -> None:
        if self.eos is not None:
            object.__setattr__(self, "eos", whole("eos", self.eos, 0))
        says = f"stop must be a string or several, each of at least one character, got {self.stop!r}"
        given = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(given, Iterable):
            raise TypeError(says)
        stop = tuple(given)
        if not all(isinstance(text, str) for text in stop):
            raise TypeError(says)
        if not all(stop):
            raise ValueError(says)
        object.__setattr__(self, "stop", stop)
        wanted = "a function from a list of tokens to their text"
        if self.decode is not None and not callable(self.decode):
            raise TypeError(f"decode must be {wanted}, got {self.decode!r}")
        if stop and self.decode is None:
            raise ValueError(f"stop strings need decode, {wanted}")

    @staticmethod
    def of(given: Ending | None) -> Ending:
        """Return what a caller gave, the default for None. Raises `TypeError` for anything but an `Ending`."""
        if given is not None and not isinstance(given, Ending):
            raise TypeError(f"ending must be an Ending, got {given!r}; Ending(eos=0) is one")
        return given or Ending()

    def check(self, vocab_size: int) -> None:
        """Raise `ValueError` for an `eos` out of range."""
        if self.eos is not None and not 0 <= self.eos < vocab_size:
            raise ValueError(f"eos must lie in 0 to {vocab_size - 1} (vocab_size - 1), got {self.eos}")

    def ends(self, new: list[int]) -> bool:
        """Whether a continuation ends with its last token."""
        if self.eos is not None and new[-1] == self.eos:
            return True
        return self.stopped(new)

    def stopped(self, new: list[int]) -> bool:
        """Whether a stop string stands at the end of a continuation's text."""
        if not self.stop:
            return False
        # The last token completes a stop string or none does, so that it begins no further before that token's text
        # than the longest is long. Tokens without any text, as special ones are, do not count.
        longest = max(map(len, self.stop))
        count = longest + 1 + _BROKEN
        while True:
            text = self._text(new[-count:])
            if any(stop in text for stop in self.stop):
                return True
            if count >= len(new) or len(text) >= longest + len(self._text(new[-1:])) + _BROKEN:
                return False
            count *= 2

    def _text(self, tokens: list[int]) -> str:
        assert self.decode is not None
        text = self.decode(tokens)
        if not isinstance(text, str):
            raise TypeError(f"decode must return the text of its tokens, a str, got {text!r}")
        return text


class Picker:
    """Chooses a token for each row of logits `[N, V]`; -1 for a row whose logits are not finite.

    rows: N. With a seed each row has a generator of its own, made of the seed and the row's number, so that what a row
        draws does not depend on the others; row 0's is that of the seed itself.
    """

    def __init__(self, sampling: Sampling, device: torch.device, rows: int = 1) -> None:
        self.sampling = sampling
        self.generators: list[torch.Generator] | None = None
        if sampling.temperature and (seed := sampling.seed) is not None:
            seeds = [seed, *((seed ^ _mixed(row)) & _MASK for row in range(1, rows))]
            self.generators = [torch.Generator(device).manual_seed(each) for each in seeds]

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        # Looked at on the device, for a draw among NaNs would be of any token; the host sees -1 when it reads.
        finite = torch.isfinite(logits).all(-1)
        tokens = self._pick(logits.masked_fill(~finite[:, None], 0))
        return tokens.masked_fill(~finite, -1)

    def _pick(self, logits: Tensor) -> Tensor:
        s = self.sampling
        if s.temperature == 0:
            return logits.argmax(-1)
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        # Below the largest, so that what overflows is -inf; and by what has an inverse in float32.
        logits = (logits - logits.amax(-1, keepdim=True)).float()
        if s.top_k is not None and s.top_k < logits.shape[-1]:
            logits = logits.masked_fill(~_largest(logits, s.top_k), -torch.inf)
        probability = (logits / min(max(s.temperature, _FLOAT.tiny), _FLOAT.max)).softmax(-1)
        if s.top_p is not None and s.top_p < 1:
            ranked, order = probability.sort(dim=-1, descending=True, stable=True)
            # A token stays where those likelier than it hold less than top_p; the likeliest always does, however small
            # top_p is in float32.
            kept = ranked.cumsum(-1) - ranked < s.top_p
            kept[:, 0] = True
            probability = probability.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), 0)
        if s.min_p is not None:
            probability = probability.masked_fill(probability < s.min_p * probability.amax(-1, keepdim=True), 0)
        return self._draw(probability)

    def _draw(self, probability: Tensor) -> Tensor:
        """A token of each row, in proportion: of exponential times, each at its rate, the first.

        So does `torch.multinomial` draw one of a row, but by one generator for all of them.
        """
        times = torch.empty_like(probability)
        if self.generators is None:
            times.exponential_()
        else:
            for row, generator in zip(times, self.generators, strict=True):
                row.exponential_(generator=generator)
        return (probability / times).argmax(-1)


_FLOAT = torch.finfo(torch.float32)


def _largest(x: Tensor, k: int) -> Tensor:
    """Where the k largest of each row `[N, V]` are, of equals those that come first."""
    smallest = x.topk(k).values[:, -1:]
    above, equal = x > smallest, x == smallest
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _mixed(x: int) -> int:
    """Scatter a number over 64 bits, for seeds that no row shares with that of a near seed (SplitMix64's finish)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
