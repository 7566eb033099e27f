"""Training over several processes: checks that every rank of a process group runs, as a script of its own.

`run(2, "cpu", folder)` starts two ranks over gloo, `run(n, "cuda", folder)` one a GPU over NCCL; each prints, for each
check, what it raised. A rank that waits for ever is ended, and said so.

Shapes: B batch, T time, N packed sequences.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from registry_cases import default_cases, words_for
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hybridzoo.architectures import HybridLM, Spec, build_model
from hybridzoo.training import TrainConfig, build_optimiser
from hybridzoo.training.sharding import shard

VOCABULARY = 32
STUCK = 120.0  # seconds that a rank waits for another
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
KINDS = {"reentrant": CheckpointImpl.REENTRANT, "not reentrant": CheckpointImpl.NO_REENTRANT}


def spec_of(backend: str) -> Spec:
    """Four layers: CARVE with its content gate, Gated DeltaNet-2, Mamba-2 and attention over a window."""
    heads: dict[str, Any] = {"n_heads": 2, "head_dim": 16}
    own = {"backend": backend}
    return Spec.from_dict(
        {
            "name": "four-kinds",
            "d_model": 32,
            "vocab_size": VOCABULARY,
            "mixers": {
                "c": {"type": "carve", **heads, "content_chunk": 16, "content_rank": 4, **own},
                "g": {"type": "gdn2", **heads, **own},
                "m": {"type": "mamba2", **heads, "state_dim": 16, **own},
                "a": {"type": "attention", "n_heads": 2, "window": 16},
            },
            "layers": "c g m a",
        }
    )


def model_of(spec: Spec, device: str, dtype: torch.dtype | None = None) -> HybridLM:
    """The same model on every rank, with every gate at work."""
    torch.manual_seed(0)
    model = build_model(spec, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("content_up"):  # zero at init, where the readout does nothing
                parameter.normal_()
    return model.to(device)


def checkpointed(model: HybridLM, kind: str) -> HybridLM:
    """The model, each block to be computed again in the backward pass."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, KINDS[kind])
    return model


