"""python -m llama info and verify: what a checkpoint contains, and whether it is intact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

from ..checkpoints.files import check_readable, folder_of, md5_of, path_of, size_text
from ..checkpoints.folder import Checkpoint, is_gguf, open_whole, world_sizes
from ..checkpoints.loading import bytes_per_weight
from ..checkpoints.memory import Memory, memory_needs
from ..errors import check_positive
from ..model import ModelArgs, Transformer
from ..quantization.formats import QUANTIZED, select_formats
from .common import FolderOrFile

# Formats of the weights in memory, by name. Each has the dtype of all weights outside linear
# layers, and the bytes per weight of linear layers.
Kinds = dict[str, tuple[torch.dtype, float]]


def info(
    ckpt_dir: FolderOrFile,
    max_seq_len: Annotated[int, "tokens of prompt and answer together"] = 512,
    max_batch_size: Annotated[int, "how many prompts run at once"] = 8,
) -> str:
    """Show a checkpoint's layout, size and types, and the memory that it needs per rank."""
    check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    checkpoint, args, shapes = open_whole(ckpt_dir, max_seq_len, max_batch_size)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    lines = [
        f"{checkpoint.name}: {checkpoint.source.layout} layout, "
        f"{len(checkpoint.source.files)} file(s) of weights, "
        f"{parameters:,} parameters, {' and '.join(checkpoint.kinds)}",
        f"dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
        f"{args.kv_heads} key/value heads, "
        f"{args.hidden_dim} feed-forward channels, {args.vocab_size} pieces",
        "",
        f"Per rank; cache for max_batch_size {max_batch_size} and max_seq_len {max_seq_len}, "
        "and one pass, in 16 bits:",
        *memory_table(args, kinds_of(checkpoint, args)),
    ]
    return "\n".join(lines)


def kinds_of(checkpoint: Checkpoint, args: ModelArgs) -> Kinds:
    """The formats in which a checkpoint's weights can be held, by their names in the table."""
    kinds: Kinds = {"float32": (torch.float32, 4.0), "16 bits": (torch.bfloat16, 2.0)}
    for name, formats in QUANTIZED.items():
        kinds[name] = (torch.bfloat16, formats.wide.bytes_per_weight)
    bits = checkpoint.stored_bits
    if bits is not None:
        own = select_formats(None, "auto", torch.device("cpu"), stored_bits=bits)
        with torch.device("meta"):
            model = Transformer(args)
        size = bytes_per_weight(checkpoint, model, torch.bfloat16, own)
        kinds["its own"] = (torch.bfloat16, size)
    return kinds


def memory_table(args: ModelArgs, kinds: Kinds) -> list[str]:
    """The lines of the memory table, one for each number of ranks.

    The columns are the weights in each format, then the cache and one forward pass in 16 bits.
    """
    columns = [*kinds, "cache", "pass"]
    lines = [f"{'ranks':>5}" + "".join(f"{column:>12}" for column in columns)]
    for ranks in world_sizes(args):
        needs: dict[str, Memory] = {}
        for kind, (dtype, size) in kinds.items():
            needs[kind] = memory_needs(args, ranks, dtype, size)
        half = needs["16 bits"]
        sizes = [need.weights for need in needs.values()]
        sizes += [args.max_batch_size * half.cache_row, half.pass_bytes]
        lines.append(f"{ranks:>5}" + "".join(f"{size_text(size):>12}" for size in sizes))
    return lines


def verify(ckpt_dir: FolderOrFile) -> str:
    """Compare each file listed in checklist.chk with its MD5 sum.

    Without a checklist.chk, read all weights and report missing tensors, wrong shapes and values
    that are not finite.
    """
    path = path_of("ckpt_dir", ckpt_dir)
    if not is_gguf(path):
        checklist = folder_of("ckpt_dir", ckpt_dir, "checklist.chk") / "checklist.chk"
        if checklist.exists():
            return verify_sums(checklist)
    checkpoint, _, shapes = open_whole(ckpt_dir)
    broken = []
    for name in tqdm(shapes, desc="reading", unit="tensor", leave=False, disable=None):
        values = torch.empty(shapes[name])
        checkpoint.copy(name, 0, values)
        if not all(bound.isfinite() for bound in torch.aminmax(values)):
            broken.append(checkpoint.source.name_of(name))
    if broken:
        names = ", ".join(broken)
        raise ValueError(f"{path.name}: {names} has values that are not finite: download it again")
    return f"{len(shapes)} tensors are whole, as far as can be seen without a checklist.chk"


def verify_sums(checklist: Path) -> str:
    """Compare the files next to a checklist with it. Raises ValueError if any of them differ."""
    files = files_of(checklist)
    for file, _ in files:
        check_readable(file)
    wrong = []
    for file, digest in files:
        found = md5_of(file)
        if found != digest:
            wrong.append(f"{file.name} has MD5 {found}, but checklist.chk has {digest}")
    if wrong:
        raise ValueError("; ".join(wrong) + ": download the files that differ again")
    return f"{len(files)} file(s) are whole"


def files_of(checklist: Path) -> list[tuple[Path, str]]:
    """The paths of the files that a checklist lists, and their MD5 sums."""
    check_readable(checklist)
    lines = checklist.read_text(errors="replace").splitlines()
    sums = [line.split() for line in lines if line.strip()]
    if not sums or any(len(words) != 2 or len(words[0]) != 32 for words in sums):
        reason = "has lines that are not an MD5 sum and a file name: download it again"
        raise ValueError(f"{checklist} {reason}")
    files = []
    for digest, name in sums:
        file = checklist.with_name(Path(name.removeprefix("*")).name)
        files.append((file, digest.lower()))
    return files
