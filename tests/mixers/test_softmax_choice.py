"""Which backend of softmax attention a call is given: the order of `auto`, and what each refuses and why."""

from __future__ import annotations

import itertools
from importlib.metadata import version
from typing import Any

import attention_stand_ins
import pytest
import torch
from attention_problems import apart, make_attention

from hybridzoo.mixers.softmax import BACKENDS, SoftmaxRule, attend, attend_packed, backends, imports
from hybridzoo.mixers.softmax.backends import choose, chosen, found, order, usual_call


def test_a_backend_asked_for_by_name_runs_or_says_why_not() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    reasons = {
        "flash": r"needs tensors on a CUDA device, got cpu",
        "xformers": r"needs tensors on a CUDA device, got cpu",
        "flex": r"has no backward pass on a CPU",
    }
    for name, why in reasons.items():
        with pytest.raises(ValueError, match=f"backend='{name}' {why}"):
            attend(q, q, q, SoftmaxRule(1.0, backend=name))
    with pytest.raises(ValueError, match="backend='sdpa' has no soft-cap"):
        attend(q, q, q, SoftmaxRule(1.0, softcap=2.0, backend="sdpa"))
    with pytest.raises(ValueError, match="backend must be one of auto, flash, flex, xformers, sdpa, reference"):
        attend(q, q, q, SoftmaxRule(1.0, backend="cudnn"))


def test_auto_takes_the_first_of_its_order_that_does_not_refuse() -> None:
    for changes in (
        {},
        {"window": 4},
        {"packed": True},
        {"softcap": True},
        {"cached": True, "gradient": False},
        {"dtype": torch.float64},
    ):
        call = usual_call(**changes)
        taken = choose(call, "auto")
        names = order(call)
        assert taken.refusal(call) is None
        assert all(BACKENDS[name].refusal(call) is not None for name in names[: names.index(taken.name)])


@pytest.mark.parametrize(
    ("changes", "first", "before_flex"),
    [
        ({"tokens": 128, "cached": True}, "sdpa", True),
        ({"tokens": 129, "cached": True}, "flash", False),  # many queries: sdpa would hold all of a long cache's scores
        ({"tokens": 4096, "cached": True, "window": 64}, "flash", False),
        ({"tokens": 511, "softcap": True}, "flash", True),
        ({"tokens": 4096, "softcap": True}, "flash", False),
        ({"tokens": 2047, "window": 682}, "flash", True),
        ({"tokens": 2047, "window": 683}, "flash", False),  # no band: a square of masked scores
        ({"tokens": 2048, "window": 64}, "flash", False),
        ({"tokens": 2047, "window": 64, "packed": True}, "flash", False),
        ({"tokens": 511, "packed": True}, "flash", True),
        ({"tokens": 1024, "window": 64, "softcap": True}, "flash", True),
    ],
)
def test_nothing_compiles_where_plain_products_cost_little(
    changes: dict[str, Any], first: str, before_flex: bool
) -> None:
    call = usual_call(device="cuda", number=0, dtype=torch.float32, **changes)
    names = order(call)
    assert names[0] == first
    plain = "reference" if call.softcap else "sdpa"
    assert ("flex" not in names or names.index(plain) < names.index("flex")) == before_flex


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, True),
        ({"gradient": False}, False),
        ({"window": 1024}, False),
        ({"cached": True}, False),  # xformers would copy the caches
    ],
)
def test_xformers_comes_before_flex_for_packs_that_are_trained_on(changes: dict[str, Any], first: bool) -> None:
    names = order(usual_call(device="cuda", number=0, packed=True, **changes))
    assert (names.index("xformers") < names.index("flex")) == first


def test_every_call_has_a_backend_and_only_known_ones_are_ordered() -> None:
    for device in ("cpu", "cuda", "mps"):
        for window in (None, 4):
            for packed in (False, True):
                for cached, tokens in itertools.product((False, True), (1, 64, 8192)):
                    call = usual_call(device=device, window=window, packed=packed, cached=cached, tokens=tokens)
                    assert set(order(call)) <= set(BACKENDS)
                    assert order(call)[-1] == "reference"  # which takes everything


