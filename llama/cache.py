"""Keys and values of tokens that were run before, the ids whose they are, and what a pass attends to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import kernels


class KVCache:
    """Keys and values, each (n_layers, rows, n_local_kv_heads, length, head_dim).

    Row i holds those of the ids held[i], at their positions from 0 on, and nothing that counts beyond them. This is the
    one truth about what was computed: whoever writes to a row says so here, and only once it is written.
    """

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v
        self.held: list[list[int]] = [[] for _ in range(self.rows)]

    @property
    def rows(self) -> int:
        return self.k.shape[1]

    @property
    def length(self) -> int:
        return self.k.shape[3]

    def known(self, row: int, ids: list[int]) -> int:
        """How many of `ids`, from the first on, the row holds."""
        held = self.held[row]
        if ids[: len(held)] == held:
            return len(held)
        # By halves, so that lists are compared in C.
        lengths = range(min(len(held), len(ids)) + 1)
        return bisect_left(lengths, True, key=lambda n: held[:n] != ids[:n]) - 1

    def clear(self) -> None:
        self.held = [[] for _ in range(self.rows)]

    def forget(self, row: int, length: int) -> None:
        """Keep no more than the first `length` ids of a row."""
        del self.held[row][length:]

    def swap(self, a: int, b: int) -> None:
        """Let two rows change places. Until it is done they hold nothing: an interrupt costs no more than time."""
        if a == b:
            return
        ids_a, ids_b = self.held[a], self.held[b]
        self.held[a], self.held[b] = [], []
        for layer in (*self.k, *self.v):
            of_a, of_b = layer[a, :, : len(ids_a)].clone(), layer[b, :, : len(ids_b)]
            layer[a, :, : len(ids_b)] = of_b
            layer[b, :, : len(ids_a)] = of_a
        self.held[a], self.held[b] = ids_b, ids_a

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the first `length` ids of `source`."""
        ids, self.held[target] = self.held[source][:length], []
        for cached in (self.k, self.v):
            cached[:, target, :, :length] = cached[:, source, :, :length]
        self.held[target] = ids

    def wipe(self) -> None:
        """Put zeros wherever nothing is held: of a NaN that was left there, even a masked position is multiplied."""
        for cached in (self.k, self.v):
            for row, ids in enumerate(self.held):
                cached[:, row, :, len(ids) :] = 0


class Seen:
    """What tokens at positions (n, seqlen) attend to: of their row's first `length` positions, those up to their own.

    `groups` query heads share a key head.
    """

    def __init__(self, positions: Tensor, length: int, groups: int):
        self.positions, self.length, self.groups = positions, length, groups
        self.from_start = positions.shape[1] == length  # rows begin with these tokens
        self._mask: Tensor | None = None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """To be added to scores, (n, 1, groups × seqlen, length); None where a causal one does. Made when first asked
        for: kernels that go by positions need none."""
        if self._mask is None and not self.from_start:
            unseen = torch.arange(self.length, device=self.positions.device) > self.positions[:, None, :, None]
            self._mask = unseen.to(dtype).masked_fill_(unseen, -torch.inf).repeat(1, 1, self.groups, 1)
        return self._mask


class Attended(NamedTuple):
    """What some of a pass' tokens attend to."""

    tokens: slice  # which of them, along the sequence
    keys: Tensor  # (bsz, n_local_kv_heads, length, head_dim)
    values: Tensor
    seen: Seen | None  # None: each of these tokens sees itself and those before it


class Batch:
    """A pass over tokens (n, seqlen) of the first n rows, at positions (n, seqlen) of their own.

    Each attends to what its row has up to it, of the row's first `length` positions. `groups` query heads share a key.
    """

    def __init__(self, cache: KVCache, positions: Tensor, length: int, groups: int):
        n = len(positions)
        self.positions, self.seen = positions, Seen(positions, length, groups)
        self.rows = torch.arange(n, device=positions.device)[:, None]
        self.k, self.v = (t[:, :n, :, :length] for t in (cache.k, cache.v))

    def update(self, layer_id: int, xk: Tensor, xv: Tensor) -> list[Attended]:
        """Cache a layer's keys and values (n, seqlen, n_local_kv_heads, head_dim)."""
        keys, values = self.k[layer_id], self.v[layer_id]
        for x, cached in ((xk, keys), (xv, values)):
            if kernels.fit(x, cached):
                kernels.write_cache(x, self.positions, cached)
            else:
                cached[self.rows, :, self.positions] = x
        return [Attended(slice(None), keys, values, self.seen)]


class Run(NamedTuple):
    """Ids that follow each other in a row, the first of them at position `start`."""

    row: int
    start: int
    ids: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class Runs:
    """A pass over runs of several rows, put one after another as tokens (1, total), without padding."""

    def __init__(self, cache: KVCache, runs: Sequence[Run], groups: int):
        self.cache = cache
        positions = [torch.arange(run.start, run.end, device=cache.k.device)[None] for run in runs]
        self.positions = torch.cat(positions, dim=1)
        self.parts: list[tuple[Run, slice, Seen]] = []
        first = 0
        for run, own in zip(runs, positions, strict=True):
            tokens = slice(first, first + len(run.ids))
            self.parts.append((run, tokens, Seen(own, run.end, groups)))
            first = tokens.stop

    def update(self, layer_id: int, xk: Tensor, xv: Tensor) -> list[Attended]:
        """Cache a layer's keys and values (1, total, n_local_kv_heads, head_dim)."""
        attended = []
        for run, tokens, seen in self.parts:
            keys, values = (t[layer_id, run.row, None, :, : run.end] for t in (self.cache.k, self.cache.v))
            keys[0, :, run.start :] = xk[0, tokens].transpose(0, 1)
            values[0, :, run.start :] = xv[0, tokens].transpose(0, 1)
            attended.append(Attended(tokens, keys, values, seen))
        return attended
