"""Check, before loading, that a rank's device has enough free memory."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..model import ModelArgs
from .files import size_text

# The most prompt tokens in one pass, in addition to one token for each slot.
CHUNK_TOKENS = 512


class Memory(NamedTuple):
    """The memory that one rank needs, in bytes."""

    weights: int
    cache_row: int  # for each slot
    pass_bytes: int  # largest temporaries of a pass

    def total(self, rows: int) -> int:
        return self.weights + rows * self.cache_row + self.pass_bytes


def memory_needs(
    args: ModelArgs, world_size: int, dtype: torch.dtype, bytes_per_weight: float
) -> Memory:
    """Compute the memory that one rank needs.

    `bytes_per_weight` applies to the linear layers. Everything else has type `dtype`.
    """
    attention = 2 * args.dim * args.head_dim * (args.n_heads + args.kv_heads)
    feed_forward = 3 * args.dim * args.hidden_dim
    embedding = args.dim * args.vocab_size  # the output layer has the same size
    linear = args.n_layers * (attention + feed_forward) + embedding
    norms = (2 * args.n_layers + 1) * args.dim
    split = linear * bytes_per_weight + embedding * dtype.itemsize
    weights = split / world_size + norms * dtype.itemsize
    keys_and_values = 2 * args.n_layers * args.kv_heads * args.head_dim * args.max_seq_len
    cache_row = keys_and_values * dtype.itemsize // world_size
    pass_tokens = min(CHUNK_TOKENS + args.max_batch_size, args.max_batch_size * args.max_seq_len)
    # The tensors at the measured peak of a pass: x, its norm and the update to x; the gate and up
    # projections, before and after they are split, and their product. Then the logits, as computed
    # and in float32, if all positions are requested.
    layer = (4 * args.dim + 6 * args.hidden_dim // world_size) * dtype.itemsize
    logits = args.vocab_size * (dtype.itemsize + 4)
    return Memory(int(weights), cache_row, pass_tokens * (layer + logits))


def needed(name: str, args: ModelArgs, needs: Memory) -> str:
    rows = args.max_batch_size
    return (
        f"{name} needs {size_text(needs.weights)} for its weights, "
        f"{size_text(rows * needs.cache_row)} for a cache of "
        f"max_batch_size {rows} × max_seq_len {args.max_seq_len} "
        f"and {size_text(needs.pass_bytes)} for a pass, per rank"
    )


def check_memory(name: str, args: ModelArgs, needs: Memory, device: torch.device) -> None:
    """Raise ValueError if this rank needs more memory than its device has free."""
    free = free_memory(device)
    if needs.total(args.max_batch_size) <= free:
        return
    advice = "use fewer bits per weight, more ranks or a smaller model"
    fitting = (free - needs.total(0)) // needs.cache_row
    if fitting > 0:
        advice = f"build with max_batch_size {fitting} or a smaller max_seq_len"
    raise ValueError(
        f"{needed(name, args, needs)}, and {device} has {size_text(free)} free for it: {advice}"
    )


@contextlib.contextmanager
def allocating(name: str, args: ModelArgs, needs: Memory, device: torch.device) -> Iterator[None]:
    """Convert a failed allocation to a ValueError: a device may grant less than was free."""
    try:
        yield
    except RuntimeError as error:
        on_cpu = "DefaultCPUAllocator" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        advice = (
            "build with a smaller max_batch_size or max_seq_len, "
            "or use fewer bits per weight or more ranks"
        )
        raise ValueError(
            f"{needed(name, args, needs)}, and {device} refused memory: {advice}"
        ) from error


def free_memory(device: torch.device) -> int:
    """Return the bytes that this rank may still use on its device.

    The ranks of a node share its main memory evenly.
    """
    if device.type == "cuda":
        # Memory that PyTorch has reserved but not allocated.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        free = min(int(available.split()[1]) * 1024, container_memory())
    except OSError:  # macOS: total memory is the closest bound in the standard library
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def container_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Return the bytes that this process may still use under its cgroup limits; inf without any.

    Checks the cgroup named in `own` and its ancestors. Inside a container the name may be the
    host's, while `root` is the container's own.
    """
    group = root
    if own.exists():
        name = re.search("^0::/(.*)", own.read_text(), re.MULTILINE)
        if name:
            group = root / name[1]
    left = math.inf
    for folder in (group, *group.parents):
        # The files may be missing, or contain "max" for no limit.
        with contextlib.suppress(OSError, KeyError, ValueError):
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # The page cache counts as free, except for shared memory and tmpfs.
            left = min(left, max(limit - used + int(stat["file"]) - int(stat["shmem"]), 0))
    return left
