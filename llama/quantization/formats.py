"""Formats of a linear layer's weight: a parameter, or packed in 16, 8 or 4 bits.

A PackedWeight is made from one rank's weight, (out_features, in_features). It multiplies
activations (..., in_features), and `dequantize` returns the weight that it multiplies by.
Activations keep 16 bits: 8 are too few for Llama's outlier channels.
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

# The types that a model can compute in, by their names in options.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows of quantized weights expanded at a time, so that temporaries fit into the processor's cache.
BLOCK_ROWS = 512

# Additional tokens that a 16-bit decode step computes at little cost, because it is limited by
# reading the weights.
SPARE_TOKENS = 3


def expand_dtype() -> torch.dtype:
    """The type that this CPU multiplies fastest."""
    if compat.has_bfloat16_products():
        return torch.bfloat16
    return torch.float32


class PackedWeight(nn.Module):
    """A packed weight. It moves between devices with its model, but keeps its own types."""

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
    """A weight in a form that PyTorch cannot copy or pickle: copying packs it again."""

    packed: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dequantize(),)


@transparent
class PackedBFloat16(Opaque):
    """bfloat16 in oneDNN's blocks.

    x and the product are rounded to bfloat16; sums are float32.
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
    """float16 in FBGEMM's panels, with float32 inputs and outputs.

    Its speed is limited by memory for one row, and by arithmetic for many.
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
    """8 or 4 bits with a scale for every 32 inputs of a row, for this library's own kernels.

    ops/quantized.c describes the layout.
    """

    def __init__(self, groups: Groups, columns: int | None = None, order: Tensor | None = None):
        """`columns` is the number of inputs, if the last group was padded.

        Input `order[i]` of the layer is input i of the groups.
        """
        super().__init__()
        self.order = None if order is None else nn.Buffer(order, persistent=False)
        self.bits = groups.bits
        self.rows = len(groups.q)
        self.columns = columns or groups.q.shape[1] * GROUP
        # Adjacent inputs form a pair, and the pairs of a panel's rows form a line: (panels, groups,
        # lines, 16 pairs).
        pairs = in_panels(groups.q.view(torch.int16)).permute(0, 2, 3, 1).contiguous()
        self.q = nn.Buffer(pairs.view(groups.q.dtype), persistent=False)
        # Scales and minimums are (panels, groups, 16).
        self.scales = nn.Buffer(in_panels(groups.scales).mT.contiguous(), persistent=False)
        mins = groups.mins
        if mins is not None:
            mins = nn.Buffer(in_panels(mins).mT.contiguous(), persistent=False)
        self.mins = mins

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
        """Dequantized rows (BLOCK_ROWS, in_features) of the weight, from panel `first` on."""
        last = first + BLOCK_ROWS // PANEL
        q = self.q[first:last]
        scales = self.scales[first:last]
        mins: Tensor | None = self.mins
        if mins is not None:
            mins = mins[first:last]
        if q.is_cpu and not torch.compiler.is_compiling() and kernels.available():
            return kernels.expand(q, scales, mins, dtype)[:, : self.columns]
        if self.bits == 4:
            q = torch.cat((q & 15, q >> 4), dim=2)
            if mins is None:
                mins = -8 * scales.float()
        weight = q.unflatten(3, (PANEL, 2)).to(torch.float32) * scales.float()[:, :, None, :, None]
        if mins is not None:
            weight += mins.float()[:, :, None, :, None]
        return weight.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:, : self.columns].to(dtype)

    def dequantize(self) -> Tensor:
        blocks = range(0, len(self.q), BLOCK_ROWS // PANEL)
        weight = torch.cat([self._expand(first, torch.float32) for first in blocks])[: self.rows]
        if self.order is not None:
            weight = weight[:, self.order.argsort()]
        return weight


def in_panels(rows: Tensor) -> Tensor:
    """Reshape (rows, ...) to (panels, 16, ...), with the last panel padded with zeros."""
    missing = -len(rows) % PANEL
    if missing:
        rows = torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))
    return rows.unflatten(0, (-1, PANEL))


@functools.cache
def few_rows_on_gpu(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """This library's GPU kernel for int8 weights and inputs of this type.

    Returns None and logs a warning if it does not run. PyTorch's own operation is not used: on an
    H200, a step of one row took 5.6 times as long as in 16 bits, and one of 16 rows 18 times.
    """
    try:
        from ..ops.triton_int8 import multiply

        one = torch.ones(1, 32, device="cuda")
        multiply(one.to(dtype), one.to(torch.int8), one[0, :1].bfloat16())
    # No Triton, as on Windows; no compiler for the code that launches kernels; too small a GPU.
    except Exception as error:
        logger.warning("int8 expands its weights at every step: %s", error)
        return None
    return multiply


@transparent
class Int8(PackedWeight):
    """8 bits without this library's CPU kernels: weight ≈ q × scale, one scale per output row.

    q is in [-127, 127], |error| <= scale / 2, scale = max |row| / 126.5. Scales are rounded to
    bfloat16, the kernel's type, before q is computed, so that this rounding adds no error.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.q = nn.Buffer(q, persistent=False)
        scales = weight.new_empty(weight.shape[0], dtype=torch.bfloat16)
        self.scales = nn.Buffer(scales, persistent=False)
        blocks = (t.split(QUANTISED_ROWS) for t in (weight, self.q, self.scales))
        for rows, q, scales in zip(*blocks, strict=True):
            rows = rows.float()
            # Not 127: rounding to bfloat16 can reduce a scale by 1/512, and q must still not exceed
            # 127.
            scales.copy_(rows.abs().amax(dim=1).clamp(min=1e-30) / 126.5)
            q.copy_((rows / scales.float()[:, None]).round_().clamp_(-127, 127))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            one = x.is_cuda and x.shape[-2] == 1 and not torch.compiler.is_compiling()
            if one and (multiply := few_rows_on_gpu(x.dtype)):
                return multiply(x.flatten(0, -2), self.q, self.scales).unflatten(0, x.shape[:-1])
            return self.expanded(x)
        if x.shape[-2] < expand_tokens() and x.shape[-1] % 16 == 0:  # else it reads past a row
            y = compat.multiply_int8(x.flatten(0, -2).bfloat16(), self.q, self.scales)
            return y.to(x.dtype).unflatten(0, x.shape[:-1])
        near = x.to(expand_dtype())
        y = torch.cat([F.linear(near, q.to(near.dtype)) for q in self.q.split(BLOCK_ROWS)], dim=-1)
        return y.to(x.dtype) * self.scales.to(x.dtype)

    def expanded(self, x: Tensor) -> Tensor:
        """The product with the scaled weight: sums of unscaled integers can overflow float16."""
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
    """4 bits without this library's CPU kernels: weight ≈ (q - 8) × scale + zero, q in [0, 15].

    Every `group_size` inputs of a row share a scale and a zero; |error| <= scale / 2. The kernel
    takes both in bfloat16, which is coarse for a group of nearly equal weights. The scale is
    therefore computed from the rounded zero, and is large enough to cover the group.
    """

    def __init__(self, weight: Tensor, group_size: int = GROUP):
        super().__init__()
        check_groups(weight)
        self.group_size = group_size
        self.rows, self.in_features = weight.shape
        padded = F.pad(weight, (0, 0, 0, -self.rows % 16))  # to the kernels' tiles
        blocks = map(self._quantise, padded.split(QUANTISED_ROWS))
        packed, scales_and_zeros = zip(*blocks, strict=True)
        self.q = nn.Buffer(torch.cat(packed), persistent=False)
        self.scales_and_zeros = nn.Buffer(torch.cat(scales_and_zeros, dim=1), persistent=False)

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the kernel's layout: q in tiles, and scales and zeros.

        Scales and zeros are one tensor, (in_features / group_size, rows, 2).
        """
        # Shape: (rows, in_features / group_size, group_size).
        groups = weight.float().unflatten(1, (-1, self.group_size))
        low, high = groups.aminmax(dim=2)
        zeros = (low + 8 * (high - low) / 15).bfloat16()
        scales = torch.maximum((zeros.float() - low) / 8, (high - zeros.float()) / 7)
        scales = scales.clamp(min=1e-30)
        scales = (scales * (1 + 2**-8)).bfloat16()  # rounding does not reduce it
        q = (groups - zeros.float()[..., None]) / scales.float()[..., None]
        q = q.round_().add_(8).clamp_(0, 15)
        # How many tiles of 16 inputs are packed together.
        tiles = next((n for n in (8, 4, 2) if self.in_features % (16 * n) == 0), 1)
        packed = compat.pack_int4(q.flatten(1).to(torch.int32), tiles)
        return packed, torch.stack((scales, zeros), dim=-1).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).bfloat16()
        y = compat.multiply_int4(flat, self.q, self.group_size, self.scales_and_zeros)
        return y[:, : self.rows].to(x.dtype).unflatten(0, x.shape[:-1])

    def dequantize(self) -> Tensor:
        # Each kernel has its own layout of q, so the kernel itself expands it, by columns.
        eye = torch.eye(self.in_features, device=self.q.device)
        return torch.cat([self(columns) for columns in eye.split(QUANTISED_ROWS)]).T.contiguous()


class WeightFormat(NamedTuple):
    """A format of linear weights.

    `pack` makes a PackedWeight. If it is None or returns None, the weight stays a parameter.
    """

    bytes_per_weight: float
    pack: Callable[[Tensor], nn.Module | None] | None = None
    dtype: torch.dtype | None = None  # of the parameter; None for the model's
    # Computing this many more tokens with a row's next one takes little longer.
    draft_tokens: int = 0
    # This many prompt tokens take about three times as long as one token. 0: not measured.
    chunk_tokens: int = 0


class Formats(NamedTuple):
    """The format of each linear weight of a model."""

    wide: WeightFormat  # of weights stored in 16 bits or more
    coarse: WeightFormat  # of weights stored in fewer bits that no format keeps exactly
    kept_bits: tuple[int, ...] = ()  # bits of weights that keep the file's own groups

    def of(self, stored: Any, adapted: bool) -> WeightFormat | None:
        """The format for a stored weight; None if it keeps the file's own groups.

        `adapted` is True if an adapter is merged into the weights.
        """
        if adapted or not hasattr(stored, "kind"):
            return self.wide
        if getattr(stored, "bits", None) in self.kept_bits:
            return None
        return self.coarse

    @property
    def in_place(self) -> torch.dtype | None:
        """The type of weights that are used in place, in the file's mapped pages."""
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
    """Packed float16; None if values exceed its range and the weight must stay a parameter."""
    low, high = torch.aminmax(weight)
    if max(-low, high) <= torch.finfo(torch.float16).max:
        return PackedFloat16(weight)
    return None


