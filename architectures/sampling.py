"""How a token is chosen from logits, and what ends a continuation: the words of generation that are not its prompts.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Decode = Callable[[list[int]], str]

# Tokens of a character at most, as of UTF-8 in bytes: how far back a stop string may begin.
_TOKENS_A_CHARACTER = 4


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest; above, tokens come from `softmax(logits / temperature)`.

    top_k: of this many likeliest tokens.
    top_p: of the fewest likeliest that hold this much of the probability (arXiv 1904.09751).
    min_p: of those at least this share as probable as the likeliest (arXiv 2407.01082).
    seed: makes the draw repeatable; None draws from torch's global generator.

    Raises: `ValueError` for words out of range or that do not go together.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (the likeliest token) or above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share}")
        if self.temperature == 0 and not self.top_k is self.top_p is self.min_p is None:
            raise ValueError("top_k, top_p and min_p choose among drawn tokens: give a temperature above 0 with them")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What ends a continuation besides its length: the token `eos`, or one of the strings `stop` in its text.

    decode: makes text of tokens; stop strings need it. What ends a continuation belongs to it.

    Raises: `ValueError` for an empty stop string, and for stop strings without `decode`.
    """

    eos: int | None = None
    stop: tuple[str, ...] = ()
    decode: Decode | None = None

    def __post_init__(self) -> None:
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError(f"stop must be strings of at least one character, got {list(self.stop)!r}")
        if self.stop and self.decode is None:
            raise ValueError("stop strings need decode, a function from a list of tokens to their text")

    @staticmethod
    def of(eos: int | None, stop: str | Sequence[str] | None, decode: Decode | None) -> Ending:
        """Build one; a single stop string may stand by itself."""
        return Ending(eos=eos, stop=(stop,) if isinstance(stop, str) else tuple(stop or ()), decode=decode)

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
        if not self.stop or self.decode is None:
            return False
        # The last token completes a stop string or none does; only so much text can take part in it.
        text = self.decode(new[-_TOKENS_A_CHARACTER * (max(map(len, self.stop)) + 1) :])
        return any(stop in text for stop in self.stop)


class Picker:
    """Chooses a token for each row of logits `[N, V]`; -1 for a row whose logits are not finite."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        seed = sampling.seed
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        # Looked at on the device, where a NaN would end the process in multinomial; the host sees -1 when it reads.
        finite = torch.isfinite(logits).all(-1)
        tokens = self._pick(logits.masked_fill(~finite[:, None], 0))
        return tokens.masked_fill(~finite, -1)

    def _pick(self, logits: Tensor) -> Tensor:
        s = self.sampling
        if s.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / s.temperature
        if s.top_k is not None and s.top_k < logits.shape[-1]:
            smallest = logits.topk(s.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if s.top_p is not None:
            ranked, order = logits.softmax(-1).sort(-1, descending=True)
            # A token stays where those likelier than it hold less than top_p: the likeliest always does.
            kept = ranked.cumsum(-1) - ranked < s.top_p
            logits = logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -torch.inf)
        probability = F.softmax(logits, -1)
        if s.min_p is not None:
            probability = probability.masked_fill(probability < s.min_p * probability.amax(-1, keepdim=True), 0)
        return torch.multinomial(probability, 1, generator=self.generator)[:, 0]
