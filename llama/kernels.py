"""The products of kernels.c for PyTorch's tensors, on PyTorch's threads; or nobody, where it was not built.

pip builds it where there is a C compiler with OpenMP. It is plain C without Python's headers: one library serves every
Python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

GROUP, PANEL = 32, 16  # as in kernels.c

BEST = 2  # the best kind of processor that there are kernels for: plain C, AVX2, AVX512


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernels, chosen for this processor; None, and one line in the log, where there are none."""
    try:
        spec = importlib.util.find_spec("llama._kernels")
        if spec is None or spec.origin is None:
            raise OSError("they were not built: install again where there is a C compiler with OpenMP")
        found = ctypes.CDLL(spec.origin)
    except OSError as error:
        logger.warning("decoding without our own kernels, more slowly (%s)", error)
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.multiply.argtypes = [number, *[pointer] * 5, *[size] * 3, number]
    found.expand.argtypes = [number, *[pointer] * 3, *[size] * 2, number, pointer, number]
    for function in (found.multiply, found.expand):
        function.restype = None
    found.choose(BEST)
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    return library() is not None


def _multiply(x: Tensor, q: Tensor, scales: Tensor, lows: Tensor | None, rows: int) -> Tensor:
    x, shape = x.float().contiguous(), (*x.shape[:-1], rows)
    y = x.new_empty(shape)
    sizes = x.numel() // x.shape[-1], x.shape[-1], rows, torch.get_num_threads()
    _library().multiply(*_held(q, scales, lows), x.data_ptr(), y.data_ptr(), *sizes)
    return y


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask whether they are available()"
    return found


def _held(q: Tensor, scales: Tensor, lows: Tensor | None) -> tuple[int | None, ...]:
    """A weight in panels, q (panels, groups, lines, 32), as the kernels take it: its bits, and where its parts lie."""
    bits = 8 if q.shape[2] == GROUP // 2 else 4  # a group has a line for each of 16 pairs of inputs, or for two
    return bits, q.data_ptr(), scales.data_ptr(), None if lows is None else lows.data_ptr()


# The compiler cannot see into a call of C; an operation it calls as it is.
_multiply_op = torch.library.custom_op("llama::multiply", _multiply, mutates_args=())


@_multiply_op.register_fake
def _(x: Tensor, q: Tensor, scales: Tensor, lows: Tensor | None, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.float32)


def multiply(x: Tensor, q: Tensor, scales: Tensor, lows: Tensor | None, rows: int) -> Tensor:
    """(..., rows) float32, for x (..., in_features) and a weight of 8 or 4 bits in panels (see `Grouped`)."""
    run = _multiply_op if torch.compiler.is_compiling() else _multiply
    y: Tensor = run(x, q, scales, lows, rows)
    return y


def expand(q: Tensor, scales: Tensor, lows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of panels: (16 × panels, 32 × groups) in bfloat16 or float32."""
    weight = torch.empty(len(q) * PANEL, q.shape[1] * GROUP, dtype=dtype)
    sizes = weight.shape[1], weight.shape[0], int(dtype == torch.bfloat16)
    _library().expand(*_held(q, scales, lows), *sizes, weight.data_ptr(), torch.get_num_threads())
    return weight
