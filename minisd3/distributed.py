"""One run on many processes, as torchrun starts them: who does what, how a batch is shared out, and how weights are spread.

Every process draws the randomness of the whole batch and takes its own rows of it, so any number of processes makes the same run.
For a process that is alone, every function here is the identity.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from minisd3.config import require

T = TypeVar("T")


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """While open, this process works with the others that torchrun started. Gives the device to compute on: `device`, or on a machine
    with GPUs this process's own."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(x: Tensor) -> Tensor:
    """This process's rows of a batch that all processes drew alike: (B ...) -> (B/processes ...). Raises ValueError if it does not divide."""
    n = processes()
    require(len(x) % n == 0, f"a batch of {len(x)} cannot be shared by {n} processes; make it a multiple of {n}")
    return x.unflatten(0, (n, -1))[dist.get_rank()] if n > 1 else x


def share_list(items: Sequence[T]) -> list[T]:
    """This process's part of a list that all processes have: every n-th."""
    return list(items[dist.get_rank() :: processes()]) if dist.is_initialized() else list(items)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process. All wait for each other here."""
    flags = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def mean(value: Tensor) -> float:
    """The mean of a scalar over the processes."""
    value = value.detach().cpu()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / processes()


# --- two ways to spread a module ----------------------------------------------------------------------------------------------------


def replicate(module: nn.Module) -> nn.Module:
    """The module with all its weights in every process, and gradients averaged over them: DistributedDataParallel."""
    return DistributedDataParallel(module) if dist.is_initialized() else module


def shard(module: nn.Module) -> nn.Module:
    """The module with a part of each weight in every process; a block is whole only while it is at work (FSDP2's fully_shard).

    So each process holds 1/n of weights, gradients and optimiser state. The last block is whole together with what stands outside
    of blocks: its backward pass follows its forward pass at once.
    """
    if dist.is_initialized():
        mesh = init_device_mesh(next(module.parameters()).device.type, (processes(),))
        for blocks in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
            for block in blocks[:-1]:
                fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def bare(module: nn.Module) -> nn.Module:
    """The module itself, whose names are those of a file."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def without_averaging(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While open, gradients of replicas gather in each process. Shards, which have no room for whole gradients, go on averaging."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def to_first(x: Tensor) -> Tensor | None:
    """A copy in main memory of a tensor that may be in shards, for the first process; None in the others."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.detach().to("cpu", copy=True) if is_first() else None


def like(x: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has whole, in shards if `other` is."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
