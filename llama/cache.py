"""The KV cache, and the views of it that a forward pass attends to.

`start_pos` gives the positions of a pass's tokens: an integer, as in the original, or a View made
by the engine. Attention wraps an integer in a View as well, and always calls `View.update`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import ops
from .ops import CausalMask


class KVCache:
    """The preallocated keys and values of every layer.

    `k[layer]` and `v[layer]` are (n_slots, n_local_kv_heads, length, head_dim). Slot i holds the
    keys and values of the tokens `token_ids[i]`, from position 0 on. Anything beyond them is
    ignored. `token_ids` is the only record of what has been computed: to write to a slot, first
    shorten its ids, then write the keys and values, then append the new ids.
    """

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        n_kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        self.n_slots = n_slots
        self.length = length
        self.shape = (n_slots, n_kv_heads, length, head_dim)
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.allocate(n_layers, dtype, device)

    def allocate(
        self, n_layers: int, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        """Allocate zeros for `n_layers` layers and empty all slots."""
        like = torch.empty(0, dtype=dtype, device=device)
        self.dtype = like.dtype
        self.device = like.device
        self.k.clear()
        self.v.clear()
        self.clear()
        self.grow(n_layers)

    @torch.inference_mode(False)  # inference tensors cannot be written outside inference mode
    def grow(self, n_layers: int) -> None:
        """Add layers until there are at least `n_layers`."""
        while len(self.k) < n_layers:
            # Zeros, not torch.empty: masked values are multiplied by 0, and 0 × NaN is NaN.
            self.k.append(torch.zeros(self.shape, dtype=self.dtype, device=self.device))
            self.v.append(torch.zeros(self.shape, dtype=self.dtype, device=self.device))

    def prefix_length(self, slot: int, ids: list[int]) -> int:
        """Length of the longest prefix of `ids` that the slot holds."""
        cached = self.token_ids[slot]
        if ids[: len(cached)] == cached:
            return len(cached)
        # Bisection compares whole lists, which is done in C.
        lengths = range(min(len(cached), len(ids)) + 1)
        return bisect_left(lengths, True, key=lambda n: cached[:n] != ids[:n]) - 1

    def clear(self) -> None:
        """Empty all slots."""
        self.token_ids: list[list[int]] = [[] for _ in range(self.n_slots)]

    def truncate(self, slot: int, length: int) -> None:
        """Keep at most the first `length` tokens of a slot."""
        del self.token_ids[slot][length:]

    def swap(self, a: int, b: int) -> None:
        """Exchange the contents of two slots.

        Both count as empty until the exchange is complete, so an interrupt only means that their
        tokens are computed again.
        """
        if a == b:
            return
        ids_a = self.token_ids[a]
        ids_b = self.token_ids[b]
        self.token_ids[a] = []
        self.token_ids[b] = []
        for layer in (*self.k, *self.v):
            of_a = layer[a, :, : len(ids_a)].clone()
            layer[a, :, : len(ids_b)] = layer[b, :, : len(ids_b)]
            layer[b, :, : len(ids_a)] = of_a
        self.token_ids[a] = ids_b
        self.token_ids[b] = ids_a

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        ids = self.token_ids[source][:length]
        self.token_ids[target] = []
        for layer in (*self.k, *self.v):
            layer[target, :, :length] = layer[source, :, :length]
        self.token_ids[target] = ids

    def wipe(self) -> None:
        """Zero all positions that hold no token, to remove NaNs.

        Masked values are multiplied by 0, and 0 × NaN is NaN.
        """
        for layer in (*self.k, *self.v):
            for slot, ids in enumerate(self.token_ids):
                layer[slot, :, len(ids) :] = 0

    def apply(self, layer: int, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert one layer, as Module.to does. If its tensors change, empty all slots."""
        before = self.k[layer]
        self.k[layer] = function(before)
        self.v[layer] = function(self.v[layer])
        self.device = self.k[layer].device
        self.dtype = self.k[layer].dtype
        if self.k[layer] is not before:
            self.clear()


class KeyValues(NamedTuple):
    """The keys and values that some of a pass's tokens attend to."""

    tokens: slice  # which tokens, along the sequence dimension
    keys: Tensor  # (bsz, n_local_kv_heads, length, head_dim)
    values: Tensor
    mask: CausalMask | Tensor | None  # for ops.attention


class View:
    """The slots and positions of a pass's tokens; replaces the original's integer `start_pos`.

    The engine passes a View to every layer. `positions` has the shape of the pass's tokens and
    gives the position of each token in its slot. A replaced Attention.forward passes its new keys
    and values to `update`, which caches them and returns what the queries attend to. A View is not
    a number: arithmetic and comparisons raise a TypeError that says what to use instead.
    """

    positions: Tensor

    def update(self, cache: KVCache | None, layer: int, xk: Tensor, xv: Tensor) -> list[KeyValues]:
        """Cache one layer's keys and values, and return those that the tokens attend to.

        `xk` and `xv` are (*positions.shape, n_local_kv_heads, head_dim). Pass each returned
        KeyValues to ops.attention, with the queries of its `tokens`.
        """
        raise NotImplementedError

    def _is_no_number(self, *_: Any) -> NoReturn:
        raise TypeError(
            "start_pos is a view of the cache, not an integer: in the engine, each sequence "
            "has its own positions. Use start_pos.positions, and for keys and values "
            "start_pos.update(self.cache, self.layer_id, xk, xv)"
        )

    __index__ = __int__ = __float__ = __bool__ = _is_no_number
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _is_no_number
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _is_no_number
    __hash__ = object.__hash__


