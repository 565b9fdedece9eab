"""A checkpoint's tensors -> this rank's model: copied, packed, or left where the file has them."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..distributed import model_ranks
from ..model import ModelArgs, Transformer
from ..parallel import ShardedLinear, fuse
from ..quantization.formats import Formats, Grouped
from ..quantization.groups import concatenate
from .folder import Checkpoint, check_world_size
from .memory import allocating, check_memory, memory_needs
from .quantized import Quantized

logger = logging.getLogger(__name__)

# Threads that pack or quantise; each holds a matrix and its temporaries beside the weights.
MAX_LOADERS = 4


def load_model(
    checkpoint: Checkpoint,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    formats: Formats | None,
) -> Transformer:
    """This rank's part of a checkpoint's model, with an empty cache.

    Raises ValueError for what cannot be shared by the ranks, does not fit into memory, or is
    broken.
    """
    ranks = model_ranks()
    check_world_size(checkpoint.name, args, ranks.size)
    with torch.device("meta"):
        model = Transformer(args)
    size = bytes_per_weight(checkpoint, model, dtype, formats)
    needs = memory_needs(args, ranks.size, dtype, size)
    check_memory(checkpoint.name, args, needs, device)
    with allocating(checkpoint.name, args, needs, device):
        load(checkpoint, model, device, dtype, formats)
        model.allocate_cache()
    return model


def linear_layers(model: Transformer) -> dict[str, ShardedLinear]:
    """By their weights' names."""
    return {
        f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, ShardedLinear)
    }


def bytes_per_weight(
    checkpoint: Checkpoint, model: Transformer, dtype: torch.dtype, formats: Formats | None
) -> float:
    """Of the linear layers, as `load` keeps them."""
    if formats is None:
        return dtype.itemsize
    total = 0.0
    count = 0
    for name, layer in linear_layers(model).items():
        # `load` tells what is missing
        stored = checkpoint.source.first.get(checkpoint.source.name_of(name))
        chosen = formats.of(stored, checkpoint.adapter is not None)
        if chosen is None:
            assert isinstance(stored, Quantized)
            size = stored.bytes_per_weight
        else:
            size = chosen.bytes_per_weight
        total += size * layer.weight.numel()
        count += layer.weight.numel()
    return total / count


def load(
    checkpoint: Checkpoint,
    model: Transformer,
    device: torch.device,
    dtype: torch.dtype,
    formats: Formats | None = None,
) -> None:
    """Give `model`, built for this rank on the meta device, its weights; linear ones in their
    `formats`.

    Copies one tensor at a time (with `formats`, one matrix per thread) and gives its mapped pages
    back, so that memory holds this rank's weights and little more. What a file has in the format
    that is wanted is neither copied nor rounded: 16 bits stay where they are mapped, privately, 8
    and 4 bits are only laid out anew. Raises ValueError, before anything is read, where the files
    do not hold exactly the model's tensors. Warns of values that are not finite, and of positions
    that the model was not made for.
    """
    names = list(checkpoint.check(model))
    rank = model.ranks.rank
    warn_of_length(checkpoint, model, rank)
    parts: dict[str, Tensor | Quantized] = {}
    if formats and device.type == "cpu":
        for name, layer in linear_layers(model).items():
            part = checkpoint.stored_part(name, rank, layer.weight.shape, formats)
            if part is not None:
                parts[name] = part
        quantized = [name for name, part in parts.items() if isinstance(part, Quantized)]
        checkpoint.check_groups(quantized, model.params, model.ranks.size)
    together: list[list[str]] = []
    if formats:
        fusable = fused_names(checkpoint, model, parts)
        together = [names for names in fusable if packs(checkpoint, names, formats)]
    together += [[name] for name in names if name not in {*chain(*together)}]
    loader = Loader(checkpoint, model, device, dtype, formats, parts)
    state: dict[str, Tensor] = {}
    # Packing and quantising are slow and release the interpreter's lock; plain copies are as fast
    # from one thread.
    workers = min(torch.get_num_threads(), MAX_LOADERS) if formats else 1
    quiet = rank > 0 or None
    with ThreadPoolExecutor(workers) as pool:
        loaded = pool.map(loader.load, together)
        for tensors in tqdm(
            loaded, total=len(together), desc="loading", unit="tensor", leave=False, disable=quiet
        ):
            state |= tensors
    model.load_state_dict(state, assign=True, strict=True)
    model.requires_grad_(False)


