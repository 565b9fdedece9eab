"""This rank among the others, how a process joins and leaves them, and which device is its own."""

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

# Unused; imported later, its default arguments would keep the process group alive
import torch.distributed.nn
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor

from . import compat

T = TypeVar("T")


class Ranks:
    """The `size` ranks that share a model, seen from one of them, whose number is `rank`."""

    def __init__(self, size: int = 1, rank: int = 0, group: dist.ProcessGroup | None = None):
        # one rank has no group, and nothing to say to it
        self.size = size
        self.rank = rank
        self.group = group
        self.asking = False
        self.thread: threading.Thread | None = None  # the one that speaks to the others
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of a model, or one read from a pickle, is of the ranks it comes to
        return model_ranks, ()

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def split(self, n: int) -> int:
        """One rank's part of a dimension.

        The checkpoint was checked to divide before any layer is built.
        """
        assert n % self.size == 0, f"{n} does not divide over {self.size} ranks"
        return n // self.size

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place. Only for several ranks."""
        self.check_gradients(x)
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(..., n / size) on each rank -> (..., n) on all. Only for several ranks."""
        self.check_gradients(x)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def all(self, value: bool) -> bool:
        """Whether it is so on every rank. Only for several ranks."""
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def check_gradients(self, x: Tensor) -> None:
        """Raise RuntimeError where gradients are wanted: plain collectives do not carry them."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"gradients over {self.size} ranks are not computed: train on one rank, or run "
                "under torch.no_grad()"
            )

    def share(self, x: Tensor) -> Tensor:
        """The values that the first rank has in `x`, on all of them."""
        if self.group is not None:
            self._check()
            dist.broadcast(x, src=dist.get_global_rank(self.group, 0), group=self.group)
        return x

    def ask_first(self, question: Callable[[], T]) -> T:
        """What `question` returns or raises on the first rank, on all ranks; no other is asked."""
        if self.group is None:
            return question()
        self._check()
        told: list[Any] = [None, None]
        if self.rank == 0:
            self.asking = True
            try:
                told[0] = question()
            except BaseException as error:  # of whatever kind: the other ranks wait
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
        """What `make` returns, once all ranks have seen that each of them made the same.

        Raises ValueError where they did not, and on each rank what `make` raised there.
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
        """Raise RuntimeError rather than begin what the other ranks do not take part in."""
        if self.asking:
            raise RuntimeError(
                f"a check asked the model itself, and of {self.size} ranks only the first runs it: "
                "ask after the call"
            )
        with self.lock:
            me = threading.current_thread()
            if self.thread is not None and self.thread is not me and self.thread.is_alive():
                raise RuntimeError(
                    f"several threads ask one model on {self.size} ranks: use one thread"
                )
            self.thread = me


# One for each group of several ranks in which something was built.
_joined: list[Ranks] = []


def model_ranks() -> Ranks:
    """The ranks that share what this one builds."""
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
    """Keep no reference to a group: its threads end with the last one."""
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
    """Join the process group, split it by `model_parallel_size`; returns this rank's device.

    Under torchrun the group is torchrun's; without it, a group of this process alone, which needs
    no port and no environment variable. Raises ValueError where ranks and devices or ranks and
    groups do not fit.
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
            f"model_parallel_size is {size}, and {world_size} ranks do not divide into groups of "
            f"it: use {either(divisors(world_size))}, or run with --nproc_per_node {max(size, 1)}"
        )
    if fs_init.model_parallel_is_initialized() and fs_init.get_model_parallel_world_size() != size:
        fs_init.destroy_model_parallel()  # layers built before keep the groups of their size
    if not fs_init.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces each step there
            fs_init.initialize_model_parallel(size)
    return device


def patient_ranks() -> Ranks:
    """All ranks, in a group that waits for ever: for a person to type, or a client to come.

    The model's own collectives have a time limit.
    """
    size = dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if size > 1 else None
    return Ranks(size, dist.get_rank(), group)


@atexit.register
def leave_process_group() -> None:
    """End gloo's threads while the interpreter is whole, whoever made the group of the models.

    A gloo thread needs the interpreter's lock to let go of a collective's tensors. One that comes
    for it late, when the main thread is past its last collective and ends, is unwound by CPython,
    and that aborts a rank which has done its work. A process group joins its threads when the last
    reference to it goes, so here go all of them.
    """
    if not fs_init.model_parallel_is_initialized():
        return
    if (
        dist.is_initialized()
        and dist.get_world_size() > 1
        and "nccl" in str(dist.get_backend_config())
    ):
        return  # a rank would wait there for one that has failed
    # Before PyTorch 2.8 a process group joins them with the lock held, for ever; its backend, let
    # go last, does not.
    backends = compat.group_backends()  # noqa: F841
    let_groups_go()
    fs_init.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def select_device(device: str | torch.device) -> torch.device:
    """The device of this rank: with "auto" cuda if there is one, else mps, else cpu.

    On cuda each process has a GPU of its own.
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
        # the other ranks' contexts would cost this rank's GPU memory otherwise
        torch.cuda.set_device(device)
    return device


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def either(numbers: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
