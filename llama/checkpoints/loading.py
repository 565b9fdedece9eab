"""Load a checkpoint's tensors into this rank's model: copied, packed, or mapped in place."""

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

# Threads that pack or quantize. Each needs memory for one matrix and its temporaries.
MAX_LOADERS = 4


def load_model(
    checkpoint: Checkpoint,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    formats: Formats | None,
) -> Transformer:
    """Load this rank's part of a checkpoint's model, with an empty cache.

    Raises ValueError if the ranks cannot share the model, it does not fit into memory, or the
    checkpoint is broken.
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
    """Return the model's linear layers by the names of their weights."""
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, ShardedLinear):
            layers[f"{path}.weight"] = module
    return layers


def bytes_per_weight(
    checkpoint: Checkpoint, model: Transformer, dtype: torch.dtype, formats: Formats | None
) -> float:
    """Return the mean bytes per weight of the linear layers, in the formats that `load` uses."""
    if formats is None:
        return dtype.itemsize
    total = 0.0
    count = 0
    for name, layer in linear_layers(model).items():
        # None if the tensor is missing, which `load` reports.
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
    """Load the weights of `model`, which was built for this rank on the meta device.

    `formats` selects the format of linear weights. Copies one tensor at a time (with `formats`, one
    matrix per thread) and releases its mapped pages, so that the process needs little more memory
    than this rank's weights. Tensors already stored in the requested format are neither copied nor
    rounded: 16-bit tensors stay in a private mapping of the file, 8- and 4-bit tensors are only
    rearranged.

    Raises ValueError, before reading anything, unless the files have exactly the model's tensors.
    Warns of non-finite values, and if max_seq_len exceeds the model's context length.
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
    fused = {*chain(*together)}
    together += [[name] for name in names if name not in fused]
    loader = Loader(checkpoint, model, device, dtype, formats, parts)
    state: dict[str, Tensor] = {}
    # Packing and quantizing are slow and release the GIL. Plain copies are as fast on one thread.
    workers = 1
    if formats:
        workers = min(torch.get_num_threads(), MAX_LOADERS)
    quiet = rank > 0 or None  # None: quiet if there is no terminal
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
    # Some configs give the length before linear scaling, some after it: allow the longer one.
    known = (source.max_positions or math.inf) * model.params.rope_scaling_factor
    asked = model.params.max_seq_len
    if rank == 0 and asked > known:
        made_for = f"{checkpoint.name} was made for {known:.0f} tokens ({source.params_file})"
        logger.warning(
            "max_seq_len is %d, and %s: text beyond that may make no sense", asked, made_for
        )


def packs(checkpoint: Checkpoint, names: list[str], formats: Formats) -> bool:
    """Whether weights are packed rather than kept as parameters."""
    stored = checkpoint.source.tensor(names[0])
    chosen = formats.of(stored, checkpoint.adapter is not None)
    return chosen is None or chosen.pack is not None


def fused_names(
    checkpoint: Checkpoint, model: nn.Module, parts: dict[str, Tensor | Quantized]
) -> list[list[str]]:
    """Return groups of weights that multiply the same input and can be packed as one.

    The weights of a group have the same stored type, and none is used in place.
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
    parts: dict[str, Tensor | Quantized]  # tensors already stored in the requested format

    def load(self, names: list[str]) -> dict[str, Tensor]:
        """Load these tensors: pack linear weights, fused along their rows, into their layers.

        Returns the tensors that remain parameters.
        """
        layers = []
        if self.formats:
            modules = [self.model.get_submodule(name.removesuffix(".weight")) for name in names]
            layers = [module for module in modules if isinstance(module, ShardedLinear)]
        part = self.parts.get(names[0])
        if isinstance(part, Quantized):
            fuse(layers, self.grouped(names))
            return {}
        whole = part
        if whole is None:
            whole = self.copied(names, exact=bool(layers))
        self.check_finite(names, whole)
        dtype = self.dtype
        if self.formats and layers:
            stored = self.checkpoint.source.tensor(names[0])
            chosen = self.formats.of(stored, self.checkpoint.adapter is not None)
            if chosen is None:  # the part spans shards, so the file's groups are not kept
                chosen = self.formats.coarse
            if chosen.pack is not None:
                packed = chosen.pack(whole)
                if packed is not None:
                    fuse(layers, packed)
                    return {}
            dtype = chosen.dtype or dtype
        rows = [len(self.model.get_parameter(name)) for name in names]
        return dict(zip(names, whole.to(dtype).split(rows), strict=True))

    def grouped(self, names: list[str]) -> Grouped:
        """Return fused weights packed in the file's own groups."""
        parts = []
        for name in names:
            part = self.parts[name]
            assert isinstance(part, Quantized)
            parts.append(part)
        groups = concatenate(list(map(self.checkpoint.groups, names, parts)))
        for factors in (groups.scales, groups.mins):
            if factors is not None:
                self.check_finite(names, factors)
        packed = Grouped(groups, order=parts[0].order)
        for part in parts:
            part.let_go()
        return packed

    def copied(self, names: list[str], exact: bool) -> Tensor:
        """Return this rank's rows of all these tensors.

        They have a type that represents the file's values exactly if `exact`, else the model's.
        """
        # These are on the meta device and have this rank's shapes.
        weights = [self.model.get_parameter(name) for name in names]
        dtype = self.dtype
        if exact:
            dtype = reduce(torch.promote_types, map(self.exact_type, names))
        rows = [len(weight) for weight in weights]
        whole = torch.empty(sum(rows), *weights[0].shape[1:], dtype=dtype, device=self.device)
        for name, target in zip(names, whole.split(rows), strict=True):
            self.checkpoint.copy(name, self.model.ranks.rank, target)
        return whole

    def exact_type(self, name: str) -> torch.dtype:
        """Return the type that represents a tensor's stored values exactly."""
        tensor = self.checkpoint.source.tensor(name)
        if isinstance(tensor, Quantized):
            return torch.float32
        return tensor.dtype

    def check_finite(self, names: list[str], values: Tensor) -> None:
        if not all(bound.isfinite() for bound in torch.aminmax(values)):
            said = " and ".join(names)
            logger.warning(
                "%s of %s has values that are not finite: download it again",
                said,
                self.checkpoint.name,
            )
