"""Ways to hold a linear weight: plain, packed in 16 bits, int8, int4. The model does not know which it is.

Each class is made from one rank's weight (out_features, in_features), multiplies (..., in_features) activations by it,
and gives back the weight that it multiplies by. Activations are never quantised: Llama's outlier channels do not
survive it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# int8 is expanded so many rows at a time: temporaries stay in the processor's cache.
BLOCK_ROWS = 512

# Weights are quantised so many rows at a time, and int4 given back by so many columns: temporaries are small beside it.
QUANTISED_ROWS = 128

# What a decode step packed in 16 bits takes on top for nearly nothing: it is bound by reading the weights.
SPARE_TOKENS = 3


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively (AVX512-BF16; every CPU with AMX has it too)."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.cpu._is_avx512_bf16_supported()


class Plain:
    """The layer's own parameter, whatever it is at the time."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)  # type: ignore[arg-type]


class Held(nn.Module):
    """What the stores in other forms have in common: they move between devices, and keep their own types."""

    def unpack(self) -> Tensor:
        """The weight, (out_features, in_features)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Held:
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(fn(buffer).device))
        return self


class Rows(nn.Module):
    """Rows `first` to `last` of a store that several layers share."""

    def __init__(self, shared: Any, first: int, last: int):
        super().__init__()
        self.shared, self.first, self.last = shared, first, last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared(x)
        return y[..., self.first : self.last]

    def unpack(self) -> Tensor:
        weight: Tensor = self.shared.unpack()
        return weight[self.first : self.last]


class Packed(Held):
    """A weight in a form that PyTorch neither copies nor pickles: it is packed anew where a copy of it comes to."""

    packed: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.unpack(),)


class PackedBFloat16(Packed):
    """bfloat16 in oneDNN's blocks: x is rounded to bfloat16 and so is the product; sums are float32."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, None, "none", [], "")
        return y.to(x.dtype)

    def unpack(self) -> Tensor:
        weight: Tensor = self.packed.to_dense()
        return weight


class PackedFloat16(Packed):
    """float16 in FBGEMM's panels, float32 in and out: at the limit of memory for one row, of arithmetic for many."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return y.to(x.dtype)

    def unpack(self) -> Tensor:
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
        return weight.half()


class Int8(Held):
    """weight ≈ q × scale, q in [-127, 127], one scale per output row: |error| <= scale / 2, scale = max |row| / 127.

    Scales are rounded to bfloat16, which the kernel wants, before q is computed, so that this rounding costs nothing.
    """

    # From so many tokens of a row on, expanding the weight takes less time than the kernel for few rows.
    # Rows do not count: the next token of a row is rounded in one way, however many others are decoded beside it.
    expand_tokens = 32 if has_bfloat16_products() else 64
    expand_dtype = torch.bfloat16 if has_bfloat16_products() else torch.float32

    def __init__(self, weight: Tensor):
        super().__init__()
        # 126.5, for bfloat16 may round a scale down by a 512th, and the largest value must still not exceed 127.
        self.q = nn.Buffer(torch.empty_like(weight, dtype=torch.int8), persistent=False)
        self.scales = nn.Buffer(weight.new_empty(weight.shape[0], dtype=torch.bfloat16), persistent=False)
        blocks = (t.split(QUANTISED_ROWS) for t in (weight, self.q, self.scales))
        for rows, q, scales in zip(*blocks, strict=True):
            rows = rows.float()
            scales.copy_(rows.abs().amax(dim=1).clamp(min=1e-30) / 126.5)
            q.copy_((rows / scales.float()[:, None]).round_().clamp_(-127, 127))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:  # the kernel is the CPU's; elsewhere the expansion is left to a compiler to fuse
            return F.linear(x, self.q.to(x.dtype)) * self.scales.to(x.dtype)
        if x.shape[-2] < self.expand_tokens:
            y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.q, self.scales)
            return y.to(x.dtype).unflatten(0, x.shape[:-1])
        near = x.to(self.expand_dtype)
        y = torch.cat([F.linear(near, q.to(near.dtype)) for q in self.q.split(BLOCK_ROWS)], dim=-1)
        return y.to(x.dtype) * self.scales.to(x.dtype)

    def unpack(self) -> Tensor:
        return self.q.float() * self.scales.float()[:, None]


class Int4(Held):
    """weight ≈ (q - 8) × scale + zero, q in [0, 15], a scale and a zero for every `group_size` inputs of a row.

    |error| <= scale / 2, scale = (max - min of the group) / 15.
    """

    def __init__(self, weight: Tensor, group_size: int = 32):
        super().__init__()
        if weight.shape[1] % group_size:
            raise ValueError(
                f"int4 stores groups of {group_size} inputs, and this rank's weight has {weight.shape[1]}: "
                "use fewer ranks or int8"
            )
        self.group_size, self.in_features = group_size, weight.shape[1]
        packed, scales_and_zeros = zip(*map(self._quantise, weight.split(QUANTISED_ROWS)), strict=True)
        self.q = nn.Buffer(torch.cat(packed), persistent=False)
        self.scales_and_zeros = nn.Buffer(torch.cat(scales_and_zeros, dim=1), persistent=False)

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels' layouts: rows in tiles of q, and scales and zeros (in_features / group_size, rows, 2)."""
        groups = weight.float().unflatten(1, (-1, self.group_size))  # (rows, in_features / group_size, group_size)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low).clamp(min=1e-30) / 15).bfloat16()
        zeros = (low + 8 * scales.float()).bfloat16()
        q = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
        q = q.flatten(1).to(torch.int32)
        if weight.is_cuda:
            packed = torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8)
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
        return packed, torch.stack((scales, zeros), dim=-1).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        y = multiply(x.flatten(0, -2).bfloat16(), self.q, self.group_size, self.scales_and_zeros)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def unpack(self) -> Tensor:
        # The layout of q is each kernel's own, so that it is the kernel that is asked, for some columns at a time.
        eye = torch.eye(self.in_features, device=self.q.device)
        return torch.cat([self(columns) for columns in eye.split(QUANTISED_ROWS)]).T.contiguous()


