"""A checkpoint folder -> ModelArgs and this rank's tensors, whatever the folder's shard count.

Files are data: they are mapped, read with `weights_only`, and refused by name when they do not fit together.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .files import check_numbers, map_pickle, read_json, release, size_text
from .hf import HuggingFace, difference
from .lora import Adapter
from .model import ModelArgs, Transformer
from .parallel import ShardedLinear, divisors, either, free_memory, hold_together

logger = logging.getLogger(__name__)

# The dimension along which a release splits each weight over its shards; norms are whole in every shard.
SHARD_DIM = (
    dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
    | dict.fromkeys(("wo", "w2", "tok_embeddings"), 1)
    | dict.fromkeys(("attention_norm", "ffn_norm", "norm"), None)
)

# Weights that multiply the same input, and so can be held as one matrix: each named with the first of them.
JOINED = {"wk": "wq", "wv": "wq", "w3": "w1"}

# Threads that pack or quantise; each holds a matrix and its temporaries beside the weights.
MAX_LOADERS = 4

# Precomputed angles that some releases carry and no model needs.
IGNORED_KEY = "rope.freqs"

REQUIRED_PARAMS = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
OPTIONAL_PARAMS = ("n_kv_heads", "ffn_dim_multiplier", "vocab_size", "rope_theta", "rope_scaling_factor")
REAL_PARAMS = ("norm_eps", "rope_theta", "rope_scaling_factor", "ffn_dim_multiplier")
NEWER_PARAMS = {"use_scaled_rope": " (Llama 3.1)"}


def shard_dim(name: str) -> int | None:
    """The dimension that `layers.0.attention.wq.weight` and the like are split along."""
    return SHARD_DIM[name.split(".")[-2]]


class Release:
    """A folder with consolidated.NN.pth and params.json, opened but not read."""

    layout = "release"
    params_file = "params.json"

    def __init__(self, path: Path):
        self.path = path
        self.files = find_shards(path)
        self.params = read_params(path / "params.json")
        self.shards = [map_shard(file) for file in self.files]

    def __contains__(self, name: str) -> bool:
        return name in self.shards[0]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.shards[0][name].dtype

    @property
    def vocab_size(self) -> int:
        return self.shards[0]["tok_embeddings.weight"].shape[0]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every shard holds its part of the tensors of these whole shapes, and nothing else."""
        for file, shard in zip(self.files, self.shards, strict=True):
            if what := difference(shard.keys() - {IGNORED_KEY}, shapes.keys()):
                raise ValueError(f"{file} {what}: params.json is of another model, or the file is not a Llama 2 shard")
            for name, whole_shape in shapes.items():
                shape, dim = list(whole_shape), shard_dim(name)
                uneven = dim is not None and shape[dim] % len(self.shards)
                if dim is not None:
                    shape[dim] //= len(self.shards)
                if uneven or list(shard[name].shape) != shape:
                    raise ValueError(
                        f"{file}: {name} has shape {tuple(shard[name].shape)}, and params.json asks for {tuple(shape)} "
                        f"in each of {len(self.shards)} shard(s): a shard is missing or of another model"
                    )
                if dim is None and not torch.equal(shard[name], self.shards[0][name]):
                    logger.warning("%s: %s is not that of shard 00: the shards may be of two models", file, name)

    def copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        """Fill `out` with the part of a tensor that begins at `start` along `dim`, over as many shards as it takes."""
        shards = self.shards if shard_dim(name) is not None else self.shards[:1]
        size = shards[0][name].shape[dim]  # of each shard
        end = start + out.shape[dim]
        for number, shard in enumerate(shards):
            first, last = max(start, number * size), min(end, (number + 1) * size)
            if first < last:
                part = shard[name].narrow(dim, first - number * size, last - first)
                out.narrow(dim, first - start, last - first).copy_(part)
                release(part)


