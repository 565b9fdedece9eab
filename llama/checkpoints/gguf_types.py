"""Decode GGUF's low-bit types from blocks of bytes to integers, scales and minimums.

A block has 32 consecutive inputs of a row or, in the K types, 256; ggml-common.h defines the
blocks. A decoder takes (rows, blocks, bytes) uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import GROUP
from ..quantization.groups import Groups
from .files import give_back
from .quantized import Quantized


class Type(NamedTuple):
    name: str
    block: int  # inputs per block
    bytes: int  # per block
    decode: Callable[[Tensor], Groups]
    bits: int | None  # of the packed format that stores the groups exactly; None: there is none
    factors: int  # bytes of a group's scale and minimum in that format


class Blocks(Quantized):
    """A matrix of blocks in a mapped file."""

    def __init__(self, raw: Tensor, type: Type):
        """`raw` has shape (rows, blocks, bytes)."""
        super().__init__(len(raw), raw.shape[1] * type.block)
        self.raw = raw
        self.type = type
        self.kind = self.joins = type.name
        self.block = type.block
        self.bits = type.bits
        self.bytes_per_weight = (type.bits or 8) / 8 + type.factors / GROUP

    def read(self, rows: slice, inputs: slice) -> Groups:
        return self.type.decode(
            self.raw[rows, inputs.start // self.block : inputs.stop // self.block]
        )

    def let_go(self) -> None:
        give_back(self.raw[self.rows.start : self.rows.stop])


def floats(raw: Tensor) -> Tensor:
    """View (..., 2 n) bytes as (..., n) float16 values."""
    return raw.view(torch.float16)


def unpack(raw: Tensor, bits: int) -> Tensor:
    """Split (..., n) bytes into (..., 8 / bits, n) integers, beginning with the lowest bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
    return raw.unsqueeze(-2) >> shifts[:, None] & (1 << bits) - 1


def grouped(q: Tensor, scales: Tensor, mins: Tensor | None = None) -> Groups:
    """Join the groups of all blocks of a row.

    `q` is (rows, blocks, groups, inputs) int8; scales and minimums are (rows, blocks, groups).
    """
    if mins is not None:
        mins = mins.flatten(1)
    return Groups(q.flatten(1, 2), scales.flatten(1), mins)


def q4_0(raw: Tensor) -> Groups:
    return Groups(raw[..., 2:], floats(raw[..., :2])[..., 0], None)


def q4_1(raw: Tensor) -> Groups:
    scales, mins = floats(raw[..., :4]).unbind(-1)
    return Groups(raw[..., 4:], scales, mins)


def five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Combine 16 bytes of low nibbles and 4 bytes of fifth bits into (rows, blocks, 1, 32)."""
    bits = unpack(high, 1).mT.flatten(-2)
    return (unpack(low, 4).flatten(-2) | bits << 4).to(torch.int8).unsqueeze(-2)


def q5_0(raw: Tensor) -> Groups:
    return grouped(five_bits(raw[..., 6:], raw[..., 2:6]) - 16, floats(raw[..., :2]))


def q5_1(raw: Tensor) -> Groups:
    factors = floats(raw[..., :4])
    return grouped(five_bits(raw[..., 8:], raw[..., 4:8]), factors[..., :1], factors[..., 1:])


def q8_0(raw: Tensor) -> Groups:
    return Groups(raw[..., 2:].view(torch.int8), floats(raw[..., :2])[..., 0], None)


def q2_k(raw: Tensor) -> Groups:
    d, dmin = floats(raw[..., 80:84]).float().split(1, -1)
    scales, mins = unpack(raw[..., :16], 4).unbind(-2)
    q = unpack(raw[..., 16:80].unflatten(-1, (2, 32)), 2).to(torch.int8)
    return grouped(q.flatten(2).unflatten(-1, (16, 16)), d * scales, -dmin * mins)


def q3_k(raw: Tensor) -> Groups:
    low = unpack(raw[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(2, 3)  # (rows, blocks, 8, 32)
    q = low.to(torch.int8) + (unpack(raw[..., :32], 1) << 2).to(torch.int8) - 4
    scales = unpack(raw[..., 96:104], 4).flatten(-2) | unpack(raw[..., 104:108], 2).flatten(-2) << 4
    return grouped(
        q.flatten(2).unflatten(-1, (16, 16)),
        floats(raw[..., 108:]).float() * (scales.to(torch.int8) - 32),
    )


def scales_and_mins(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Decode 16 bytes: d, dmin, then a 6-bit scale and a 6-bit minimum for each of 8 groups."""
    d, dmin = floats(raw[..., :4]).float().split(1, -1)
    first, second, rest = raw[..., 4:].split(4, -1)
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1)
    mins = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return d * scales, -dmin * mins


def q4_k(raw: Tensor) -> Groups:
    scales, mins = scales_and_mins(raw[..., :16])
    # In the file, 32 bytes hold one group in their low nibbles and the next in their high nibbles.
    # In Groups, 16 bytes hold one group.
    a, b = raw[..., 16:].unflatten(-1, (4, 2, 16)).unbind(-2)
    q = torch.stack((a & 15 | b << 4, a >> 4 | b & 0xF0), dim=-2)
    return grouped(q.flatten(2, 3), scales, mins)


def q5_k(raw: Tensor) -> Groups:
    scales, mins = scales_and_mins(raw[..., :16])
    low = unpack(raw[..., 48:].unflatten(-1, (4, 32)), 4).flatten(2, 3)
    return grouped((low | unpack(raw[..., 16:48], 1) << 4).to(torch.int8), scales, mins)


def q6_k(raw: Tensor) -> Groups:
    low = unpack(raw[..., :128].unflatten(-1, (2, 64)), 4).flatten(2).unflatten(-1, (8, 32))
    high = unpack(raw[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(2, 3)
    q = (low | high << 4).to(torch.int8) - 32
    scales = floats(raw[..., 208:]).float() * raw[..., 192:208].view(torch.int8)
    return grouped(q.flatten(2).unflatten(-1, (16, 16)), scales)


FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# Scales that are products of two numbers are exact in float32. Types with a scale for every 16
# inputs do not fit any packed format of this library: only their values can be read.
TYPES = {
    2: Type("Q4_0", 32, 18, q4_0, bits=4, factors=2),
    3: Type("Q4_1", 32, 20, q4_1, bits=4, factors=4),
    6: Type("Q5_0", 32, 22, q5_0, bits=8, factors=2),
    7: Type("Q5_1", 32, 24, q5_1, bits=8, factors=4),
    8: Type("Q8_0", 32, 34, q8_0, bits=8, factors=2),
    10: Type("Q2_K", 256, 84, q2_k, bits=None, factors=2),
    11: Type("Q3_K", 256, 110, q3_k, bits=None, factors=2),
    12: Type("Q4_K", 256, 144, q4_k, bits=4, factors=8),
    13: Type("Q5_K", 256, 176, q5_k, bits=8, factors=8),
    14: Type("Q6_K", 256, 210, q6_k, bits=None, factors=2),
}
OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
