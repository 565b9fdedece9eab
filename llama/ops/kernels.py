"""quantized.c, bf16.c and fused.c for PyTorch's tensors, on PyTorch's threads; or nothing, where
they were not built.

pip builds them where there is a C compiler with OpenMP. They are plain C without Python's headers:
one library serves every Python.
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

# as in quantized.c
GROUP = 32
PANEL = 16
# as in fused.c
LANES = 16
LARGEST_HEAD = 256

# Queries of a key head up to which our own attention is the faster one where each key has one head
# of queries (2 to 3 times for a token, 0.8 at eight), and equal where it has eight.
FEW_QUERIES = 8

# The arguments of each function: pointers, sizes of 64 bits, ints and floats.
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

# not subclasses, whose memory may be another or none
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)

BEST = 2  # the best kind of processor that there are kernels for: plain C, AVX2, AVX512


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernels, chosen for this processor; None, and one line in the log, where there are
    none.
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
    """Call a function of the library with tensors as bare addresses: types and strides are the
    caller's to check.
    """
    found = library()
    assert found is not None, "ask whether they are available()"
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
    # a group has a line for each of 16 pairs of inputs, or for two
    bits = 8 if q.shape[2] == GROUP // 2 else 4
    return bits, int(scales.dtype == torch.float32)


# The compiler cannot see into a call of C; an operation it calls as it is.
_multiply_op = torch.library.custom_op("llama::multiply", _multiply, mutates_args=())


@_multiply_op.register_fake
def _(x: Tensor, q: Tensor, scales: Tensor, mins: Tensor | None, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.float32)


def multiply(x: Tensor, q: Tensor, scales: Tensor, mins: Tensor | None, rows: int) -> Tensor:
    """(..., rows) float32, for x (..., in_features) and a weight of 8 or 4 bits in panels (see
    `Grouped`).
    """
    run = _multiply_op if torch.compiler.is_compiling() else _multiply
    y: Tensor = run(x, q, scales, mins, rows)
    return y


def multiply_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    """(..., rows) float32, for x (..., columns) and a bfloat16 weight (rows, columns), whose rows
    may be apart.

    Only for processors with AVX512-BF16.
    """
    x = x.float().contiguous()
    rows, columns = weight.shape
    y = x.new_empty((*x.shape[:-1], rows))
    m = x.numel() // columns
    near = x.new_empty(m * -(-columns // GROUP) * GROUP, dtype=torch.bfloat16)
    call("multiply_bfloat16", weight, weight.stride(0), x, near, y, m, columns, rows, threads())
    return y


def expand(q: Tensor, scales: Tensor, mins: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of panels: (16 × panels, 32 × groups) in bfloat16 or float32."""
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
    """Whether there is a product with bfloat16 weights here.

    bf16.c is for x86 processors with AVX512-BF16, and for compilers that know its instructions.
    """
    if not compat.has_bfloat16_products() or not available():
        return False
    return hasattr(library(), "multiply_bfloat16")


def fits(*tensors: Tensor) -> bool:
    """Whether kernels take these: float32 on a CPU, in inference mode, not traced or compiled.

    Elsewhere PyTorch's own operations compute, which gradients, transforms, tracers and compilers
    know.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or library() is None:
        return False
    for x in tensors:
        if not x.is_cpu or x.dtype is not torch.float32 or type(x) not in PLAIN:
            return False
    return not compat.is_tracing()


def fits_bfloat16(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply_bfloat16` takes these."""
    if weight.dtype is not torch.bfloat16 or not weight.is_cpu or not fits(x):
        return False
    return multiplies_bfloat16() and weight.stride(1) == 1 and type(weight) in PLAIN
