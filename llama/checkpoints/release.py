"""The release's layout, consolidated.NN.pth and params.json, and what the other layouts have in common with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import check_numbers, give_back, map_pickle, read_json
from .names import part_shape, shard_dim

logger = logging.getLogger(__name__)

REQUIRED_PARAMS = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
OPTIONAL_PARAMS = ("n_kv_heads", "ffn_dim_multiplier", "vocab_size", "rope_theta", "rope_scaling_factor")
REAL_PARAMS = ("norm_eps", "rope_theta", "rope_scaling_factor", "ffn_dim_multiplier")
NEWER_PARAMS = {"use_scaled_rope": " (Llama 3.1)"}


class Source:
    """The weights of one folder. Outside, tensors have the release's names; a layout says what they are called in it.

    Raises ValueError for a shard that has no embedding.
    """

    layout: str  # what users call it
    params_file: str
    ignored: str  # what the names of precomputed angles end in, which some files carry and no model needs

    def __init__(
        self,
        files: list[Path],
        params: dict[str, Any],
        shards: dict[Path, dict[str, Tensor]],
        max_positions: int | None = None,
    ):
        self.files = files
        self.params = params  # as in params.json
        self.shards = shards  # by the path that errors name
        self.max_positions = max_positions  # what the model was made for, before scaling; None: the folder does not say
        embedding = self.name_of("tok_embeddings.weight")
        for path, shard in shards.items():
            if embedding not in shard or shard[embedding].dim() != 2:
                raise ValueError(f"{path} lacks tensor {embedding}: is it a checkpoint of Llama 2?")
        self.first = next(iter(shards.values()))

    def name_of(self, name: str) -> str:
        """The layout's name of a tensor."""
        return name

    def place(self, name: str, part: Tensor, out: Tensor) -> None:
        """Copy some rows or columns of a tensor, as the files have them, to `out`, as the model wants them."""
        raise NotImplementedError

    def __contains__(self, name: str) -> bool:
        return self.name_of(name) in self.first

    def dtype_of(self, name: str) -> torch.dtype:
        return self.first[self.name_of(name)].dtype

    @property
    def vocab_size(self) -> int:
        return self.first[self.name_of("tok_embeddings.weight")].shape[0]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every shard holds its part of the tensors of these whole shapes, and nothing else."""
        wanted = {self.name_of(name) for name in shapes}
        for path, shard in self.shards.items():
            held = {name for name in shard if not name.endswith(self.ignored)}
            for what, names in (("holds unknown", held - wanted), ("lacks", wanted - held)):
                if names:
                    tensor = f"{what} tensor {min(names)}"
                    raise ValueError(f"{path} {tensor}: {self.params_file} is of another model, or this is no Llama 2")
            for name, shape in shapes.items():
                self._check_tensor(path, name, shape)

    def _check_tensor(self, path: Path, name: str, whole: tuple[int, ...]) -> None:
        held, first = self.shards[path][self.name_of(name)], self.first[self.name_of(name)]
        dim, parts = shard_dim(name), len(self.shards)
        shape = part_shape(name, whole, parts)
        if tuple(held.shape) != shape or (dim is not None and whole[dim] % parts):
            asked = f"{self.params_file} asks for {shape}" + f" in each of {parts} shards" * (parts > 1)
            found = f"{path}: {self.name_of(name)} has shape {tuple(held.shape)}"
            raise ValueError(f"{found}, and {asked}: a shard is missing or of another model")
        if dim is None and held is not first and not torch.equal(held, first):
            logger.warning("%s: %s is not that of shard 00: the shards may be of two models", path, name)

    def copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        """Fill `out` with the part of a tensor that begins at `start` along `dim`, over as many shards as it takes."""
        tensors = [shard[self.name_of(name)] for shard in self.shards.values()]
        if shard_dim(name) is None:
            tensors = tensors[:1]
        size = tensors[0].shape[dim]  # of each shard
        end = start + out.shape[dim]
        for number, tensor in enumerate(tensors):
            first, last = max(start, number * size), min(end, (number + 1) * size)
            if first < last:
                part = tensor.narrow(dim, first - number * size, last - first)
                self.place(name, part, out.narrow(dim, first - start, last - first))


class Release(Source):
    """A folder in this layout. Raises FileNotFoundError and ValueError as `find_shards` and `read_params` do."""

    layout = "release"
    params_file = "params.json"
    ignored = "rope.freqs"

    def __init__(self, path: Path):
        files = find_shards(path)
        super().__init__(files, read_params(path / self.params_file), {file: map_pickle(file) for file in files})

    def place(self, name: str, part: Tensor, out: Tensor) -> None:
        out.copy_(part)
        give_back(part)


def find_shards(path: Path) -> list[Path]:
    """consolidated.00.pth to the last one. Raises FileNotFoundError where one is missing in between, or all are."""
    files = sorted(path.glob("consolidated.[0-9][0-9].pth"))
    if not files:
        raise FileNotFoundError(f"no consolidated.*.pth in {path}/: is this the folder that download.sh made?")
    there = [file.name.split(".")[1] for file in files]
    if missing := {f"{number:02}" for number in range(int(there[-1]))} - {*there}:
        raise FileNotFoundError(
            f"consolidated.{min(missing)}.pth is missing: shards {', '.join(there)} are there: download it again"
        )
    return files


def read_params(path: Path) -> dict[str, Any]:
    """params.json. Raises ValueError for a key that is unknown, as it may change the mathematics, or missing."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}/: is this the folder that download.sh made?")
    params = read_json(path)
    for key in params:
        if key not in REQUIRED_PARAMS + OPTIONAL_PARAMS:
            raise ValueError(f"params.json has unknown key '{key}'{NEWER_PARAMS.get(key, '')}: not supported")
    for key in REQUIRED_PARAMS:
        if key not in params:
            raise ValueError(f"params.json lacks key '{key}': download it again")
    given = {key: value for key, value in params.items() if value is not None or key in REQUIRED_PARAMS}
    sizes = {key: value for key, value in given.items() if (key, value) != ("vocab_size", -1)}
    check_numbers("params.json", sizes, real=REAL_PARAMS)
    return given
