"""GPTQ and AWQ matrices of 4 or 8 bits in Hugging Face folders, packed into 32-bit words.

w[i, o] = scale[g, o] × (q[i, o] − zero[g, o]), where g is the group of input i (Frantar et al.
2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978). Files store the transpose of this
library's weights, with inputs along rows.
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

REQUIRED_PARTS = ("qweight", "qzeros", "scales")
PARTS = (*REQUIRED_PARTS, "g_idx")
# Files next to config.json that older packers of GPTQ and AWQ wrote.
OTHER_CONFIGS = ("quantize_config.json", "quant_config.json")
# The supported formats and bits of each method.
LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
WIDTHS = {"gptq": (4, 8), "awq": (4,)}
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # output 8 c + j is nibble AWQ_ORDER[j] of word c


class Packing(NamedTuple):
    """How a folder's matrices are packed."""

    method: str  # "gptq" or "awq"
    bits: int
    group_size: int  # inputs per group; -1: all inputs
    zero_offset: int  # subtracted from the zero points before packing


def packing_of(folder: Path, config: dict[str, Any]) -> Packing | None:
    """Read the packing from config.json or the file next to it; None for plain weights.

    Raises ValueError if the packing is not supported.
    """
    file, said = quantization_config(folder, config)
    if said is None:
        return None
    if not isinstance(said, dict):
        raise ValueError(f"{file} has quantization_config {said!r}: expected a dict")
    bits = said.get("bits", said.get("w_bit"))
    size = said.get("group_size", said.get("q_group_size"))
    method = method_of(file, said)
    if method not in LAYOUTS:
        raise ValueError(
            f"{file} has quant_method {said.get('quant_method')!r}: "
            "not supported, only gptq and awq are"
        )
    named = said.get("checkpoint_format") or said.get("format") or said.get("version")
    layout = str(named or LAYOUTS[method][0]).lower()
    if layout not in LAYOUTS[method]:
        known = " and ".join(map(repr, LAYOUTS[method]))
        raise ValueError(
            f"{file} has weights in {method}'s format {layout!r}: not supported, only {known} are"
        )
    if type(bits) is not int or bits not in WIDTHS[method]:
        widths = " and ".join(map(str, WIDTHS[method]))
        raise ValueError(f"{file} has bits {bits!r}: not supported, only {widths} are")
    if type(size) is not int or (size != -1 and (size < GROUP or size % GROUP)):
        raise ValueError(
            f"{file} has group_size {size!r}: not supported, only -1 and multiples of {GROUP} are"
        )
    return Packing(method, bits, size, zero_offset=int(layout == "gptq"))


def quantization_config(folder: Path, config: dict[str, Any]) -> tuple[str, Any]:
    """Return the file that describes the packing, and its content or None if there is none."""
    said = config.get("quantization_config")
    if said is not None:
        return "config.json", said
    for name in OTHER_CONFIGS:
        if (folder / name).exists():
            return name, read_json(folder / name)
    return "config.json", None


def method_of(file: str, said: dict[str, Any]) -> str:
    """Return the method that packed the matrices, or a name that is not in LAYOUTS."""
    if "quant_method" in said:
        return str(said["quant_method"]).lower()
    if file != "config.json":
        return "gptq" if file == OTHER_CONFIGS[0] else "awq"
    return "gptq" if "desc_act" in said else "unknown"


def unpacked(tensors: dict[str, Tensor], packing: Packing) -> dict[str, Tensor | Quantized]:
    """Replace the parts of each packed matrix with one `Packed` matrix.

    Raises ValueError if parts are missing or do not match.
    """
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    left_out = {f"{stem}.{part}" for stem in stems for part in PARTS}
    for stem in stems:
        # Packers write a zero bias for every layer, but Llama has no biases.
        bias = tensors.get(f"{stem}.bias")
        if bias is not None and not bias.any():
            left_out.add(f"{stem}.bias")
    plain = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    for name, tensor in plain.items():
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} has type {dtype}: download it again")
    return plain | {f"{stem}.weight": packed_matrix(stem, tensors, packing) for stem in stems}