class Checkpoint:
    """A folder of weights, opened but not read: of the release's layout, or of Hugging Face's.

    With `adapter_dir`, a LoRA adapter in PEFT's layout is merged into what is read. Raises FileNotFoundError for a
    missing folder or file, ValueError for one that is not what its name says.
    """

    def __init__(self, ckpt_dir: str | os.PathLike[str], adapter_dir: str | os.PathLike[str] | None = None):
        self.path = Path(ckpt_dir)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no folder {ckpt_dir}: pass the folder that holds params.json or config.json")
        try:
            names = {file.name for file in self.path.iterdir()}
        except OSError as error:
            raise type(error)(f"{ckpt_dir} cannot be read ({error.strerror}): check its permissions") from error
        in_hf_layout = "config.json" in names and "params.json" not in names
        self.source = HuggingFace(self.path) if in_hf_layout else Release(self.path)
        self.adapter = None if adapter_dir is None else Adapter(adapter_dir)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights are stored in."""
        return self.dtype_of("tok_embeddings.weight")

    def dtype_of(self, name: str) -> torch.dtype:
        return self.source.dtype_of(name)

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.model in the folder, or beside it where the releases have it."""
        inside, beside = self.path / "tokenizer.model", self.path.resolve().parent / "tokenizer.model"
        for path in (inside, beside):
            if path.is_file():
                return path
        raise FileNotFoundError(f"no tokenizer.model in {self.path}/ or beside it: pass tokenizer_path")

    def model_args(self, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        file = self.source.params_file
        params = {key: value for key, value in self.source.params.items() if key != "vocab_size"}
        vocab_size = self.source.vocab_size
        if self.source.params.get("vocab_size", -1) not in (-1, vocab_size):  # the releases say -1
            raise ValueError(
                f"{file} has vocab_size {self.source.params['vocab_size']}, the checkpoint's embedding {vocab_size} "
                "rows: they are of two models"
            )
        args = ModelArgs(**params, vocab_size=vocab_size, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        if args.dim % (2 * args.n_heads) or args.n_heads % args.kv_heads:
            raise ValueError(
                f"{file} has dim {args.dim}, {args.n_heads} attention heads and {args.kv_heads} key/value heads, "
                "which do not divide: it is of no Llama 2"
            )
        last = f"layers.{args.n_layers - 1}.attention_norm.weight"
        if last not in self.source:
            raise ValueError(f"{self.path} lacks tensor {last}: {file} is of another model")
        return args

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold exactly the tensors of these names and whole shapes."""
        self.source.check(shapes)
        if self.adapter is not None:
            self.adapter.check(shapes)

    def copy(self, name: str, rank: int, out: Tensor) -> None:
        """Fill `out`, of the shape of one rank's part, with this rank's part of a tensor."""
        dim = shard_dim(name) or 0
        start = 0 if shard_dim(name) is None else rank * out.shape[dim]
        self.source.copy(name, dim, start, out)
        if self.adapter is not None:
            head_dim = self.source.params["dim"] // self.source.params["n_heads"]
            self.adapter.add(name, dim, start, head_dim, out)

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
        do not hold exactly the model's tensors. Warns of values that are not finite.
        """
        wanted = model.state_dict()
        self.check(whole_shapes(wanted, world_size))
        state: dict[str, Tensor] = {}

        def load_together(names: list[str]) -> None:
            rows = [wanted[name].shape[0] for name in names]
            modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
            layers = [module for module in modules if hold and isinstance(module, ShardedLinear)]
            stored = reduce(torch.promote_types, map(self.dtype_of, names)) if layers else dtype
            tensor = torch.empty(sum(rows), *wanted[names[0]].shape[1:], dtype=stored, device=device)
            for name, target in zip(names, tensor.split(rows), strict=True):
                self.copy(name, rank, target)
                if not all(bound.isfinite() for bound in torch.aminmax(target)):
                    logger.warning("%s of %s has values that are not finite: download it again", name, self.name)
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
        with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_LOADERS) if hold else 1) as pool:
            done = pool.map(load_together, groups.values())
            for _ in tqdm(
                done, total=len(groups), desc="loading", unit="tensor", leave=False, disable=rank > 0 or None
            ):
                pass
        model.load_state_dict(state, assign=True, strict=True)
        model.requires_grad_(False)


