"""A release's checkpoint folder -> ModelArgs and this rank's tensors, whatever the folder's shard count.

Files are data: they are mapped, read with `weights_only`, and refused by name when they do not fit together.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .model import KVCache, ModelArgs, Transformer
from .parallel import ShardedLinear, divisors, either, free_memory, hold_together

# The dimension along which a release splits each weight over its shards; norms are whole in every shard.
SHARD_DIM = (
    dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
    | dict.fromkeys(("wo", "w2", "tok_embeddings"), 1)
    | dict.fromkeys(("attention_norm", "ffn_norm", "norm"), None)
)

# Weights that multiply the same input, and so can be held as one matrix: each named with the first of them.
JOINED = {"wk": "wq", "wv": "wq", "w3": "w1"}

# Precomputed angles that some releases carry and no model needs.
IGNORED_KEY = "rope.freqs"

REQUIRED_PARAMS = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
OPTIONAL_PARAMS = ("n_kv_heads", "ffn_dim_multiplier", "vocab_size", "rope_theta")
NEWER_PARAMS = {"use_scaled_rope": " (Llama 3.1)"}


def shard_dim(name: str) -> int | None:
    """The dimension that `layers.0.attention.wq.weight` and the like are split along."""
    return SHARD_DIM[name.split(".")[-2]]


class Checkpoint:
    """A folder with consolidated.NN.pth and params.json, opened but not read.

    Raises FileNotFoundError for a missing folder or file, ValueError for one that is not what its name says.
    """

    def __init__(self, ckpt_dir: str | os.PathLike[str]):
        self.path = Path(ckpt_dir)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no folder {ckpt_dir}: pass the folder that holds params.json")
        shard_paths = find_shards(self.path)
        self.params = read_params(self.path / "params.json")
        self.shards = [map_shard(path) for path in shard_paths]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights are stored in."""
        return self.shards[0]["tok_embeddings.weight"].dtype

    def model_args(self, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        params = {key: value for key, value in self.params.items() if key != "vocab_size"}
        vocab_size = self.shards[0]["tok_embeddings.weight"].shape[0]
        if self.params.get("vocab_size", -1) not in (-1, vocab_size):  # the releases say -1
            raise ValueError(
                f"params.json has vocab_size {self.params['vocab_size']}, the checkpoint's embedding "
                f"{vocab_size} rows: they are of two models"
            )
        return ModelArgs(**params, vocab_size=vocab_size, max_seq_len=max_seq_len, max_batch_size=max_batch_size)

    def parts(self, name: str, rank: int, world_size: int) -> list[Tensor]:
        """Views of the mapped files that, joined along the tensor's shard dimension, are this rank's part of it."""
        dim = shard_dim(name)
        if dim is None:
            return [self.shards[0][name]]
        size = self.shards[0][name].shape[dim]  # of each shard
        local_size = size * len(self.shards) // world_size
        start, end = rank * local_size, (rank + 1) * local_size
        parts = []
        for number, shard in enumerate(self.shards):
            first, last = max(start - number * size, 0), min(end - number * size, size)
            if first < last:
                parts.append(shard[name].narrow(dim, first, last - first))
        return parts

    def load(
        self,
        model: Transformer,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        hold: Callable[[Tensor], nn.Module | None] | None = None,
    ) -> None:
        """Give `model`, built for this rank on the meta device, its weights; linear ones as `hold` makes them.

        Copies one tensor at a time (with `hold`, one matrix per thread) and gives its mapped pages back, so that
        memory holds this rank's weights and little more. Raises ValueError, before anything is copied, where the files
        do not hold exactly the model's tensors.
        """
        wanted = model.state_dict()
        self.check_tensors({name: tuple(meta.shape) for name, meta in wanted.items()}, world_size)
        state: dict[str, Tensor] = {}

        def load_together(names: list[str]) -> None:
            rows, dim = [wanted[name].shape[0] for name in names], shard_dim(names[0]) or 0
            modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
            layers = [module for module in modules if hold and isinstance(module, ShardedLinear)]
            stored = self.shards[0][names[0]].dtype if layers else dtype
            tensor = torch.empty(sum(rows), *wanted[names[0]].shape[1:], dtype=stored, device=device)
            for name, target in zip(names, tensor.split(rows), strict=True):
                parts = self.parts(name, rank, world_size)
                for goal, part in zip(target.split([p.shape[dim] for p in parts], dim), parts, strict=True):
                    goal.copy_(part)
                    release(part)
            if hold and layers and (store := hold(tensor)) is not None:
                hold_together(layers, store)
            else:
                state.update(zip(names, tensor.to(dtype).split(rows), strict=True))

        groups: dict[str, list[str]] = {}
        for name in wanted:
            stem = name.split(".")[-2]
            leader = name.replace(stem, JOINED.get(stem, stem)) if hold else name
            groups.setdefault(leader, []).append(name)
        # Packing and quantising are slow and release the interpreter's lock; plain copies are as fast from one thread.
        with ThreadPoolExecutor(torch.get_num_threads() if hold else 1) as pool:
            done = pool.map(load_together, groups.values())
            for _ in tqdm(
                done, total=len(groups), desc="loading", unit="tensor", leave=False, disable=rank > 0 or None
            ):
                pass
        model.load_state_dict(state, assign=True, strict=True)
        model.requires_grad_(False)

    def check_tensors(self, local_shapes: dict[str, tuple[int, ...]], world_size: int) -> None:
        """Every shard holds its part of every tensor and nothing else."""
        for number, shard in enumerate(self.shards):
            file = self.path / f"consolidated.{number:02}.pth"
            extra = sorted(shard.keys() - local_shapes.keys() - {IGNORED_KEY})
            missing = sorted(local_shapes.keys() - shard.keys())
            if extra or missing:
                what = f"holds unknown tensor {extra[0]}" if extra else f"lacks tensor {missing[0]}"
                raise ValueError(f"{file} {what}: params.json is of another model, or the file is not a Llama 2 shard")
            for name, local_shape in local_shapes.items():
                shape, dim = list(local_shape), shard_dim(name)
                if dim is not None:
                    shape[dim] = shape[dim] * world_size // len(self.shards)
                if list(shard[name].shape) != shape:
                    raise ValueError(
                        f"{file}: {name} has shape {tuple(shard[name].shape)}, and params.json asks for {tuple(shape)} "
                        f"in each of {len(self.shards)} shard(s): a shard is missing or of another model"
                    )


def find_shards(path: Path) -> list[Path]:
    """consolidated.00.pth to the last one, none missing in between."""
    found = sorted(p.name for p in path.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", p.name))
    if not found:
        raise FileNotFoundError(f"no consolidated.*.pth in {path}/: is this the folder that download.sh made?")
    numbers = [name.split(".")[1] for name in found]
    for number in range(int(numbers[-1])):
        if f"{number:02}" not in numbers:
            raise FileNotFoundError(
                f"consolidated.{number:02}.pth is missing: shards {', '.join(numbers)} are there: download it again"
            )
    return [path / name for name in found]


def read_params(path: Path) -> dict[str, Any]:
    """params.json. Raises ValueError for a key that is unknown, as it may change the mathematics, or missing."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}/: is this the folder that download.sh made?")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    for key in params:
        if key not in REQUIRED_PARAMS + OPTIONAL_PARAMS:
            raise ValueError(f"params.json has unknown key '{key}'{NEWER_PARAMS.get(key, '')}: not supported")
    for key in REQUIRED_PARAMS:
        if key not in params:
            raise ValueError(f"params.json lacks key '{key}': download it again")
    for key, value in params.items():
        real = key in ("norm_eps", "rope_theta", "ffn_dim_multiplier")
        fits = isinstance(value, (int, float) if real else int) and not isinstance(value, bool)
        optional = (value is None and key in OPTIONAL_PARAMS) or (value == -1 and key == "vocab_size")
        if not optional and not (fits and 0 < value < 2**31):
            raise ValueError(f"params.json has {key} {value!r}: expected a positive {'number' if real else 'integer'}")
    return {key: value for key, value in params.items() if value is not None}


def map_shard(path: Path) -> dict[str, Tensor]:
    """A shard's tensors, in the page cache's memory. Code in the pickle is refused, not run."""
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what the unpickler raises over damaged bytes is any of a dozen types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a whole PyTorch checkpoint: download it again ({reason})") from error
    if not isinstance(shard, dict) or not all(isinstance(value, Tensor) for value in shard.values()):
        raise ValueError(f"{path} is not a dictionary of tensors: is it a checkpoint of Llama 2?")
    if "tok_embeddings.weight" not in shard:
        raise ValueError(f"{path} lacks tensor tok_embeddings.weight: is it a checkpoint of Llama 2?")
    return shard


def release(mapped: Tensor) -> None:
    """Take the pages of a mapped file that a tensor lies on out of this process; they could be read in again."""
    if not hasattr(mmap, "MADV_DONTNEED") or mapped.numel() == 0:
        return
    first = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = mapped.data_ptr() - first + mapped.shape[0] * mapped.stride(0) * mapped.element_size()
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def check_world_size(name: str, args: ModelArgs, world_size: int) -> None:
    """Raise ValueError unless every split dimension of the model divides over the ranks."""
    sizes = {
        "attention heads": args.n_heads,
        "key/value heads": args.kv_heads,
        "feed-forward channels": args.hidden_dim,
        "model channels": args.dim,
        "vocabulary pieces": args.vocab_size,
    }
    if args.dim % args.n_heads or args.n_heads % args.kv_heads:
        raise ValueError(
            f"{name} has dim {args.dim}, {args.n_heads} attention heads and {args.kv_heads} key/value heads, "
            "which do not divide: params.json is of no Llama 2"
        )
    uneven = [what for what, size in sizes.items() if size % world_size]
    if uneven:
        named = uneven if not uneven[0].endswith("heads") else ["attention heads", "key/value heads"]
        listed = " and ".join(f"{sizes[what]} {what}" for what in named)
        fitting = divisors(math.gcd(*sizes.values()))
        raise ValueError(f"{name} has {listed}, which {world_size} ranks cannot share: use {either(fitting)}")


def select_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute in. "auto" is the checkpoint's own 16-bit type on a GPU, and float32 on a CPU, where 16-bit
    matrix products of many rows are several times slower unless the processor has instructions for them."""
    names = ("float32", "bfloat16", "float16")
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    if dtype not in names:
        raise ValueError(f"dtype is {dtype!r}: use 'auto', {', '.join(map(repr, names))}")
    selected: torch.dtype = getattr(torch, dtype)
    return selected


def check_memory(
    name: str, model: Transformer, device: torch.device, dtype: torch.dtype, bytes_per_weight: float
) -> None:
    """Raise ValueError, before anything is loaded, if this rank's weights and cache do not fit into its device.

    `bytes_per_weight` is of the linear layers; everything else is of `dtype`.
    """
    args, free = model.params, free_memory(device)
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, ShardedLinear))
    other = sum(weight.numel() for weight in model.parameters()) - linear
    weights = int(linear * bytes_per_weight + other * dtype.itemsize)
    row = KVCache.allocate(args, dtype, torch.device("meta")).nbytes // args.max_batch_size
    if weights + args.max_batch_size * row <= free:
        return
    needed = f"{gigabytes(weights)} for its weights and {gigabytes(args.max_batch_size * row)} for a cache of"
    fitting = (free - weights) // row
    advice = (
        f"build with max_batch_size {fitting} or a smaller max_seq_len"
        if fitting > 0
        else "use fewer bits for each weight, more ranks or a smaller model"
    )
    raise ValueError(
        f"{name} needs {needed} max_batch_size {args.max_batch_size} × max_seq_len {args.max_seq_len} per rank, "
        f"and {device} has {gigabytes(free)} free for it: {advice}"
    )


def gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB"
