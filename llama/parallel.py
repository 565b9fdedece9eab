"""The process group and device of this rank, and fairscale's parallel layers, for inference.

fairscale's own constructors allocate the whole weight on every rank and cannot build on the meta device; its reduce is
an autograd function, which breaks a compiled graph. The subclasses below keep its types and its groups, hold this
rank's shard only, and reduce with plain collectives. On one rank they are ordinary layers, and differentiable.
"""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel import layers as fs_layers
from torch import Tensor, nn


def init_model_parallel(device: str | torch.device = "auto", model_parallel_size: int | None = None) -> torch.device:
    """Join the process group and split it into groups of `model_parallel_size` ranks; returns this rank's device.

    Under torchrun the group is torchrun's; without it, a group of this process alone, which needs no port and no
    environment variable. Raises ValueError where ranks and devices or ranks and groups do not fit.
    """
    device = select_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        if backend == "gloo":
            # gloo's threads must not outlive the interpreter: now and then that aborts a rank which has done its work.
            atexit.register(leave_process_group)
    world_size = dist.get_world_size()
    size = world_size if model_parallel_size is None else model_parallel_size
    if size < 1 or world_size % size:
        raise ValueError(
            f"model_parallel_size is {size}, and {world_size} ranks do not divide into groups of it: "
            f"use {either(divisors(world_size))}, or run with --nproc_per_node {max(size, 1)}"
        )
    if fs_init.model_parallel_is_initialized() and fs_init.get_model_parallel_world_size() != size:
        fs_init.destroy_model_parallel()  # forgets the groups; layers built before keep theirs
    if not fs_init.model_parallel_is_initialized():
        fs_init.initialize_model_parallel(size)
    return device


def leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def select_device(device: str | torch.device) -> torch.device:
    """The device of this rank: with "auto", cuda if there is one, else mps, else cpu; on cuda, one GPU per process."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    try:
        device = torch.device(device)
        if device.type == "cuda" and 0 < gpus < processes:
            plural = "" if gpus == 1 else "s"
            raise ValueError(
                f"{processes} processes on this node, but {gpus} GPU{plural}: run with --nproc_per_node {gpus}"
            )
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError):
        raise ValueError(f"device is {str(device)!r}, which this machine does not have: use 'auto' or 'cpu'") from None
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if processes > 1:
        torch.cuda.set_device(device)  # the other ranks' contexts would cost this rank's GPU memory otherwise
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still use on its device; the ranks of a node share its main memory evenly."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept for the next tensor
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
    except OSError:  # macOS: all memory is the closest bound that the standard library knows
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def model_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that share this rank's model, or None where it is not split."""
    if not fs_init.model_parallel_is_initialized() or fs_init.get_model_parallel_world_size() == 1:
        return None
    return fs_init.get_model_parallel_group()


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def either(numbers: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def split(size: int, group: dist.ProcessGroup | None) -> int:
    """This rank's part of a dimension. The checkpoint was checked to divide before any layer is built."""
    assert size % group_size(group) == 0, f"{size} does not divide over {group_size(group)} ranks"
    return size // group_size(group)


def share(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The values that the group's first rank has in `x`, on every rank."""
    if group is not None:
        dist.broadcast(x, src=dist.get_global_rank(group, 0), group=group)
    return x


def share_object(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The picklable value that the group's first rank has, on every rank."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]


def gather_last_dim(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(..., n / world_size) on each rank -> (..., n) on all."""
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(group_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class ShardedLinear(nn.Module):
    """What the two linear layers share: this rank's weight, as a parameter or in one of quantize.py's stores."""

    weight: nn.Parameter
    store: nn.Module | None

    def hold(self, store: nn.Module) -> None:
        """Multiply by `store` in place of the weight."""
        self.store = store
        del self.weight

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.store is None else self.store(x)


class ColumnParallelLinear(ShardedLinear, fs_layers.ColumnParallelLinear):
    """y = x Wᵀ with W split by rows: weight (out_features / world_size, in_features); each rank has its part of y."""

    def __init__(self, in_features: int, out_features: int, *, gather_output: bool = False):
        nn.Module.__init__(self)
        self.group = model_parallel_group()
        self.gather_output = gather_output
        self.weight = new_weight(split(out_features, self.group), in_features)
        self.store = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return gather_last_dim(y, self.group) if self.gather_output else y


class RowParallelLinear(ShardedLinear, fs_layers.RowParallelLinear):
    """y = x Wᵀ with W split by columns: weight (out_features, in_features / world_size); x comes split, y is whole."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.group = model_parallel_group()
        self.weight = new_weight(out_features, split(in_features, self.group))
        self.store = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        if self.group is not None:
            dist.all_reduce(y, group=self.group)
        return y


class ParallelEmbedding(fs_layers.ParallelEmbedding):
    """Token embeddings split along the model dimension: weight (num_embeddings, embedding_dim / world_size)."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)
        self.group = model_parallel_group()
        self.weight = new_weight(num_embeddings, split(embedding_dim, self.group))

    def forward(self, tokens: Tensor) -> Tensor:
        return gather_last_dim(F.embedding(tokens, self.weight), self.group)


def new_weight(rows: int, columns: int) -> nn.Parameter:
    """A weight to be trained, or on the meta device to be replaced by a checkpoint's."""
    return nn.Parameter(nn.init.normal_(torch.empty(rows, columns), std=0.02))
