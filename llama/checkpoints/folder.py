"""A checkpoint folder as users see it, whatever its layout, and this rank's part of it.

Files are data: they are mapped, read with `weights_only`, and refused by name when they do not fit together.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..distributed import divisors, either
from ..model import ModelArgs, Transformer
from ..parallel import ShardedLinear, hold_together
from .files import folder_of
from .huggingface import HuggingFace
from .lora import Adapter
from .names import shard_dim
from .release import Release, Source

logger = logging.getLogger(__name__)

Hold = Callable[[Tensor], "nn.Module | None"]  # makes a store of a weight, or None where it is to stay a tensor

# Threads that pack or quantise; each holds a matrix and its temporaries beside the weights.
MAX_LOADERS = 4


class Checkpoint:
    """A folder of weights, opened but not read: of the release's layout, or of Hugging Face's.

    With `adapter_dir`, a LoRA adapter in PEFT's layout is merged into what is read. Raises FileNotFoundError for a
    missing folder or file, ValueError for one that is not what its name says, TypeError for what is no path.
    """

    def __init__(self, ckpt_dir: str | os.PathLike[str], adapter_dir: str | os.PathLike[str] | None = None):
        self.path = folder_of("ckpt_dir", ckpt_dir, "params.json or config.json")
        try:
            names = {file.name for file in self.path.iterdir()}
        except OSError as error:
            raise type(error)(f"{ckpt_dir} cannot be read ({error.strerror}): check its permissions") from error
        in_hf_layout = "config.json" in names and "params.json" not in names
        self.source: Source = HuggingFace(self.path) if in_hf_layout else Release(self.path)
        self.adapter = None if adapter_dir is None else Adapter(adapter_dir)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights are stored in."""
        return self.source.dtype_of("tok_embeddings.weight")

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.model in the folder, or beside it where the releases have it. Raises FileNotFoundError."""
        # A folder that is a link has two places beside it.
        for folder in (self.path, Path(os.path.abspath(self.path)).parent, self.path.resolve().parent):
            if (folder / "tokenizer.model").is_file():
                return folder / "tokenizer.model"
        raise FileNotFoundError(f"no tokenizer.model in {self.path}/ or beside it: pass tokenizer_path")

    def model_args(self, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        """The model's shape, with a cache of this size. Raises ValueError for a shape that the weights are not of."""
        file, rows = self.source.params_file, self.source.vocab_size
        said = self.source.params.get("vocab_size", -1)
        if said not in (-1, rows):  # the releases say -1
            raise ValueError(f"{file} has vocab_size {said}, the checkpoint's embedding {rows} rows: not of one model")
        sizes = {"vocab_size": rows, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args = ModelArgs(**self.source.params | sizes)
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

    def load(self, model: Transformer, device: torch.device, dtype: torch.dtype, hold: Hold | None = None) -> None:
        """Give `model`, built for this rank on the meta device, its weights; linear ones as `hold` makes them.

        Copies one tensor at a time (with `hold`, one matrix per thread) and gives its mapped pages back, so that
        memory holds this rank's weights and little more. Raises ValueError, before anything is copied, where the files
        do not hold exactly the model's tensors. Warns of values that are not finite, and of positions that the model
        was not made for.
        """
        wanted, rank = model.state_dict(), model.ranks.rank
        self.check(whole_shapes(wanted, model.ranks.size))
        if rank == 0:
            self._warn_of_length(model.params)
        groups: dict[str, list[str]] = {}
        firsts = first_joined(model) if hold else {}
        for name in wanted:
            groups.setdefault(firsts.get(name, name), []).append(name)
        load = partial(self._load_joined, model, device, dtype, hold)
        state: dict[str, Tensor] = {}
        # Packing and quantising are slow and release the interpreter's lock; plain copies are as fast from one thread.
        with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_LOADERS) if hold else 1) as pool:
            loaded = pool.map(load, groups.values())
            quiet = rank > 0 or None
            for tensors in tqdm(loaded, total=len(groups), desc="loading", unit="tensor", leave=False, disable=quiet):
                state |= tensors
        model.load_state_dict(state, assign=True, strict=True)
        model.requires_grad_(False)

    def _load_joined(
        self, model: Transformer, device: torch.device, dtype: torch.dtype, hold: Hold | None, names: list[str]
    ) -> dict[str, Tensor]:
        """Copy tensors, joined along their rows, into a store of their layers; returns those that stay tensors."""
        modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
        weights = [model.get_parameter(name) for name in names]  # of this rank's shapes, on the meta device
        layers = [module for module in modules if isinstance(module, ShardedLinear)] if hold else []
        stored = reduce(torch.promote_types, map(self.source.dtype_of, names)) if layers else dtype
        rows = [len(weight) for weight in weights]
        joined = torch.empty(sum(rows), *weights[0].shape[1:], dtype=stored, device=device)
        for name, target in zip(names, joined.split(rows), strict=True):
            self.copy(name, model.ranks.rank, target)
            if not all(bound.isfinite() for bound in torch.aminmax(target)):
                logger.warning("%s of %s has values that are not finite: download it again", name, self.name)
        if hold and layers and (store := hold(joined)) is not None:
            hold_together(layers, store)
            return {}
        return dict(zip(names, joined.to(dtype).split(rows), strict=True))

    def _warn_of_length(self, args: ModelArgs) -> None:
        # Whether the config's length is that before or after linear scaling, folders do not agree: the longer counts.
        known = (self.source.max_positions or math.inf) * args.rope_scaling_factor
        if args.max_seq_len > known:
            made_for = f"{self.name} was made for {known:.0f} tokens ({self.source.params_file})"
            logger.warning("max_seq_len is %d, and %s: text beyond them may make no sense", args.max_seq_len, made_for)


def first_joined(model: Transformer) -> dict[str, str]:
    """Of the weights that multiply the same input, and can be held as one matrix: each one's name, and the first's."""
    modules = [(path, module.joined) for path, module in model.named_modules() if hasattr(module, "joined")]
    return {f"{path}.{name}.weight": f"{path}.{names[0]}.weight" for path, names in modules for name in names}


def whole_shapes(local: Mapping[str, Tensor], world_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's tensors, for those of one of `world_size` ranks."""
    return {
        name: tuple(n * world_size if d == shard_dim(name) else n for d, n in enumerate(tensor.shape))
        for name, tensor in local.items()
    }


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
