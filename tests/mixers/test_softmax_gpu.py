"""Every backend of softmax attention that is present, on the GPU itself, against the reference: `pytest -m gpu`.

Inputs are rounded to the dtype first; the reference then runs on them in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_problems import AttentionProblem, apart, make_attention
from device_reads import no_device_reads

from hybridzoo.mixers import build_mixer
from hybridzoo.mixers.schema import SpecError
from hybridzoo.mixers.softmax import BACKENDS
from hybridzoo.mixers.softmax.backends import choose, chosen, order, usual_call
from hybridzoo.mixers.softmax.rule import call_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),  # the code generator's advice
]

# Output, gradients.
TOLERANCES = {torch.bfloat16: (6e-3, 1.5e-2), torch.float16: (2e-3, 4e-3), torch.float32: (2e-5, 5e-5)}
FAST = [name for name in BACKENDS if name != "reference"]
LENGTHS = (200, 0, 1, 333, 66)
CACHED = (0, 37, 500, 256, 1)
SHAPES: dict[str, dict[str, Any]] = {
    "full": {"T": 300},
    "one token": {"T": 1},
    "a block exactly": {"T": 256},
    "window": {"T": 700, "window": 100},
    "window of one": {"T": 140, "window": 1},
    "grouped": {"T": 300, "heads": (8, 2)},
    "grouped by three, windowed": {"T": 300, "heads": (6, 2), "window": 130},
    "one key head": {"T": 200, "heads": (4, 1)},
    "soft-cap": {"T": 300, "softcap": 3.0},
    "soft-cap, window": {"T": 300, "softcap": 3.0, "window": 64},
    "behind a cache": {"T": 150, "cached": CACHED},
    "behind a cache, windowed": {"T": 150, "cached": CACHED, "window": 90},
    "decode": {"T": 1, "cached": CACHED, "heads": (8, 2)},
    "decode, windowed": {"T": 1, "cached": CACHED, "heads": (8, 2), "window": 200},
    "packed": {"lengths": LENGTHS, "cached": (0,) * 5},
    "packed, windowed": {"lengths": LENGTHS, "cached": (0,) * 5, "window": 50, "heads": (4, 2)},
    "packed behind caches": {"lengths": LENGTHS, "cached": CACHED, "heads": (4, 2)},
    "packed behind caches, windowed, soft-cap": {"lengths": LENGTHS, "cached": CACHED, "window": 77, "softcap": 3.0},
}


def check(problem: AttentionProblem, backend: str, dtype: torch.dtype, record: Any, gradients: bool = True) -> None:
    rounded = problem.to(dtype)
    on_gpu = rounded.to("cuda")
    refuse_to_skip(on_gpu, backend, gradients)
    found = on_gpu.results(backend, gradients)
    truth = rounded.to(torch.float64).to("cuda").results("reference", gradients)
    errors = apart(found, truth)
    record("errors", errors)
    output, gradient = TOLERANCES[dtype]
    assert found["y"].dtype == dtype
    assert errors.pop("y") < output
    assert max(errors.values(), default=0.0) < gradient, errors


def refuse_to_skip(problem: AttentionProblem, backend: str, gradients: bool = True) -> None:
    q, k, v = (problem.tensors[name] for name in "qkv")
    call = call_of(q, k, v, problem.rule, problem.lengths is not None, problem.tensors["old_k"].shape[1] > 0)
    why = BACKENDS[backend].refusal(call._replace(gradient=gradients))
    if why is not None:
        with pytest.raises(ValueError, match=f"backend='{backend}'"):
            problem.results(backend, gradients)
        pytest.skip(f"{backend} {why}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_every_shape_has_the_output_and_gradients_of_the_reference(
    backend: str, shape: str, record_property: Any
) -> None:
    words = {"cached": (0, 0), "heads": (4, 4), **SHAPES[shape]}
    check(make_attention(D=64, **words), backend, torch.bfloat16, record_property)


@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("backend", FAST)
def test_every_head_size(backend: str, window: int | None, D: int, record_property: Any) -> None:
    problem = make_attention(T=333, heads=(4, 2), D=D, window=window)
    check(problem, backend, torch.bfloat16, record_property)


@pytest.mark.parametrize("D", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("shape", ["full", "window", "packed behind caches"])
@pytest.mark.parametrize("backend", FAST)
def test_other_dtypes(backend: str, shape: str, dtype: torch.dtype, D: int, record_property: Any) -> None:
    words = {"cached": (0, 0), "heads": (4, 4), **SHAPES[shape]}
    check(make_attention(D=D, **words), backend, dtype, record_property)


@pytest.mark.parametrize("D", [40, 80, 192])
@pytest.mark.parametrize("backend", FAST)
def test_head_sizes_without_gradients(backend: str, D: int, record_property: Any) -> None:
    with torch.inference_mode():
        problem = make_attention(T=333, heads=(4, 2), D=D, window=100)
        check(problem, backend, torch.bfloat16, record_property, gradients=False)


@pytest.mark.parametrize(
    "shape",
    [
        "decode",
        "decode, windowed",
        "packed behind caches",
        "packed behind caches, windowed, soft-cap",
        "behind a cache",
    ],
)
@pytest.mark.parametrize("backend", FAST)
def test_without_gradients_too(backend: str, shape: str, record_property: Any) -> None:
    words = {"heads": (4, 4), **SHAPES[shape]}
    with torch.inference_mode():
        check(make_attention(D=128, **words), backend, torch.bfloat16, record_property, gradients=False)


@pytest.mark.parametrize("backend", [*FAST, "auto"])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"window": 50, "n_kv_heads": 1, "qk_norm": "l2"},
        {
            "n_kv_heads": 2,
            "window": 70,
            "qk_norm": "rmsnorm",
            "output_gate": True,
            "conv_size": 4,
            "qkv_bias": True,
            "rope_scaling": "yarn",
            "rope_factor": 4.0,
            "rope_context": 64,
        },
        {"softcap": 5.0, "rope": False},
    ],
    ids=["plain", "window", "all words", "soft-cap, no positions"],
)
def test_a_mixer_prefills_in_packs_and_decodes_as_one_pass(backend: str, words: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if backend in ("sdpa", "xformers") and "softcap" in words:
        with pytest.raises(SpecError, match=f"'{backend}' has no soft-cap"):
            build_mixer("attention", d_model=256, n_heads=4, backend=backend, **words)
        return
    mixer = build_mixer("attention", d_model=256, n_heads=4, backend=backend, **words).cuda().bfloat16()
    reference = build_mixer("attention", d_model=256, n_heads=4, backend="reference", **words).cuda().bfloat16()
    reference.load_state_dict(mixer.state_dict())
    if backend != "auto":
        call = usual_call(
            window=words.get("window"), softcap="softcap" in words, packed=True, cached=True, gradient=False
        )
        if (why := BACKENDS[backend].refusal(call)) is not None:
            pytest.skip(f"{backend} {why}")
    lengths = [130, 3, 64]
    x = torch.randn(3, 140, 256, device="cuda", dtype=torch.bfloat16)
    packed = torch.cat([x[n, :length] for n, length in enumerate(lengths)])[None]
    bounds = torch.tensor([0, 130, 133, 197], device="cuda")
    with torch.no_grad():
        y, state = mixer(packed, cu_seqlens=bounds)
        steps = []
        for t in range(4):
            tokens = torch.stack([x[n, length + t] for n, length in enumerate(lengths)])[:, None]
            step, state = mixer(tokens, state)
            steps.append(step)
        for n, length in enumerate(lengths):
            expected = reference(x[n : n + 1, : length + 4])[0][0].float()
            start = int(bounds[n])
            got = torch.cat([y[0, start : start + length], *(step[n] for step in steps)]).float()
            assert (got - expected).norm() < 1.5e-2 * expected.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", ["auto", "flex", "sdpa", "flash"])
def test_training_compiles_as_one_graph(backend: str, packed: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    words = {"d_model": 256, "n_heads": 4, "n_kv_heads": 2, "window": 100, "backend": backend}
    mixer = build_mixer("attention", **words).cuda().bfloat16()
    if backend != "auto":
        call = usual_call(window=100, packed=packed, compiling=True)
        if (why := BACKENDS[backend].refusal(call)) is not None:
            pytest.skip(f"{backend} {why}")
    x = torch.randn(1, 400, 256, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, 150, 150, 400], device="cuda", dtype=torch.int32) if packed else None
    gradients = []
    for run in (mixer, torch.compile(mixer, fullgraph=True)):
        mixer.zero_grad()
        run(x, cu_seqlens=bounds)[0].float().square().sum().backward()
        gradients.append([p.grad.float().clone() for p in mixer.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager - compiled).norm() < 3e-2 * eager.norm()


@pytest.mark.parametrize("backend", ["flex", "flash"])
@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "behind caches"])
def test_a_packed_call_asks_the_device_nothing(backend: str, cached: bool) -> None:
    words: dict[str, Any] = {"lengths": LENGTHS, "cached": CACHED if cached else (0,) * 5, "heads": (4, 2), "D": 64}
    problem = make_attention(**words).to(torch.bfloat16).to("cuda")
    refuse_to_skip(problem, backend)
    from hybridzoo.mixers.softmax import attend_packed

    bounds = torch.tensor([0, 200, 200, 201, 534, 600], dtype=torch.int32, device="cuda")
    q, k, v, old_k, old_v = (problem.tensors[name] for name in ("q", "k", "v", "old_k", "old_v"))
    rule = problem.rule._replace(backend=backend)
    length = problem.length.cuda()
    with torch.no_grad():
        attend_packed(q[0], k[0], v[0], rule, bounds, (old_k, old_v), length)  # compiles
        with no_device_reads():
            attend_packed(q[0], k[0], v[0], rule, bounds, (old_k, old_v), length)


def test_what_auto_takes_is_the_first_that_does_not_refuse() -> None:
    assert set(chosen()) == {"full", "window", "packed", "soft-cap", "decoding"}
    call = usual_call(window=1024)
    taken = choose(call, "auto").name
    assert all(BACKENDS[name].refusal(call) is not None for name in order(call)[: order(call).index(taken)])