def whole_shapes(local: Mapping[str, Tensor], world_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's tensors, for those of one of `world_size` ranks."""
    shapes = {}
    for name, tensor in local.items():
        dim = shard_dim(name)
        shapes[name] = tuple(n * world_size if d == dim else n for d, n in enumerate(tensor.shape))
    return shapes


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


def map_shard(path: Path) -> dict[str, Tensor]:
    shard = map_pickle(path)
    if "tok_embeddings.weight" not in shard or shard["tok_embeddings.weight"].dim() != 2:
        raise ValueError(f"{path} lacks tensor tok_embeddings.weight: is it a checkpoint of Llama 2?")
    return shard


def split_sizes(args: ModelArgs) -> dict[str, int]:
    """What is split over the ranks, all of which have to divide it."""
    return {
        "attention heads": args.n_heads,
        "key/value heads": args.kv_heads,
        "feed-forward channels": args.hidden_dim,
        "model channels": args.dim,
        "vocabulary pieces": args.vocab_size,
    }


def world_sizes(args: ModelArgs) -> list[int]:
    """The numbers of ranks that can share the model."""
    return divisors(math.gcd(*split_sizes(args).values()))


def check_world_size(name: str, args: ModelArgs, world_size: int) -> None:
    """Raise ValueError unless every split dimension of the model divides over the ranks."""
    sizes = split_sizes(args)
    uneven = [what for what, size in sizes.items() if world_size < 1 or size % world_size]
    if uneven:
        named = uneven if not uneven[0].endswith("heads") else ["attention heads", "key/value heads"]
        listed = " and ".join(f"{sizes[what]} {what}" for what in named)
        raise ValueError(f"{name} has {listed}, which {world_size} ranks cannot share: use {either(world_sizes(args))}")


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


class Memory(NamedTuple):
    """What one rank needs, in bytes."""

    weights: int
    cache_row: int  # for each row of the batch
    pass_row: int  # of the largest temporaries, which a pass over whole rows of max_seq_len holds, for each row

    def total(self, rows: int) -> int:
        return self.weights + rows * (self.cache_row + self.pass_row)


def memory_needs(args: ModelArgs, world_size: int, dtype: torch.dtype, bytes_per_weight: float) -> Memory:
    """`bytes_per_weight` is of the linear layers; everything else is of `dtype`."""
    attention = 2 * args.dim * args.head_dim * (args.n_heads + args.kv_heads)
    linear = args.n_layers * (attention + 3 * args.dim * args.hidden_dim) + args.dim * args.vocab_size
    embedding, norms = args.dim * args.vocab_size, (2 * args.n_layers + 1) * args.dim
    weights = (linear * bytes_per_weight + embedding * dtype.itemsize) / world_size + norms * dtype.itemsize
    cache_row = 2 * args.n_layers * args.kv_heads * args.head_dim * args.max_seq_len * dtype.itemsize // world_size
    # x, its norm and what is added to it; the feed-forward's gate and up, as computed and as split off, and their
    # product: what was seen at the peak of a pass.
    pass_row = args.max_seq_len * (4 * args.dim + 6 * args.hidden_dim // world_size) * dtype.itemsize
    return Memory(int(weights), cache_row, pass_row)


def needed(name: str, args: ModelArgs, needs: Memory) -> str:
    rows = args.max_batch_size
    return (
        f"{name} needs {size_text(needs.weights)} for its weights, {size_text(rows * needs.cache_row)} for a cache of "
        f"max_batch_size {rows} × max_seq_len {args.max_seq_len} and {size_text(rows * needs.pass_row)} for a pass "
        "over it per rank"
    )


def check_memory(name: str, args: ModelArgs, needs: Memory, device: torch.device) -> None:
    """Raise ValueError, before anything is loaded, if what this rank needs does not fit into its device."""
    free = free_memory(device)
    if needs.total(args.max_batch_size) <= free:
        return
    fitting = (free - needs.weights) // (needs.cache_row + needs.pass_row)
    advice = (
        f"build with max_batch_size {fitting} or a smaller max_seq_len"
        if fitting > 0
        else "use fewer bits for each weight, more ranks or a smaller model"
    )
    raise ValueError(f"{needed(name, args, needs)}, and {device} has {size_text(free)} free for it: {advice}")


@contextlib.contextmanager
def allocating(name: str, args: ModelArgs, needs: Memory, device: torch.device) -> Iterator[None]:
    """Turn the device's refusal of memory, where it gives less than it had free, into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        advice = "build with a smaller max_batch_size or max_seq_len, or use fewer bits for each weight or more ranks"
        raise ValueError(f"{needed(name, args, needs)}, and {device} refused memory: {advice}") from error
