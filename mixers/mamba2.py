"""Mamba-2 (SSD) as a token mixer over the gated delta rule: `k = B`, `q = C`, `v = x`, `write = dt`, no correction.

One projection makes the output gate, the values, B, C and the step size; one short convolution runs over x, B and C.
Parameters are named as in the reference implementation, those that must stay float32 apart in `gates`. May import
kernels.

Shapes: B batch, T time, H heads, G groups that share B and C, K state dim, V head dim, N sequences, W taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels import DeltaState, gated_delta_rule, gated_delta_rule_flops
from hybridzoo.mixers.base import (
    ConvInit,
    HeldState,
    MixerConfig,
    QkInit,
    RecurrentState,
    RuleBackend,
    TokenMixer,
    check_recurrent_state,
    require_above_zero,
    require_positive,
)
from hybridzoo.mixers.parts import GatedRMSNorm, ShortConvolution, count_sequences, length_after
from hybridzoo.mixers.registry import register_mixer
from hybridzoo.mixers.schema import SpecError


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Words of `mamba2`. Two of `expand`, `n_heads` and `head_dim` give the third: `n_heads head_dim = expand d_model`.

    The step size is `dt = softplus(raw + dt_bias)`. Of the gate flags only `decay` may be changed: the others are what
    makes the mixer Mamba-2.
    """

    n_heads: Annotated[int | None, "H, heads; expand d_model / head_dim unless given"] = None
    head_dim: Annotated[int | None, "V, channels of a head; 64 unless it follows from the other two"] = None
    expand: Annotated[float | None, "inner width in units of d_model; 2 unless it follows from the other two"] = None
    state_dim: Annotated[int, "K, state channels: those of B and C"] = 128
    n_groups: Annotated[int, "groups of heads that share B and C"] = 1
    norm_groups: Annotated[
        int | None, "groups of channels that are normed apart; n_groups unless given (transformers up to 5.17: 1)"
    ] = None
    decay: Annotated[
        Literal["none", "scalar", "channel"], "gate: none, one rate a head, or (as in Mamba-1) one a state channel"
    ] = "scalar"
    erase: Annotated[Literal["none"], "gate: Mamba-2 has none"] = "none"
    correct: Annotated[Literal["none"], "gate: Mamba-2 has none"] = "none"
    write: Annotated[Literal["scalar"], "gate: the step size, one a head"] = "scalar"
    conv_size: Annotated[int, "taps of the short causal convolution on x, B and C; 0 is none"] = 4
    conv_init: ConvInit = "default"
    qk_init: QkInit = "independent"
    dt_min: Annotated[float, "step sizes start spread evenly in the logarithm, from this one"] = 0.001
    dt_max: Annotated[float, "to this one"] = 0.1
    dt_init_floor: Annotated[float, "and no smaller than this"] = 1e-4
    dt_limit_min: Annotated[float, "step sizes are held at or above this, in every call"] = 0.0
    dt_limit_max: Annotated[float | None, "and at or below this"] = None
    norm_eps: Annotated[float, "epsilon of the gated RMS norm of the heads' outputs"] = 1e-5
    backend: RuleBackend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_heads", "head_dim", "state_dim", "n_groups", "norm_groups")
        require_above_zero(self, "norm_eps", "expand", "dt_min", "dt_max", "dt_init_floor")
        self._check_width()
        if self.heads % self.n_groups:
            raise SpecError(f".n_groups: {self.n_groups} does not divide {self.heads} heads")
        if self.norm_groups is not None and self.inner % self.norm_groups:
            raise SpecError(f".norm_groups: {self.norm_groups} does not divide {self.inner} channels")
        if self.conv_size < 0:
            raise SpecError(f".conv_size: must be 0 (none) or more, got {self.conv_size}")
        if not 0 < self.dt_min <= self.dt_max:
            raise SpecError(f".dt_min: must be positive and at most dt_max {self.dt_max}, got {self.dt_min}")
        if self.dt_limit_min < 0 or (self.dt_limit_max is not None and self.dt_limit_max < self.dt_limit_min):
            raise SpecError(f".dt_limit_min: must be 0 or more and at most dt_limit_max, got {self.dt_limit_min}")

    def _check_width(self) -> None:
        expanded = self._expanded
        if self.n_heads is not None and self.head_dim is not None:
            if self.expand is not None and self.n_heads * self.head_dim != expanded:
                raise SpecError(
                    f".n_heads: {self.n_heads} heads of {self.head_dim} are not expand {self.expand:g} times "
                    f"d_model {self.d_model}; leave one of the three out"
                )
            return
        name, part = ("n_heads", self.n_heads) if self.n_heads else ("head_dim", self.head_dim or 64)
        if expanded % part:
            raise SpecError(f".{name}: {part} does not divide the inner width {expanded:g} (expand times d_model)")

    @property
    def inner(self) -> int:
        """`H V`, the width of x and of the output gate."""
        if self.n_heads is not None and self.head_dim is not None:
            return self.n_heads * self.head_dim
        return int(self._expanded)

    @property
    def _expanded(self) -> float:
        """Expand times d_model: a whole number where it is one but for rounding, as 1.1 times 100 is."""
        exact = (2.0 if self.expand is None else self.expand) * self.d_model
        return float(round(exact)) if abs(exact - round(exact)) < 1e-9 * exact else exact

    @property
    def heads(self) -> int:
        """H."""
        return self.n_heads or self.inner // (self.head_dim or 64)

    @property
    def resolved(self) -> dict[str, Any]:
        sizes = {"n_heads": self.heads, "head_dim": self.inner // self.heads, "expand": self.inner / self.d_model}
        return {**sizes, "norm_groups": self.norm_groups or self.n_groups}


class StepGates(nn.Module):
    """`dt = softplus(raw + dt_bias)` and the log-decay `-exp(A_log) dt`; in float32 whatever the model is in."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        H, K = config.heads, config.state_dim
        self.dt_bias = nn.Parameter(torch.empty(H))
        shape = {"none": None, "scalar": (H,), "channel": (H, K)}[config.decay]
        self.A_log = nn.Parameter(torch.empty(shape)) if shape is not None else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw as the reference implementation does: rates uniform in [1, 16], steps uniform in the logarithm."""
        c = self.config
        self.dt_bias.uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp_().clamp_(min=c.dt_init_floor)
        self.dt_bias.add_((-torch.expm1(-self.dt_bias)).log_())  # softplus, inverted
        if self.A_log is not None:
            self.A_log.uniform_(1, 16).log_()

    def forward(self, raw: Tensor) -> tuple[Tensor | None, Tensor]:
        """From `raw [B, T, H]` make the log-decay `[B, T, H]` or `[B, T, H, K]` (None without) and `dt [B, T, H]`."""
        wide = torch.promote_types(raw.dtype, torch.float32)
        dt = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        if self.config.dt_limit_min > 0 or self.config.dt_limit_max is not None:
            dt = dt.clamp(self.config.dt_limit_min, self.config.dt_limit_max)
        if self.A_log is None:
            return None, dt
        rate = -self.A_log.to(wide).exp()
        return (dt if rate.dim() == 1 else dt[..., None]) * rate, dt


@register_mixer(
    "mamba2",
    source="SSD, arXiv 2405.21060",
    summary="state space duality: scalar decay and step size from one projection, gated grouped norm",
)
class Mamba2(TokenMixer):
    """Mamba-2. Words: `Mamba2Config`."""

    Config: ClassVar[type[MixerConfig]] = Mamba2Config
    config: Mamba2Config

    def _build(self) -> None:
        c = self.config
        shared = c.n_groups * c.state_dim
        # Channels of in_proj, in order: output gate | x | B | C | dt. The convolution runs over x, B and C.
        self._channels = [c.inner, c.inner + 2 * shared, c.heads]
        self.in_proj = nn.Linear(c.d_model, sum(self._channels), bias=False)
        self.conv1d = ShortConvolution(c.inner + 2 * shared, c.conv_size, bias=True) if c.conv_size else None
        self.gates = StepGates(c)
        self.D = nn.Parameter(torch.empty(c.heads))
        group = c.inner // (c.norm_groups or c.n_groups)
        self.norm = GatedRMSNorm(c.inner, c.norm_eps, "silu", norm_before_gate=False, group_size=group)
        self.out_proj = nn.Linear(c.inner, c.d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw as the reference implementation does; `conv_init` and `qk_init` (B starts as C) on top."""
        for part in (self.in_proj, self.out_proj, self.norm, self.gates):
            part.reset_parameters()
        nn.init.ones_(self.D)
        if self.conv1d is not None:
            self.conv1d.reset_parameters(self.config.conv_init)
        if self.config.qk_init == "equal":
            start, shared = self.config.inner, self.config.n_groups * self.config.state_dim
            targets = [self.in_proj.weight[start:]]
            if self.conv1d is not None and self.conv1d.bias is not None:
                targets += [self.conv1d.weight, self.conv1d.bias]
            for rows in targets:  # each begins at x
                rows[start : start + shared] = rows[start + shared : start + 2 * shared]

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Mix; see `TokenMixer.forward`."""
        c = self.config
        N = count_sequences(x, self.in_proj.weight, cu_seqlens)
        if state is not None:
            check_recurrent_state(state, N, 1 if c.conv_size else 0)
        gate, xBC, raw_dt = self.in_proj(x).split(self._channels, dim=-1)
        tails: tuple[Tensor, ...] = ()
        if self.conv1d is None:
            xBC = F.silu(xBC)
        else:
            xBC, tail = self.conv1d(xBC, state.conv[0] if state is not None else None, cu_seqlens)
            tails = (tail,)
        shared = c.n_groups * c.state_dim
        values, B, C = xBC.split([c.inner, shared, shared], dim=-1)
        values = values.unflatten(-1, (c.heads, c.inner // c.heads))
        B, C = (z.unflatten(-1, (c.n_groups, c.state_dim)) for z in (B, C))
        log_decay, dt = self.gates(raw_dt)
        o, delta = gated_delta_rule(
            *(C, B, values),
            log_decay=log_decay,
            write=dt,
            scale=1.0,
            state=None if state is None else state.delta,
            cu_seqlens=cu_seqlens,
            inplace_state=isinstance(state, HeldState) and state.written_in_place(x, cu_seqlens),
            backend=c.backend,
        )
        y = torch.addcmul(o, values, self.D.to(o.dtype)[:, None]).flatten(-2)
        length = length_after(x, None if state is None else state.length, cu_seqlens)
        assert delta is not None
        return self.out_proj(self.norm(y, gate)), RecurrentState(tails, delta, length)

    def init_state(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """Return the state of `n` sequences before their first token."""
        c, weight = self.config, self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        tails = () if self.conv1d is None else (self.conv1d.init_tail(n, device, dtype),)
        wide = torch.promote_types(dtype, torch.float32)
        delta = DeltaState.zeros(n, c.heads, c.state_dim, c.inner // c.heads, device=device, dtype=wide)
        return RecurrentState(tails, delta, torch.zeros(n, dtype=torch.int32, device=device))

    def state_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """The float32 state, the convolution's tail and two counters, whatever the context."""
        c = self.config
        tail = 0 if self.conv1d is None else self.conv1d.channels * (c.conv_size - 1) * dtype.itemsize
        exact = 8 if dtype == torch.float64 else 4
        return c.state_dim * c.inner * exact + tail + 2 * 4  # count and length, int32

    def flops_per_token(self, context: int, decode: bool = False) -> int:
        """Projections, the convolution, the recurrence, and the skip `D x`."""
        c = self.config
        projections = 2 * c.d_model * (sum(self._channels) + c.inner)
        convolution = 0 if self.conv1d is None else 2 * self.conv1d.channels * c.conv_size
        recurrence = gated_delta_rule_flops(1, c.heads, c.state_dim, c.inner // c.heads, corrected=False, decode=decode)
        return projections + convolution + recurrence + 2 * c.inner
