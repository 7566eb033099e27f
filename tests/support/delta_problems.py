"""Random inputs of `gated_delta_rule` for tests: every flag, length, grouping, packing and state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from hybridzoo.kernels import ContentGate, DeltaState, gated_delta_rule


@dataclass
class Problem:
    """One call: differentiable tensors by name, and the options that go with them."""

    tensors: dict[str, Tensor]
    state: DeltaState | None
    chunk: int = 0
    options: dict[str, object] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        state = self.state
        if state is not None:
            state = DeltaState(*(x.to(exact) if x.is_floating_point() else x for x in state))
        return Problem({n: x.to(dtype) for n, x in self.tensors.items()}, state, self.chunk, self.options)

    def call(self, backend: str, tensors: dict[str, Tensor] | None = None, state: DeltaState | None = None, **options):
        """Run the rule; `tensors` and `state` replace the problem's own."""
        arguments = dict(self.tensors if tensors is None else tensors)
        if self.chunk:
            arguments["content"] = ContentGate(arguments.pop("down"), arguments.pop("up"), self.chunk)
        state = self.state if state is None else state
        return gated_delta_rule(**arguments, state=state, backend=backend, **{**self.options, **options})

    def flat(self, ends: bool = True, save: bool = True) -> tuple[object, ...]:
        """The arguments of a backend's operator (recurrence_op.py)."""
        names = ("q", "k", "v", "log_decay", "erase_logits", "down", "up", "correct", "write")
        state = self.state or (None,) * 4
        state = state if self.chunk else (state[0], None, None, None)
        stored = self.options.get("predict") == "stored"
        tensors = (*(self.tensors.get(name) for name in names), *state, self.options.get("cu_seqlens"))
        return (*tensors, stored, 0.5, self.chunk, False, 0, ends, save)

    def results(self, backend: str, ends: tuple[str, ...] = ("o", "S", "o_sum", "o_mean")) -> dict[str, Tensor]:
        """Output, final state and every gradient by name, of a fixed random loss over the named `ends`."""
        leaves = {n: x.detach().clone().requires_grad_() for n, x in self.tensors.items()}
        state = self.state
        if state is not None:
            state = DeltaState(*(x.clone().requires_grad_() if x.is_floating_point() else x for x in state))
        o, final = self.call(backend, leaves, state)
        seed = torch.Generator().manual_seed(1)
        values = {n: o if n == "o" else getattr(final, n) for n in ends}
        losses = [(x.double() * torch.randn(x.shape, generator=seed)).sum() for x in values.values()]
        torch.stack(losses).sum().backward()
        if state is not None:
            leaves |= {f"state.{n}": x for n, x in zip(state._fields, state, strict=True) if x.requires_grad}
        found = {n: x.detach() for n, x in values.items()}
        found |= {f"d_{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
        return {n: x for n, x in found.items() if x.numel()} | {"count": final.count}


def make_problem(
    *,
    seed: int = 0,
    B: int = 2,
    T: int = 70,
    H: int = 1,
    group: int = 1,
    K: int = 8,
    V: int = 8,
    decay: str = "channel",
    erase: str = "none",
    correct: str = "scalar",
    write: str = "scalar",
    predict: str = "decayed",
    chunk: int = 64,
    lengths: list[int] | None = None,
    with_state: bool = True,
    strength: float = 3.0,
    repeat_keys: bool = False,
    e_max: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Draw a problem; `lengths` packs sequences into one row, `strength` is the strongest log-decay."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    cu_seqlens = None
    N = B
    if lengths is not None:
        B, T, N = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    HV = H * group
    per = {"scalar": (B, T, HV), "channel": (B, T, HV, K)}
    k = normal(B, T, H, K)
    if repeat_keys and T:
        k = k[:, :1].expand_as(k) + 0.01 * k
    tensors = {"q": normal(B, T, H, K), "k": k / k.norm(dim=-1, keepdim=True), "v": normal(B, T, HV, V)}
    if decay != "none":  # weak and strong side by side
        tensors["log_decay"] = -strength * uniform(*per[decay]) ** 3
    if erase != "none":
        tensors["erase_logits"] = 2 * normal(B, T, HV, K) - 2
    if correct != "none":
        tensors["correct"] = e_max * uniform(*per[correct])
    if write != "one":
        tensors["write"] = uniform(*(per["scalar"] if write == "scalar" else (B, T, HV, V)))
    content = erase == "content"
    state = DeltaState.zeros(N, HV, K, V, content, dtype=torch.float64)
    if content:
        tensors |= {"down": normal(HV, 3, V), "up": normal(HV, K, 3)}
    if with_state:
        count = torch.randint(0, chunk, (N,), generator=g).int() if content else state.count
        state = DeltaState(normal(*state.S.shape), normal(*state.o_sum.shape), normal(*state.o_mean.shape), count)
    return Problem(
        tensors,
        state if with_state else None,
        chunk if content else 0,
        {"predict": predict, "cu_seqlens": cu_seqlens},
    ).to(dtype)


def gradients_without_ends(case: Problem, with_state: bool, ends: bool) -> dict[str, Tensor]:
    """Output and gradients on `triton` from a state of zeros, given or not, where the final one is asked for or not."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in case.tensors.items()}
    zeros = DeltaState(*(torch.zeros_like(x) for x in case.state)) if with_state else None
    o, end = replace(case, state=None).call("triton", leaves, zeros, return_state=ends)
    assert (end is None) != ends
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(o, list(leaves.values()), weights.to(o))
    return {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}


FLAGS = {
    "decay": ("none", "scalar", "channel"),
    "erase": ("none", "token", "content"),
    "correct": ("none", "scalar", "channel"),
    "write": ("one", "scalar", "channel"),
    "predict": ("decayed", "stored"),
}
EDGE_LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100)


@st.composite
def problems(draw: st.DrawFn, **fixed: object) -> Problem:
    """Every combination of flags, at lengths around a tile's and a chunk's edges, packed or not."""
    words = {flag: draw(st.sampled_from(values), label=flag) for flag, values in FLAGS.items()}
    words["chunk"] = draw(st.sampled_from((1, 3, 16, 64, 65, 80)), label="chunk")
    if draw(st.booleans(), label="packed"):
        words["lengths"] = draw(st.lists(st.sampled_from((0, *EDGE_LENGTHS)), min_size=1, max_size=4), label="lengths")
    else:
        words |= {"B": draw(st.integers(1, 2), label="B"), "T": draw(st.sampled_from(EDGE_LENGTHS), label="T")}
    words |= {
        "seed": draw(st.integers(0, 2**16)),
        "H": draw(st.integers(1, 2), label="H"),
        "group": draw(st.integers(1, 2), label="group"),
        "K": draw(st.sampled_from((1, 4, 7)), label="K"),
        "V": draw(st.sampled_from((1, 4, 6)), label="V"),
        "with_state": draw(st.booleans(), label="with_state"),
        "strength": draw(st.sampled_from((0.01, 3.0, 50.0)), label="strength"),
        "repeat_keys": draw(st.booleans(), label="repeat_keys"),
    }
    if words["predict"] == "decayed":
        words["e_max"] = draw(st.sampled_from((1.0, 2.0)), label="e_max")
    return make_problem(**{**words, **fixed})


def relative_error(x: Tensor, truth: Tensor, floor: Tensor | None = None) -> float:
    """`||x - truth|| / max(||truth||, 1e-3 ||floor||)`, the error that tolerances are stated in."""
    least = 0.0 if floor is None else 1e-3 * floor.double().norm().item()
    size = max(truth.double().norm().item(), least, 1e-30)
    return ((x.double() - truth.double()).norm() / size).item()


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Compare two `Problem.results`, each quantity by name; gradients that underflow are measured against d_v."""
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        if name == "count":
            assert torch.equal(found[name], expected), "count"
            continue
        error = relative_error(found[name], expected, truth.get("d_v") if name.startswith("d_") else None)
        assert error < tolerance, f"{name}: relative error {error:.1e}, at most {tolerance:.0e} allowed"
