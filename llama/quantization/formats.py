"""The formats that a linear layer may keep its weight in: a parameter, packed in 16 bits, in 8 or 4
bits.

Each class is a packed weight: made from one rank's (out_features, in_features), it multiplies (...,
in_features) activations and gives back, dequantised, the weight that it multiplies by. Activations
keep 16 bits: Llama's outlier channels do not survive 8.
"""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compat
from ..ops import GROUP, PANEL, expand_tokens, kernels, transparent
from .groups import QUANTISED_ROWS, Groups, quantize

logger = logging.getLogger(__name__)

# Quantised weights are expanded so many rows at a time: temporaries stay in the processor's cache.
BLOCK_ROWS = 512

# What a decode step in 16 bits takes on top for little: it is bound by reading the weights.
SPARE_TOKENS = 3


def expand_dtype() -> torch.dtype:
    """The type that this CPU multiplies fastest."""
    return torch.bfloat16 if compat.has_bfloat16_products() else torch.float32


class PackedWeight(nn.Module):
    """What packed weights have in common: they move between devices, and keep their own types."""

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(fn(buffer).device))
        return self


@transparent
class Rows(nn.Module):
    """Rows `first` to `last` of a packed weight that several fused layers share."""

    def __init__(self, shared: Any, first: int, last: int):
        super().__init__()
        self.shared = shared
        self.first = first
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared(x)
        return y[..., self.first : self.last]

    def dequantize(self) -> Tensor:
        weight: Tensor = self.shared.dequantize()
        return weight[self.first : self.last]


class Opaque(PackedWeight):
    """A weight in a form that PyTorch neither copies nor pickles: it is packed anew where a copy of
    it comes to.
    """

    packed: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dequantize(),)


@transparent
class PackedBFloat16(Opaque):
    """bfloat16 in oneDNN's blocks: x is rounded to bfloat16 and so is the product; sums are
    float32.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = compat.pack_bfloat16(weight)

    def forward(self, x: Tensor) -> Tensor:
        return compat.multiply_packed_bfloat16(x.bfloat16(), self.packed).to(x.dtype)

    def dequantize(self) -> Tensor:
        weight: Tensor = self.packed.to_dense()
        return weight


@transparent
class PackedFloat16(Opaque):
    """float16 in FBGEMM's panels, float32 in and out: at the limit of memory for one row, of
    arithmetic for many.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return y.to(x.dtype)

    def dequantize(self) -> Tensor:
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
        return weight.half()