@pytest.mark.parametrize(
    ("packages", "changes", "why"),
    [
        (
            (),
            {},
            "which is not installed: pip install -e '.[flash]' in a clone of hybridzoo; with flash-attn 2 needs",
        ),
        (("flash-attn-4",), {"compiling": True}, "cannot be traced by a compiler"),
        (("flash-attn",), {"head_dim": 264}, "multiples of 8 up to 256, got 264"),
        (("flash-attn",), {"dtype": torch.float32}, "takes bfloat16 and float16, got torch.float32"),
        (("flash-attn",), {"head_dim": 36}, "multiples of 8 up to 256, got 36"),
    ],
)
def test_flash_refuses_what_neither_package_takes(
    monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], changes: dict[str, Any], why: str
) -> None:
    attention_stand_ins.install(monkeypatch, *packages)
    call = usual_call(device="cuda", dtype=torch.bfloat16)
    assert why in str(BACKENDS["flash"].refusal(call._replace(**changes)))
    if packages:
        assert BACKENDS["flash"].refusal(call) is None


@pytest.mark.parametrize(
    ("number", "refused"),
    [("4.0.0b9", True), ("4.0.0b10", True), ("4.0.0b11", False), ("4.0.0b36", False), ("4.0.0", False)],
)
def test_a_flash_attn_4_whose_backward_fails_is_refused_with_what_would_be_right(
    monkeypatch: pytest.MonkeyPatch, number: str, refused: bool
) -> None:
    call = usual_call(device="cuda", dtype=torch.bfloat16)
    attention_stand_ins.install(monkeypatch, "flash-attn-4", versions={"flash-attn-4": number})
    said = (
        f"with flash-attn-4 needs flash-attn-4 4.0.0b11 or later, got {number}, whose backward pass fails with "
        "quack-kernels 0.4: pip install -e '.[flash]' in a clone of hybridzoo; with flash-attn 2 needs"
    )
    for gradient in (True, False):
        why = BACKENDS["flash"].refusal(call._replace(gradient=gradient))
        assert str(why).startswith(said) if refused else why is None


def test_flash_attn_2_computes_where_flash_attn_4_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_attention(T=5, heads=(2, 2), D=8, cached=(0,)).to(torch.bfloat16)
    expected = problem.results("reference")
    packages = ("flash-attn", "flash-attn-4")
    attention_stand_ins.install(monkeypatch, *packages, versions={"flash-attn-4": "4.0.0b10"})
    monkeypatch.setattr("flash_attn.cute.flash_attn_func", None)
    errors = apart(problem.results("flash"), expected)
    assert max(errors.values()) < 1.5e-2, errors


GRADIENTS_4 = [
    (
        9,
        {"head_dim": 80},
        "of head sizes 32, 64, 96, 128 and 256 on this GPU, got 80: those of 4.0.0b15 are wrong at 80",
    ),
    (9, {"head_dim": 192, "window": 64}, "got 192: those of 4.0.0b15 are wrong at 80 and do not compile at 192"),
    (
        9,
        {"head_dim": 48, "packed": True},
        "got 48: those of 4.0.0b15 are wrong at 80 and do not compile at 192, others",
    ),
    (9, {"softcap": True, "packed": True}, "has no gradient of a soft-cap with packed sequences or behind a cache"),
    (9, {"softcap": True, "cached": True}, "has no gradient of a soft-cap with packed sequences or behind a cache"),
    (10, {"softcap": True, "packed": True}, "has no gradient of a soft-cap with packed sequences or behind a cache"),
    (10, {"softcap": True, "head_dim": 256}, "has no gradient of a soft-cap at a head size of 256"),
    (10, {"head_dim": 80}, "has no gradient on this GPU where a head size's next multiple of 16 is none of 32, got 80"),
]


@pytest.mark.parametrize(("major", "changes", "why"), GRADIENTS_4)
def test_flash_attn_4_refuses_gradients_that_fail_and_computes_without(
    monkeypatch: pytest.MonkeyPatch, major: int, changes: dict[str, Any], why: str
) -> None:
    attention_stand_ins.install(monkeypatch, "flash-attn-4", capability=major)
    call = usual_call(device="cuda", dtype=torch.bfloat16, **changes)
    said = str(BACKENDS["flash"].refusal(call))
    assert said.startswith("with flash-attn-4 has ")
    assert why in said
    assert "; with flash-attn 2 needs the package flash-attn" in said
    assert BACKENDS["flash"].refusal(call._replace(gradient=False)) is None


