"""Calls the functions of quantized.c, bf16.c and fused.c with PyTorch's tensors and threads.

pip builds them if it finds a C compiler with OpenMP; otherwise `available()` is False. They are
plain C without Python's headers, so one library serves every Python version.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging

import torch
from torch import Tensor

from .. import compat

logger = logging.getLogger(__name__)

# As in quantized.c.
GROUP = 32
PANEL = 16
# As in fused.c.
LANES = 16
LARGEST_HEAD = 256

# The most queries of a key head for which our attention is used. Relative to PyTorch's, with one
# query head per key head it is 2 to 3 times as fast for one token and 0.8 times for eight tokens.
# With eight query heads per key head both are equally fast.
FEW_QUERIES = 8

# Types of arguments: pointers, 64-bit sizes, ints and floats.
KINDS = {"p": ctypes.c_void_p, "s": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
SIGNATURES = {
    "multiply": "iippppppsssi",
    "expand": "iipppssipi",
    "multiply_bfloat16": "pspppsssi",
    "rms_norm": "ppfsspi",
    "gate": "ppssspi",
    "rotate": "pspsssspi",
    "write_cache": "pspsssspss",
    "attend": "pppsspsssssfpi",
}

# Not subclasses, which may keep their data elsewhere or have none.
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)

BEST = 2  # the highest level of kernels to use: 0 plain C, 1 AVX2, 2 AVX512


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library of kernels, set up for this processor.

    Returns None and logs a warning if it was not built or belongs to another version.
    """
    try:
        spec = importlib.util.find_spec("llama._kernels")
        if spec is None or spec.origin is None:
            raise OSError(
                "they were not built: install again where there is a C compiler with OpenMP"
            )
        found = ctypes.CDLL(spec.origin)
    except OSError as error:
        logger.warning("decoding without our own kernels, more slowly (%s)", error)
        return None
    for name, arguments in SIGNATURES.items():
        if not hasattr(found, name) and name != "multiply_bfloat16":
            logger.warning(
                "decoding without our own kernels, more slowly "
                "(they are of another version: install again)"
            )
            return None
        if hasattr(found, name):
            function = getattr(found, name)
            function.argtypes = [KINDS[kind] for kind in arguments]
            function.restype = None
    found.choose(BEST)
    return found


@compat.constant
def available() -> bool:
    return library() is not None


threads = torch.get_num_threads


def call(name: str, *args: Tensor | float | None) -> None:
    """Call a function of the library. Tensors are passed as bare addresses.

    The caller checks their types and strides.
    """
    found = library()
    assert found is not None, "check available() first"
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    if compat.profiler._is_profiler_enabled:
        with torch.profiler.record_function(f"llama::{name}"):
            getattr(found, name)(*plain)
    else:
        getattr(found, name)(*plain)


def _multiply(x: Tensor, q: Tensor, scales: Tensor, mins: Tensor | None, rows: int) -> Tensor:
    x, shape = x.float().contiguous(), (*x.shape[:-1], rows)
    y = x.new_empty(shape)
    m = x.numel() // x.shape[-1]
    rounded = x.new_empty(m * q.shape[1] * (2 + GROUP // 2))
    call(
        "multiply",
        *_form(q, scales),
        q,
        scales,
        mins,
        x,
        rounded,
        y,
        m,
        x.shape[-1],
        rows,
        threads(),
    )
    return y


def _form(q: Tensor, scales: Tensor) -> tuple[int, int]:
    """Bits of a weight, and whether its scales are float32."""
    # A group has 16 lines of one pair of inputs in 8 bits, 8 lines of two pairs in 4 bits.
    bits = 8 if q.shape[2] == GROUP // 2 else 4
    return bits, int(scales.dtype == torch.float32)


# The compiler cannot trace a call of C, but it calls a custom operation as it is.
_multiply_op = torch.library.custom_op("llama::multiply", _multiply, mutates_args=())


@_multiply_op.register_fake
def _(x: Tensor, q: Tensor, scales: Tensor, mins: Tensor | None, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.float32)


def multiply(x: Tensor, q: Tensor, scales: Tensor, mins: Tensor | None, rows: int) -> Tensor:
    """x Wᵀ, (..., rows) float32, for x (..., in_features) and W in panels of 8 or 4 bits.

    quantized.c describes the panels.
    """
    run = _multiply_op if torch.compiler.is_compiling() else _multiply
    y: Tensor = run(x, q, scales, mins, rows)
    return y


def multiply_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, (..., rows) float32, for x (..., columns) and W (rows, columns) in bfloat16.

    W's rows need not be adjacent. Only for processors with AVX512-BF16.
    """
    x = x.float().contiguous()
    rows, columns = weight.shape
    y = x.new_empty((*x.shape[:-1], rows))
    m = x.numel() // columns
    near = x.new_empty(m * -(-columns // GROUP) * GROUP, dtype=torch.bfloat16)
    call("multiply_bfloat16", weight, weight.stride(0), x, near, y, m, columns, rows, threads())
    return y


def expand(q: Tensor, scales: Tensor, mins: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The dequantized rows of panels, (16 × panels, 32 × groups) in bfloat16 or float32."""
    weight = torch.empty(len(q) * PANEL, q.shape[1] * GROUP, dtype=dtype)
    rows, columns = weight.shape
    call(
        "expand",
        *_form(q, scales),
        q,
        scales,
        mins,
        columns,
        rows,
        int(dtype == torch.bfloat16),
        weight,
        threads(),
    )
    return weight


def multiplies_bfloat16() -> bool:
    """Whether `multiply_bfloat16` is available.

    bf16.c needs an x86 processor with AVX512-BF16 and a compiler that supports its instructions.
    """
    if not compat.has_bfloat16_products() or not available():
        return False
    return hasattr(library(), "multiply_bfloat16")


def fits(*tensors: Tensor) -> bool:
    """Whether kernels accept these: float32 on a CPU, in inference mode, not traced or compiled.

    Otherwise PyTorch's own operations run, which support gradients, transforms, tracing and
    compilation.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or library() is None:
        return False
    for x in tensors:
        if not x.is_cpu or x.dtype is not torch.float32 or type(x) not in PLAIN:
            return False
    return not compat.is_tracing()


def fits_bfloat16(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply_bfloat16` accepts these."""
    if weight.dtype is not torch.bfloat16 or not weight.is_cpu or not fits(x):
        return False
    return multiplies_bfloat16() and weight.stride(1) == 1 and type(weight) in PLAIN
