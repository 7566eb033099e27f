"""`gated_delta_rule`: the one recurrence behind every recurrent mixer, and the choice of backend.

The backends are `reference` (token by token, reference.py), `torch` (chunkwise, chunkwise.py and chunkwise_op.py) and
`triton` (fused/, where one token without a gradient is an operator of its own); what they share is checked here once.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences (B, or the number packed into one row).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridzoo.kernels.checks import check_bounds, check_counts, check_cu_seqlens, check_inputs, check_state
from hybridzoo.kernels.chunkwise_op import chunkwise_delta_rule
from hybridzoo.kernels.derivatives import refuse_forward_mode, refuse_transforms
from hybridzoo.kernels.fused.op import fused_delta_rule
from hybridzoo.kernels.fused.step_op import fused_step, no_gradient_to_come
from hybridzoo.kernels.fused.support import refusal
from hybridzoo.kernels.norms import l2_norm
from hybridzoo.kernels.reference import reference_delta_rule
from hybridzoo.kernels.state import ContentGate, DeltaState

BACKENDS = ("auto", "triton", "torch", "reference")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    erase_logits: Tensor | None = None,
    content: ContentGate | None = None,
    correct: Tensor | None = None,
    write: Tensor | None = None,
    predict: str = "decayed",
    scale: float | None = None,
    qk_l2norm: bool = False,
    state: DeltaState | None = None,
    cu_seqlens: Tensor | None = None,
    erase_value: Tensor | None = None,
    segments: int | None = None,
    return_state: bool = True,
    inplace_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, DeltaState | None]:
    """Run the gated delta rule over a sequence.

    Per value head, with value head `j` reading key head `j // (HV/H)`::

        log D_t = g_t - softplus(z_t + u_c)
        S_t = diag(D_t) S_{t-1} - k_t ((e_t * k_t)^T S') + k_t (w_t * v_t)^T
        S'  = diag(D_t) S_{t-1}  (predict="decayed")   or   S_{t-1}  (predict="stored")
        o_t = scale * S_t^T q_t

    A gate is a tensor, or None and off: no decay, no erase, no correction, and ones for `write`.

    Args:
        q, k: `[B, T, H, K]`, one floating dtype with v.
        v: `[B, T, HV, V]`, HV a multiple of H.
        log_decay: `g`, `[B, T, HV]` or `[B, T, HV, K]`, at most 0, which is not checked; `-inf` clears the state
            (`triton` leaves 2e-9 of it).
        erase_logits: `z`, `[B, T, HV, K]`.
        content: CARVE's readout `u_c`, added to `erase_logits`.
        correct: `e`, `[B, T, HV]` or `[B, T, HV, K]`.
        write: `w`, `[B, T, HV]` or `[B, T, HV, V]`.
        predict: which state the correction reads.
        scale: `1/sqrt(K)` unless given.
        qk_l2norm: replace q and k by `x * rsqrt(sum x^2 + 1e-6)` first. `triton` reads its gradient off the outputs:
            they must not be written in place before the backward pass.
        state: where the sequences stand; fresh when None.
        cu_seqlens: int `[N+1]`: N sequences packed into one row (B = 1), each with its own state.
        erase_value: `[B, T, HV, V]`, logits of an erase mask over value channels; `reference` only.
        segments: how many pieces `triton`'s backward pass goes through the sequence in: more take less memory, fewer
            fill a GPU better, and the result is the same to the bit. Chosen from the shape when None.
        return_state: give back the final state, else None.
        inplace_state: write the final state into `state`'s own tensors (inference only).
        backend: `auto` (`triton` for what it takes on a GPU, else `torch`), `triton`, `torch` or `reference`.

    Returns:
        `o [B, T, HV, V]` in v's dtype and the final `DeltaState`. All are differentiable in every floating input.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices, bounds or options that do not fit, naming the argument.
        NotImplementedError: in forward mode and within transforms of torch.func, but on `reference`.

    The rows of flags that make GLA, Mamba-2, DeltaNet, Gated DeltaNet, KDA, Gated DeltaNet-2 and CARVE of it are in
    `hybridzoo.mixers`.
    """
    check_inputs(q, k, v, log_decay, erase_logits, content, correct, write, erase_value, predict)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "triton" if q.is_cuda and refusal(q, v, content) is None else "torch"
    elif backend == "triton" and erase_value is None and (why := refusal(q, v, content)) is not None:
        raise ValueError(f"backend='triton' {why}")
    if erase_value is not None and backend != "reference":
        raise ValueError(
            "erase_value needs backend='reference': an erase along the value axis gives each value channel its own "
            "triangular system, so no chunkwise form with one shared solve exists"
        )
    if segments is not None and (not isinstance(segments, int) or segments < 1):
        raise ValueError(f"segments must be a whole number, at least 1, got {segments!r}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}; multiply q by a scale that is learned")
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    n = B
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, q.device)
        n = cu_seqlens.numel() - 1
    if state is not None:
        check_state(state, n, HV, K, V, content is not None, dtype, q.device)
    elif inplace_state:
        raise ValueError("inplace_state needs a state to write into")
    scale = K**-0.5 if scale is None else float(scale)
    floats = (q, k, v, log_decay, erase_logits, *(content or ())[:2], correct, write, *(state or ())[:3])
    if backend != "reference":
        name = f"gated_delta_rule with backend={backend!r}"
        refuse_forward_mode(name, floats)
        refuse_transforms(name)
    fresh = partial(DeltaState.zeros, n, HV, K, V, content is not None, q.device, dtype)
    new_state: DeltaState | None
    if backend == "triton" and T == 1 and cu_seqlens is None and no_gradient_to_come(floats):
        o, new_state = fused_step(
            *(q, k, v, log_decay, erase_logits, content, correct, write, state or fresh()),
            predict=predict,
            scale=scale,
            qk_l2norm=qk_l2norm,
            inplace_state=inplace_state,
        )
        return o, new_state if return_state else None
    if qk_l2norm and backend != "triton":  # whose kernels do it themselves
        q, k = l2_norm(q), l2_norm(k)
    if backend == "reference":
        state = state or fresh()
        if cu_seqlens is not None:
            check_bounds(cu_seqlens.tolist(), q.shape[1])
        if content is not None:
            check_counts(state.count.tolist(), content.chunk)
        o, new_state = reference_delta_rule(
            *(q, k, v, log_decay, erase_logits, content, correct, write, state),
            predict=predict,
            scale=scale,
            cu_seqlens=cu_seqlens,
            erase_value=erase_value,
        )
    else:
        rule = fused_delta_rule if backend == "triton" else chunkwise_delta_rule
        o, new_state = rule(
            *(q, k, v, log_decay, erase_logits, content, correct, write, state),
            predict=predict,
            scale=scale,
            qk_norm=qk_l2norm and backend == "triton",
            segments=segments or 0,
            cu_seqlens=cu_seqlens,
            return_state=return_state or inplace_state,
        )
    o = o.to(v.dtype)
    if inplace_state and state is not None and new_state is not None:
        new_state = _write_back(state, new_state)
    return o, new_state if return_state else None


def _write_back(state: DeltaState, new_state: DeltaState) -> DeltaState:
    if torch.is_grad_enabled() and any(field.requires_grad for field in (*state, *new_state)):
        raise ValueError("inplace_state would overwrite a tensor that autograd needs: use it under torch.no_grad()")
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)
    return state
