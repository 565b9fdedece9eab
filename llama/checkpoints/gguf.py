"""Read GGUF files, llama.cpp's layout of the same weights.

A model is one file, or several parts, with metadata, vocabulary and tensors. The rows of query and
key matrices are in the release's order. gguf_types.py decodes the low-bit types.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import check_numbers, check_readable
from .gguf_types import FLOATS, OTHER_TYPES, TYPES, Blocks
from .huggingface import feed_forward_params
from .names import gguf_name
from .quantized import Quantized
from .release import Source
from .vocabulary import proto_of

VERSIONS = (2, 3)
ALIGNMENT = 32  # of tensors in bytes, if the file does not specify it
MOST_VALUES = 2**22  # limit for a metadata array; a vocabulary has about 32,000 pieces

# Value types of the metadata: numbers, as format characters of struct, then strings and arrays.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING = 8
ARRAY = 9

# Metadata keys -> params.json keys.
KEYS = {
    "llama.embedding_length": "dim",
    "llama.block_count": "n_layers",
    "llama.attention.head_count": "n_heads",
    "llama.attention.head_count_kv": "n_kv_heads",
    "llama.attention.layer_norm_rms_epsilon": "norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "llama.vocab_size": "vocab_size",
}
REQUIRED_KEYS = (
    *list(KEYS)[:3],
    "llama.attention.layer_norm_rms_epsilon",
    "llama.feed_forward_length",
)
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def open_gguf(path: Path) -> Source:
    """Open a GGUF file or, if `path` is one part of a split file, all its parts.

    Raises ValueError if a file is broken or not a Llama 2 model, FileNotFoundError if a part is
    missing.
    """
    files = parts_of(path)
    metadata, tensors = read_file(files[0])
    for file in files[1:]:
        tensors |= read_file(file)[1]
    name = files[0].name
    params = params_of(name, metadata)
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{name} has rope_freqs.weight (Llama 3.1's positions): not supported")
    if "output.weight" not in tensors and "token_embd.weight" in tensors:
        tensors["output.weight"] = tensors["token_embd.weight"]
    longest = metadata.get("llama.context_length")
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{name} has tokenizer.chat_template {template!r}: download it again")
    return Source(
        layout="GGUF",
        params_file=name,
        params=params,
        files=files,
        shards={files[0]: tensors},
        name_of=gguf_name,
        gives_back=True,
        max_positions=longest if isinstance(longest, int) else None,
        vocabulary=proto_of(name, metadata),
        chat_template=template,
    )


def parts_of(path: Path) -> list[Path]:
    """Return all parts of the file that `path` is a part of.

    Raises FileNotFoundError if a part is missing, ValueError if the name has an impossible number.
    """
    part = PART.fullmatch(path.name)
    if part is None:
        return [path]
    number = int(part[2])
    count = int(part[3])
    if not 1 <= number <= count:
        raise ValueError(
            f"{path.name} is named as part {number} of {count}: restore its original name"
        )
    files = [path.with_name(f"{part[1]}-{n:05}-of-{part[3]}.gguf") for n in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file.name} is missing beside {path}: download it")
    return files


def params_of(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Convert a file's metadata to the values of params.json.

    Raises ValueError if the model requires computations that are not supported.
    """
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise ValueError(
            f"{name} has general.architecture {kind!r}: not supported, only 'llama' is"
        )
    for key in REQUIRED_KEYS:
        if key not in metadata:
            raise ValueError(f"{name} lacks key {key}: download it again")
    given = {key: metadata[key] for key in (*KEYS, *REQUIRED_KEYS) if key in metadata}
    check_numbers(
        name, given, real=("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base")
    )
    params = {ours: as_written(given[theirs]) for theirs, ours in KEYS.items() if theirs in given}
    if params.get("n_kv_heads") == params["n_heads"]:
        del params["n_kv_heads"]  # as in the releases
    head_dim = params["dim"] // params["n_heads"]
    others = {
        "llama.rope.dimension_count": head_dim,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.expert_count": 0,
        "llama.attention.causal": True,
    }
    for key, wanted in others.items():
        if metadata.get(key, wanted) != wanted:
            raise ValueError(
                f"{name} has {key} {metadata[key]!r}: not supported, only {wanted!r} is"
            )
    scaling = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear"))
    if scaling not in ("none", "linear"):
        raise ValueError(
            f"{name} has llama.rope.scaling.type {scaling!r}: not supported, only 'linear' is"
        )
    if factor and scaling == "linear":
        check_numbers(
            name, {"llama.rope.scaling.factor": factor}, real=("llama.rope.scaling.factor",)
        )
        params["rope_scaling_factor"] = as_written(factor)
    return params | feed_forward_params(
        given["llama.embedding_length"], given["llama.feed_forward_length"]
    )


