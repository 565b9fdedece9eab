"""How a process joins and leaves the process group, and which device is its own."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # unused; imported later, its default arguments would keep the process group alive
from fairscale.nn.model_parallel import initialize as fs_init

from .parallel import Ranks, let_groups_go


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
    world_size = dist.get_world_size()
    size = world_size if model_parallel_size is None else model_parallel_size
    if size < 1 or world_size % size:
        raise ValueError(
            f"model_parallel_size is {size}, and {world_size} ranks do not divide into groups of it: "
            f"use {either(divisors(world_size))}, or run with --nproc_per_node {max(size, 1)}"
        )
    if fs_init.model_parallel_is_initialized() and fs_init.get_model_parallel_world_size() != size:
        fs_init.destroy_model_parallel()  # layers built before keep the groups of their size
    if not fs_init.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces each step there
            fs_init.initialize_model_parallel(size)
    return device


def patient_ranks() -> Ranks:
    """All ranks, in a group that waits for ever: for a person to type, or a client to come. The model's own collectives
    have a time limit."""
    size = dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if size > 1 else None
    return Ranks(size, dist.get_rank(), group)


@atexit.register
def leave_process_group() -> None:
    """End gloo's threads while the interpreter is whole, whoever made the group, if models are in it.

    A gloo thread needs the interpreter's lock to let go of a collective's tensors. One that comes for it late, when the
    main thread is past its last collective and ends, is unwound by CPython, and that aborts a rank which has done its
    work. A process group joins its threads when the last reference to it goes, so here go all of them.
    """
    if not fs_init.model_parallel_is_initialized():
        return
    if dist.is_initialized() and dist.get_world_size() > 1 and "nccl" in str(dist.get_backend_config()):
        return  # a rank would wait there for one that has failed
    # Before PyTorch 2.8 a process group joins them with the lock held, for ever; its backend, let go last, does not.
    backends = [  # noqa: F841
        group._get_backend(device) for group in dist.distributed_c10d._world.pg_map for device in group._device_types
    ]
    let_groups_go()
    fs_init.destroy_model_parallel()
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


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def either(numbers: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
