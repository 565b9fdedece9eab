"""Matrices that files have in fewer bits, decoded only where and when a rank needs them."""

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
    """A part, at first all, of a matrix (rows, inputs), with the methods of Tensor that are needed.

    Subclasses decode one format of a file.
    """

    kind: str  # what its layout calls it
    # bits of the weight format that keeps the file's groups exactly; None: there is none, and only
    # values can be read
    bits: int | None = None
    bytes_per_weight: float  # of these groups
    joins: Hashable  # matrices in which it is equal can be packed as one
    block: int  # so many inputs of a row are decoded together
    # input order[i] of a row is the i-th of its groups; None: they stand in their order
    order: Tensor | None = None
    dtype = torch.float16  # of a copy of it in a layout without such matrices

    def __init__(self, rows: int, inputs: int):
        self.rows = range(rows)
        self.inputs = range(inputs)
        self.width = inputs

    def read(self, rows: slice, inputs: slice) -> Groups:
        """Some rows' inputs, whole blocks of them, decoded."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Take what was read out of this process's memory, if it can be read again."""

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
        """The groups of a packed weight of `bits` bits, in `order`.

        The part has to begin and end with a group.
        """
        parts = list(self._decode())
        first = (self.inputs.start - self._blocks.start) // GROUP
        return concatenate(parts).map(
            lambda tensor: tensor.narrow(1, first, len(self.inputs) // GROUP)
        )

    def copy_to(self, out: Tensor) -> None:
        """Fill `out`, (rows, inputs), with the values, rounded to its type."""
        first = self.inputs.start - self._blocks.start
        for rows, part in zip(out.split(QUANTISED_ROWS), self._decode(), strict=True):
            values = part.dequantize()
            if self.order is not None:
                values = values[:, self.order.argsort()]
            rows.copy_(values.narrow(1, first, len(self.inputs)))

    @property
    def _blocks(self) -> slice:
        """The inputs of the blocks that the part's inputs are in."""
        if self.order is not None:
            return slice(0, self.width)
        first = self.inputs.start // self.block
        last = -(-self.inputs.stop // self.block)
        return slice(first * self.block, last * self.block)

    def _decode(self) -> Iterator[Groups]:
        for first in range(self.rows.start, self.rows.stop, QUANTISED_ROWS):
            last = min(first + QUANTISED_ROWS, self.rows.stop)
            yield self.read(slice(first, last), self._blocks)
