"""Write a checkpoint with a different number of shards, or in another layout."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import check_positive
from ..model import ModelArgs
from .files import import_safetensors, md5_of, path_of, size_text
from .folder import Checkpoint, check_world_size, open_whole
from .gguf_writer import GGUFFile
from .huggingface import config_of
from .names import Shapes, huggingface_name, is_rotary, part_shape, split_halves
from .release import OPTIONAL_PARAMS, REQUIRED_PARAMS

logger = logging.getLogger(__name__)

PART_BYTES = 2 * 10**9  # limit for a safetensors file; one is in memory at a time


def reshard(ckpt_dir: str, out: str, model_parallel_size: int) -> str:
    """Write a folder in the release's layout with `model_parallel_size` shards.

    Holds one shard in memory at a time.
    """
    check_positive(model_parallel_size=model_parallel_size)
    checkpoint, args, shapes = open_whole(ckpt_dir)
    check_world_size(checkpoint.name, args, model_parallel_size)
    with new_folder(out, checkpoint, size_of(checkpoint, shapes)) as folder:
        for rank in range(model_parallel_size):
            shard = read(checkpoint, shapes, f"shard {rank}", rank, model_parallel_size)
            torch.save(shard, folder / f"consolidated.{rank:02}.pth")
            del shard
        changed = [
            name for name in OPTIONAL_PARAMS if getattr(args, name) != getattr(ModelArgs, name)
        ]
        params = {name: getattr(args, name) for name in (*REQUIRED_PARAMS, *changed)}
        # The release's own params.json has vocab_size -1.
        (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    return f"{out}: {model_parallel_size} shard(s)"


def convert(ckpt_dir: str, out: str, to: str, type: str = "f16") -> str:
    """Write the checkpoint in another layout.

    `to` is "hf" (Hugging Face's layout), "meta" (the release's layout with one shard) or "gguf".
    `type` is the type of the matrices in a GGUF file: f16, bf16, q8_0, q4_0 or q4_1.
    """
    if to == "meta":
        return reshard(ckpt_dir, out, 1)
    if to not in ("hf", "gguf"):
        raise ValueError(f"to is {to!r}: use 'hf', 'meta' or 'gguf'")
    checkpoint, args, shapes = open_whole(ckpt_dir)
    if to == "hf":
        return write_huggingface(checkpoint, args, shapes, out)
    file = GGUFFile(checkpoint, args, shapes, type)
    with new_path(out, file.size) as path:
        file.write(path)
    return f"{out}: {len(shapes)} tensors, {size_text(path_of('out', out).stat().st_size)}"


def write_huggingface(checkpoint: Checkpoint, args: ModelArgs, shapes: Shapes, out: str) -> str:
    parts = parts_of(checkpoint, shapes)
    save_file = import_safetensors(path_of("out", out)).save_file
    with new_folder(out, checkpoint, size_of(checkpoint, shapes)) as folder:
        weight_map: dict[str, str] = {}
        for number, part in enumerate(parts, 1):
            file = "model.safetensors"
            if len(parts) > 1:
                file = f"model-{number:05}-of-{len(parts):05}.safetensors"
            tensors = {}
            for name, tensor in read(checkpoint, part, file).items():
                if is_rotary(name):
                    tensor = split_halves(tensor, args.head_dim)
                tensors[huggingface_name(name)] = tensor
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            del tensors
        if len(parts) > 1:
            index = {
                "metadata": {"total_size": size_of(checkpoint, shapes)},
                "weight_map": weight_map,
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = config_of(args, checkpoint.dtype, checkpoint.source.max_positions)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        # Without these keys, transformers drops the leading space of a text.
        kind = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(kind, indent=2))
    return f"{out}: {len(parts)} file(s) of weights"


def read(
    checkpoint: Checkpoint, shapes: Shapes, what: str, rank: int = 0, world_size: int = 1
) -> dict[str, Tensor]:
    """Read one rank's part of each tensor, in the data type of the file.

    `shapes` are the shapes of the whole tensors.
    """
    tensors = {}
    for name, shape in tqdm(shapes.items(), desc=what, unit="tensor", leave=False, disable=None):
        dtype = checkpoint.source.tensor(name).dtype
        tensors[name] = torch.empty(part_shape(name, shape, world_size), dtype=dtype)
        checkpoint.copy(name, rank, tensors[name])
    return tensors


def size_of(checkpoint: Checkpoint, shapes: Shapes) -> int:
    """Return the total size of the tensors in bytes."""
    return sum(
        math.prod(shape) * checkpoint.source.tensor(name).dtype.itemsize
        for name, shape in shapes.items()
    )


def parts_of(checkpoint: Checkpoint, shapes: Shapes) -> list[Shapes]:
    """Split the tensors into groups of at most PART_BYTES."""
    parts: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if parts[-1] and size_of(checkpoint, parts[-1] | {name: shape}) > PART_BYTES:
            parts.append({})
        parts[-1][name] = shape
    return parts


@contextlib.contextmanager
def new_path(out: str, needed: int) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `out` on success and removed on an error.

    Raises FileExistsError if `out` exists, FileNotFoundError if its parent folder does not, and
    OSError if a write fails or the disk has less than `needed` bytes free.
    """
    path = path_of("out", out)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another name, or remove it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into: make it first")
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("too little space")
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f"{path.name}.", suffix=".part"
        ) as scratch:
            written = Path(scratch, path.name)
            yield written
            written.rename(path)
    except (ImportError, ValueError):  # not caused by the disk
        raise
    # If a write fails, torch raises a RuntimeError and safetensors an error type of its own.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        free = size_text(shutil.disk_usage(path.parent).free)
        sizes = f"{size_text(needed)} are needed, and {free} are free"
        raise OSError(f"could not write to {path.parent} ({reason}): {sizes}") from error


@contextlib.contextmanager
def new_folder(out: str, checkpoint: Checkpoint, needed: int) -> Iterator[Path]:
    """Yield a new folder for a checkpoint's weights; see `new_path`.

    Afterwards, adds the tokenizer and checklist.chk.
    """
    tokenizer = None
    try:
        tokenizer = checkpoint.tokenizer_model()
    except (FileNotFoundError, ValueError) as error:  # the weights are complete without it
        logger.warning("writing no tokenizer.model: %s", error)
    with new_path(out, needed) as folder:
        folder.mkdir()  # has the umask's permissions, unlike the temporary parent
        yield folder
        if tokenizer is not None:
            (folder / "tokenizer.model").write_bytes(tokenizer)
        sums = [f"{md5_of(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
        (folder / "checklist.chk").write_text("".join(sums))
        for file in folder.iterdir():
            file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files owner-only
