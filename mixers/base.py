"""What every token mixer is: a frozen config of words, a module built from it, and its cost beside it.

May import kernels. A recurrent mixer is a row of flags (presets.py over delta.py); attention and Mamba-2 have files of
their own; registry.py names them all.

Shapes: B batch, T time, N sequences (B, or the number packed into one row).
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hybridzoo.kernels.state import DeltaState
from hybridzoo.mixers.caches import FixedCache, StateCache
from hybridzoo.mixers.schema import SpecError, convert, hints_of

State: TypeAlias = Any  # a NamedTuple of tensors, one kind a mixer; torch's pytrees see through it


class RecurrentState(NamedTuple):
    """The state of a mixer over the gated delta rule.

    `conv`: the tails `[N, channels, W-1]` of its short convolutions, or none; `delta`: the recurrence's own; `length
    [N]` int32: tokens seen.
    """

    conv: tuple[Tensor, ...]
    delta: DeltaState
    length: Tensor


class HeldState(RecurrentState):
    """The same, in a cache: on a GPU a step of one token writes `delta` in place, so that it is moved once."""

    def written_in_place(self, x: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether a call on `x [B, T, ...]` may write into `delta`, for good. On a CPU calls are checked first."""
        return x.is_cuda and x.shape[1] == 1 and cu_seqlens is None


def check_recurrent_state(state: object, n: int, n_tails: int) -> None:
    """Refuse a state of another kind of mixer or batch; the tails and the recurrence check their own shapes."""
    if not isinstance(state, RecurrentState):
        raise ValueError(f"expected a RecurrentState, got {type(state).__name__}: another mixer's state")
    if len(state.conv) != n_tails:
        raise ValueError(f"state.conv must hold {n_tails} convolution tails, got {len(state.conv)}")
    if tuple(state.length.shape) != (n,):
        raise ValueError(f"state.length must be [N] = [{n}], got {list(state.length.shape)}")
    if state.length.dtype != torch.int32:
        raise TypeError(f"state.length must be int32, got {state.length.dtype}")


# What a word means stands in its type and nowhere else: `hybridzoo list NAME` and docs/mixers.md print it from here.
ConvInit: TypeAlias = Annotated[
    Literal["default", "mean"], "how the convolution's taps start: as nn.Conv1d draws them, or near a running mean"
]
QkInit: TypeAlias = Annotated[
    Literal["independent", "equal"], "equal: the projection of k starts as that of q (in Mamba-2 B as C)"
]
RuleBackend: TypeAlias = Annotated[
    Literal["auto", "triton", "torch", "reference"],
    "what computes the recurrence; auto: Triton on a GPU, else chunkwise PyTorch",
]


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The words every mixer takes. Subclasses add their own; `__post_init__` refuses what cannot be built.

    A word that is `Annotated[type, "meaning"]` is listed with its meaning, also by mixers that declare it again.
    """

    d_model: Annotated[int, "width of what goes in and comes out; in a spec the spec's own"]

    def __post_init__(self) -> None:
        require_positive(self, "d_model")

    @property
    def resolved(self) -> dict[str, Any]:
        """Words that may be left out because others give them, with what they come to."""
        return {}

    @property
    def caveat(self) -> str | None:
        """What a user should know before training this choice of words, if anything."""
        return None


def require_positive(config: MixerConfig, *names: str) -> None:
    """Raise `SpecError` for a named size that is set and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise SpecError(f".{name}: must be at least 1, got {value}")


def require_above_zero(config: MixerConfig, *names: str) -> None:
    """Raise `SpecError` for a named number that is set and not finite or not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise SpecError(f".{name}: must be a finite number above 0, got {value}")


class TokenMixer(nn.Module):
    """A causal map of `x [B, T, d_model]` to `y` of the same shape, with a state that lets a sequence be split.

    Built from words (`Carve(d_model=256, n_heads=4, head_dim=64)`) or from a ready `Config`. A subclass declares a
    frozen dataclass `Config` and fills in `_build`, `reset_parameters`, `forward`, `init_state` and the three costs.

    Raises: `SpecError` for an unknown word, a wrong type, or sizes that do not fit together.
    """

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    registry_name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not dataclasses.is_dataclass(cls.Config):
            raise TypeError(f"{cls.__qualname__}.Config must be a frozen dataclass extending MixerConfig")
        hints = hints_of(cls.Config)
        parameters = [
            inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
            *(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                    annotation=hints[field.name],
                )
                for field in dataclasses.fields(cls.Config)
            ),
        ]
        # The words are checked strictly against Config, so help() and editors should show them, not **words.
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def __init__(self, config: MixerConfig | None = None, **words: Any) -> None:
        super().__init__()
        where = self.registry_name or type(self).__name__
        if config is None:
            config = convert(self.Config, words, where)
        elif words:
            raise SpecError(f"{where}: give a config or words, not both (got {', '.join(words)} besides the config)")
        elif not isinstance(config, self.Config):
            raise SpecError(f"{where}: expected a {self.Config.__qualname__}, got {type(config).__qualname__}")
        self.config = config
        self.d_model = config.d_model
        self._build()
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.reset_parameters()

    def _build(self) -> None:
        """Create parameters and submodules from `self.config`."""
        raise NotImplementedError(f"{type(self).__name__} does not build")

    def reset_parameters(self) -> None:
        """Draw the initial parameters as the mixer's source prescribes."""
        raise NotImplementedError(f"{type(self).__name__} has no initialisation")

    def forward(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        """Mix `x [B, T, d_model]`, going on from `state`; with `cu_seqlens [N+1]`, B is 1 and N sequences are packed.

        Returns `y [B, T, d_model]` and the state after the last token of each sequence.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def init_state(self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """Return the state of `n` sequences before their first token."""
        raise NotImplementedError(f"{type(self).__name__} has no state")

    def init_cache(self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> StateCache:
        """Return the cache of `n` sequences before their first token: what `init_state` gives, written in place."""
        state = self.init_state(n, device, dtype)
        return FixedCache(HeldState(*state) if isinstance(state, RecurrentState) else state)

    def state_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one sequence needs to go on from `context` tokens, keys and values and tails in `dtype`."""
        raise NotImplementedError(f"{type(self).__name__} does not count its state")

    def kv_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """The part of `state_bytes` that is cached keys and values."""
        return 0

    def flops_per_token(self, context: int, decode: bool = False) -> int:
        """Forward FLOPs a token (a multiply-add is 2), projections included.

        The mean over a sequence of `context` tokens in the training form; with `decode`, the one token that follows
        `context` earlier ones.
        """
        raise NotImplementedError(f"{type(self).__name__} does not count its FLOPs")

    def extra_repr(self) -> str:
        words = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        return ", ".join(f"{name}={value}" for name, value in {**words, **self.config.resolved}.items())
