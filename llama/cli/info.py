"""What one does with a checkpoint but run it: describe it, check that it is whole. Writing it anew is in convert.py."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tqdm import tqdm

from ..arguments import check_positive
from ..checkpoints.files import check_readable, folder_of, md5_of, path_of, size_text
from ..checkpoints.folder import is_gguf, open_whole, world_sizes
from ..checkpoints.loading import bytes_per_weight
from ..checkpoints.memory import memory_needs
from ..model import Transformer
from ..quantization.formats import STORES, select_store


def info(ckpt_dir: str, max_seq_len: int = 512, max_batch_size: int = 8) -> str:
    """A checkpoint's layout, size and types, the rank counts that can share it, and what each rank would need."""
    check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    checkpoint, args, shapes = open_whole(ckpt_dir, max_seq_len, max_batch_size)
    kinds = {"float32": (torch.float32, 4.0), "16 bits": (torch.bfloat16, 2.0)}
    kinds |= {name: (torch.bfloat16, store.bytes_per_weight) for name, store in STORES.items()}
    if bits := checkpoint.stored_bits:
        own = select_store(None, "auto", torch.device("cpu"), stored_bits=bits)
        with torch.device("meta"):
            kinds["its own"] = (torch.bfloat16, bytes_per_weight(checkpoint, Transformer(args), torch.bfloat16, own))
    lines = [
        f"{checkpoint.name}: {checkpoint.source.layout} layout, {len(checkpoint.source.files)} file(s) of weights, "
        f"{sum(map(math.prod, shapes.values())):,} parameters, {' and '.join(checkpoint.kinds)}",
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
    """Compare each file that checklist.chk names with its MD5 sum there; without one, read all weights for what is
    missing, of another shape or not finite. Raises ValueError naming what is wrong."""
    path = path_of("ckpt_dir", ckpt_dir)
    if not is_gguf(path) and (folder_of("ckpt_dir", ckpt_dir, "checklist.chk") / "checklist.chk").exists():
        return verify_sums(path / "checklist.chk")
    checkpoint, _, shapes = open_whole(ckpt_dir)
    broken = []
    for name in tqdm(shapes, desc="reading", unit="tensor", leave=False, disable=None):
        values = torch.empty(shapes[name])
        checkpoint.copy(name, 0, values)
        if not all(bound.isfinite() for bound in torch.aminmax(values)):
            broken.append(checkpoint.source.name_of(name))
    if broken:
        raise ValueError(f"{path.name}: {', '.join(broken)} has values that are not finite: download it again")
    return f"{len(shapes)} tensors are whole, as far as can be seen without a checklist.chk"


def verify_sums(checklist: Path) -> str:
    check_readable(checklist)
    sums = [line.split() for line in checklist.read_text(errors="replace").splitlines() if line.strip()]
    if not sums or any(len(words) != 2 or len(words[0]) != 32 for words in sums):
        raise ValueError(f"{checklist} has lines that are no MD5 sum and file name: download it again")
    files = [(checklist.with_name(Path(name.removeprefix("*")).name), digest) for digest, name in sums]
    for file, _ in files:
        check_readable(file)
    found = [(file.name, md5_of(file), digest.lower()) for file, digest in files]
    if wrong := [f"{name} has MD5 {md5}, and checklist.chk {said}" for name, md5, said in found if md5 != said]:
        raise ValueError("; ".join(wrong) + ": download again what differs")
    return f"{len(files)} file(s) are whole"
