"""GPTQ's and AWQ's matrices of 4 or 8 bits in Hugging Face folders, packed into 32-bit words.

w[i, o] = scale[g, o] × (q[i, o] − zero[g, o]) with g the group of input i (Frantar et al. 2022,
arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978); stored with inputs along rows, the transpose
of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import GROUP
from ..quantization.groups import Groups
from .files import read_json
from .quantized import Quantized

PARTS = ("qweight", "qzeros", "scales", "g_idx")
# beside config.json, of earlier packers
OTHER_CONFIGS = ("quantize_config.json", "quant_config.json")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that output 8 c + j is in


class Packing(NamedTuple):
    """How a folder's matrices are packed."""

    method: str  # "gptq" or "awq"
    bits: int
    group_size: int  # inputs; -1 for all
    zero_offset: int  # what was taken from the zeros before they were packed


def packing_of(folder: Path, config: dict[str, Any]) -> Packing | None:
    """What config.json or the file beside it says; None for plain weights.

    Raises ValueError for what is not read.
    """
    file = "config.json"
    said = config.get("quantization_config")
    if said is None:
        found = [name for name in OTHER_CONFIGS if (folder / name).exists()]
        if not found:
            return None
        file = found[0]
        said = read_json(folder / found[0])
    if not isinstance(said, dict):
        raise ValueError(f"{file} has quantization_config {said!r}: expected a dict")
    bits = said.get("bits", said.get("w_bit"))
    size = said.get("group_size", said.get("q_group_size"))
    method = str(said.get("quant_method", "gptq" if file == OTHER_CONFIGS[0] else "awq")).lower()
    if file == "config.json" and "quant_method" not in said:
        method = "gptq" if "desc_act" in said else "unknown"
    layouts = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
    if method not in layouts:
        raise ValueError(
            f"{file} has quant_method {said.get('quant_method')!r}: not supported, only gptq and awq are"
        )
    named = said.get("checkpoint_format") or said.get("format") or said.get("version")
    layout = str(named or layouts[method][0]).lower()
    if layout not in layouts[method]:
        known = " and ".join(map(repr, layouts[method]))
        raise ValueError(
            f"{file} has weights in {method}'s format {layout!r}: not supported, only {known} are"
        )
    widths = (4, 8) if method == "gptq" else (4,)
    if type(bits) is not int or bits not in widths:
        raise ValueError(
            f"{file} has bits {bits!r}: not supported, only {' and '.join(map(str, widths))} are"
        )
    if type(size) is not int or (size != -1 and (size < GROUP or size % GROUP)):
        raise ValueError(
            f"{file} has group_size {size!r}: not supported, only -1 and multiples of {GROUP} are"
        )
    return Packing(method, bits, size, int(layout == "gptq"))


def unpacked(tensors: dict[str, Tensor], packing: Packing) -> dict[str, Tensor | Quantized]:
    """The tensors with each matrix in place of its parts.

    Raises ValueError for parts that do not fit each other.
    """
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = {f"{stem}.{part}" for stem in stems for part in PARTS}
    # Packers write a bias for every layer, of which Llama has none.
    empty = {
        f"{stem}.bias"
        for stem in stems
        if f"{stem}.bias" in tensors and not tensors[f"{stem}.bias"].any()
    }
    plain = {name: tensor for name, tensor in tensors.items() if name not in parts | empty}
    if wrong := [name for name, tensor in plain.items() if not tensor.is_floating_point()]:
        raise ValueError(
            f"{wrong[0]} is of {str(tensors[wrong[0]].dtype).removeprefix('torch.')}: download it again"
        )
    return plain | {f"{stem}.weight": packed_matrix(stem, tensors, packing) for stem in stems}


