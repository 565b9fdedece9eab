"""What the layouts share: named tensors in one or several shards, opened but not read."""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .names import shard_dim

logger = logging.getLogger(__name__)


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
            if what := difference({name for name in shard if not name.endswith(self.ignored)}, wanted):
                raise ValueError(f"{path} {what}: {self.params_file} is of another model, or this is not a Llama 2")
            for name, shape in shapes.items():
                self._check_tensor(path, name, shape)

    def _check_tensor(self, path: Path, name: str, whole: tuple[int, ...]) -> None:
        held, dim, parts = self.shards[path][self.name_of(name)], shard_dim(name), len(self.shards)
        shape = tuple(n // parts if d == dim else n for d, n in enumerate(whole))
        uneven = dim is not None and whole[dim] % parts
        if uneven or tuple(held.shape) != shape:
            raise ValueError(
                f"{path}: {self.name_of(name)} has shape {tuple(held.shape)}, and {self.params_file} asks for {shape}"
                + f" in each of {parts} shards" * (parts > 1)
                + ": a shard is missing or of another model"
            )
        if dim is None and not torch.equal(held, self.first[self.name_of(name)]):
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


def difference(held: Set[str], wanted: Set[str]) -> str | None:
    """What is wrong with the names of the tensors that a file holds, the first of it; None if nothing is."""
    if extra := held - wanted:
        return f"holds unknown tensor {min(extra)}"
    if missing := wanted - held:
        return f"lacks tensor {min(missing)}"
    return None