def as_written(value: float) -> float:
    """Return the shortest decimal with the same float32 value: 9.999999747378752e-06 -> 1e-05."""
    if isinstance(value, int):
        return value
    for digits in range(1, 9):
        near = float(f"{value:.{digits}g}")
        if struct.pack("f", near) == struct.pack("f", value):
            return near
    return value


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor | Quantized]]:
    """Read a file's metadata and map its tensors into memory.

    Raises ValueError if the file is broken.
    """
    check_readable(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = Header(path, data)
        try:
            metadata, infos = header.read()
        except (UnicodeDecodeError, struct.error) as error:
            raise header.broken(str(error)) from error
        start = header.position
        size = len(data)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise ValueError(f"{path} has general.alignment {alignment!r}: download it again")
    start += -start % alignment
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return metadata, {
        name: tensor_at(path, mapped, start, name, *info) for name, info in infos.items()
    }


class Header:
    """A reader of a file's header, which does not trust the counts and lengths in it."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.position = 0

    def broken(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is not a whole GGUF file ({reason}): download it again")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise self.broken(f"it ends at byte {len(self.data)}, in its header")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.broken(f"a value of kind {kind} in its metadata")
        kind = self.number("I")
        count = self.number("Q")
        if kind == ARRAY or count > MOST_VALUES:
            raise self.broken(f"an array of {count} values of kind {kind} in its metadata")
        if kind not in NUMBERS:
            return [self.value(kind) for _ in range(count)]
        form = f"<{count}{NUMBERS[kind]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
        """Return the metadata, and the shape, type and byte offset of each tensor."""
        if self.take(4) != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            said = f"of version {version}"
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                said = "in big-endian order"
            raise ValueError(
                f"{self.path} is a GGUF file {said}: not supported, only versions 2 and 3 are"
            )
        tensors = self.number("Q")
        values = self.number("Q")
        metadata = {self.text(): self.value(self.number("I")) for _ in range(values)}
        infos = {}
        for _ in range(tensors):
            name = self.text()
            dims = self.number("I")
            if not 1 <= dims <= 4:
                raise self.broken(f"{name} has {dims} dimensions")
            shape = tuple(self.number("Q") for _ in range(dims))[::-1]
            infos[name] = shape, self.number("I"), self.number("Q")
        return metadata, infos


def tensor_at(
    path: Path,
    mapped: Tensor,
    start: int,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    offset: int,
) -> Tensor | Quantized:
    """Return the tensor whose data begins `offset` bytes after `start`.

    Raises ValueError if its type is not supported or the file does not contain all of it.
    """
    if kind not in FLOATS and kind not in TYPES:
        known = ", ".join(["F32", "F16", "BF16", *(t.name for t in TYPES.values())])
        said = f"{path.name}: {name} is of type {OTHER_TYPES.get(kind, kind)}"
        raise ValueError(
            f"{said}: not supported, only {known} are; llama.cpp's llama-quantize writes them"
        )
    if kind in FLOATS:
        block = 1
        size = FLOATS[kind].itemsize
    else:
        block = TYPES[kind].block
        size = TYPES[kind].bytes
    length = math.prod(shape) // block * size
    begin = start + offset
    if shape[-1] % block or 0 in shape or offset % 4 or begin + length > len(mapped):
        raise ValueError(
            f"{path} is not a whole GGUF file ({name} is {shape} at byte {begin}): "
            "download it again"
        )
    raw = mapped[begin : begin + length]
    if kind in FLOATS:
        return raw.view(FLOATS[kind]).view(shape)
    if len(shape) != 2:
        raise ValueError(
            f"{path} has {name} of shape {shape} in {TYPES[kind].name}: "
            "only matrices can be quantized"
        )
    return Blocks(raw.view(shape[0], -1, size), TYPES[kind])
