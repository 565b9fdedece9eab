"""Weights of 8 or 4 bits with a scale, and maybe a minimum, for every 32 inputs of a row: rounded
here, or as files have them. Stores multiply by them; checkpoints read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import GROUP

# Weights are quantised so many rows at a time: temporaries are small beside a matrix.
QUANTISED_ROWS = 128


class Groups(NamedTuple):
    """weight = q × scale + min.

    Without mins they are 0 in 8 bits and -8 × scale in 4, where q stands in [0, 15].
    """

    # (rows, groups, 32) int8; in 4 bits (rows, groups, 16) uint8: inputs j and, in the higher half,
    # 16 + j
    q: Tensor
    scales: Tensor  # (rows, groups), float16 or float32
    mins: Tensor | None  # the same

    @property
    def bits(self) -> int:
        return 8 if self.q.dtype == torch.int8 else 4

    def map(self, function: Callable[[Tensor], Tensor]) -> Groups:
        """Groups of what the function makes of each tensor."""
        return Groups(
            function(self.q),
            function(self.scales),
            None if self.mins is None else function(self.mins),
        )

    def dequantize(self) -> Tensor:
        """(rows, inputs) float32: each value as exactly as float32 has it, for q × scale is exact."""
        q = self.q if self.bits == 8 else torch.cat((self.q & 15, self.q >> 4), dim=2)
        mins = self.mins
        if mins is None and self.bits == 4:
            mins = -8 * self.scales.float()
        weight = q * self.scales.float()[..., None]
        return (weight if mins is None else weight.add_(mins.float()[..., None])).flatten(1)


def concatenate(parts: Sequence[Groups]) -> Groups:
    """The rows of all parts, which are of one kind."""
    if len(parts) == 1:
        return parts[0]
    q = torch.cat([part.q for part in parts])
    scales = torch.cat([part.scales for part in parts])
    mins = [part.mins for part in parts if part.mins is not None]
    return Groups(q, scales, torch.cat(mins) if mins else None)


def quantize(weight: Tensor, bits: int) -> Groups:
    """The groups nearest to a weight (rows, inputs); the last of a row is filled up with zeros.

    Off by at most half a scale: scales and, in 4 bits, mins are rounded to float16 before q is
    computed.
    """
    return concatenate([_quantize(rows, bits) for rows in weight.split(QUANTISED_ROWS)])


def _quantize(weight: Tensor, bits: int) -> Groups:
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    if bits == 8:
        scale = float16_towards(torch.maximum(high, -low) / 127, torch.inf)
        return Groups(
            (groups / scale.clamp(min=1e-30)[..., None]).round_().to(torch.int8), scale.half(), None
        )
    low = float16_towards(low, -torch.inf)
    scale = float16_towards((high - low) / 15, torch.inf)
    q = ((groups - low[..., None]) / scale.clamp(min=1e-30)[..., None]).round_().to(torch.uint8)
    return Groups(q[..., :16] | q[..., 16:] << 4, scale.half(), low.half())


def float16_towards(x: Tensor, bound: float) -> Tensor:
    """x in float16's values, rounded towards infinity or its negative."""
    near = x.half()
    short = near < x if bound > 0 else near > x
    return torch.where(short, near.nextafter(torch.full_like(near, bound)), near).float()
