"""Other ways to store a linear weight: packed float16, int8, int4. The model does not know.

Each class is made from one rank's weight (out_features, in_features) and multiplies (..., in_features) activations by
it. Activations are never quantised: Llama's outlier channels do not survive it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# From this many rows on, expanding int8 weights for a matrix product takes less time than the kernel for few rows:
# measured on two cores, 16 rows took a third of the time in the kernel, a 512-token prompt half the time expanded.
EXPAND_ROWS = 64


class PackedFloat16(nn.Module):
    """float16 in FBGEMM's panels, float32 in and out: at the limit of memory for one row, of arithmetic for many."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8(nn.Module):
    """weight ≈ q × scale, q in [-127, 127], one scale per output row: |error| <= scale / 2, scale = max |row| / 127.

    Scales are rounded to bfloat16, which the kernel wants, before q is computed, so that this rounding costs nothing.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        weight = weight.float()
        # 126.5, for bfloat16 may round a scale down by a 512th, and the largest value must still not exceed 127.
        scales = (weight.abs().amax(dim=1).clamp(min=1e-30) / 126.5).bfloat16()
        q = (weight / scales.float()[:, None]).round_().clamp_(-127, 127)
        self.q = nn.Buffer(q.to(torch.int8), persistent=False)
        self.scales = nn.Buffer(scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # The kernel is the CPU's, for few rows; elsewhere the expansion is left to a compiler to fuse.
        if not x.is_cpu or x.shape[:-1].numel() >= EXPAND_ROWS:
            return F.linear(x, self.q.to(x.dtype)) * self.scales.to(x.dtype)
        y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.q, self.scales)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class Int4(nn.Module):
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
        self.group_size = group_size
        groups = weight.float().unflatten(1, (-1, group_size))  # (rows, columns / group_size, group_size)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low).clamp(min=1e-30) / 15).bfloat16()
        zeros = (low + 8 * scales.float()).bfloat16()
        q = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
        q = q.flatten(1).to(torch.int32)
        self.scales_and_zeros = nn.Buffer(
            torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous(), persistent=False
        )
        if weight.is_cuda:
            q = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
            self.q = nn.Buffer(torch._convert_weight_to_int4pack(q, 8), persistent=False)
        else:
            self.q = nn.Buffer(torch._convert_weight_to_int4pack_for_cpu(q, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        y = multiply(x.flatten(0, -2).bfloat16(), self.q, self.group_size, self.scales_and_zeros)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def packed_or_plain(weight: Tensor) -> nn.Module | None:
    """Packed float16, or None for a weight with values beyond float16's range, which has to stay as it is."""
    return PackedFloat16(weight) if weight.abs().amax() <= torch.finfo(torch.float16).max else None


class Store(NamedTuple):
    """A way to hold linear weights: None from `hold` leaves a weight a plain tensor of the model's type."""

    hold: Callable[[Tensor], nn.Module | None]
    bytes_per_weight: float


def select_store(quantize: str | None, dtype: str, device: torch.device) -> Store | None:
    """How linear weights are held; None: as plain tensors of the model's type."""
    if quantize is None:
        return Store(packed_or_plain, 2) if dtype == "auto" and device.type == "cpu" and cpu_packs_float16() else None
    stores = {"int8": Store(Int8, 1), "int4": Store(Int4, 0.5 + 4 / 32)}
    if quantize not in stores:
        raise ValueError(f"quantize is {quantize!r}: use 'int8', 'int4' or None")
    return stores[quantize]


def cpu_packs_float16() -> bool:
    """Whether this CPU has the packed float16 product, which only x86 builds of PyTorch do.

    Where it exists it is the fastest 16-bit decoding that we measured, with or without bfloat16 instructions. With them
    (AVX512-BF16) plain bfloat16 is twice as fast on long prompts and takes 1.4 times as long for each token after.
    """
    return platform.machine() in ("x86_64", "AMD64") and "fbgemm" in torch.backends.quantized.supported_engines
