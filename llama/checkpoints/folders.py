"""What one does with a checkpoint folder but run it: describe it, check its sums, write it anew in another layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_positive
from ..model import ModelArgs, Transformer
from ..stores import STORES
from .files import check_readable, folder_of, import_safetensors, new_folder, path_of, size_text
from .folder import Checkpoint, check_world_size, whole_shapes, world_sizes
from .huggingface import config_of
from .memory import memory_needs
from .names import huggingface_name, is_rotary, part_shape, split_halves
from .release import OPTIONAL_PARAMS, REQUIRED_PARAMS

Shapes = dict[str, tuple[int, ...]]  # of whole tensors, by their names

PART_BYTES = 2 * 10**9  # of a safetensors file; one at a time is in memory


def info(ckpt_dir: str, max_seq_len: int = 512, max_batch_size: int = 8) -> str:
    """A folder's layout, size and type, the rank counts that can share it, and what each rank would need."""
    check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    checkpoint = Checkpoint(ckpt_dir)
    args = checkpoint.model_args(max_seq_len, max_batch_size)
    shapes = shapes_of(checkpoint, args)
    lines = [
        f"{checkpoint.name}: {checkpoint.source.layout} layout, {len(checkpoint.source.files)} file(s) of weights, "
        f"{sum(map(math.prod, shapes.values())):,} parameters, {str(checkpoint.dtype).removeprefix('torch.')}",
        f"dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, {args.kv_heads} key/value heads, "
        f"{args.hidden_dim} feed-forward channels, {args.vocab_size} pieces",
        "",
        f"Per rank; cache for max_batch_size {max_batch_size} and max_seq_len {max_seq_len}, and one pass, in 16 bits:",
        f"{'ranks':>5}{'float32':>12}{'16 bits':>12}{'int8':>12}{'int4':>12}{'cache':>12}{'pass':>12}",
    ]
    quantised = [(torch.bfloat16, store.bytes_per_weight) for store in STORES.values()]
    kinds = [(torch.float32, 4.0), (torch.bfloat16, 2.0), *quantised]
    for ranks in world_sizes(args):
        needs = [memory_needs(args, ranks, dtype, bytes_per_weight) for dtype, bytes_per_weight in kinds]
        weights = [need.weights for need in needs]
        others = [max_batch_size * needs[1].cache_row, needs[1].pass_bytes]
        lines.append(f"{ranks:>5}" + "".join(f"{size_text(n):>12}" for n in weights + others))
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
    checkpoint = Checkpoint(ckpt_dir)
    args = checkpoint.model_args(1, 1)
    check_world_size(checkpoint.name, args, model_parallel_size)
    shapes = shapes_of(checkpoint, args)
    with new_folder(path_of("out", out), size_of(checkpoint, shapes)) as folder:
        for rank in range(model_parallel_size):
            shard = read(checkpoint, shapes, f"shard {rank}", rank, model_parallel_size)
            torch.save(shard, folder / f"consolidated.{rank:02}.pth")
            del shard
        (folder / "params.json").write_text(json.dumps(params_of_release(args)))
        copy_tokenizer(checkpoint, folder)
    return f"{out}: {model_parallel_size} shard(s)"


def convert(ckpt_dir: str, out: str, to: str) -> str:
    """Write the checkpoint in Hugging Face's layout ("hf") or, in one shard, the release's ("meta")."""
    if to == "meta":
        return reshard(ckpt_dir, out, 1)
    if to != "hf":
        raise ValueError(f"to is {to!r}: use 'hf' or 'meta'")
    checkpoint = Checkpoint(ckpt_dir)
    args = checkpoint.model_args(1, 1)
    shapes = shapes_of(checkpoint, args)
    parts, size = parts_of(checkpoint, shapes), size_of(checkpoint, shapes)
    safetensors = import_safetensors(path_of("out", out))
    with new_folder(path_of("out", out), size) as folder:
        weight_map: dict[str, str] = {}
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
            tensors = {
                huggingface_name(name): split_halves(tensor, args.head_dim) if is_rotary(name) else tensor
                for name, tensor in read(checkpoint, part, file).items()
            }
            safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            del tensors
        if len(parts) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = config_of(args, checkpoint.dtype, checkpoint.source.max_positions)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        copy_tokenizer(checkpoint, folder)
    return f"{out}: {len(parts)} file(s) of weights"


def shapes_of(checkpoint: Checkpoint, args: ModelArgs) -> Shapes:
    """The shapes of the whole model's tensors, which the files are checked to hold."""
    with torch.device("meta"):
        state = Transformer(args).state_dict()
    shapes = whole_shapes(state, 1)
    checkpoint.check(shapes)
    return shapes


def read(checkpoint: Checkpoint, shapes: Shapes, what: str, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """A rank's parts, in their stored types, of tensors of these whole shapes."""
    tensors = {}
    for name, shape in tqdm(shapes.items(), desc=what, unit="tensor", leave=False, disable=None):
        tensors[name] = torch.empty(part_shape(name, shape, world_size), dtype=checkpoint.source.dtype_of(name))
        checkpoint.copy(name, rank, tensors[name])
    return tensors


def size_of(checkpoint: Checkpoint, shapes: Shapes) -> int:
    """Bytes of the tensors."""
    return sum(math.prod(shape) * checkpoint.source.dtype_of(name).itemsize for name, shape in shapes.items())


def parts_of(checkpoint: Checkpoint, shapes: Shapes) -> list[Shapes]:
    """The tensors in groups of at most PART_BYTES."""
    parts: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if parts[-1] and size_of(checkpoint, parts[-1] | {name: shape}) > PART_BYTES:
            parts.append({})
        parts[-1][name] = shape
    return parts


def params_of_release(args: ModelArgs) -> dict[str, object]:
    """params.json of a model: what the release's own has, and what else is not as there."""
    changed = [name for name in OPTIONAL_PARAMS if getattr(args, name) != getattr(ModelArgs, name)]
    return {name: getattr(args, name) for name in (*REQUIRED_PARAMS, *changed)} | {"vocab_size": -1}


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # the weights are whole without it
        shutil.copyfile(checkpoint.tokenizer_path, folder / "tokenizer.model")
