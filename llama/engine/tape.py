"""A pass of the model as a list of calls, to be made again without Python's way through its modules.

What a CUDA graph is to a GPU: the calls of a pass of one shape are recorded with the memory that each reads and writes,
and made again on other values in the same places. Python's way through a layer takes some 0.2 ms, as long as a product
of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import kernels

ALIGNMENT = 64  # bytes
BLOCK = 2**22  # bytes that a pool grows by, or more


class Pool:
    """Memory that tapes share, for no two are played at once: what one left there, the next may overwrite."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.block = self.used = 0

    def rewind(self) -> None:
        self.block = self.used = 0

    def has(self, tensor: Tensor) -> bool:
        memory = tensor.untyped_storage().data_ptr()
        return any(block.data_ptr() == memory for block in self.blocks)

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
    """Records what is computed while it is entered, our kernels' calls and PyTorch's operations; `play` repeats it.

    What is computed lies in the pool from then on. Raises NotImplementedError for an operation that answers with
    something else than tensors: what Python decided by it would be decided for ever.
    """

    def __init__(self, pool: Pool):
        super().__init__()  # type: ignore[no-untyped-call]
        self.pool = pool
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.outside: list[tuple[Tensor, int]] = []  # what our kernels find elsewhere, and at which address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and to say so would import the compiler, most of a second

    def __enter__(self) -> Tape:
        self.pool.rewind()
        super().__enter__()  # type: ignore[no-untyped-call]
        kernels.recorders.current = self
        return self

    def __exit__(self, *error: Any) -> None:
        kernels.recorders.current = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def add(self, function: Callable[..., Any], plain: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        """Note a call of a kernel with `args`, `plain` where tensors are their addresses."""
        self.calls.append((function, plain))
        self.outside += [(tensor, tensor.data_ptr()) for tensor in _tensors(args) if not self.pool.has(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        out = call()
        memories = {tensor.untyped_storage().data_ptr() for tensor in _tensors(args)}
        results = _tensors([out])
        if func._schema.is_mutable:
            self.calls.append((call, ()))
        elif len(results) != (len(out) if isinstance(out, (list, tuple)) else 1):
            raise NotImplementedError(f"{func} returns what a tape cannot repeat")
        elif any(tensor.untyped_storage().data_ptr() not in memories for tensor in results):
            own = [self.pool.take(tensor) for tensor in results]
            if "empty" not in func.__name__:  # else there is nothing in it to be computed again
                _copy(own, out)
                self.calls.append((_again, (own, call)))
            return own[0] if isinstance(out, Tensor) else type(out)(own)
        return out  # a view, which sees what its memory gets

    def has_moved(self) -> bool:
        """Whether memory that is not the pool's was given up for another since it was recorded."""
        return any(tensor.data_ptr() != address for tensor, address in self.outside)

    def play(self) -> None:
        for call, args in self.calls:
            call(*args)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Those among an operation's arguments or results, which may be lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _copy(to: list[Tensor], source: Any) -> None:
    for target, tensor in zip(to, _tensors([source]), strict=True):
        target.copy_(tensor)


def _again(own: list[Tensor], call: Callable[[], Any]) -> None:
    _copy(own, call())
