"""The release's layout, consolidated.NN.pth and params.json, and `Source` for all layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .files import check_numbers, map_tensors, read_json
from .names import is_rotary
from .quantized import Quantized

REQUIRED_PARAMS = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
OPTIONAL_PARAMS = (
    "n_kv_heads",
    "ffn_dim_multiplier",
    "vocab_size",
    "rope_theta",
    "rope_scaling_factor",
)
REAL_PARAMS = ("norm_eps", "rope_theta", "rope_scaling_factor", "ffn_dim_multiplier")
NEWER_PARAMS = {"use_scaled_rope": " (Llama 3.1)"}


class Source(NamedTuple):
    """The weights of a folder or GGUF file, and how its layout differs from the release's."""

    layout: str  # name shown to users
    params_file: str
    params: dict[str, Any]  # as in params.json
    files: list[Path]
    # By the path to name in errors, then by the name of a tensor in this layout.
    shards: Mapping[Path, Mapping[str, Tensor | Quantized]]
    name_of: Callable[[str], str]  # a tensor's name in the release -> in this layout
    in_halves: bool = False  # whether rotary rows are in Hugging Face's order
    # Whether all tensors are mapped pages of their file, which can be released and read again.
    gives_back: bool = False
    # The model's context length before scaling. None: the files do not specify it.
    max_positions: int | None = None
    vocabulary: bytes | None = None  # a complete SentencePiece model, if there is one
    chat_template: str | None = None  # a Jinja template, if there is one
    # Ids beyond those of tokenizer.model, and their texts. None: this layout cannot have any.
    added_tokens: Callable[[], Mapping[int, str]] | None = None

    def tensor(self, name: str) -> Tensor | Quantized:
        """Return the first shard's part of a tensor, by its name in the release."""
        return self.first[self.name_of(name)]

    def parts(self, name: str) -> list[Tensor | Quantized]:
        """Return every shard's part of a tensor, by its name in the release."""
        return [shard[self.name_of(name)] for shard in self.shards.values()]

    def in_halves_of(self, name: str) -> bool:
        """Whether a tensor, by its name in the release, has rows in Hugging Face's order."""
        return self.in_halves and is_rotary(name)

    @property
    def first(self) -> Mapping[str, Tensor | Quantized]:
        """The first shard, or the only one."""
        return next(iter(self.shards.values()))


def open_release(path: Path) -> Source:
    """Open a folder in this layout.

    Raises FileNotFoundError if a file is missing, ValueError if one is broken.
    """
    files = sorted(path.glob("consolidated.[0-9][0-9].pth"))
    if not files:
        raise FileNotFoundError(
            f"no consolidated.*.pth in {path}/: is this the folder that download.sh made?"
        )
    there = [file.name.split(".")[1] for file in files]
    missing = {f"{number:02}" for number in range(int(there[-1]))} - {*there}
    if missing:
        raise FileNotFoundError(
            f"consolidated.{min(missing)}.pth is missing: shards {', '.join(there)} are present: "
            "download it again"
        )
    params = read_params(path / "params.json")
    shards = {file: map_tensors(file) for file in files}
    return Source(
        "release", "params.json", params, files, shards, name_of=lambda name: name, gives_back=True
    )


def read_params(path: Path) -> dict[str, Any]:
    """Return the values of params.json that are set.

    Raises ValueError if a required key is missing, or if a key is unknown: it may belong to a
    different model.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}/: is this the folder that download.sh made?"
        )
    params = read_json(path)
    given = {
        key: value
        for key, value in params.items()
        if value is not None and (key, value) != ("vocab_size", -1)
    }
    for key in params:
        if key not in REQUIRED_PARAMS + OPTIONAL_PARAMS:
            raise ValueError(
                f"params.json has unknown key '{key}'{NEWER_PARAMS.get(key, '')}: not supported"
            )
    for key in REQUIRED_PARAMS:
        if key not in given:
            raise ValueError(f"params.json lacks key '{key}': download it again")
    check_numbers("params.json", given, real=REAL_PARAMS)
    return given
