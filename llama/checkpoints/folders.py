"""What one does with a checkpoint folder but run it: describe it, check its sums, write it anew in another layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_positive
from ..model import ModelArgs, Transformer
from ..stores import STORES
from .files import check_readable, folder_of, import_safetensors, path_of, size_text
from .folder import Checkpoint, check_world_size, world_sizes
from .huggingface import config_of
from .memory import memory_needs
from .names import Shapes, huggingface_name, is_rotary, part_shape, split_halves
from .release import OPTIONAL_PARAMS, REQUIRED_PARAMS

PART_BYTES = 2 * 10**9  # of a safetensors file; one at a time is in memory


def info(ckpt_dir: str, max_seq_len: int = 512, max_batch_size: int = 8) -> str:
    """A folder's layout, size and type, the rank counts that can share it, and what each rank would need."""
    check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    checkpoint, args, shapes = open_whole(ckpt_dir, max_seq_len, max_batch_size)
    kinds = {"float32": (torch.float32, 4.0), "16 bits": (torch.bfloat16, 2.0)}
    kinds |= {name: (torch.bfloat16, store.bytes_per_weight) for name, store in STORES.items()}
    lines = [
        f"{checkpoint.name}: {checkpoint.source.layout} layout, {len(checkpoint.source.files)} file(s) of weights, "
        f"{sum(map(math.prod, shapes.values())):,} parameters, {str(checkpoint.dtype).removeprefix('torch.')}",
        f"dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, {args.kv_heads} key/value heads, "
        f"{args.hidden_dim} feed-forward channels, {args.vocab_size} pieces",
        "",
        f"Per rank; cache for max_batch_size {max_batch_size} and max_seq_len {max_seq_len}, and one pass, in 16 bits:",
        f"{'ranks':>5}" + "".join(f"{kind:>12}" for kind in (*kinds, "cache", "pass")),
    ]
    for ranks in world_sizes(args):
        needs = {kind: memory_needs(args, ranks, *of_weights) for kind, of_weights in kinds.items()}
        _, cache_row, pass_bytes = needs["16 bits"]
        sizes = [*(need.weights for need in needs.values()), max_batch_size * cache_row, pass_bytes]
        lines.append(f"{ranks:>5}" + "".join(f"{size_text(size):>12}" for size in sizes))
    return "\n".join(lines)


def verify(ckpt_dir: str) -> str:
    """Compare each file that checklist.chk names with its MD5 sum there. Raises ValueError naming those that differ."""
    folder = folder_of("ckpt_dir", ckpt_dir, "checklist.chk")
    checklist = folder / "checklist.chk"
    check_readable(checklist)
    sums = [line.split() for line in checklist.read_text(errors="replace").splitlines() if line.strip()]
    if not sums or any(len(words) != 2 or len(words[0]) != 32 for words in sums):
        raise ValueError(f"{checklist} has lines that are no MD5 sum and file name: download it again")
    files = [(folder / Path(name.removeprefix("*")).name, digest) for digest, name in sums]
    for file, _ in files:
        check_readable(file)
    wrong = []
    for file, digest in files:
        md5, size = hashlib.md5(usedforsecurity=False), file.stat().st_size
        with (
            file.open("rb") as stream,
            tqdm.wrapattr(stream, "read", size, desc=file.name, leave=False, disable=None) as counted,
        ):
            while data := counted.read(2**24):
                md5.update(data)
        if md5.hexdigest() != digest.lower():
            wrong.append(f"{file.name} has MD5 {md5.hexdigest()}, and checklist.chk {digest}")
    if wrong:
        raise ValueError("; ".join(wrong) + ": download again what differs")
    return f"{len(files)} file(s) are whole"


def reshard(ckpt_dir: str, out: str, model_parallel_size: int) -> str:
    """Write a folder of the release's layout with `model_parallel_size` shards; holds one shard at a time."""
    check_positive(model_parallel_size=model_parallel_size)
    checkpoint, args, shapes = open_whole(ckpt_dir)
    check_world_size(checkpoint.name, args, model_parallel_size)
    with new_folder(out, checkpoint, shapes) as folder:
        for rank in range(model_parallel_size):
            shard = read(checkpoint, shapes, f"shard {rank}", rank, model_parallel_size)
            torch.save(shard, folder / f"consolidated.{rank:02}.pth")
            del shard
        changed = [name for name in OPTIONAL_PARAMS if getattr(args, name) != getattr(ModelArgs, name)]
        params = {name: getattr(args, name) for name in (*REQUIRED_PARAMS, *changed)}
        (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))  # as the release's own has it
    return f"{out}: {model_parallel_size} shard(s)"


