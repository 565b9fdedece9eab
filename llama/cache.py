"""Keys and values of tokens that were run before, and the views of them that a pass attends to.

A pass is told where its tokens stand by what the original calls `start_pos`: an integer, as there,
or a View that the engine makes. Both have one method that attention calls: `update`.
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
    """Keys and values of every layer, each (n_slots, n_local_kv_heads, length, head_dim).

    Slot i holds those of `token_ids[i]`, at positions 0 onward, and nothing that counts beyond
    them. This is the one record of what was computed: whoever writes to a slot shortens its ids
    before, and lengthens them once the keys and values are written.
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
        """Take memory of a type on a device, and hold nothing."""
        like = torch.empty(0, dtype=dtype, device=device)
        self.dtype = like.dtype
        self.device = like.device
        self.k.clear()
        self.v.clear()
        self.clear()
        self.grow(n_layers)

    @torch.inference_mode(False)  # a tensor made in inference mode could not be written to outside
    def grow(self, n_layers: int) -> None:
        """Have at least so many layers."""
        while len(self.k) < n_layers:
            # Zeros, not empty: masked positions are multiplied by 0, and 0 × NaN would be NaN.
            self.k.append(torch.zeros(self.shape, dtype=self.dtype, device=self.device))
            self.v.append(torch.zeros(self.shape, dtype=self.dtype, device=self.device))

    def prefix_length(self, slot: int, ids: list[int]) -> int:
        """How many of `ids`, from the first on, a slot holds."""
        cached = self.token_ids[slot]
        if ids[: len(cached)] == cached:
            return len(cached)
        # By halves, so that lists are compared in C.
        lengths = range(min(len(cached), len(ids)) + 1)
        return bisect_left(lengths, True, key=lambda n: cached[:n] != ids[:n]) - 1

    def clear(self) -> None:
        """Forget everything."""
        self.token_ids: list[list[int]] = [[] for _ in range(self.n_slots)]

    def truncate(self, slot: int, length: int) -> None:
        """Keep no more than the first `length` tokens of a slot."""
        del self.token_ids[slot][length:]

    def swap(self, a: int, b: int) -> None:
        """Let two slots change places.

        Until it is done they hold nothing: an interrupt costs no more than time.
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
        """Let `target` hold the first `length` tokens of `source`."""
        ids = self.token_ids[source][:length]
        self.token_ids[target] = []
        for layer in (*self.k, *self.v):
            layer[target, :, :length] = layer[source, :, :length]
        self.token_ids[target] = ids

    def wipe(self) -> None:
        """Put zeros wherever no token is held: even a masked position is multiplied, and a NaN
        would spread.
        """
        for layer in (*self.k, *self.v):
            for slot, ids in enumerate(self.token_ids):
                layer[slot, :, len(ids) :] = 0

    def apply(self, layer: int, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert one layer's part, as Module.to does with parameters."""
        before = self.k[layer]
        self.k[layer] = function(before)
        self.v[layer] = function(self.v[layer])
        self.device = self.k[layer].device
        self.dtype = self.k[layer].dtype
        if self.k[layer] is not before:
            self.clear()


class KeyValues(NamedTuple):
    """What some of a pass' tokens attend to."""

    tokens: slice  # which of them, along the sequence
    keys: Tensor  # (bsz, n_local_kv_heads, length, head_dim)
    values: Tensor
    mask: CausalMask | Tensor | None  # as ops.attention takes it


class View:
    """Where the tokens of a pass stand, in place of the original's integer `start_pos`.

    `positions`, of the shape of the pass' tokens, are those of their slots. A replaced
    Attention.forward hands its keys and values to `update`, which caches them and returns what the
    queries attend to. It is no number: arithmetic and comparisons raise a TypeError.
    """

    positions: Tensor

    def update(self, cache: KVCache | None, layer: int, xk: Tensor, xv: Tensor) -> list[KeyValues]:
        """Cache a layer's keys and values, (*positions.shape, n_local_kv_heads, head_dim)."""
        raise NotImplementedError

    def _is_no_number(self, *_: Any) -> NoReturn:
        raise TypeError(
            "start_pos is a view of the cache, not an integer: the engine runs sequences at "
            "positions of their own. Use start_pos.positions, and for keys and values "
            "start_pos.update(self.cache, self.layer_id, xk, xv)"
        )

    __index__ = __int__ = __float__ = __bool__ = _is_no_number
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _is_no_number
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _is_no_number
    __hash__ = object.__hash__


class Sequences(View):
    """The view of an integer start_pos: slots 0 to bsz - 1, each from `start_pos` on.

    The mask is the caller's.
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
                f"{bsz} rows reach position {end}, and the cache has {cache.n_slots} rows of "
                f"{cache.length} positions: pass fewer"
            )
        for slot in range(bsz):
            cache.truncate(slot, start)  # what else the slots held is overwritten
        keys = cache.k[layer][:bsz, :, :end]
        values = cache.v[layer][:bsz, :, :end]
        # Without gradients, which would hold on to every pass that ever wrote to the cache.
        keys[:, :, start:] = xk.detach().transpose(1, 2)
        values[:, :, start:] = xv.detach().transpose(1, 2)
        if torch.is_grad_enabled() and xk.requires_grad:  # but to these tokens they go
            keys = torch.cat((keys[:, :, :start], xk.transpose(1, 2)), dim=2)
            values = torch.cat((values[:, :, :start], xv.transpose(1, 2)), dim=2)
        mask: CausalMask | Tensor | None = self.mask
        if (
            mask is None and seqlen == 1
        ):  # sees all there is; kernels that go by positions are sooner
            positions = torch.full((bsz, 1), start, device=xk.device)
            mask = CausalMask(positions, end, 1)
        return [KeyValues(slice(None), keys, values, mask)]


class Uncached(View):
    """A pass over whole sequences from position 0 on, without a cache.

    Tokens attend to each other alone.
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
    """A pass over tokens (n, seqlen) of the first n slots, at positions (n, seqlen) of their own.

    Each attends to its slot's first `length` positions up to its own. `n_rep` query heads share a
    key head.
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
    """Tokens that follow each other in a slot, the first of them at position `start`."""

    slot: int
    start: int
    ids: list[int]


class PrefillBatch(View):
    """A pass over spans of several slots, one after another as tokens (1, total), without padding.

    `wanted` are the places in that row whose logits are wanted; each is multiplied by `output` as
    if it were a row's next token. The pass leaves the final norm's output of all its tokens,
    (total, dim), in `states`.
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
