"""A checkpoint folder as users see it, whatever its layout, and this rank's part of it."""

from __future__ import annotations

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..distributed import divisors, either
from ..model import ModelArgs, Transformer
from ..parallel import ShardedLinear, hold_together
from ..stores import Store
from .files import folder_of, give_back
from .huggingface import open_huggingface
from .lora import Adapter
from .names import Shapes, interleave, is_rotary, part_shape, shard_dim
from .release import open_release

logger = logging.getLogger(__name__)

# Threads that pack or quantise; each holds a matrix and its temporaries beside the weights.
MAX_LOADERS = 4

EMBEDDING = "tok_embeddings.weight"
IGNORED = ("rope.freqs", "rotary_emb.inv_freq")  # precomputed angles, which some files carry and no model needs


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
        self.source = open_huggingface(self.path) if in_hf_layout else open_release(self.path)
        path, first = next(iter(self.source.shards.items()))
        embedding = self.source.name_of(EMBEDDING)
        if embedding not in first or first[embedding].dim() != 2:
            raise ValueError(f"{path} lacks tensor {embedding}: is it a checkpoint of Llama 2?")
        self.adapter = None if adapter_dir is None else Adapter(adapter_dir)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights are stored in."""
        return self.source.tensor(EMBEDDING).dtype

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
        file, rows = self.source.params_file, len(self.source.tensor(EMBEDDING))
        if (said := self.source.params.get("vocab_size", rows)) != rows:
            raise ValueError(f"{file} has vocab_size {said}, the checkpoint's embedding {rows} rows: not of one model")
        sizes = {"vocab_size": rows, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args = ModelArgs(**self.source.params | sizes)
        if args.dim % (2 * args.n_heads) or args.n_heads % args.kv_heads:
            raise ValueError(
                f"{file} has dim {args.dim}, {args.n_heads} attention heads and {args.kv_heads} key/value heads, "
                "which do not divide: it is of no Llama 2"
            )
        last = f"layers.{args.n_layers - 1}.attention_norm.weight"
        if not any(self.source.name_of(last) in shard for shard in self.source.shards.values()):
            raise ValueError(f"{next(iter(self.source.shards))} lacks tensor {last}: {file} is of another model")
        return args

    def check(self, model: Transformer) -> Shapes:
        """The shapes of the whole model's tensors. Raises ValueError unless the files hold these and nothing else."""
        ranks, source, shards = model.ranks.size, self.source, len(self.source.shards)
        shapes = {
            name: tuple(n * ranks if d == shard_dim(name) else n for d, n in enumerate(part.shape))
            for name, part in model.state_dict().items()
        }
        wanted = {source.name_of(name) for name in shapes}
        for path, shard in source.shards.items():
            held = {name for name in shard if not name.endswith(IGNORED)}
            for what, names in (("holds unknown", held - wanted), ("lacks", wanted - held)):
                if names:
                    reason = f"{source.params_file} is of another model, or this is no Llama 2"
                    raise ValueError(f"{path} {what} tensor {min(names)}: {reason}")
            for name, whole in shapes.items():
                tensor, first = shard[source.name_of(name)], source.tensor(name)
                dim, shape = shard_dim(name), part_shape(name, whole, shards)
                if tuple(tensor.shape) != shape or (dim is not None and whole[dim] % shards):
                    found = f"{path}: {source.name_of(name)} has shape {tuple(tensor.shape)}"
                    asked = f"{source.params_file} asks for {shape}" + f" in each of {shards} shards" * (shards > 1)
                    raise ValueError(f"{found}, and {asked}: a shard is missing or of another model")
                if dim is None and tensor is not first and not torch.equal(tensor, first):
                    logger.warning("%s: %s is not that of shard 00: the shards may be of two models", path, name)
        if self.adapter is not None:
            self.adapter.check(shapes)
        return shapes

    def mapped(self, name: str, rank: int, shape: torch.Size) -> Tensor | None:
        """This rank's part of a matrix, of `shape`, where one file has it as it is, in bfloat16; else None."""
        source, dim = self.source, shard_dim(name)
        shards = [shard[source.name_of(name)] for shard in source.shards.values()]
        if self.adapter is not None or (source.in_halves and is_rotary(name)) or dim is None:
            return None
        number, first = divmod(rank * shape[dim], shards[0].shape[dim])
        if shards[0].dtype != torch.bfloat16 or first + shape[dim] > shards[0].shape[dim]:
            return None
        return shards[number].narrow(dim, first, shape[dim])

    def copy(self, name: str, rank: int, out: Tensor) -> None:
        """Fill `out`, of the shape of one rank's part, with this rank's part of a tensor, of one shard or several."""
        source, head_dim = self.source, self.source.params["dim"] // self.source.params["n_heads"]
        tensors = [shard[source.name_of(name)] for shard in source.shards.values()]
        dim = shard_dim(name)
        if dim is None:  # each shard has the whole of it
            tensors, dim, rank = tensors[:1], 0, 0
        size, start, end = tensors[0].shape[dim], rank * out.shape[dim], (rank + 1) * out.shape[dim]
        for number, tensor in enumerate(tensors):
            first, last = max(start, number * size), min(end, (number + 1) * size)
            if first < last:
                part = tensor.narrow(dim, first - number * size, last - first)
                in_order = interleave(part, head_dim) if source.in_halves and is_rotary(name) else part
                out.narrow(dim, first - start, last - first).copy_(in_order)
                if source.gives_back:
                    give_back(part)
        if self.adapter is not None:
            self.adapter.add(name, dim, start, head_dim, out)

    def load(self, model: Transformer, device: torch.device, dtype: torch.dtype, store: Store | None = None) -> None:
        """Give `model`, built for this rank on the meta device, its weights; linear ones as `store` holds them.

        Copies one tensor at a time (with `store`, one matrix per thread) and gives its mapped pages back, so that
        memory holds this rank's weights and little more. A store that multiplies in place is given bfloat16 matrices
        where they are mapped, if a file has them as this rank needs them. Raises ValueError, before anything is read,
        where the files do not hold exactly the model's tensors. Warns of values that are not finite, and of positions
        that the model was not made for.
        """
        names, rank = list(self.check(model)), model.ranks.rank
        # Whether the config's length is that before or after linear scaling, folders do not agree: the longer counts.
        known = (self.source.max_positions or math.inf) * model.params.rope_scaling_factor
        if rank == 0 and (asked := model.params.max_seq_len) > known:
            made_for = f"{self.name} was made for {known:.0f} tokens ({self.source.params_file})"
            logger.warning("max_seq_len is %d, and %s: text beyond them may make no sense", asked, made_for)
        mapped: dict[str, Tensor] = {}
        if store and store.in_place and device.type == "cpu":
            layers = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, ShardedLinear)}
            parts = {name: self.mapped(name, rank, layer.weight.shape) for name, layer in layers.items()}
            mapped = {name: part for name, part in parts.items() if part is not None}
        # Weights that multiply the same input can be held as one matrix.
        groups = [
            [name for part in module.joined if (name := f"{path}.{part}.weight") not in mapped]
            for path, module in model.named_modules()
            if store and hasattr(module, "joined")
        ]
        groups = [group for group in groups if group]
        groups += [[name] for name in names if name not in {*chain(*groups)}]
        load = partial(self._load_joined, model, device, dtype, store, mapped)
        state: dict[str, Tensor] = {}
        # Packing and quantising are slow and release the interpreter's lock; plain copies are as fast from one thread.
        with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_LOADERS) if store else 1) as pool:
            loaded, quiet = pool.map(load, groups), rank > 0 or None
            for tensors in tqdm(loaded, total=len(groups), desc="loading", unit="tensor", leave=False, disable=quiet):
                state |= tensors
        model.load_state_dict(state, assign=True, strict=True)
        model.requires_grad_(False)

    def _load_joined(
        self,
        model: Transformer,
        device: torch.device,
        dtype: torch.dtype,
        store: Store | None,
        mapped: dict[str, Tensor],
        names: list[str],
    ) -> dict[str, Tensor]:
        """Copy tensors, joined along their rows, into a store of their layers; returns those that stay tensors.

        One that is `mapped` is alone, and is not copied.
        """
        weights = [model.get_parameter(name) for name in names]  # of this rank's shapes, on the meta device
        modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
        layers = [module for module in modules if isinstance(module, ShardedLinear)] if store else []
        stored = reduce(torch.promote_types, (self.source.tensor(name).dtype for name in names)) if layers else dtype
        rows = [len(weight) for weight in weights]
        part = mapped.get(names[0])
        joined = torch.empty(sum(rows), *weights[0].shape[1:], dtype=stored, device=device) if part is None else part
        for name, target in zip(names, joined.split(rows), strict=True):
            if part is None:
                self.copy(name, model.ranks.rank, target)
            if not all(bound.isfinite() for bound in torch.aminmax(target)):
                logger.warning("%s of %s has values that are not finite: download it again", name, self.name)
        if store and layers and (held := store.hold(joined)) is not None:
            hold_together(layers, held)
            return {}
        return dict(zip(names, joined.to(dtype).split(rows), strict=True))


def world_sizes(args: ModelArgs) -> list[int]:
    """The numbers of ranks that can share the model: what divides its key/value heads divides its other heads too."""
    return divisors(math.gcd(args.kv_heads, args.hidden_dim, args.vocab_size))


def check_world_size(name: str, args: ModelArgs, world_size: int) -> None:
    """Raise ValueError unless every split dimension of the model divides over the ranks."""
    heads = {"attention heads": args.n_heads, "key/value heads": args.kv_heads}
    others = {"feed-forward channels": args.hidden_dim, "vocabulary pieces": args.vocab_size}
    uneven = heads if args.kv_heads % world_size else {what: n for what, n in others.items() if n % world_size}
    if uneven:
        listed = " and ".join(f"{n} {what}" for what, n in uneven.items())
        raise ValueError(f"{name} has {listed}, which {world_size} ranks cannot share: use {either(world_sizes(args))}")
