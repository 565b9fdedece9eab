"""python -m llama reshard and convert: write a checkpoint with other shards or another layout."""

from __future__ import annotations

from typing import Annotated

from ..checkpoints import convert as checkpoints
from .common import FolderOrFile

Out = Annotated[str, "folder or GGUF file to write; it must not exist yet"]
Shards = Annotated[int, "number of shards to write"]
Layout = Annotated[
    str, "hf for Hugging Face's layout, meta for the release's, gguf for llama.cpp's"
]
MatrixType = Annotated[str, "type of a GGUF file's matrices: f16, bf16, q8_0, q4_0 or q4_1"]


def reshard(ckpt_dir: FolderOrFile, out: Out, model_parallel_size: Shards) -> str:
    """Write a folder in the release's layout with `model_parallel_size` shards.

    Only one shard at a time is in memory.
    """
    return checkpoints.reshard(ckpt_dir, out, model_parallel_size)


def convert(ckpt_dir: FolderOrFile, out: Out, to: Layout, type: MatrixType = "f16") -> str:
    """Write the checkpoint in another layout.

    The layouts are Hugging Face's, the release's with one shard, and a GGUF file. All matrices of
    a GGUF file have the same `type`.
    """
    return checkpoints.convert(ckpt_dir, out, to, type)