def whole(model: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter or gradient by the name that it has without wrappers, gathered where it is sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.grad if gradients else parameter.detach()
        assert value is not None, name
        name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
        found[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        apart = (found[name] - x).abs().max().item()
        assert apart <= tolerance, f"{name}: {apart:.1e} apart"


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance of all values together, relative to their norm."""
    pairs = [(found[name].float(), x.float()) for name, x in expected.items()]
    return (sum((y - x).square().sum() for y, x in pairs) / sum(x.square().sum() for _, x in pairs)).sqrt().item()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, x in expected.items() if not torch.equal(found[name], x)]
    assert not different


class Rank:
    """Where a check runs: one rank of `world`, on `device`, and its share of each of two batches."""

    def __init__(self, rank: int, world: int, device: str) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.spec = spec_of("triton" if device == "cuda" else "torch")
        self.mesh: DeviceMesh = init_device_mesh(device, (world,))
        ids = torch.randint(VOCABULARY, (2, 2 * world, 40), generator=torch.Generator().manual_seed(1))
        self.ids = ids.to(device)
        self.mine = self.ids[:, 2 * rank : 2 * rank + 2]

    def model(self, dtype: torch.dtype | None = None) -> HybridLM:
        return model_of(self.spec, self.device, dtype)

    def sharded(self, model: HybridLM, policy: MixedPrecisionPolicy | None = None) -> HybridLM:
        shard(model, self.mesh, mp_policy=policy)
        return model

    def packed(self, ids: Tensor) -> dict[str, Tensor]:
        """Rows as one row of twice as many sequences, each cut after 13 tokens."""
        B, T = ids.shape
        ends = torch.arange(B)[:, None] * T + torch.tensor([13, T])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), ends.flatten()]).to(self.device, torch.int32)
        return {"ids": ids.reshape(1, -1), "labels": ids.reshape(1, -1), "cu_seqlens": bounds}

    def train(self, model: nn.Module, batches: Tensor, pack: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Two steps of plain descent, whose rounding nothing magnifies: the losses `[2]` and the parameters after."""
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for ids in batches:
            loss = model(**self.packed(ids)).loss if pack else model(ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        return self.mean(torch.stack(losses)), whole(model)

    def mean(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / self.world

    def as_one_process(self, wrap: Callable[[HybridLM], nn.Module]) -> None:
        """Hold two steps of the wrapped model, each rank on its share, to one process on the whole batch."""
        for pack in (False, True):
            alone = self.model()
            before = whole(alone)
            expected_loss, expected = self.train(alone, self.ids, pack)  # every rank does: their mean is the loss
            loss, found = self.train(wrap(self.model()), self.mine, pack)
            assert (loss - expected_loss).abs().max() < 2e-5
            assert_close(found, expected, 2e-5)
            moved = [name for name, x in expected.items() if (x - before[name]).abs().max() > 2e-4]
            assert len(moved) > len(expected) / 2, "the steps are too small to tell"


CHECKS: dict[str, Callable[[Rank], None]] = {}


def check(run: Callable[[Rank], None]) -> Callable[[Rank], None]:
    """Add a function that raises when a property does not hold."""
    CHECKS[run.__name__] = run
    return run


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within, operations that add in the order of threads do not, where torch has another way."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@check
def replicas_train_as_one_process_on_the_whole_batch(here: Rank) -> None:
    here.as_one_process(DistributedDataParallel)


@check
def a_sharded_model_trains_as_one_process_on_the_whole_batch(here: Rank) -> None:
    here.as_one_process(here.sharded)


@check
def gates_sharded_by_hand_and_freed_after_each_call_train_alike(here: Rank) -> None:
    def wrap(model: HybridLM) -> HybridLM:
        for name, module in model.named_modules():
            if name.endswith(".gates") and list(module.parameters()):
                fully_shard(module, mesh=here.mesh, reshard_after_forward=True)
        for block in model.blocks:
            fully_shard(block, mesh=here.mesh)
        fully_shard(model, mesh=here.mesh)
        return model

    here.as_one_process(wrap)


def _dtypes_in_use(model: HybridLM, ids: Tensor) -> dict[str, torch.dtype]:
    """The dtype of every parameter while its module runs."""
    seen: dict[str, torch.dtype] = {}

    def look(name: str, module: nn.Module, inputs: object) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            seen[f"{name}.{own}"] = parameter.dtype

    handles = [m.register_forward_pre_hook(functools.partial(look, name)) for name, m in model.named_modules()]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


@check
def gates_stay_float32_where_the_rest_computes_in_bfloat16(here: Rank) -> None:
    exact = here.model()(here.mine[0], labels=here.mine[0]).loss
    model = here.sharded(here.model(), BF16)
    seen = _dtypes_in_use(model, here.mine[0])
    assert {name.rpartition(".gates.")[2] for name in seen if ".gates." in name} == {
        *("A_log", "dt_bias", "content_down", "content_up"),
    }
    assert {kind for name, kind in seen.items() if ".gates." in name} == {torch.float32}
    assert {kind for name, kind in seen.items() if ".gates." not in name} == {torch.bfloat16}
    optimiser = build_optimiser(model, TrainConfig(lr=1e-2))
    losses = []
    for _ in range(3):
        out = model(here.mine[0], labels=here.mine[0])
        assert out.logits.dtype == torch.bfloat16
        out.loss.backward()
        assert all(grad.dtype == torch.float32 for grad in whole(model, gradients=True).values())
        assert torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(out.loss.item())
    assert abs(losses[0] - exact.item()) < 0.02 * exact.item()
    assert losses[2] < losses[0]


@check
def every_mixer_reads_its_gates_where_they_are_gathered(here: Rank) -> None:
    for name in default_cases():
        words = words_for(name, head_dim=16, state_dim=16, d_model=32)
        words.pop("d_model")
        data = {"name": name, "d_model": 32, "vocab_size": VOCABULARY, "layers": "x"}
        model = model_of(Spec.from_dict({**data, "mixers": {"x": {"type": name, **words}}}), here.device)
        shard(model, here.mesh, mp_policy=BF16)
        seen = _dtypes_in_use(model, here.mine[0])
        wrong = [own for own, kind in seen.items() if ".gates." in own and kind != torch.float32]
        assert not wrong
        model(here.mine[0], labels=here.mine[0]).loss.backward()
        for own, gradient in whole(model, gradients=True).items():
            assert torch.isfinite(gradient).all(), f"{name}: {own}"


@check
def computing_blocks_again_gives_the_same_bits(here: Rank) -> None:
    def gradients(wrap: Callable[[HybridLM], nn.Module], model: HybridLM) -> dict[str, Tensor]:
        wrapped = wrap(model)
        wrapped(here.mine[0], labels=here.mine[0]).loss.backward()
        return whole(wrapped, gradients=True)

    wraps: dict[str, Callable[[HybridLM], nn.Module]] = {
        "replicated": DistributedDataParallel,
        "sharded": here.sharded,
        "sharded, bfloat16": functools.partial(here.sharded, policy=BF16),
    }
    with deterministic():
        for wrap in wraps.values():
            expected = gradients(wrap, here.model())
            for kind in KINDS:
                assert_equal(gradients(wrap, checkpointed(here.model(), kind)), expected)


@check
def a_state_and_its_gradient_pass_between_calls(here: Rank) -> None:
    ids = here.mine[0]

    def gradients(model: HybridLM, passed: bool = True) -> dict[str, Tensor]:
        state = model(ids[:, :21]).state
        out = model(ids[:, 21:], labels=ids[:, 21:], state=state if passed else None)
        assert all(block[0].delta.S.dtype == torch.float32 for block in out.state[:3])
        out.loss.backward()
        return whole(model, gradients=True)

    exact, without = gradients(here.model()), gradients(here.model(), passed=False)
    exact, without = ({name: here.mean(x) for name, x in each.items()} for each in (exact, without))
    assert apart(without, exact) > 0.1, "the state makes no difference here"
    with deterministic():
        for policy, tolerance in ((None, 1e-4), (BF16, 0.15)):
            found = gradients(here.sharded(here.model(), policy))
            for part in ("", ".gates.", "embedding"):  # each in a group of its own
                expected = {name: x for name, x in exact.items() if part in name}
                assert apart(found, expected) < tolerance, f"{part}: {apart(found, expected):.1e}"
            again = gradients(here.sharded(checkpointed(here.model(), "not reentrant"), policy))
            assert_equal(again, found)


@check
def a_model_cast_to_bfloat16_is_sharded_with_its_float32_gates(here: Rank) -> None:
    model = here.sharded(here.model(torch.bfloat16))
    model(here.mine[0], labels=here.mine[0]).loss.backward()
    for name, gradient in whole(model, gradients=True).items():
        assert gradient.dtype == (torch.float32 if ".gates." in name else torch.bfloat16), name
        assert torch.isfinite(gradient).all(), name


@check
def the_gathered_weights_are_those_of_a_model_that_never_was_sharded(here: Rank) -> None:
    model = here.sharded(checkpointed(here.model(), "not reentrant"), BF16)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    if here.rank == 0:
        assert_equal(weights, dict(here.model().state_dict()))


@check
def a_block_compiles_as_one_graph_inside_a_sharded_model(here: Rank) -> None:
    model = here.model()
    del model.blocks[0], model.blocks[1:]  # Gated DeltaNet-2 alone: a compilation takes seconds
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="inductor" if here.device == "cuda" else "aot_eager")
    losses, found = [], []
    for each in (here.sharded(model), here.sharded(compiled)):
        with torch.autocast(here.device, torch.bfloat16):
            loss = each(here.mine[0], labels=here.mine[0]).loss
        loss.backward()
        losses.append(loss.item())
        found.append(whole(each, gradients=True))
    assert abs(losses[0] - losses[1]) < 1e-2 * losses[0]
    # A compiler that fuses rounds less often: 0.011 by inductor on a CPU.
    assert apart(found[1], found[0]) < 0.05


def main(rank: int, world: int, device: str, store: str) -> None:
    """Run every check as one rank; print a line of JSON for each."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=STUCK),
    )
    here = Rank(rank, world, device)
    for name, run in CHECKS.items():
        started, raised = time.perf_counter(), None
        try:
            run(here)
        except Exception:
            raised = f"rank {rank}:\n{traceback.format_exc()}"
        print(json.dumps({"name": name, "raised": raised, "seconds": time.perf_counter() - started}), flush=True)
    dist.destroy_process_group()


def run(world: int, device: str, folder: Path, limit: float) -> dict[str, str | None]:
    """Run this file as `world` ranks; return what the first rank to fail raised in each check, or that it never ended.

    All ranks are ended after `limit` seconds.
    """
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-P", "-m", "ranks"]
    files = [(folder / f"out{rank}", folder / f"err{rank}") for rank in range(world)]
    ranks = []
    for rank, (out, err) in enumerate(files):
        arguments = [str(rank), str(world), device, str(folder / "store")]
        with out.open("w") as stdout, err.open("w") as stderr:
            ranks.append(subprocess.Popen([*command, *arguments], env=environment, stdout=stdout, stderr=stderr))
    until = time.monotonic() + limit
    try:
        for each in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(max(0.0, until - time.monotonic()))
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    ends = "".join(f"rank {rank}: {err.read_text()[-2000:]}\n" for rank, (_, err) in enumerate(files))
    results: dict[str, str | None] = dict.fromkeys(CHECKS)
    for out, _ in files:
        lines = [json.loads(line) for line in out.read_text().splitlines() if line.startswith("{")]
        found = {line["name"]: line["raised"] for line in lines}
        for name in CHECKS:
            results[name] = results[name] or found.get(name, f"not finished within {limit:g} s:\n{ends}")
    return results


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
