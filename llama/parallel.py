"""fairscale's model-parallel layers, each holding only this rank's shard of its weight.

fairscale's constructors allocate the whole weight on every rank and do not work on the meta device.
Its reduction is an autograd function, which breaks a compiled graph. The subclasses below keep its
types, arguments and process groups, hold only this rank's shard, and reduce with plain collectives.
On one rank they are ordinary differentiable layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fs_layers
from torch import Tensor, nn

from . import ops
from .distributed import Ranks, model_ranks
from .quantization.formats import Rows

InitMethod = Callable[[Tensor], Any]


class ShardedLinear(nn.Module):
    """Base of the two linear layers: holds this rank's weight, as a parameter or packed.

    A packed layer has no parameter. Its `weight` is a dequantized copy, an inference tensor, which
    PyTorch does not let you write to outside inference mode. Assigning a Parameter to `weight`
    replaces the packed weight.
    """

    def __init__(self, rows: int, columns: int, ranks: Ranks, init_method: InitMethod | None):
        nn.Module.__init__(self)
        self.ranks = ranks
        self.packed: nn.Module | None = None
        self.weight = new_weight(rows, columns, init_method)
        self.register_parameter("bias", None)  # fairscale's layers have it

    def pack(self, packed: nn.Module) -> None:
        """Replace the parameter with a packed weight."""
        self.packed = packed
        del self.weight

    def multiply(self, x: Tensor) -> Tensor:
        """x Wᵀ, where W is this rank's shard."""
        if self.packed is None:
            return ops.linear(x, self.weight)
        y: Tensor = self.packed(x)
        return y

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and "_modules" in self.__dict__:
            self._modules.pop("packed", None)
            self.packed = None
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        packed = "packed" in self.__dict__.get("_modules", ())
        if name == "weight" and packed and not isinstance(value, nn.Parameter):
            raise TypeError(
                "the layer's weight is packed: assign a torch.nn.Parameter in its place"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            packed: Any = self._modules.get("packed")
            if packed is not None:
                with torch.inference_mode():
                    return packed.dequantize().clone()
        return super().__getattr__(name)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.packed.dequantize()  # type: ignore[operator]


def fused_linear(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Each layer's product with x, computed as a single product if the layers are fused."""
    packed: list[Any] = [getattr(layer, "packed", None) for layer in layers]
    fused = not torch.compiler.is_compiling() and ops.path.fused
    if not fused or not all(isinstance(part, Rows) for part in packed):
        return [layer(x) for layer in layers]
    y: Tensor = packed[0].shared(x)
    return y.split([part.last - part.first for part in packed], dim=-1)


def fuse(layers: Sequence[ShardedLinear], packed: nn.Module) -> None:
    """Make layers with the same input share `packed`, which stacks their weights' rows."""
    if len(layers) == 1:
        layers[0].pack(packed)
        return
    last = 0
    for layer in layers:
        first = last
        last += layer.weight.shape[0]
        layer.pack(Rows(packed, first, last))


@ops.transparent
class ColumnParallelLinear(ShardedLinear, fs_layers.ColumnParallelLinear):
    """y = x Wᵀ, with W split by rows.

    weight: (out_features / ranks, in_features). Each rank gets its part of y, or with
    `gather_output` all of y. Takes fairscale's arguments. Raises ValueError for values that Llama's
    layers do not support.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = True,
        init_method: InitMethod | None = None,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
    ):
        refuse_unless_taken(
            bias=bias, stride=stride, keep_master_weight_for_test=keep_master_weight_for_test
        )
        ranks = model_ranks()
        super().__init__(ranks.split(out_features), in_features, ranks, init_method)
        self.in_features = in_features
        self.out_features = out_features
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return self.ranks.gather(y) if self.gather_output and self.ranks.size > 1 else y


@ops.transparent
class RowParallelLinear(ShardedLinear, fs_layers.RowParallelLinear):
    """y = x Wᵀ, with W split by columns.

    weight: (out_features, in_features / ranks). Each rank gets all of y. With `input_is_parallel`,
    each rank passes only its part of x. Takes fairscale's arguments. Raises ValueError for values
    that Llama's layers do not support.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        init_method: InitMethod | None = None,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
    ):
        refuse_unless_taken(
            bias=bias, stride=stride, keep_master_weight_for_test=keep_master_weight_for_test
        )
        ranks = model_ranks()
        super().__init__(out_features, ranks.split(in_features), ranks, init_method)
        self.in_features = in_features
        self.out_features = out_features
        self.input_is_parallel = input_is_parallel

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel and self.ranks.size > 1:
            x = x.chunk(self.ranks.size, dim=-1)[self.ranks.rank]
        y = self.multiply(x)
        return self.ranks.sum(y) if self.ranks.size > 1 else y


@ops.transparent
class ParallelEmbedding(fs_layers.ParallelEmbedding):
    """Token embeddings, split along the model dimension.

    weight: (num_embeddings, embedding_dim / ranks). Takes fairscale's arguments. Raises ValueError
    for values that Llama's layers do not support.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        init_method: InitMethod | None = None,
        keep_master_weight_for_test: bool = False,
    ):
        refuse_unless_taken(
            padding_idx=padding_idx,
            max_norm=max_norm,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            keep_master_weight_for_test=keep_master_weight_for_test,
        )
        nn.Module.__init__(self)
        self.ranks = model_ranks()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.weight = new_weight(num_embeddings, self.ranks.split(embedding_dim), init_method)

    def forward(self, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens, self.weight)
        return self.ranks.gather(h) if self.ranks.size > 1 else h


# Arguments of fairscale that would change a layer's result, each with its only supported value.
TAKEN: dict[str, Any] = {
    "bias": False,
    "stride": 1,
    "padding_idx": None,
    "max_norm": None,
    "scale_grad_by_freq": False,
    "sparse": False,
    "keep_master_weight_for_test": False,
}


def refuse_unless_taken(**arguments: Any) -> None:
    """Raise ValueError unless each argument has its supported value."""
    for name, value in arguments.items():
        taken = TAKEN[name]
        if type(value) is not type(taken) or value != taken:
            raise ValueError(
                f"{name} is {value!r}, which Llama's layers do not support: pass {name}={taken}"
            )


def new_weight(rows: int, columns: int, init_method: InitMethod | None = None) -> nn.Parameter:
    """Make an initialized weight, or on the meta device a placeholder for a checkpoint's.

    The placeholder is not initialized: arithmetic on the meta device imports the compiler, which
    takes most of a second.
    """
    weight = torch.empty(rows, columns)
    if not weight.is_meta:
        if init_method is None:
            nn.init.normal_(weight, std=0.02)
        else:
            init_method(weight)
    return nn.Parameter(weight)
