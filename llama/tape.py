"""A pass of the model as a list of calls, to be made again without Python's way through its modules.

What a CUDA graph is to a GPU: the calls of a pass of one shape are recorded with the memory that each reads and writes,
and made again on other values in the same places. Python's way through a layer takes some 0.2 ms, as long as a product
of a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import kernels

ALIGNMENT = 64  # bytes
BLOCK = 2**22  # bytes that a pool grows by, or more


class Pool:
    """Memory that tapes share, for no two are played at once: what one left there, the next may overwrite."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.block = self.used = 0

    def rewind(self) -> None:
        self.block = self.used = 0

    def take(self, like: Tensor) -> Tensor:
        """Uninitialised memory for a dense tensor of the shape and type of `like`."""
        size = -(-like.numel() * like.element_size() // ALIGNMENT) * ALIGNMENT
        while self.block < len(self.blocks) and self.used + size > len(self.blocks[self.block]):
            self.block, self.used = self.block + 1, 0
        if self.block == len(self.blocks):
            self.blocks.append(torch.empty(max(size, BLOCK), dtype=torch.uint8))
        memory = self.blocks[self.block][self.used : self.used + like.numel() * like.element_size()]
        self.used += size
        return memory.view(like.dtype).view(like.shape)


class Tape(TorchDispatchMode):
    """Records what is computed while it is entered, our kernels' calls and PyTorch's operations; `play` repeats it."""

    def __init__(self, pool: Pool):
        super().__init__()  # type: ignore[no-untyped-call]
        self.pool = pool
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.kept: list[Any] = []  # whose memory the calls use

    def __enter__(self) -> Tape:
        self.pool.rewind()
        kernels.recorders.current = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        kernels.recorders.current = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def add(self, call: Callable[..., Any], args: tuple[Any, ...], keep: Any = None) -> None:
        self.calls.append((call, args))
        self.kept.append(keep)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.add(_again, (func, args, kwargs))
        elif not any(returned.alias_info for returned in func._schema.returns):  # else a view, which stays one
            if not isinstance(out, Tensor):
                raise NotImplementedError(f"{func} returns what a tape cannot repeat")
            own = self.pool.take(out)
            if "empty" not in func.__name__:
                own.copy_(out)
                self.add(_again_into, (own, func, args, kwargs))
            out = own
        return out

    def play(self) -> None:
        for call, args in self.calls:
            call(*args)


def _again(func: Any, args: Any, kwargs: Any) -> None:
    func(*args, **kwargs)


def _again_into(out: Tensor, func: Any, args: Any, kwargs: Any) -> None:
    out.copy_(func(*args, **kwargs))