@pytest.mark.parametrize(("major", "changes", "why"), GRADIENTS_4)
def test_auto_takes_the_next_where_flash_attn_4_has_no_gradients(
    monkeypatch: pytest.MonkeyPatch, major: int, changes: dict[str, Any], why: str
) -> None:
    free = {name: backend._replace(refusal=lambda call: None) for name, backend in BACKENDS.items() if name != "flash"}
    monkeypatch.setattr(backends, "BACKENDS", {**BACKENDS, **free})
    attention_stand_ins.install(monkeypatch, "flash-attn-4", capability=major)
    call = usual_call(device="cuda", dtype=torch.bfloat16, **changes)
    names = order(call)
    assert choose(call, "auto").name == names[names.index("flash") + 1]
    assert choose(call._replace(gradient=False), "auto").name == "flash"
    attention_stand_ins.install(monkeypatch, "flash-attn-4", "flash-attn", capability=major)
    assert choose(call, "auto").name == "flash"  # by flash-attn 2


@pytest.mark.parametrize(
    ("major", "sizes"), [(9, [32, 64, 96, 128, 256]), (10, [24, 32, 56, 64, 88, 96, 120, 128, 256])]
)
def test_the_head_sizes_with_gradients_by_flash_attn_4(
    monkeypatch: pytest.MonkeyPatch, major: int, sizes: list[int]
) -> None:
    attention_stand_ins.install(monkeypatch, "flash-attn-4", capability=major)
    call = usual_call(device="cuda", dtype=torch.bfloat16)
    assert [D for D in range(8, 257, 8) if BACKENDS["flash"].refusal(call._replace(head_dim=D)) is None] == sizes


@pytest.mark.parametrize("way", [{"lengths": (5, 0, 9), "cached": (2, 0, 3)}, {"T": 5, "cached": (2, 0, 3)}])
@pytest.mark.parametrize("words", [{"D": 80}, {"D": 32, "softcap": 2.0}])
def test_flash_attn_2_computes_the_gradients_that_flash_attn_4_has_not(
    monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], words: dict[str, Any]
) -> None:
    problem = make_attention(heads=(2, 2), **way, **words).to(torch.bfloat16)
    expected = problem.results("reference")
    attention_stand_ins.install(monkeypatch, "flash-attn", "flash-attn-4")
    monkeypatch.setattr("flash_attn.cute.flash_attn_varlen_func", lambda *_, **__: pytest.fail("not by this one"))
    errors = apart(problem.results("flash"), expected)
    assert max(errors.values()) < 1.5e-2, errors


def test_a_cache_that_alone_has_gradients_counts_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_stand_ins.install(monkeypatch, "flash-attn-4")
    q, bounds, length = torch.randn(4, 2, 80).bfloat16(), torch.tensor([0, 4]), torch.tensor([3])
    cache = torch.randn(1, 3, 2, 80).bfloat16()
    rule = SoftmaxRule(1.0, backend="flash")
    assert attend_packed(q, q, q, rule, bounds, (cache, cache), length).shape == q.shape
    with pytest.raises(ValueError, match="wrong at 80"):
        attend_packed(q, q, q, rule, bounds, (cache.requires_grad_(), cache), length)


def test_a_version_is_a_constant_to_a_compiler() -> None:
    said: list[str | None] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        said.append(imports.version_refusal("numpy", "99", "which is too old"))  # a package that is there
        return x if said[-1] is None else x + 1

    torch._dynamo.reset()
    y = torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(2))
    assert torch.equal(y, torch.ones(2))
    assert f"needs numpy 99 or later, got {version('numpy')}, which is too old" in str(said[-1])


def test_what_was_found_is_said_of_every_backend() -> None:
    rows = {row.name: row for row in found()}
    assert list(rows) == list(BACKENDS)
    assert rows["reference"].training is rows["reference"].inference is None
    assert rows["sdpa"].versions["torch"] == version("torch")  # `__version__` may name a build as well
    assert set(chosen().values()) <= {row.name for row in rows.values() if row.inference is None}