INT8 = WeightFormat(1 + 2 / GROUP, pack_int8, chunk_tokens=12)
INT4 = WeightFormat(0.5 + 4 / GROUP, pack_int4, chunk_tokens=8)
QUANTIZED = {"int8": Formats(INT8, INT8, (8,)), "int4": Formats(INT4, INT4, (4,))}


def select_dtype(
    dtype: str | torch.dtype, stored: torch.dtype, device: torch.device
) -> torch.dtype:
    """The type to compute in; `stored` is the checkpoint's.

    "auto" is the checkpoint's own 16-bit type on a GPU (bfloat16 if it has none) and float32 on a
    CPU, where 16-bit products of many rows are several times slower without special instructions.

    Raises ValueError unless `dtype` is float32, bfloat16 or float16, by name or as a torch.dtype.
    """
    if isinstance(dtype, str) and dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        if stored in (torch.bfloat16, torch.float16):
            return stored
        return torch.bfloat16
    for name, kind in DTYPES.items():
        if dtype in (name, kind):
            return kind
    raise ValueError(f"dtype is {dtype!r}: use 'auto', {', '.join(map(repr, DTYPES))}")


def select_formats(
    quantize: str | None,
    dtype: str | torch.dtype,
    device: torch.device,
    compile: bool = False,
    stored_bits: int | None = None,
) -> Formats | None:
    """The formats of linear weights; None for parameters of the model's type.

    `stored_bits` is the bit width of a quantized file, else None. By default, weights keep the bits
    of such a file; weights that no format keeps exactly become 8 bits. With `compile`, 16-bit
    weights are not packed, because the compiler cannot optimize operations on packed weights.

    Raises ValueError unless `quantize` is None, "int8" or "int4".
    """
    if quantize is not None:
        if quantize not in QUANTIZED:
            raise ValueError(f"quantize is {quantize!r}: use 'int8', 'int4' or None")
        formats = QUANTIZED[quantize]
        if device.type == "cpu" and kernels.available():
            return formats
        return formats._replace(kept_bits=())
    if dtype != "auto" or device.type != "cpu":
        return None
    wide = None if compile else fastest_16_bits()
    if stored_bits is None or not kernels.available():
        return None if wide is None else Formats(wide, wide)
    most = INT4 if stored_bits == 4 else INT8  # the format of most weights
    wide = wide or WeightFormat(4)
    wide = wide._replace(draft_tokens=0, chunk_tokens=most.chunk_tokens)
    return Formats(wide, INT8, (4, 8))


def fastest_16_bits() -> WeightFormat | None:
    """The fastest 16-bit format for this CPU, as measured (benchmarks/README.md), or None.

    With bfloat16 instructions: bfloat16 parameters, used in place if the file has that type.
    Compared with packed bfloat16, one row takes 0.7 times as long, 4 rows 0.8, 16 rows 0.9 and a
    prompt 1.05 times, and nothing is copied. If this library's kernel was not built: packed
    bfloat16, because PyTorch's own product in place reads at 0.6 times the speed.

    Without bfloat16 instructions: packed float16. It is several times faster than bfloat16, which
    is then converted value by value.
    """
    if compat.has_bfloat16_products() and torch.backends.mkldnn.is_available():
        if kernels.multiplies_bfloat16():
            return WeightFormat(2, None, torch.bfloat16, SPARE_TOKENS, chunk_tokens=16)
        return WeightFormat(2, PackedBFloat16, draft_tokens=SPARE_TOKENS, chunk_tokens=64)
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and "fbgemm" in torch.backends.quantized.supported_engines:
        return WeightFormat(2, pack_float16, draft_tokens=SPARE_TOKENS)
    return None
