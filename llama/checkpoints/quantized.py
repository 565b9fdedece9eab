"""Matrices stored in few bits, of which a rank decodes only the parts that it needs."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..ops import GROUP
from ..quantization.groups import QUANTISED_ROWS, Groups, concatenate

T = TypeVar("T", bound="Quantized")


class Quantized:
    """A matrix (rows, inputs), or a part of one, with the methods of Tensor that loading needs.

    Each subclass decodes one file format.
    """

    kind: str  # the name of its type in the layout
    # Bits of the packed format that stores the file's groups exactly. None: there is no such
    # format, and only values can be read.
    bits: int | None = None
    bytes_per_weight: float  # in that format
    joins: Hashable  # matrices with equal `joins` can be packed as one
    block: int  # number of inputs of a row that are decoded together
    # Input order[i] of a row is at position i of its groups. None: inputs are in order.
    order: Tensor | None = None
    dtype = torch.float16  # of a copy in a layout without quantized matrices

    def __init__(self, rows: int, inputs: int):
        self.rows = range(rows)
        self.inputs = range(inputs)
        self.width = inputs

    def read(self, rows: slice, inputs: slice) -> Groups:
        """Decode these inputs, which are whole blocks, of these rows."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Release the memory of the data that was read, if it can be read again."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), len(self.inputs)))

    def dim(self) -> int:
        return 2

    def __len__(self) -> int:
        return len(self.rows)

    def narrow(self: T, dim: int, start: int, length: int) -> T:
        part = copy.copy(self)
        if dim == 0:
            part.rows = self.rows[start : start + length]
        else:
            part.inputs = self.inputs[start : start + length]
        return part

    def groups(self) -> Groups:
        """Return the groups for a packed weight of `bits` bits, in `order`.

        The part must begin and end at a group boundary.
        """
        parts = list(self._decode())
        first = (self.inputs.start - self._blocks.start) // GROUP
        return concatenate(parts).map(
            lambda tensor: tensor.narrow(1, first, len(self.inputs) // GROUP)
        )

    def copy_to(self, out: Tensor) -> None:
        """Fill `out` (rows, inputs) with the values, rounded to its type."""
        first = self.inputs.start - self._blocks.start
        for rows, part in zip(out.split(QUANTISED_ROWS), self._decode(), strict=True):
            values = part.dequantize()
            if self.order is not None:
                values = values[:, self.order.argsort()]
            rows.copy_(values.narrow(1, first, len(self.inputs)))

    @property
    def _blocks(self) -> slice:
        """The inputs of all blocks that contain inputs of this part."""
        if self.order is not None:
            return slice(0, self.width)
        first = self.inputs.start // self.block
        last = -(-self.inputs.stop // self.block)
        return slice(first * self.block, last * self.block)

    def _decode(self) -> Iterator[Groups]:
        for first in range(self.rows.start, self.rows.stop, QUANTISED_ROWS):
            last = min(first + QUANTISED_ROWS, self.rows.stop)
            yield self.read(slice(first, last), self._blocks)
