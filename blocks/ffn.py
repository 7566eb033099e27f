"""Channel mixers: the feed-forward half of a block. Imports nothing below mixers; residual.py wires them in.

Shapes: B batch, T time, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.mixers.schema import SpecError


@dataclass(frozen=True, kw_only=True)
class FfnConfig:
    """The words of a spec's `ffn`.

    type: `swiglu`, `silu(x W_gate) * (x W_up)` (arXiv 2002.05202); `gelu`, GPT-2's tanh form; `relu2`, the square of a
        ReLU (Primer, arXiv 2109.08668); `none`, no channel mixer.
    width: hidden width F, taken as it stands.
    expand: where no width is given, F is `expand * d_model` rounded to the nearest `multiple_of`; None is 8/3 for
        swiglu and 4 for the others, which gives all of them the same parameters.
    """

    type: Literal["swiglu", "gelu", "relu2", "none"] = "swiglu"
    expand: float | None = None
    width: int | None = None
    multiple_of: int = 16

    def __post_init__(self) -> None:
        if self.expand is not None and not 0 < self.expand <= 1024:
            raise SpecError(f".expand: must be above 0 and at most 1024, got {self.expand}")
        if self.width is not None and self.width < 1:
            raise SpecError(f".width: must be at least 1, got {self.width} (no channel mixer is type: none)")
        if self.multiple_of < 1:
            raise SpecError(f".multiple_of: must be at least 1, got {self.multiple_of}")

    def hidden(self, d_model: int) -> int:
        """Return the hidden width at a model width."""
        if self.width is not None:
            return self.width
        expand = self.expand if self.expand is not None else 8 / 3 if self.type == "swiglu" else 4.0
        return max(1, round(expand * d_model / self.multiple_of)) * self.multiple_of


class FeedForward(nn.Module):
    """`x [B, T, d_model]` to `y` of the same shape, each token by itself, without biases.

    Parameter names follow Llama's: `gate_proj` (swiglu only), `up_proj`, `down_proj`.

    Raises: `ValueError` for type `none`, which has no module.
    """

    def __init__(self, d_model: int, config: FfnConfig) -> None:
        super().__init__()
        if config.type == "none":
            raise ValueError("ffn type 'none' has no module")
        self.config = config
        width = config.hidden(d_model)
        if config.type == "swiglu":
            self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draw every matrix as `nn.Linear` does, uniformly within `1/sqrt(fan-in)`."""
        for linear in self.children():
            assert isinstance(linear, nn.Linear)
            linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.config.type == "swiglu":
            hidden = F.silu(self.gate_proj(x)) * up
        elif self.config.type == "gelu":
            hidden = F.gelu(up, approximate="tanh")
        else:
            hidden = F.relu(up).square()
        return self.down_proj(hidden)

    def flops_per_token(self) -> int:
        """Forward FLOPs a token: every weight is multiplied and added once."""
        return 2 * sum(parameter.numel() for parameter in self.parameters())
