"""Fully sharded data parallelism (FSDP2) over a model, block by block, with the gates in groups of their own.

For whoever writes a training loop over several processes; loop.py trains in one. May import architectures and below.
"""

from __future__ import annotations

import dataclasses

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int | None = None,
) -> None:
    """Shard `model`, its `blocks` and their gates in place with `fully_shard`; build the optimiser afterwards.

    Where the model is to compute in `mp_policy.param_dtype`, or holds parameters of more than one dtype, each module
    named `gates` is a group of its own without the policy: rates, time steps and content pairs are computed with, and
    reduced, in the dtype that they are stored in. They stay gathered until their gradient is known, since they are
    small. `mesh` and `reshard_after_forward` are as in `fully_shard`, the latter for the blocks.

    Modules choose the dtypes of what they pass on, and a state is float32 in every precision. So inputs are not cast
    (`cast_forward_inputs` is taken as False: embeddings are in `param_dtype` already).

    Raises: `TypeError` for a model without `blocks`, `ValueError` for a policy with an `output_dtype`, which would cast
    states too.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"shard: the model must have `blocks`, an nn.ModuleList; {type(model).__name__} has none")
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if policy.output_dtype is not None:
        raise ValueError(
            f"shard: mp_policy.output_dtype is {policy.output_dtype}, which would cast the states in a model's output "
            "as well; leave it None and cast the logits"
        )
    policy = dataclasses.replace(policy, cast_forward_inputs=False)
    dtypes = {policy.param_dtype, *(parameter.dtype for parameter in model.parameters())} - {None}
    for name, module in model.named_modules():
        gates = name.rpartition(".")[2] == "gates" and any(True for _ in module.parameters())
        if gates and len(dtypes) > 1:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)