@transparent
class Grouped(PackedWeight):
    """8 or 4 bits with a scale for every 32 inputs of a row, for our own kernels (ops/quantized.c
    says how they lie).
    """

    def __init__(self, groups: Groups, columns: int | None = None, order: Tensor | None = None):
        """`columns`: how many inputs there are where the last group was filled up; `order`: input
        order[i] is the groups' i-th.
        """
        super().__init__()
        self.order = None if order is None else nn.Buffer(order, persistent=False)
        self.bits = groups.bits
        self.rows = len(groups.q)
        self.columns = columns or groups.q.shape[1] * GROUP
        # Neighbouring inputs make a pair, and the pairs of a panel's rows a line: (panels, groups,
        # lines, 16 pairs).
        pairs = in_panels(groups.q.view(torch.int16)).permute(0, 2, 3, 1).contiguous()
        self.q = nn.Buffer(
            pairs.view(torch.uint8 if self.bits == 4 else torch.int8), persistent=False
        )
        # (panels, groups, 16)
        self.scales = nn.Buffer(in_panels(groups.scales).mT.contiguous(), persistent=False)
        mins = None if groups.mins is None else in_panels(groups.mins).mT.contiguous()
        self.mins = None if mins is None else nn.Buffer(mins, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        few = x.is_cpu and x.shape[-2] < expand_tokens() and x.shape[-1] == self.columns
        if self.order is not None:
            x = x[..., self.order]
        if few and kernels.available():
            return kernels.multiply(x, self.q, self.scales, self.mins, self.rows).to(x.dtype)
        near = x.to(expand_dtype() if x.is_cpu else x.dtype)
        blocks = range(0, len(self.q), BLOCK_ROWS // PANEL)
        y = torch.cat([F.linear(near, self._expand(first, near.dtype)) for first in blocks], dim=-1)
        return y[..., : self.rows].to(x.dtype)

    def _expand(self, first: int, dtype: torch.dtype) -> Tensor:
        """(BLOCK_ROWS, in_features) of the weight, from a panel on."""
        last = first + BLOCK_ROWS // PANEL
        q = self.q[first:last]
        scales = self.scales[first:last]
        mins = None if self.mins is None else self.mins[first:last]
        if q.is_cpu and not torch.compiler.is_compiling() and kernels.available():
            return kernels.expand(q, scales, mins, dtype)[:, : self.columns]
        if self.bits == 4:
            q = torch.cat((q & 15, q >> 4), dim=2)
        weight = q.unflatten(3, (PANEL, 2)).to(torch.float32) * scales.float()[:, :, None, :, None]
        if mins is not None or self.bits == 4:
            weight += (-8 * scales.float() if mins is None else mins.float())[:, :, None, :, None]
        return weight.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:, : self.columns].to(dtype)

    def dequantize(self) -> Tensor:
        blocks = range(0, len(self.q), BLOCK_ROWS // PANEL)
        weight = torch.cat([self._expand(first, torch.float32) for first in blocks])[: self.rows]
        return weight if self.order is None else weight[:, self.order.argsort()]


def in_panels(rows: Tensor) -> Tensor:
    """(panels, 16, ...) for (rows, ...), the last panel filled up with zeros."""
    missing = -len(rows) % PANEL
    filled = torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows
    return filled.unflatten(0, (-1, PANEL))


@functools.cache
def few_rows_on_gpu(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Our kernel of int8 weights, for inputs of this type; None where it does not run, and one line
    says why.

    PyTorch's own operation is not used there: on an H200 it made a step of one row 5.6 times as
    long as in 16 bits, and one of 16 rows 18 times.
    """
    try:
        from ..ops.triton_int8 import multiply

        one = torch.ones(1, 32, device="cuda")
        multiply(one.to(dtype), one.to(torch.int8), one[0, :1].bfloat16())
    except Exception as error:  # no Triton, as on Windows; no compiler for what starts its kernels; a GPU too small
        logger.warning("int8 expands its weights at every step: %s", error)
        return None
    return multiply


@transparent
class Int8(PackedWeight):
    """8 bits where there are no kernels of ours: weight ≈ q × scale, q in [-127, 127], one scale
    per output row.

    |error| <= scale / 2, scale = max |row| / 127. Scales are rounded to bfloat16, which the kernel
    wants, before q is computed, so that this rounding costs nothing.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        # 126.5, for bfloat16 may round a scale down by a 512th, and the largest value must still
        # not exceed 127.
        self.q = nn.Buffer(
            torch.empty(weight.shape, dtype=torch.int8, device=weight.device), persistent=False
        )
        self.scales = nn.Buffer(
            weight.new_empty(weight.shape[0], dtype=torch.bfloat16), persistent=False
        )
        blocks = (t.split(QUANTISED_ROWS) for t in (weight, self.q, self.scales))
        for rows, q, scales in zip(*blocks, strict=True):
            rows = rows.float()
            scales.copy_(rows.abs().amax(dim=1).clamp(min=1e-30) / 126.5)
            q.copy_((rows / scales.float()[:, None]).round_().clamp_(-127, 127))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            one = x.is_cuda and x.shape[-2] == 1 and not torch.compiler.is_compiling()
            if one and (multiply := few_rows_on_gpu(x.dtype)):
                return multiply(x.flatten(0, -2), self.q, self.scales).unflatten(0, x.shape[:-1])
            return self.expanded(x)
        if x.shape[-2] < expand_tokens() and x.shape[-1] % 16 == 0:  # else it reads beyond a row
            y = compat.multiply_int8(x.flatten(0, -2).bfloat16(), self.q, self.scales)
            return y.to(x.dtype).unflatten(0, x.shape[:-1])
        near = x.to(expand_dtype())
        y = torch.cat([F.linear(near, q.to(near.dtype)) for q in self.q.split(BLOCK_ROWS)], dim=-1)
        return y.to(x.dtype) * self.scales.to(x.dtype)

    def expanded(self, x: Tensor) -> Tensor:
        """The product with the scaled weight: sums of unscaled integers may be beyond float16's
        range.
        """
        return F.linear(x, self.q.to(x.dtype) * self.scales.to(x.dtype)[:, None])

    def dequantize(self) -> Tensor:
        return self.q.float() * self.scales.float()[:, None]


def check_groups(weight: Tensor) -> None:
    if weight.shape[1] % GROUP:
        raise ValueError(
            f"int4 stores groups of {GROUP} inputs, and this rank's weight has {weight.shape[1]}: "
            "use fewer ranks or int8"
        )


@transparent
class Int4(PackedWeight):
    """4 bits where there are no kernels of ours: weight ≈ (q - 8) × scale + zero, q in [0, 15].

    A scale and a zero for every `group_size` inputs of a row; |error| <= scale / 2. The kernel
    wants both in bfloat16, which is coarse beside a group of weights that are nearly the same: the
    scale is as large as the rounded zero needs.
    """

    def __init__(self, weight: Tensor, group_size: int = GROUP):
        super().__init__()
        check_groups(weight)
        self.group_size = group_size
        self.rows, self.in_features = weight.shape
        padded = F.pad(weight, (0, 0, 0, -self.rows % 16))  # the kernels' tiles
        packed, scales_and_zeros = zip(
            *map(self._quantise, padded.split(QUANTISED_ROWS)), strict=True
        )
        self.q = nn.Buffer(torch.cat(packed), persistent=False)
        self.scales_and_zeros = nn.Buffer(torch.cat(scales_and_zeros, dim=1), persistent=False)

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels' layouts: rows in tiles of q, and scales and zeros (in_features / group_size,
        rows, 2).
        """
        # (rows, in_features / group_size, group_size)
        groups = weight.float().unflatten(1, (-1, self.group_size))
        low, high = groups.aminmax(dim=2)
        zeros = (low + 8 * (high - low) / 15).bfloat16()
        scales = torch.maximum((zeros.float() - low) / 8, (high - zeros.float()) / 7).clamp(
            min=1e-30
        )
        scales = (scales * (1 + 2**-8)).bfloat16()  # rounded, it is not smaller
        q = (
            ((groups - zeros.float()[..., None]) / scales.float()[..., None])
            .round_()
            .add_(8)
            .clamp_(0, 15)
        )
        # Of 16 inputs each, packed together.
        tiles = next((n for n in (8, 4, 2) if self.in_features % (16 * n) == 0), 1)
        packed = compat.pack_int4(q.flatten(1).to(torch.int32), tiles)
        return packed, torch.stack((scales, zeros), dim=-1).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).bfloat16()
        y = compat.multiply_int4(flat, self.q, self.group_size, self.scales_and_zeros)
        return y[:, : self.rows].to(x.dtype).unflatten(0, x.shape[:-1])

    def dequantize(self) -> Tensor:
        # The layout of q is each kernel's own, so that it is the kernel that is asked, for some
        # columns at a time.
        eye = torch.eye(self.in_features, device=self.q.device)
        return torch.cat([self(columns) for columns in eye.split(QUANTISED_ROWS)]).T.contiguous()


class WeightFormat(NamedTuple):
    """A format of linear weights.

    `pack` makes a PackedWeight; None, or a `pack` that returns None, leaves the weight a parameter.
    """

    bytes_per_weight: float
    pack: Callable[[Tensor], nn.Module | None] | None = None
    dtype: torch.dtype | None = None  # of the parameter; None: the model's
    draft_tokens: int = 0  # so many beside a row's next token take little longer than it does alone
    # so many of a prompt take some three times as long as one; 0: not measured
    chunk_tokens: int = 0


class Formats(NamedTuple):
    """The format of each linear weight of a model."""

    wide: WeightFormat  # of weights that the file has in 16 bits or more
    coarse: WeightFormat  # of weights that it has in fewer bits, which no format holds exactly
    kept_bits: tuple[int, ...] = ()  # of weights that keep the file's own groups

    def of(self, stored: Any, adapted: bool) -> WeightFormat | None:
        """The format of one weight, as a file has it; None: in the file's own groups.

        `adapted`: whether an adapter is merged into the weights.
        """
        bits = getattr(stored, "bits", None)
        if adapted or not hasattr(stored, "kind"):
            return self.wide
        return None if bits in self.kept_bits else self.coarse

    @property
    def in_place(self) -> torch.dtype | None:
        """The type of weights that stay where the file's pages are mapped."""
        return self.wide.dtype


def pack_int8(weight: Tensor) -> nn.Module:
    if weight.is_cpu and kernels.available():
        return Grouped(quantize(weight, 8), weight.shape[1])
    return Int8(weight)


def pack_int4(weight: Tensor) -> nn.Module:
    check_groups(weight)
    if weight.is_cpu and kernels.available():
        return Grouped(quantize(weight, 4))
    return Int4(weight)


def pack_float16(weight: Tensor) -> nn.Module | None:
    """Packed float16, or None for a weight with values beyond float16's range, which stays as it
    is.
    """
    low, high = torch.aminmax(weight)
    return PackedFloat16(weight) if max(-low, high) <= torch.finfo(torch.float16).max else None


INT8 = WeightFormat(1 + 2 / GROUP, pack_int8, chunk_tokens=12)
INT4 = WeightFormat(0.5 + 4 / GROUP, pack_int4, chunk_tokens=8)
QUANTIZED = {"int8": Formats(INT8, INT8, (8,)), "int4": Formats(INT4, INT4, (4,))}


def select_dtype(
    dtype: str | torch.dtype, stored: torch.dtype, device: torch.device
) -> torch.dtype:
    """The type to compute in. "auto" is the checkpoint's own 16-bit type on a GPU, and float32 on a
    CPU.

    On a CPU 16-bit products of many rows are several times slower unless it has instructions for
    them. Raises ValueError for any but float32, bfloat16 and float16, by name or as PyTorch's.
    """
    if isinstance(dtype, str) and dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, kind in kinds.items():
        if dtype in (name, kind):
            return kind
    raise ValueError(f"dtype is {dtype!r}: use 'auto', {', '.join(map(repr, kinds))}")


def select_formats(
    quantize: str | None,
    dtype: str | torch.dtype,
    device: torch.device,
    compile: bool = False,
    stored_bits: int | None = None,
) -> Formats | None:
    """The formats of linear weights; None: parameters of the model's type.

    The compiler cannot see into packed weights of 16 bits. `stored_bits` are those of a file with
    fewer than 16: with nothing else asked for it is kept in its own, and in 8 what no format holds
    exactly.
    """
    if quantize is not None:
        if quantize not in QUANTIZED:
            raise ValueError(f"quantize is {quantize!r}: use 'int8', 'int4' or None")
        formats = QUANTIZED[quantize]
        ours = device.type == "cpu" and kernels.available()
        return formats if ours else formats._replace(kept_bits=())
    if dtype != "auto" or device.type != "cpu":
        return None
    wide = None if compile else fastest_16_bits()
    if stored_bits is None or not kernels.available():
        return None if wide is None else Formats(wide, wide)
    chunk_tokens = (INT4 if stored_bits == 4 else INT8).chunk_tokens
    plain = wide or WeightFormat(4)
    return Formats(plain._replace(draft_tokens=0, chunk_tokens=chunk_tokens), INT8, (4, 8))


def fastest_16_bits() -> WeightFormat | None:
    """What decoded and prefilled fastest where it was measured (benchmarks/README.md); None
    elsewhere.

    With bfloat16 instructions, bfloat16 parameters where the file has them: a row takes 0.7 of
    packed bfloat16's time, 4 rows 0.8, 16 rows 0.9, a prompt 1.05 times it, and nothing is copied.
    Packed where our kernel was not built, for PyTorch's own product in place reads at 0.6 of its
    speed. Without such instructions bfloat16 is converted value by value, and packed float16 is
    several times faster.
    """
    if compat.has_bfloat16_products() and torch.backends.mkldnn.is_available():
        if kernels.multiplies_bfloat16():
            return WeightFormat(2, None, torch.bfloat16, SPARE_TOKENS, chunk_tokens=16)
        return WeightFormat(2, PackedBFloat16, draft_tokens=SPARE_TOKENS, chunk_tokens=64)
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and "fbgemm" in torch.backends.quantized.supported_engines:
        return WeightFormat(2, pack_float16, draft_tokens=SPARE_TOKENS)
    return None
