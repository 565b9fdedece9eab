"""kernels.c, half.c and fused.c for PyTorch's tensors, on PyTorch's threads; or nobody, where they were not built.

pip builds them where there is a C compiler with OpenMP. They are plain C without Python's headers: one library serves
every Python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..engine.tape import Tape

logger = logging.getLogger(__name__)

GROUP, PANEL = 32, 16  # as in kernels.c
LANES, LARGEST_HEAD = 16, 256  # as in fused.c

# Queries of a key head up to which our own attention is the faster one where each key has one head of queries (2 to 3
# times for a token, 0.8 at eight), and equal where it has eight.
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

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)  # not subclasses, whose memory may be another or none

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
    for name, arguments in SIGNATURES.items():
        if not hasattr(found, name) and name != "multiply_bfloat16":
            logger.warning("decoding without our own kernels, more slowly (they are of another version: install again)")
            return None
        if hasattr(found, name):
            function = getattr(found, name)
            function.argtypes, function.restype = [KINDS[kind] for kind in arguments], None
    found.choose(BEST)
    return found


def constant(function: Callable[[], bool]) -> Callable[[], bool]:
    """What torch.compiler.assume_constant_result does, which would import the compiler for it: most of a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def available() -> bool:
    return library() is not None


class Recorders(threading.local):
    """The tape, if any, that this thread's calls are recorded on."""

    current: Tape | None = None


recorders = Recorders()
_threads = torch.get_num_threads


def _call(name: str, *args: Tensor | float | None) -> None:
    """Call a function of the library with tensors as bare addresses: types and strides are the caller's to check."""
    found = library()
    assert found is not None, "ask whether they are available()"
    function, plain = getattr(found, name), tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in args)
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.profiler.record_function(f"llama::{name}"):
            function(*plain)
    else:
        function(*plain)
    if recorders.current is not None:
        recorders.current.add(function, plain, args)


def _multiply(x: Tensor, q: Tensor, scales: Tensor, lows: Tensor | None, rows: int) -> Tensor:
    x, shape = x.float().contiguous(), (*x.shape[:-1], rows)
    y, m = x.new_empty(shape), x.numel() // x.shape[-1]
    rounded = x.new_empty(m * q.shape[1] * (2 + GROUP // 2))
    _call("multiply", *_form(q, scales), q, scales, lows, x, rounded, y, m, x.shape[-1], rows, _threads())
    return y


def _form(q: Tensor, scales: Tensor) -> tuple[int, int]:
    """Bits of a weight, and whether its scales are float32."""
    bits = 8 if q.shape[2] == GROUP // 2 else 4  # a group has a line for each of 16 pairs of inputs, or for two
    return bits, int(scales.dtype == torch.float32)


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


def multiply_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    """(..., rows) float32, for x (..., columns) and a bfloat16 weight (rows, columns), whose rows may be apart.

    Only for processors with AVX512-BF16.
    """
    x, (rows, columns) = x.float().contiguous(), weight.shape
    y, m = x.new_empty((*x.shape[:-1], rows)), x.numel() // columns
    near = x.new_empty(m * -(-columns // GROUP) * GROUP, dtype=torch.bfloat16)
    _call("multiply_bfloat16", weight, weight.stride(0), x, near, y, m, columns, rows, _threads())
    return y


def expand(q: Tensor, scales: Tensor, lows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of panels: (16 × panels, 32 × groups) in bfloat16 or float32."""
    weight = torch.empty(len(q) * PANEL, q.shape[1] * GROUP, dtype=dtype)
    rows, columns = weight.shape
    _call("expand", *_form(q, scales), q, scales, lows, columns, rows, int(dtype == torch.bfloat16), weight, _threads())
    return weight


def multiplies_bfloat16() -> bool:
    """Whether there is a product with bfloat16 weights: half.c is for x86, and for compilers that know its words."""
    return available() and hasattr(library(), "multiply_bfloat16")


def fit(*tensors: Tensor) -> bool:
    """Whether the functions below take these: float32 on a CPU, in inference mode, where nobody but a tape looks on.

    Elsewhere PyTorch's own operations compute, which gradients, transforms, tracers and compilers know.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and all(x.is_cpu and x.dtype is torch.float32 and type(x) in PLAIN for x in tensors)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and available()
    )


def fit_norm(x: Tensor, weight: Tensor) -> bool:
    return fit(x, weight) and weight.shape == x.shape[-1:] and weight.is_contiguous()


def fit_rotary(x: Tensor, freqs_cis: Tensor) -> bool:
    """Whether `rotate` takes x (bsz, seqlen, heads, dim), and angles that are the original's."""
    angles = (x.shape[1], x.shape[3] // 2)
    alike = freqs_cis.shape in (angles, (x.shape[0], *angles)) and freqs_cis.dtype is torch.complex64
    return fit(x) and alike and freqs_cis.is_cpu and not freqs_cis.is_conj()


def attends(queries: int, dim: int) -> bool:
    """Whether `attend` takes so many queries of a key head of `dim`, and sooner than PyTorch's, made for more, does."""
    return queries <= FEW_QUERIES and dim % LANES == 0 and dim <= LARGEST_HEAD


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) × weight over the last dimension."""
    x, dim = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    _call("rms_norm", x, weight, eps, x.numel() // dim, dim, y, _threads())
    return y


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) × up, (..., width) each."""
    y = gate.new_empty(gate.shape)
    gates, stride = _tokens(gate, gate.shape[-1])
    ups, other_stride = _tokens(up, up.shape[-1])
    if stride != other_stride:
        gates, ups, stride = gates.contiguous(), ups.contiguous(), gates.shape[1]
    _call("gate", gates, ups, stride, *gates.shape, y, _threads())
    return y


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """As apply_rotary_emb does with one of its tensors."""
    y = x.new_empty(x.shape)
    *_, heads, dim = x.shape
    flat, stride = _tokens(x, heads * dim)
    cis = freqs_cis.contiguous()
    _call("rotate", flat, stride, cis, cis.numel() // cis.shape[-1], len(flat), heads, dim, y, _threads())
    return y


def write_cache(x: Tensor, positions: Tensor, cached: Tensor) -> None:
    """Put x (n, seqlen, heads, dim) to positions (n, seqlen) of the rows cached (n, heads, length, dim)."""
    flat, stride = _tokens(x, x.shape[2] * x.shape[3])
    _call("write_cache", flat, stride, positions.contiguous(), *x.shape, cached, *cached.stride()[:2])


def attend(xq: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """softmax(q kᵀ / √dim) v of queries (n, seqlen, heads, dim), each over its row's keys and values (n, kv_heads,
    length, dim) up to its position (n, seqlen)."""
    xq, positions = xq.contiguous(), positions.contiguous()
    y = torch.empty_like(xq)
    n, seqlen, heads, dim = xq.shape
    sizes = n, seqlen, heads, keys.shape[1], dim
    _call("attend", xq, keys, values, *keys.stride()[:2], positions, *sizes, dim**-0.5, y, _threads())
    return y


def _tokens(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x as tokens (n, width), and how far apart they are."""
    flat = x.reshape(-1, width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)
