"""The gates of a recurrent mixer that have parameters of their own, kept together so that they can stay float32.

May import kernels. Shapes: B batch, T time, HV value heads, K key dim, V value dim, r content rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels import ContentGate

GLA_NORMALISER = 16.0  # arXiv 2312.06635, section 4.4


class Gates(nn.Module):
    """`A_log`, `dt_bias` and the content pair of one mixer.

    Args:
        rate: shape of `A_log`: `[heads]`, or `[heads, K]` for a rate a channel; None without a softplus decay.
        dt: length of `dt_bias`, one a value of the decay projection.
        content: `(heads, r, V, K)` of CARVE's pair; one head is shared by all.
    """

    def __init__(self, rate: tuple[int, ...] | None, dt: int, content: tuple[int, int, int, int] | None) -> None:
        super().__init__()
        self.A_log = self.dt_bias = self.content_down = self.content_up = None
        if rate is not None:
            self.A_log = nn.Parameter(torch.empty(rate, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(dt, dtype=torch.float32))
        if content is not None:
            heads, r, V, K = content
            self.content_down = nn.Parameter(torch.empty(heads, r, V, dtype=torch.float32))
            self.content_up = nn.Parameter(torch.empty(heads, K, r, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self, lowest_rate: float = 1.0) -> None:
        """Draw as Mamba-2 and its successors do: rates uniform in `[lowest_rate, 16]`, steps log-uniform in [.001, .1].

        The content pair starts with U1 of unit gain and `U2 = 0`, so that CARVE starts as its token gate alone; and
        drawing it leaves torch's global generator where it was, so that what is drawn later starts so too.
        """
        if self.A_log is not None and self.dt_bias is not None:
            self.A_log.uniform_(lowest_rate, 16.0).log_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
            dt.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        if self.content_down is not None and self.content_up is not None:
            self.content_down.normal_(0.0, self.content_down.shape[-1] ** -0.5, generator=_aside(self.content_down))
            self.content_up.zero_()

    def forward(self, f: Tensor | None, n_v_heads: int, chunk: int) -> tuple[Tensor | None, ContentGate | None]:
        """Make the log-decay and the content gate, each None where the mixer has none.

        `f` is the decay's projection, `[B, T, HV]` or `[B, T, HV, K]` of any heads that A has, or None. The log-decay
        is `-exp(A) softplus(f + tau)` in float32 (float64 stays float64), without rates GLA's `logsigmoid(f) / 16`. A
        content pair that all heads share is repeated to `n_v_heads`.

        A mixer reads its gates by this call alone: whoever splits parameters over processes gathers them around it.
        """
        return None if f is None else self._log_decay(f), self._content(n_v_heads, chunk)

    def _log_decay(self, f: Tensor) -> Tensor:
        f = f if f.dtype == torch.float64 else f.float()
        if self.A_log is None or self.dt_bias is None:
            return F.logsigmoid(f) / GLA_NORMALISER
        rate = self.A_log.exp()
        if f.ndim == 4 and rate.ndim == 1:
            rate = rate[:, None]
        return -rate * F.softplus(f + self.dt_bias.view(f.shape[2:]))

    def _content(self, n_v_heads: int, chunk: int) -> ContentGate | None:
        if self.content_down is None or self.content_up is None:
            return None
        # Copies, also where each head has its own: what was gathered for this call may be freed after it.
        repeats = n_v_heads // self.content_down.shape[0]
        return ContentGate(self.content_down.repeat(repeats, 1, 1), self.content_up.repeat(repeats, 1, 1), chunk)


def _aside(parameter: Tensor) -> torch.Generator | None:
    """Return a generator seeded by where torch's global one of the parameter's device stands, which does not move."""
    device = parameter.device
    if device.type == "meta":
        return None
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        # Seeding anew, and not drawing here: those would be the numbers that the next parameter draws.
        seed = int(torch.randint(2**62, (), device=device))
    return torch.Generator(device).manual_seed(seed)
