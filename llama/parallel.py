"""This rank among the others, and fairscale's parallel layers, sharded, for inference.

fairscale's own constructors allocate the whole weight on every rank and cannot build on the meta device; its reduce is
an autograd function, which breaks a compiled graph. The subclasses below keep its types and its groups, hold this
rank's shard only, and reduce with plain collectives. On one rank they are ordinary layers, and differentiable.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel import layers as fs_layers
from torch import Tensor, nn

from .quantization.formats import Plain, Rows

T = TypeVar("T")


class Ranks:
    """The `size` ranks that share a model, seen from one of them: its number `rank`, and what they do together."""

    def __init__(self, size: int = 1, rank: int = 0, group: dist.ProcessGroup | None = None):
        self.size, self.rank, self.group = size, rank, group  # one rank has no group, and nothing to say to it
        self.asking = False
        self.thread: threading.Thread | None = None  # the one that speaks to the others
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return model_ranks, ()  # a copy of a model, or one read from a pickle, is of the ranks it comes to

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def split(self, n: int) -> int:
        """One rank's part of a dimension. The checkpoint was checked to divide before any layer is built."""
        assert n % self.size == 0, f"{n} does not divide over {self.size} ranks"
        return n // self.size

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(..., n / size) on each rank -> (..., n) on all."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def share(self, x: Tensor) -> Tensor:
        """The values that the first rank has in `x`, on all of them."""
        if self.group is not None:
            self._check()
            dist.broadcast(x, src=dist.get_global_rank(self.group, 0), group=self.group)
        return x

    def ask_first(self, question: Callable[[], T]) -> T:
        """What `question` returns or raises on the first rank, the only one that is asked, on all of them."""
        if self.group is None:
            return question()
        self._check()
        told: list[Any] = [None, None]
        if self.rank == 0:
            self.asking = True
            try:
                told[0] = question()
            except BaseException as error:  # of whatever kind: the other ranks wait
                caught = error
                told[1] = error if can_pickle(error) else RuntimeError(f"{type(error).__name__}: {error}")
            self.asking = False
        dist.broadcast_object_list(told, src=dist.get_global_rank(self.group, 0), group=self.group)
        if told[1] is not None:
            raise caught if self.rank == 0 else told[1]
        answer: T = told[0]
        return answer

    def alike(self, make: Callable[[], T]) -> T:
        """What `make` returns, once all ranks have seen that each of them made the same.

        Raises ValueError where they did not, and on each rank what `make` raised there.
        """
        if self.group is None:
            return make()
        self._check()
        made: T | Exception
        try:
            made = make()
        except Exception as error:
            made = error
        digests: list[Any] = [None] * self.size
        ours = hashlib.sha256(repr(made).encode(errors="replace")).digest()
        dist.all_gather_object(digests, ours, group=self.group)
        if isinstance(made, Exception):
            raise made
        if len(set(digests)) > 1:
            raise ValueError(f"{self.size} ranks were given different requests: pass the same to each of them")
        return made

    def _check(self) -> None:
        """Raise RuntimeError rather than begin what the other ranks do not take part in."""
        if self.asking:
            raise RuntimeError(
                f"a check asked the model itself, and of {self.size} ranks only the first runs it: ask after the call"
            )
        with self.lock:
            me = threading.current_thread()
            if self.thread is not None and self.thread is not me and self.thread.is_alive():
                raise RuntimeError(f"several threads ask one model on {self.size} ranks: use one thread")
            self.thread = me


# One for each group of several ranks in which something was built.
_joined: list[Ranks] = []


def model_ranks() -> Ranks:
    """The ranks that share what this one builds."""
    if not fs_init.model_parallel_is_initialized() or fs_init.get_model_parallel_world_size() == 1:
        return Ranks()
    group = fs_init.get_model_parallel_group()
    for ranks in _joined:
        if ranks.group is group:
            return ranks
    _joined.append(Ranks(fs_init.get_model_parallel_world_size(), fs_init.get_model_parallel_rank(), group))
    return _joined[-1]


def let_groups_go() -> None:
    """Keep no reference to a group: its threads end with the last one."""
    for ranks in _joined:
        ranks.group = None


def can_pickle(value: object) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


class ShardedLinear(nn.Module):
    """What the two linear layers share: this rank's weight, a parameter or in one of the stores of stores.py."""

    def __init__(self, rows: int, columns: int, ranks: Ranks):
        nn.Module.__init__(self)
        self.ranks = ranks
        self.weight = new_weight(rows, columns)
        self.store: Any = Plain(self)

    def hold(self, store: nn.Module) -> None:
        """Multiply by `store` in place of the weight."""
        self.store = store
        del self.weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not isinstance(self.store, Plain):
            destination[prefix + "weight"] = self.store.unpack()


def multiply_together(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Each layer's product with x; a single product where one store holds their weights, and no hook looks on."""
    stores: list[Any] = [getattr(layer, "store", None) for layer in layers]
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    if hooked or not all(isinstance(store, Rows) for store in stores):
        return [layer(x) for layer in layers]
    y: Tensor = stores[0].shared(x)
    return y.split([store.last - store.first for store in stores], dim=-1)


def hold_together(layers: Sequence[ShardedLinear], store: nn.Module) -> None:
    """Give layers that multiply the same input a store of their weights, joined along the rows."""
    if len(layers) == 1:
        return layers[0].hold(store)
    last = 0
    for layer in layers:
        first, last = last, last + layer.weight.shape[0]
        layer.hold(Rows(store, first, last))


class ColumnParallelLinear(ShardedLinear, fs_layers.ColumnParallelLinear):
    """y = x Wᵀ with W split by rows: weight (out_features / ranks, in_features); each rank has its part of y."""

    def __init__(self, in_features: int, out_features: int, *, gather_output: bool = False):
        ranks = model_ranks()
        super().__init__(ranks.split(out_features), in_features, ranks)
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.store(x)
        return self.ranks.gather(y) if self.gather_output else y


class RowParallelLinear(ShardedLinear, fs_layers.RowParallelLinear):
    """y = x Wᵀ with W split by columns: weight (out_features, in_features / ranks); x comes split, y is whole."""

    def __init__(self, in_features: int, out_features: int):
        ranks = model_ranks()
        super().__init__(out_features, ranks.split(in_features), ranks)

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.sum(self.store(x))


class ParallelEmbedding(fs_layers.ParallelEmbedding):
    """Token embeddings split along the model dimension: weight (num_embeddings, embedding_dim / ranks)."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)
        self.ranks = model_ranks()
        self.weight = new_weight(num_embeddings, self.ranks.split(embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ranks.gather(F.embedding(tokens, self.weight))


def new_weight(rows: int, columns: int) -> nn.Parameter:
    """A weight to be trained, or on the meta device to be replaced by a checkpoint's.

    There nothing is computed: arithmetic on the meta device imports the compiler, most of a second.
    """
    weight = torch.empty(rows, columns)
    return nn.Parameter(weight if weight.is_meta else 0.02 * torch.randn_like(weight))
