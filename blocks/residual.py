"""The residual block: norm and token mixer, then norm and channel mixer. May import mixers; architectures stack it.

Shapes: B batch, T time, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybridzoo.blocks.ffn import FeedForward, FfnConfig
from hybridzoo.mixers.base import MixerConfig, State, TokenMixer
from hybridzoo.mixers.caches import StateCache
from hybridzoo.mixers.parts import RMSNorm
from hybridzoo.mixers.registry import build_mixer

BlockState = tuple[State, ...]  # one of each parallel mixer


class Block(nn.Module):
    """A pre-norm residual block: `x + mixer(norm(x))`, then `x + ffn(norm(x))` where there is one.

    Several mixers run in parallel on the same normed input; each output is RMS-normalised, with a weight of its own,
    and they are averaged, so that a mixer of small outputs is heard beside one of large ones (Hymba, arXiv 2411.13676).

    Raises: `ValueError` for no mixers or mixers of different widths.
    """

    def __init__(self, mixers: Sequence[MixerConfig], ffn: FfnConfig | None = None, norm_eps: float = 1e-5) -> None:
        super().__init__()
        widths = {config.d_model for config in mixers}
        if len(widths) != 1:
            raise ValueError(f"a block needs mixers of one d_model, got {sorted(widths) or 'none'}")
        d_model = widths.pop()
        self.mixer_norm = RMSNorm(d_model, norm_eps)
        self.mixers = nn.ModuleList(build_mixer(config) for config in mixers)
        self.branch_norms = nn.ModuleList(RMSNorm(d_model, norm_eps) for _ in mixers) if len(mixers) > 1 else None
        self.ffn_norm = None if ffn is None else RMSNorm(d_model, norm_eps)
        self.ffn = None if ffn is None else FeedForward(d_model, ffn)

    def token_mixers(self) -> list[TokenMixer]:
        """Return the mixers, typed."""
        return [mixer for mixer in self.mixers if isinstance(mixer, TokenMixer)]

    @torch.no_grad()
    def reset_parameters(self, residual_scale: float = 1.0) -> None:
        """Draw every parameter as its own module does, then multiply what is added to the residual stream.

        `residual_scale` meets a mixer's `o_proj` or `out_proj`, the FFN's `down_proj`, and, of parallel mixers, the
        norms behind their projections instead, since a norm undoes a scale before it.
        """
        for module in self.modules():
            if isinstance(module, TokenMixer | FeedForward):
                module.reset_parameters()
        for norm in (self.mixer_norm, self.ffn_norm, *(self.branch_norms or ())):
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()
        for output in self._outputs():
            if isinstance(output, nn.Linear | RMSNorm):
                output.weight.mul_(residual_scale)

    def _outputs(self) -> list[nn.Module | None]:
        """The modules whose outputs are added to the residual stream."""
        mixer = self.mixers[0]
        last = getattr(mixer, "o_proj", None) or getattr(mixer, "out_proj", None)
        mixed = [last] if self.branch_norms is None else list(self.branch_norms)
        return [*mixed, None if self.ffn is None else self.ffn.down_proj]

    def forward(
        self, x: Tensor, state: BlockState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        """Map `x [B, T, d_model]` going on from `state`; with `cu_seqlens [N+1]`, B is 1 and N sequences are packed.

        Returns the new `x` and a state for each mixer. Raises `ValueError` for a state of another number of mixers;
        each mixer checks its own.
        """
        states = (None,) * len(self.mixers) if state is None else state
        if len(states) != len(self.mixers):
            raise ValueError(f"state: expected one for each of {len(self.mixers)} mixers, got {len(states)}")
        normed = self.mixer_norm(x)
        outputs, new_states = zip(
            *(mixer(normed, each, cu_seqlens) for mixer, each in zip(self.mixers, states, strict=True)), strict=True
        )
        x = x + self._merge(outputs)
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x, new_states

    def _merge(self, outputs: Sequence[Tensor]) -> Tensor:
        if self.branch_norms is None:
            return outputs[0]
        normed = [norm(output) for norm, output in zip(self.branch_norms, outputs, strict=True)]
        return torch.stack(normed).mean(0)

    def init_state(self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> BlockState:
        """Return the states of `n` sequences before their first token."""
        return tuple(mixer.init_state(n, device, dtype) for mixer in self.token_mixers())

    def init_cache(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[StateCache, ...]:
        """Return the mixers' caches for `n` sequences before their first token."""
        return tuple(mixer.init_cache(n, device, dtype) for mixer in self.token_mixers())

    def state_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one sequence needs to go on from `context` tokens."""
        return sum(mixer.state_bytes(context, dtype) for mixer in self.token_mixers())

    def kv_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """The part of `state_bytes` that is cached keys and values."""
        return sum(mixer.kv_bytes(context, dtype) for mixer in self.token_mixers())

    def flops_per_token(self, context: int, decode: bool = False) -> int:
        """Forward FLOPs a token; see `TokenMixer.flops_per_token`. Norms and sums are left out, as is usual."""
        mixing = sum(mixer.flops_per_token(context, decode) for mixer in self.token_mixers())
        return mixing + (0 if self.ffn is None else self.ffn.flops_per_token())
