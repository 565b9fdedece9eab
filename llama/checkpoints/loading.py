"""A checkpoint's tensors -> this rank's model: copied, held in a store, or left where the file has them."""

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

from ..model import Transformer
from ..parallel import ShardedLinear, hold_together
from ..quantization.formats import STORES, Grouped, Store
from ..quantization.groups import concatenate
from .folder import Checkpoint
from .quantized import Quantized

logger = logging.getLogger(__name__)

# Threads that pack or quantise; each holds a matrix and its temporaries beside the weights.
MAX_LOADERS = 4


def linear_layers(model: Transformer) -> dict[str, ShardedLinear]:
    """By their weights' names."""
    return {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, ShardedLinear)}


def bytes_per_weight(checkpoint: Checkpoint, model: Transformer, dtype: torch.dtype, store: Store | None) -> float:
    """Of the linear layers, as `load` holds them."""
    if store is None:
        return dtype.itemsize

    def of(name: str) -> float:
        stored = checkpoint.source.first.get(checkpoint.source.name_of(name))  # `load` tells what is missing
        if not isinstance(stored, Quantized) or checkpoint.adapter is not None:
            return store.bytes_per_weight
        if stored.bits in store.keeps:
            return stored.bytes_per_weight
        return STORES["int8"].bytes_per_weight if store.hold_coarse else store.bytes_per_weight

    sizes = {name: layer.weight.numel() for name, layer in linear_layers(model).items()}
    return sum(of(name) * size for name, size in sizes.items()) / sum(sizes.values())


def load(
    checkpoint: Checkpoint, model: Transformer, device: torch.device, dtype: torch.dtype, store: Store | None = None
) -> None:
    """Give `model`, built for this rank on the meta device, its weights; linear ones as `store` holds them.

    Copies one tensor at a time (with `store`, one matrix per thread) and gives its mapped pages back, so that memory
    holds this rank's weights and little more. What a file has as the store holds it is neither copied nor rounded:
    bfloat16 where it is mapped, 8 and 4 bits only laid out anew. Raises ValueError, before anything is read, where the
    files do not hold exactly the model's tensors. Warns of values that are not finite, and of positions that the model
    was not made for.
    """
    names, rank, source = list(checkpoint.check(model)), model.ranks.rank, checkpoint.source
    # Whether the config's length is that before or after linear scaling, folders do not agree: the longer counts.
    known = (source.max_positions or math.inf) * model.params.rope_scaling_factor
    if rank == 0 and (asked := model.params.max_seq_len) > known:
        made_for = f"{checkpoint.name} was made for {known:.0f} tokens ({source.params_file})"
        logger.warning("max_seq_len is %d, and %s: text beyond them may make no sense", asked, made_for)
    parts: dict[str, Tensor | Quantized] = {}
    if store and device.type == "cpu":
        as_it_is = (
            (name, checkpoint.as_it_is(name, rank, layer.weight.shape, store))
            for name, layer in linear_layers(model).items()
        )
        parts = {name: part for name, part in as_it_is if part is not None}
        held_as_groups = [name for name, part in parts.items() if isinstance(part, Quantized)]
        checkpoint.check_groups(held_as_groups, model.params, model.ranks.size)
    groups = joined(checkpoint, model, parts) if store else []
    groups += [[name] for name in names if name not in {*chain(*groups)}]
    loader = Loader(checkpoint, model, device, dtype, store, parts)
    state: dict[str, Tensor] = {}
    # Packing and quantising are slow and release the interpreter's lock; plain copies are as fast from one thread.
    with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_LOADERS) if store else 1) as pool:
        loaded, quiet = pool.map(loader.load, groups), rank > 0 or None
        for tensors in tqdm(loaded, total=len(groups), desc="loading", unit="tensor", leave=False, disable=quiet):
            state |= tensors
    model.load_state_dict(state, assign=True, strict=True)
    model.requires_grad_(False)


def joined(checkpoint: Checkpoint, model: nn.Module, parts: dict[str, Tensor | Quantized]) -> list[list[str]]:
    """The weights that multiply the same input and can be held as one matrix: all of one kind, and not in place."""
    groups = []
    for path, module in model.named_modules():
        if hasattr(module, "joined"):
            names = [f"{path}.{part}.weight" for part in module.joined]
            kinds = {getattr(checkpoint.source.tensor(name), "joins", "plain") for name in names}
            if len(kinds) == 1 and not any(isinstance(parts.get(name), Tensor) for name in names):
                groups.append(names)
    return groups


class Loader(NamedTuple):
    checkpoint: Checkpoint
    model: Transformer
    device: torch.device
    dtype: torch.dtype
    store: Store | None
    parts: dict[str, Tensor | Quantized]  # what the file has as the store holds it

    def load(self, names: list[str]) -> dict[str, Tensor]:
        """Hold tensors, joined along their rows, in a store of their layers; returns those that stay tensors."""
        model, parts = self.model, [self.parts.get(name) for name in names]
        modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
        layers = [module for module in modules if isinstance(module, ShardedLinear)] if self.store else []
        if isinstance(parts[0], Quantized):
            hold_together(layers, self.grouped(names))
            return {}
        whole = parts[0] if parts[0] is not None else self.copied(names, exact=bool(layers))
        self.check_finite(names, whole)
        quantized = isinstance(self.checkpoint.source.tensor(names[0]), Quantized)
        if self.store and layers:
            hold = self.store.hold_coarse if quantized and self.store.hold_coarse else self.store.hold
            if (held := hold(whole)) is not None:
                hold_together(layers, held)
                return {}
        rows = [len(model.get_parameter(name)) for name in names]
        return dict(zip(names, whole.to(self.dtype).split(rows), strict=True))

    def grouped(self, names: list[str]) -> Grouped:
        parts = [part for name in names if isinstance(part := self.parts[name], Quantized)]
        groups = concatenate([self.checkpoint.groups(name, part) for name, part in zip(names, parts, strict=True)])
        for factors in (groups.scales, groups.lows):
            if factors is not None:
                self.check_finite(names, factors)
        held = Grouped(groups, order=parts[0].order)
        for part in parts:
            part.let_go()
        return held

    def copied(self, names: list[str], exact: bool) -> Tensor:
        """This rank's rows of all these tensors, in the file's type if they are to be `exact`, else the model's."""
        weights = [self.model.get_parameter(name) for name in names]  # of this rank's shapes, on the meta device
        stored = [self.checkpoint.source.tensor(name) for name in names]
        types = [torch.float32 if isinstance(tensor, Quantized) else tensor.dtype for tensor in stored]
        dtype = reduce(torch.promote_types, types) if exact else self.dtype
        rows = [len(weight) for weight in weights]
        whole = torch.empty(sum(rows), *weights[0].shape[1:], dtype=dtype, device=self.device)
        for name, target in zip(names, whole.split(rows), strict=True):
            self.checkpoint.copy(name, self.model.ranks.rank, target)
        return whole

    def check_finite(self, names: list[str], values: Tensor) -> None:
        if not all(bound.isfinite() for bound in torch.aminmax(values)):
            said = " and ".join(names)
            logger.warning("%s of %s has values that are not finite: download it again", said, self.checkpoint.name)