def packed_matrix(stem: str, tensors: dict[str, Tensor], packing: Packing) -> Packed:
    """The matrix whose parts' names begin with `stem`.

    Raises ValueError for parts that do not fit each other.
    """
    found = {part: tensors[f"{stem}.{part}"] for part in PARTS if f"{stem}.{part}" in tensors}
    if missing := [part for part in PARTS[:3] if part not in found]:
        raise ValueError(f"{stem}.{missing[0]} is missing beside {stem}.qweight: download it again")
    for part, tensor in found.items():
        if tensor.dim() != (1 if part == "g_idx" else 2) or tensor.numel() == 0:
            raise ValueError(f"{stem}.{part} has shape {tuple(tensor.shape)}: download it again")
    qweight = found["qweight"]
    scales = found["scales"]
    per_word = 32 // packing.bits
    rows = scales.shape[-1]
    inputs = len(qweight) * (per_word if packing.method == "gptq" else 1)
    size = inputs if packing.group_size == -1 else packing.group_size
    groups = -(-inputs // size)
    packed = (inputs // per_word, rows) if packing.method == "gptq" else (inputs, rows // per_word)
    wanted = {
        "qweight": packed,
        "qzeros": (groups, rows // per_word),
        "scales": (groups, rows),
        "g_idx": (inputs,),
    }
    for part, tensor in found.items():
        if tuple(tensor.shape) != wanted[part] or inputs % GROUP or rows % per_word:
            raise ValueError(
                f"{stem}.{part} has shape {tuple(tensor.shape)}, which does not fit {packing.bits} bits in groups of "
                f"{packing.group_size}: download it again"
            )
        if tensor.is_floating_point() != (part == "scales"):
            raise ValueError(
                f"{stem}.{part} is of {str(tensor.dtype).removeprefix('torch.')}: download it again"
            )
    return Packed(found, packing, rows, inputs, size)


class Packed(Quantized):
    """A matrix as its parts."""

    block = GROUP

    def __init__(
        self, parts: dict[str, Tensor], packing: Packing, rows: int, inputs: int, group_size: int
    ):
        super().__init__(rows, inputs)
        self.parts = parts
        self.packing = packing
        self.group_size = group_size
        self.bits, self.per_word, self.middle = (
            packing.bits,
            32 // packing.bits,
            1 << packing.bits - 1,
        )
        # in each integer of a word
        ones = sum(1 << packing.bits * number for number in range(self.per_word))
        # To whole words, so that a zero of 0, which borrowed from its neighbour, gives back what it
        # took.
        self.zeros = parts["qzeros"] + packing.zero_offset * ones
        # Of symmetric weights the zero is the middle, which no store has to hold.
        self.symmetric = bool(
            (self.zeros == torch.tensor(self.middle * ones).to(torch.int32)).all()
        )
        in_order = torch.arange(inputs) // group_size
        groups = parts.get("g_idx", in_order).long()
        # groups of inputs that are not neighbours: "desc_act"
        if not torch.equal(groups, in_order):
            self.order = torch.argsort(groups, stable=True)
            if not torch.equal(groups[self.order], in_order):
                raise ValueError(
                    f"a g_idx has groups that are not of {group_size} inputs: download it again"
                )
        self.exact16 = self.symmetric and parts["scales"].dtype == torch.float16
        self.kind = f"{packing.method.upper()} in {packing.bits} bits"
        self.joins = (
            self.kind,
            self.symmetric,
            None if self.order is None else tuple(self.order.tolist()),
        )
        self.bytes_per_weight = (
            packing.bits / 8 + (2 if self.exact16 else 4 if self.symmetric else 8) / GROUP
        )

    def read(self, rows: slice, inputs: slice) -> Groups:
        if self.packing.method == "gptq":
            words = self.parts["qweight"][
                inputs.start // self.per_word : inputs.stop // self.per_word, rows
            ]
            q = integers(words.T, self.packing)
        else:
            q = self.columns(self.parts["qweight"][inputs], rows).T
        if self.order is not None:
            q = q[:, self.order]
        groups = torch.arange(inputs.start, inputs.stop, GROUP) // self.group_size
        scales = self.parts["scales"][groups, rows].T
        mins = None
        if not self.symmetric:
            zeros = self.columns(self.zeros, rows)[groups].T.to(torch.int16)
            mins = (self.middle * (self.bits == 8) - zeros) * scales.float()
        q = q.unflatten(1, (-1, GROUP))
        q = (
            (q.to(torch.int16) - 128).to(torch.int8)
            if self.bits == 8
            else q[..., :16] | q[..., 16:] << 4
        )
        return Groups(q, scales if self.exact16 else scales.float(), mins)

    def columns(self, words: Tensor, rows: slice) -> Tensor:
        """(n, rows) uint8 of words (n, ...) in which neighbouring integers are of neighbouring
        rows.
        """
        first = rows.start // self.per_word
        q = integers(words[:, first : -(-rows.stop // self.per_word)], self.packing)
        return q[:, rows.start - first * self.per_word : rows.stop - first * self.per_word]


def integers(words: Tensor, packing: Packing) -> Tensor:
    """(n, m × 32 / bits) uint8: what words (n, m) int32 hold, in the order that the method packs it
    in.
    """
    data = words.contiguous().view(torch.uint8)
    if packing.bits == 8:
        return data
    q = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)
    return q if packing.method == "gptq" else q.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)