class Sequences(View):
    """The view for an integer start_pos: slots 0 to bsz - 1, positions `start_pos` on.

    The caller supplies the mask.
    """

    def __init__(self, start_pos: int, mask: Tensor | None):
        self.start = start_pos
        self.mask = mask

    def update(self, cache: KVCache | None, layer: int, xk: Tensor, xv: Tensor) -> list[KeyValues]:
        assert cache is not None
        start = self.start
        bsz, seqlen = xk.shape[:2]
        end = start + seqlen
        if start < 0 or end > cache.length or bsz > cache.n_slots:
            raise ValueError(
                f"{bsz} rows reach position {end}, and the cache has {cache.n_slots} slots of "
                f"{cache.length} positions: pass fewer"
            )
        for slot in range(bsz):
            cache.truncate(slot, start)  # later tokens are overwritten
        keys = cache.k[layer][:bsz, :, :end]
        values = cache.v[layer][:bsz, :, :end]
        # Detached: otherwise the cache would keep every earlier pass's autograd graph alive.
        keys[:, :, start:] = xk.detach().transpose(1, 2)
        values[:, :, start:] = xv.detach().transpose(1, 2)
        if torch.is_grad_enabled() and xk.requires_grad:  # gradients flow through the new tokens
            keys = torch.cat((keys[:, :, :start], xk.transpose(1, 2)), dim=2)
            values = torch.cat((values[:, :, :start], xv.transpose(1, 2)), dim=2)
        mask: CausalMask | Tensor | None = self.mask
        # A single token needs no mask, but kernels that take positions are faster.
        if mask is None and seqlen == 1:
            positions = torch.full((bsz, 1), start, device=xk.device)
            mask = CausalMask(positions, end, 1)
        return [KeyValues(slice(None), keys, values, mask)]


class Uncached(View):
    """The view for training: whole sequences from position 0 on, without a cache.

    Each token attends to its own row, up to its own position.
    """

    def __init__(self, tokens: Tensor):
        bsz, seqlen = tokens.shape
        self.positions = torch.arange(seqlen, device=tokens.device).expand(bsz, seqlen)

    def update(self, cache: KVCache | None, layer: int, xk: Tensor, xv: Tensor) -> list[KeyValues]:
        keys = xk.transpose(1, 2)
        values = xv.transpose(1, 2)
        mask = CausalMask(self.positions, self.positions.shape[1], 1)
        return [KeyValues(slice(None), keys, values, mask)]


class DecodeBatch(View):
    """The view for decoding: tokens (n, seqlen) of the first n slots, at `positions` (n, seqlen).

    Each token attends to its slot's positions up to its own, all below `length`. `n_rep` query
    heads share a key head.
    """

    def __init__(self, cache: KVCache, positions: Tensor, length: int, n_rep: int):
        self.positions = positions
        self.length = length
        self.mask = CausalMask(positions, length, n_rep)

    def update(self, cache: KVCache | None, layer: int, xk: Tensor, xv: Tensor) -> list[KeyValues]:
        assert cache is not None
        n = len(self.positions)
        keys = cache.k[layer][:n, :, : self.length]
        values = cache.v[layer][:n, :, : self.length]
        ops.write_cache(xk, self.positions, keys)
        ops.write_cache(xv, self.positions, values)
        return [KeyValues(slice(None), keys, values, self.mask)]


class Span(NamedTuple):
    """Consecutive tokens of a slot, the first one at position `start`."""

    slot: int
    start: int
    ids: list[int]


class PrefillBatch(View):
    """The view for prefill: spans of several slots, concatenated to (1, total) without padding.

    `wanted` are the indices of the tokens whose logits are needed. The model's output layer gets
    each as a row of one token, as in a decode pass. The pass stores the final norm's output for all
    tokens, (total, dim), in `states`.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span], n_rep: int, wanted: Sequence[int]):
        device = cache.device
        ends = [span.start + len(span.ids) for span in spans]
        own = [
            torch.arange(span.start, end, device=device)[None]
            for span, end in zip(spans, ends, strict=True)
        ]
        self.positions = torch.cat(own, dim=1)
        self.wanted = torch.tensor(wanted, dtype=torch.long, device=device)
        self.states: Tensor | None = None
        self.parts: list[tuple[Span, slice, CausalMask]] = []
        first = 0
        for span, end, positions in zip(spans, ends, own, strict=True):
            tokens = slice(first, first + len(span.ids))
            self.parts.append((span, tokens, CausalMask(positions, end, n_rep)))
            first = tokens.stop

    def update(self, cache: KVCache | None, layer: int, xk: Tensor, xv: Tensor) -> list[KeyValues]:
        assert cache is not None
        attended = []
        for span, tokens, mask in self.parts:
            keys = cache.k[layer][span.slot, None, :, : mask.length]
            values = cache.v[layer][span.slot, None, :, : mask.length]
            keys[0, :, span.start :] = xk[0, tokens].transpose(0, 1)
            values[0, :, span.start :] = xv[0, tokens].transpose(0, 1)
            attended.append(KeyValues(tokens, keys, values, mask))
        return attended