def convert(ckpt_dir: str, out: str, to: str) -> str:
    """Write the checkpoint in Hugging Face's layout ("hf") or, in one shard, the release's ("meta")."""
    if to == "meta":
        return reshard(ckpt_dir, out, 1)
    if to != "hf":
        raise ValueError(f"to is {to!r}: use 'hf' or 'meta'")
    checkpoint, args, shapes = open_whole(ckpt_dir)
    parts = parts_of(checkpoint, shapes)
    save_file = import_safetensors(path_of("out", out)).save_file
    with new_folder(out, checkpoint, shapes) as folder:
        weight_map: dict[str, str] = {}
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
            tensors = {
                huggingface_name(name): split_halves(tensor, args.head_dim) if is_rotary(name) else tensor
                for name, tensor in read(checkpoint, part, file).items()
            }
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            del tensors
        if len(parts) > 1:
            index = {"metadata": {"total_size": size_of(checkpoint, shapes)}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = config_of(args, checkpoint.dtype, checkpoint.source.max_positions)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        kind = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}  # else a text's first space is forgotten
        (folder / "tokenizer_config.json").write_text(json.dumps(kind, indent=2))
    return f"{out}: {len(parts)} file(s) of weights"


def open_whole(ckpt_dir: str, length: int = 1, rows: int = 1) -> tuple[Checkpoint, ModelArgs, Shapes]:
    """A checkpoint, its model's shape, and the shapes of its tensors, which the files are checked to hold."""
    checkpoint = Checkpoint(ckpt_dir)
    args = checkpoint.model_args(max_seq_len=length, max_batch_size=rows)
    with torch.device("meta"):
        return checkpoint, args, checkpoint.check(Transformer(args))


def read(checkpoint: Checkpoint, shapes: Shapes, what: str, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """A rank's parts, in their stored types, of tensors of these whole shapes."""
    tensors = {}
    for name, shape in tqdm(shapes.items(), desc=what, unit="tensor", leave=False, disable=None):
        tensors[name] = torch.empty(part_shape(name, shape, world_size), dtype=checkpoint.source.tensor(name).dtype)
        checkpoint.copy(name, rank, tensors[name])
    return tensors


def size_of(checkpoint: Checkpoint, shapes: Shapes) -> int:
    """Bytes of the tensors."""
    return sum(math.prod(shape) * checkpoint.source.tensor(name).dtype.itemsize for name, shape in shapes.items())


def parts_of(checkpoint: Checkpoint, shapes: Shapes) -> list[Shapes]:
    """The tensors in groups of at most PART_BYTES."""
    parts: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if parts[-1] and size_of(checkpoint, parts[-1] | {name: shape}) > PART_BYTES:
            parts.append({})
        parts[-1][name] = shape
    return parts


@contextlib.contextmanager
def new_folder(out: str, checkpoint: Checkpoint, shapes: Shapes) -> Iterator[Path]:
    """A folder to write a checkpoint to, which gets its tokenizer and becomes `out` when all is written, else goes.

    Raises FileExistsError if `out` exists, OSError if its disk has too little space or a write fails.
    """
    path, needed = path_of("out", out), size_of(checkpoint, shapes)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another name, or remove it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into: make it first")
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("too little space")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.", suffix=".part") as scratch:
            folder = Path(scratch, path.name)
            folder.mkdir()  # with the permissions of the umask, unlike the temporary one
            yield folder
            with contextlib.suppress(FileNotFoundError):  # the weights are whole without it
                shutil.copyfile(checkpoint.tokenizer_path, folder / "tokenizer.model")
            for file in folder.iterdir():
                file.chmod(folder.stat().st_mode & 0o666)  # safetensors' are for their owner alone
            folder.rename(path)
    except Exception as error:  # torch raises a RuntimeError where a write fails, safetensors an error of its own
        reason, free = str(error).strip().split("\n")[0], size_text(shutil.disk_usage(path.parent).free)
        sizes = f"{size_text(needed)} are needed, and {free} are free"
        raise OSError(f"could not write to {path.parent} ({reason}): {sizes}") from error