def packed_matrix(stem: str, tensors: dict[str, Tensor], packing: Packing) -> Packed:
    """Return the matrix whose parts have names that begin with `stem`.

    Raises ValueError if parts are missing or do not match.
    """
    found = {part: tensors[f"{stem}.{part}"] for part in PARTS if f"{stem}.{part}" in tensors}
    for part in REQUIRED_PARTS:
        if part not in found:
            raise ValueError(f"{stem}.{part} is missing beside {stem}.qweight: download it again")
    for part, tensor in found.items():
        dims = 1 if part == "g_idx" else 2
        if tensor.dim() != dims or tensor.numel() == 0:
            raise ValueError(f"{stem}.{part} has shape {tuple(tensor.shape)}: download it again")
    per_word = 32 // packing.bits
    rows = found["scales"].shape[-1]
    inputs = len(found["qweight"])
    packed = (inputs, rows // per_word)
    if packing.method == "gptq":
        packed = (inputs, rows)
        inputs *= per_word
    size = packing.group_size
    if size == -1:
        size = inputs
    groups = -(-inputs // size)
    wanted = {
        "qweight": packed,
        "qzeros": (groups, rows // per_word),
        "scales": (groups, rows),
        "g_idx": (inputs,),
    }
    for part, tensor in found.items():
        if tuple(tensor.shape) != wanted[part] or inputs % GROUP or rows % per_word:
            raise ValueError(
                f"{stem}.{part} has shape {tuple(tensor.shape)}, which does not fit "
                f"{packing.bits} bits in groups of {packing.group_size}: download it again"
            )
        if tensor.is_floating_point() != (part == "scales"):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{stem}.{part} has type {dtype}: download it again")
    return Packed(found, packing, rows, inputs, size)


class Packed(Quantized):
    """A packed matrix, stored as its parts."""

    block = GROUP

    def __init__(
        self, parts: dict[str, Tensor], packing: Packing, rows: int, inputs: int, group_size: int
    ):
        super().__init__(rows, inputs)
        self.parts = parts
        self.packing = packing
        self.group_size = group_size
        self.bits = packing.bits
        self.per_word = 32 // packing.bits
        self.middle = 1 << packing.bits - 1
        # A word in which each integer is 1.
        ones = sum(1 << packing.bits * number for number in range(self.per_word))
        # The offset is added to whole words. If a zero point of 0 borrowed from the next integer
        # when the offset was subtracted, the carry of this addition undoes that.
        self.zeros = parts["qzeros"] + packing.zero_offset * ones
        # In symmetric weights every zero point is the middle, and no format needs to store it.
        middles = torch.tensor(self.middle * ones).to(torch.int32)
        self.symmetric = bool((self.zeros == middles).all())
        self.order = group_order(parts, inputs, group_size)
        order = None if self.order is None else tuple(self.order.tolist())
        self.exact16 = self.symmetric and parts["scales"].dtype == torch.float16
        self.kind = f"{packing.method.upper()} in {packing.bits} bits"
        self.joins = (self.kind, self.symmetric, order)
        factor_bytes = 8  # a scale and a minimum in float32
        if self.symmetric:
            factor_bytes = 2 if self.exact16 else 4
        self.bytes_per_weight = packing.bits / 8 + factor_bytes / GROUP

    def read(self, rows: slice, inputs: slice) -> Groups:
        q = self.integers_of(rows, inputs)
        groups = torch.arange(inputs.start, inputs.stop, GROUP) // self.group_size
        scales = self.parts["scales"][groups, rows].T
        if not self.exact16:
            scales = scales.float()
        mins = None
        if not self.symmetric:
            zeros = self.columns(self.zeros, rows)[groups].T.to(torch.int16)
            mins = (self.middle * (self.bits == 8) - zeros) * scales
        q = q.unflatten(1, (-1, GROUP))
        if self.bits == 8:
            return Groups((q.to(torch.int16) - 128).to(torch.int8), scales, mins)
        return Groups(q[..., :16] | q[..., 16:] << 4, scales, mins)

    def integers_of(self, rows: slice, inputs: slice) -> Tensor:
        """Unpack integers to (rows, inputs) uint8, in the order of the groups."""
        qweight = self.parts["qweight"]
        if self.packing.method == "gptq":
            words = slice(inputs.start // self.per_word, inputs.stop // self.per_word)
            q = integers(qweight[words, rows].T, self.packing)
        else:
            q = self.columns(qweight[inputs], rows).T
        if self.order is not None:
            q = q[:, self.order]
        return q

    def columns(self, words: Tensor, rows: slice) -> Tensor:
        """Unpack `words` (n, ...), with consecutive rows in each word, to (n, rows) uint8."""
        first = rows.start // self.per_word
        last = -(-rows.stop // self.per_word)
        q = integers(words[:, first:last], self.packing)
        start = first * self.per_word
        return q[:, rows.start - start : rows.stop - start]


def group_order(parts: dict[str, Tensor], inputs: int, group_size: int) -> Tensor | None:
    """Return the inputs in the order of their groups, or None if they are already in order.

    They are not if g_idx has groups of scattered inputs ("desc_act"). Raises ValueError if a group
    has the wrong size.
    """
    in_order = torch.arange(inputs) // group_size
    groups = parts.get("g_idx", in_order).long()
    if torch.equal(groups, in_order):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], in_order):
        raise ValueError(
            f"a g_idx has groups that do not have {group_size} inputs: download it again"
        )
    return order


def integers(words: Tensor, packing: Packing) -> Tensor:
    """Unpack words (n, m) int32 to integers (n, m × 32 / bits) uint8, in logical order."""
    data = words.contiguous().view(torch.uint8)
    if packing.bits == 8:
        return data
    q = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)
    if packing.method == "awq":
        q = q.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)
    return q
