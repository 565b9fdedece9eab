"""Quantization groups: 32 inputs of a row, in 8 or 4 bits, with a scale and an optional minimum.

Weights are quantized here, or read from quantized files by the checkpoints package. formats.py
packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import GROUP

# Rows of a weight that are quantized at a time, so that temporaries are small.
QUANTISED_ROWS = 128


class Groups(NamedTuple):
    """weight = q × scale + minimum.

    Without `mins`, minimums are 0 in 8 bits and -8 × scale in 4 bits. In 4 bits, q is in [0, 15].
    """

    # In 8 bits (rows, groups, 32) int8. In 4 bits (rows, groups, 16) uint8: byte j holds input j
    # and, in its high half, input 16 + j.
    q: Tensor
    scales: Tensor  # (rows, groups), float16 or float32
    mins: Tensor | None  # of the same shape and type as `scales`

    @property
    def bits(self) -> int:
        return 8 if self.q.dtype == torch.int8 else 4

    def map(self, function: Callable[[Tensor], Tensor]) -> Groups:
        """Groups with the function applied to each tensor."""
        mins = self.mins
        if mins is not None:
            mins = function(mins)
        return Groups(function(self.q), function(self.scales), mins)

    def dequantize(self) -> Tensor:
        """The weight, (rows, inputs) float32.

        With float16 scales, q × scale is exact, so that each value is rounded at most once.
        """
        q = self.q
        mins = self.mins
        if self.bits == 4:
            q = torch.cat((q & 15, q >> 4), dim=2)
            if mins is None:
                mins = -8 * self.scales.float()
        weight = q * self.scales.float()[..., None]
        if mins is not None:
            weight += mins.float()[..., None]
        return weight.flatten(1)


def concatenate(parts: Sequence[Groups]) -> Groups:
    """The rows of all parts, which must have the same bits, and all or none of them minimums."""
    if len(parts) == 1:
        return parts[0]
    q = torch.cat([part.q for part in parts])
    scales = torch.cat([part.scales for part in parts])
    mins = [part.mins for part in parts if part.mins is not None]
    return Groups(q, scales, torch.cat(mins) if mins else None)


def quantize(weight: Tensor, bits: int) -> Groups:
    """The groups nearest to a weight (rows, inputs). The last group of a row is padded with zeros.

    Errors are at most half a scale, because scales and, in 4 bits, minimums are rounded to float16
    before q is computed.
    """
    return concatenate([_quantize(rows, bits) for rows in weight.split(QUANTISED_ROWS)])


def _quantize(weight: Tensor, bits: int) -> Groups:
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    if bits == 8:
        scales = float16_towards(torch.maximum(high, -low) / 127, torch.inf)
        divisors = scales.clamp(min=1e-30)[..., None]
        return Groups((groups / divisors).round_().to(torch.int8), scales.half(), None)
    mins = float16_towards(low, -torch.inf)
    scales = float16_towards((high - mins) / 15, torch.inf)
    divisors = scales.clamp(min=1e-30)[..., None]
    q = ((groups - mins[..., None]) / divisors).round_().to(torch.uint8)
    return Groups(q[..., :16] | q[..., 16:] << 4, scales.half(), mins.half())


def float16_towards(x: Tensor, bound: float) -> Tensor:
    """x rounded to float16 values towards `bound`, inf or -inf, and returned as float32."""
    near = x.half()
    short = near < x if bound > 0 else near > x
    return torch.where(short, near.nextafter(torch.full_like(near, bound)), near).float()