def packed_float16_or_plain(weight: Tensor) -> nn.Module | None:
    """Packed float16, or None for a weight with values beyond float16's range, which has to stay as it is."""
    low, high = torch.aminmax(weight)
    return PackedFloat16(weight) if max(-low, high) <= torch.finfo(torch.float16).max else None


class Store(NamedTuple):
    """A way to hold linear weights: None from `hold` leaves a weight a plain tensor of the model's type."""

    hold: Callable[[Tensor], nn.Module | None]
    bytes_per_weight: float
    spare_tokens: int = 0  # so many beside a row's next one take little longer than it does alone
    chunk_tokens: int = 0  # so many of a prompt take some three times as long as it, if more than elsewhere


STORES = {"int8": Store(Int8, 1), "int4": Store(Int4, 0.5 + 4 / 32)}


def select_dtype(dtype: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute in. "auto" is the checkpoint's own 16-bit type on a GPU, and float32 on a CPU, where 16-bit
    matrix products of many rows are several times slower unless the processor has instructions for them.

    Raises ValueError for any but float32, bfloat16 and float16, by name or as PyTorch's.
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


def select_store(
    quantize: str | None, dtype: str | torch.dtype, device: torch.device, compile: bool = False
) -> Store | None:
    """How linear weights are held; None: as plain tensors of the model's type, as for the compiler, which cannot see
    into packed ones."""
    if quantize is None:
        return fastest_16_bits() if dtype == "auto" and device.type == "cpu" and not compile else None
    if quantize not in STORES:
        raise ValueError(f"quantize is {quantize!r}: use 'int8', 'int4' or None")
    return STORES[quantize]


def fastest_16_bits() -> Store | None:
    """What decoded and prefilled fastest where we measured it (benchmarks/README.md); None where we did not.

    With bfloat16 instructions, packed bfloat16 equals packed float16 for few rows, which is the limit of memory, and
    takes 0.4 of its time for a prompt; packed, because plain bfloat16 reads at 0.7 of that speed. Without them,
    bfloat16 products are converted value by value, and packed float16 is several times faster. Both operations are
    x86 builds' only.
    """
    if has_bfloat16_products() and torch.backends.mkldnn.is_available():
        return Store(PackedBFloat16, 2, SPARE_TOKENS, chunk_tokens=64)
    if platform.machine() in ("x86_64", "AMD64") and "fbgemm" in torch.backends.quantized.supported_engines:
        return Store(packed_float16_or_plain, 2, SPARE_TOKENS)
    return None
