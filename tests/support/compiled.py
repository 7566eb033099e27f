"""Compiling the Triton kernels for GPUs that need not be there: a launch is planned on tensors without storage."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybridzoo.kernels.fused import backward, forward
from hybridzoo.kernels.fused.form import form_of
from hybridzoo.kernels.fused.launch import Launch
from hybridzoo.kernels.fused.memory import Tensors
from hybridzoo.kernels.fused.room import room
from hybridzoo.kernels.recurrence_op import Call, parted

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: bytes of shared memory a block, and of stack (where spills go) a thread."""

    shared: int
    registers: int
    stack: int


def planned(
    flags: dict[str, Any],
    K: int,
    V: int,
    dtype: torch.dtype,
    packed: bool = False,
    chunk: int = 64,
    rank: int = 16,
    heads: int = 16,
    norm: bool = False,
    group: int = 1,
    inference: bool = False,
    fresh: bool = False,
) -> list[tuple[Launch, Tensors]]:
    """The launches of a call with these five flags, forward and backward, as the host would make them, and tensors.

    With `inference` also those of a forward pass that keeps nothing. States are given and asked for, unless `fresh`.
    """
    B, T, N = (1, 4096, 3) if packed else (2, 2048, 2)
    HV = heads * group

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def single(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.float32)

    def gate(flag: str, dim: int) -> torch.Tensor | None:
        return {"scalar": empty(B, T, HV), "channel": empty(B, T, HV, dim)}.get(flags[flag])

    content = flags["erase"] == "content"
    started, counted = not fresh, content and not fresh
    call = Call(
        q=empty(B, T, heads, K),
        k=empty(B, T, heads, K),
        v=empty(B, T, HV, V),
        log_decay=gate("decay", K),
        erase_logits=None if flags["erase"] == "none" else empty(B, T, HV, K),
        down=single(HV, rank, V) if content else None,
        up=single(HV, K, rank) if content else None,
        correct=gate("correct", K),
        write=gate("write", V),
        S=single(N, HV, K, V) if started else None,
        o_sum=single(N, HV, V) if counted else None,
        o_mean=single(N, HV, V) if counted else None,
        count=empty(N, dtype=torch.int32) if counted else None,
        cu_seqlens=empty(N + 1, dtype=torch.int64) if packed else None,
        stored=flags["predict"] == "stored",
        scale=K**-0.5,
        chunk=chunk if content else 0,
        qk_norm=norm,
        segments=0,
        ends=started,
    )
    form, kept, ends = form_of(call), room(call), call.new_ends()
    found = []
    for save in (False, True) if inference else (True,):
        the = forward.plan(form, save)
        memory = forward.memory_of(call, form, the, call.v, ends, kept if save else [])
        found += [(launch, memory.tensors) for launch in the.launches]
    back = backward.plan(form)
    d_results = (call.v, *parted(ends))
    gradients = backward.gradients(call, form, back)
    counters = empty(N, dtype=torch.int32) if content else None
    given = backward.memory_of(call, form, back, kept)
    given.add({**backward.results(call.v if norm else None, d_results), **gradients, "counters": counters})
    return found + [(launch, given.tensors) for launch in back.launches]


def usage(planned: Launch, tensors: Tensors, capability: int) -> Usage:
    """Compile a launch for a compute capability such as 90, and read what it takes."""
    constants, attributes, signature = dict(planned.constants), {}, {}
    for index, parameter in enumerate(planned.kernel.params):
        name = parameter.name
        value = planned.numbers.get(name, tensors.get(name))
        if name in constants or value is None or (value == 1 if isinstance(value, int) else False):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (
            isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(planned.kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=planned.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return Usage(made.metadata.shared, int(found[1]), int(found[2]))