def warn_of_length(checkpoint: Checkpoint, model: Transformer, rank: int) -> None:
    source = checkpoint.source
    # Whether the config's length is that before or after linear scaling, folders do not agree: the
    # longer counts.
    known = (source.max_positions or math.inf) * model.params.rope_scaling_factor
    asked = model.params.max_seq_len
    if rank == 0 and asked > known:
        made_for = f"{checkpoint.name} was made for {known:.0f} tokens ({source.params_file})"
        logger.warning(
            "max_seq_len is %d, and %s: text beyond them may make no sense", asked, made_for
        )


def packs(checkpoint: Checkpoint, names: list[str], formats: Formats) -> bool:
    """Whether weights become packed ones, and not parameters."""
    stored = checkpoint.source.tensor(names[0])
    chosen = formats.of(stored, checkpoint.adapter is not None)
    return chosen is None or chosen.pack is not None


def fused_names(
    checkpoint: Checkpoint, model: nn.Module, parts: dict[str, Tensor | Quantized]
) -> list[list[str]]:
    """The weights that multiply the same input and can be packed as one: all of one kind, and not
    in place.
    """
    groups = []
    for path, module in model.named_modules():
        if hasattr(module, "fused"):
            names = [f"{path}.{part}.weight" for part in module.fused]
            kinds = {getattr(checkpoint.source.tensor(name), "joins", "plain") for name in names}
            if len(kinds) == 1 and not any(isinstance(parts.get(name), Tensor) for name in names):
                groups.append(names)
    return groups


class Loader(NamedTuple):
    checkpoint: Checkpoint
    model: Transformer
    device: torch.device
    dtype: torch.dtype
    formats: Formats | None
    parts: dict[str, Tensor | Quantized]  # what the file has in the format that is wanted

    def load(self, names: list[str]) -> dict[str, Tensor]:
        """Pack tensors, fused along their rows, into their layers; returns those that stay
        parameters.
        """
        modules = [self.model.get_submodule(name.removesuffix(".weight")) for name in names]
        layers = (
            [module for module in modules if isinstance(module, ShardedLinear)]
            if self.formats
            else []
        )
        part = self.parts.get(names[0])
        if isinstance(part, Quantized):
            fuse(layers, self.grouped(names))
            return {}
        whole = part if part is not None else self.copied(names, exact=bool(layers))
        self.check_finite(names, whole)
        dtype = self.dtype
        if self.formats and layers:
            stored = self.checkpoint.source.tensor(names[0])
            chosen = self.formats.of(stored, self.checkpoint.adapter is not None)
            # groups that could not be kept, of several shards
            chosen = chosen or self.formats.coarse
            packed = chosen.pack(whole) if chosen.pack else None
            if packed is not None:
                fuse(layers, packed)
                return {}
            dtype = chosen.dtype or dtype
        rows = [len(self.model.get_parameter(name)) for name in names]
        return dict(zip(names, whole.to(dtype).split(rows), strict=True))

    def grouped(self, names: list[str]) -> Grouped:
        """The file's own groups of weights that are fused."""
        parts = [part for name in names if isinstance(part := self.parts[name], Quantized)]
        groups = concatenate(
            [self.checkpoint.groups(name, part) for name, part in zip(names, parts, strict=True)]
        )
        for factors in (groups.scales, groups.mins):
            if factors is not None:
                self.check_finite(names, factors)
        packed = Grouped(groups, order=parts[0].order)
        for part in parts:
            part.let_go()
        return packed

    def copied(self, names: list[str], exact: bool) -> Tensor:
        """This rank's rows of all these tensors, in the file's type if they are to be `exact`, else
        the model's.
        """
        # of this rank's shapes, on the meta device
        weights = [self.model.get_parameter(name) for name in names]
        stored = [self.checkpoint.source.tensor(name) for name in names]
        types = [
            torch.float32 if isinstance(tensor, Quantized) else tensor.dtype for tensor in stored
        ]
        dtype = reduce(torch.promote_types, types) if exact else self.dtype
        rows = [len(weight) for weight in weights]
        whole = torch.empty(sum(rows), *weights[0].shape[1:], dtype=dtype, device=self.device)
        for name, target in zip(names, whole.split(rows), strict=True):
            self.checkpoint.copy(name, self.model.ranks.rank, target)
        return whole

    def check_finite(self, names: list[str], values: Tensor) -> None:
        if not all(bound.isfinite() for bound in torch.aminmax(values)):
            said = " and ".join(names)
            logger.warning(
                "%s of %s has values that are not finite: download it again",
                said,
                self.checkpoint.name,
            )
