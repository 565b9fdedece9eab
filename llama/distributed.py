"""The ranks that share a model: process groups, collectives and each rank's device."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import os
import pickle
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Not used, but imported before there is a process group: otherwise the default arguments of its
# functions would keep the group alive.
import torch.distributed.nn
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor

from . import compat

T = TypeVar("T")


class Ranks:
    """The `size` ranks that share a model, as seen from rank number `rank`."""

    def __init__(self, size: int = 1, rank: int = 0, group: dist.ProcessGroup | None = None):
        # A single rank has no group and does not communicate.
        self.size = size
        self.rank = rank
        self.group = group
        self.asking = False
        self.thread: threading.Thread | None = None  # the one that communicates with other ranks
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled model belongs to the ranks of the process that makes it.
        return model_ranks, ()

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def split(self, n: int) -> int:
        """One rank's part of a dimension.

        It always divides evenly: checkpoints are checked before any layer is built.
        """
        assert n % self.size == 0, f"{n} does not divide over {self.size} ranks"
        return n // self.size

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place. Requires several ranks."""
        self.check_gradients(x)
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' x, (..., n / size), to (..., n). Requires several ranks."""
        self.check_gradients(x)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def all(self, value: bool) -> bool:
        """Whether `value` is true on every rank. Requires several ranks."""
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def check_gradients(self, x: Tensor) -> None:
        """Raise RuntimeError if x needs gradients: plain collectives do not propagate them."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"gradients are not supported on {self.size} ranks: train on one rank, or run "
                "under torch.no_grad()"
            )

    def share(self, x: Tensor) -> Tensor:
        """Copy the first rank's values of `x` to all ranks, in place."""
        if self.group is not None:
            self._check()
            dist.broadcast(x, src=dist.get_global_rank(self.group, 0), group=self.group)
        return x

    def ask_first(self, question: Callable[[], T]) -> T:
        """Call `question` on the first rank only; return or raise the outcome on all ranks."""
        if self.group is None:
            return question()
        self._check()
        told: list[Any] = [None, None]
        if self.rank == 0:
            self.asking = True
            try:
                told[0] = question()
            except BaseException as error:  # any kind, because the other ranks are waiting
                caught = error
                told[1] = (
                    error if can_pickle(error) else RuntimeError(f"{type(error).__name__}: {error}")
                )
            self.asking = False
        dist.broadcast_object_list(told, src=dist.get_global_rank(self.group, 0), group=self.group)
        if told[1] is not None:
            raise caught if self.rank == 0 else told[1]
        answer: T = told[0]
        return answer

    def alike(self, make: Callable[[], T]) -> T:
        """Call `make` on every rank; return its result if it is the same on all of them.

        Raises ValueError if the results differ. A rank on which `make` fails raises that error.
        """
        if self.group is None:
            return make()
        self._check()
        made: T | Exception
        try:
            made = make()
        except Exception as error:
            made = error
        digests: list[Any] = [None] * self.size
        ours = hashlib.sha256(repr(made).encode(errors="replace")).digest()
        dist.all_gather_object(digests, ours, group=self.group)
        if isinstance(made, Exception):
            raise made
        if len(set(digests)) > 1:
            raise ValueError(
                f"{self.size} ranks were given different requests: pass the same to each of them"
            )
        return made

    def _check(self) -> None:
        """Raise RuntimeError if the other ranks would not take part in a collective."""
        if self.asking:
            raise RuntimeError(
                f"a check called the model, but only the first of {self.size} ranks runs checks: "
                "call the model after the check"
            )
        with self.lock:
            me = threading.current_thread()
            if self.thread is not None and self.thread is not me and self.thread.is_alive():
                raise RuntimeError(
                    f"several threads call one model on {self.size} ranks: use one thread"
                )
            self.thread = me


# One for each process group of several ranks on which a model was built.
_joined: list[Ranks] = []


def model_ranks() -> Ranks:
    """The ranks that share the layers built by this process."""
    if not fs_init.model_parallel_is_initialized() or fs_init.get_model_parallel_world_size() == 1:
        return Ranks()
    group = fs_init.get_model_parallel_group()
    for ranks in _joined:
        if ranks.group is group:
            return ranks
    _joined.append(
        Ranks(fs_init.get_model_parallel_world_size(), fs_init.get_model_parallel_rank(), group)
    )
    return _joined[-1]


def let_groups_go() -> None:
    """Drop all references to process groups, whose threads end with the last reference."""
    for ranks in _joined:
        ranks.group = None


def can_pickle(value: object) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


def init_model_parallel(
    device: str | torch.device = "auto", model_parallel_size: int | None = None
) -> torch.device:
    """Join the process group, split it by `model_parallel_size`, and return this rank's device.

    Under torchrun, the group is torchrun's. Otherwise it contains only this process and needs no
    port or environment variable. Raises ValueError if there are too few devices for the ranks,
    or if the ranks cannot be split into groups of `model_parallel_size`.
    """
    device = select_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=compat.hash_store(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    size = world_size if model_parallel_size is None else model_parallel_size
    if size < 1 or world_size % size:
        raise ValueError(
            f"model_parallel_size is {size}, which does not divide the {world_size} ranks: "
            f"use {either(divisors(world_size))}, or run with --nproc_per_node {max(size, 1)}"
        )
    if fs_init.model_parallel_is_initialized() and fs_init.get_model_parallel_world_size() != size:
        fs_init.destroy_model_parallel()  # existing layers keep their own groups
    if not fs_init.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints each step
            fs_init.initialize_model_parallel(size)
    return device


def patient_ranks() -> Ranks:
    """All ranks, in a group that can wait indefinitely for a user's input or a client's request.

    The model's own collectives have a time limit.
    """
    size = dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if size > 1 else None
    return Ranks(size, dist.get_rank(), group)


@atexit.register
def leave_process_group() -> None:
    """End gloo's threads before the interpreter shuts down, whoever made the process group.

    A gloo thread needs the GIL to release a collective's tensors. If it requests the GIL while the
    interpreter is shutting down, CPython unwinds the thread, and that aborts a rank which has
    finished its work. A process group joins its threads when the last reference to it is dropped,
    so all references are dropped here.
    """
    if not fs_init.model_parallel_is_initialized():
        return
    if (
        dist.is_initialized()
        and dist.get_world_size() > 1
        and "nccl" in str(dist.get_backend_config())
    ):
        return  # destroying NCCL's group would wait for a rank that has failed
    # Before PyTorch 2.8, a process group holds the GIL while it joins its threads, which deadlocks.
    # Its backends do not, so this reference keeps them alive until the end.
    backends = compat.group_backends()  # noqa: F841
    let_groups_go()
    fs_init.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def select_device(device: str | torch.device) -> torch.device:
    """The device of this rank. "auto" is cuda if available, else mps, else cpu.

    On cuda, each process gets its own GPU. Raises ValueError if the device is not available.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(device)
        if device.type == "cuda" and 0 < gpus < processes:
            plural = "" if gpus == 1 else "s"
            raise ValueError(
                f"{processes} processes on this node, but {gpus} GPU{plural}: "
                f"run with --nproc_per_node {gpus}"
            )
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError):
        raise ValueError(
            f"device is {str(device)!r}, which this machine does not have: use 'auto' or 'cpu'"
        ) from None
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if processes > 1:
        # Otherwise each rank would also create a context on GPU 0, which takes memory.
        torch.cuda.set_device(device)
    return device


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def either(numbers: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
