"""The Llama 2 transformer (Touvron et al. 2023, arXiv:2307.09288) and its key/value cache.

Knows nothing about text, requests or checkpoint files. Without a cache a Transformer attends within its own input and
is differentiable; with one it continues sequences that were cached before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parallel import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    model_parallel_size,
    multiply_together,
    split,
)


@dataclass
class ModelArgs:
    """The shape of a model, as in a release's params.json, and of its cache."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: not known yet
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of it
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5

    max_batch_size: int = 32
    max_seq_len: int = 2048

    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0  # positions are divided by it

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: two thirds of 4 × dim, as SwiGLU has three matrices in place of two."""
        hidden_dim = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden_dim = int(self.ffn_dim_multiplier * hidden_dim)
        return -(-hidden_dim // self.multiple_of) * self.multiple_of


@dataclass
class KVCache:
    """Keys and values of the positions seen so far, each (n_layers, rows, n_local_kv_heads, length, head_dim)."""

    k: Tensor
    v: Tensor
    tokens: list[int] = field(default_factory=list)  # ids that the first row is known to hold from its start on

    @classmethod
    def allocate(cls, args: ModelArgs, dtype: torch.dtype, device: torch.device) -> KVCache:
        """This rank's cache for `max_batch_size` rows of `max_seq_len` positions."""
        n_local_kv_heads = split(args.kv_heads, model_parallel_size())
        shape = (args.n_layers, args.max_batch_size, n_local_kv_heads, args.max_seq_len, args.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 × NaN would be NaN.
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def window(self, rows: slice, length: int) -> KVCache:
        """A view of some rows' first `length` positions: what one pass reads and writes."""
        return KVCache(self.k[:, rows, :, :length], self.v[:, rows, :, :length])

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return self.k[layer_id], self.v[layer_id]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def move_row(self, source: int, target: int, length: int) -> None:
        for cached in (self.k, self.v):
            cached[:, target, :, :length] = cached[:, source, :, :length]

    def clear(self) -> None:
        self.tokens = []
        self.k.zero_()
        self.v.zero_()


class Span(NamedTuple):
    """Where the tokens of a pass stand; the same for every layer."""

    rows: Tensor  # (bsz, 1), of the cache
    positions: Tensor  # (bsz or 1, seqlen)
    freqs_cis: Tensor  # (bsz or 1, seqlen, 1, head_dim / 2)
    mask: Tensor | None  # added to scores, (bsz, 1, n_heads / n_kv_heads × seqlen, length); None: causal in the input


class RMSNorm(nn.Module):
    """x / rms(x) × weight, computed in float32 (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0, scaling_factor: float = 1.0) -> Tensor:
    """cis(position / scaling_factor × theta^(-2i / dim)) for i < dim / 2: (end, dim / 2) complex64, on the CPU.

    (Su et al. 2021, RoFormer, section 3.2.2; the linear scaling is of Chen et al. 2023, arXiv:2306.15595.)
    """
    freqs = theta ** -(torch.arange(0, dim, 2, device="cpu", dtype=torch.float32) / dim) / scaling_factor
    angles = torch.outer(torch.arange(end, device="cpu", dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring pairs of each head's channels: x (bsz, seqlen, n_heads, head_dim), freqs_cis
    (bsz or 1, seqlen, 1, head_dim / 2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * self.head_dim)
        self.wk = ColumnParallelLinear(args.dim, args.kv_heads * self.head_dim)
        self.wv = ColumnParallelLinear(args.dim, args.kv_heads * self.head_dim)
        self.wo = RowParallelLinear(args.n_heads * self.head_dim, args.dim)

    def forward(self, x: Tensor, span: Span, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = (y.view(bsz, seqlen, -1, self.head_dim) for y in multiply_together(x, self.wq, self.wk, self.wv))
        xq, xk = apply_rotary_emb(xq, span.freqs_cis), apply_rotary_emb(xk, span.freqs_cis)
        if cache is not None:
            keys, values = cache  # (bsz, n_local_kv_heads, length, head_dim)
            keys[span.rows, :, span.positions] = xk
            values[span.rows, :, span.positions] = xv
        xq, xk, xv = (t.transpose(1, 2) for t in (xq, xk, xv))  # (bsz, n_local_heads, seqlen, head_dim)
        if span.mask is None:
            y = F.scaled_dot_product_attention(xq, xk, xv, is_causal=True, enable_gqa=True)
        else:
            # The query heads that share a key head become more rows of it, so that no key is repeated.
            groups = xq.reshape(bsz, keys.shape[1], -1, self.head_dim)
            y = F.scaled_dot_product_attention(groups, keys, values, attn_mask=span.mask).view_as(xq)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) × w3 x)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = multiply_together(x, self.w1, self.w3)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, span: Span, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), span, cache)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Token ids -> logits. `cache` is None until one is attached; it is not part of `state_dict`."""

    def __init__(self, params: ModelArgs):
        super().__init__()
        if params.vocab_size < 1:
            raise ValueError(f"vocab_size is {params.vocab_size}: set it to the tokenizer's n_words")
        self.params = params
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        self.cache: KVCache | None = None
        # Computed at first use, after the memory was checked; not a buffer, whose angles .bfloat16() would round.
        self.freqs_cis: Tensor | None = None

    def forward(self, tokens: Tensor, start_pos: int = 0) -> Tensor:
        """Logits of every position, (bsz, seqlen, vocab_size) float32, for tokens (bsz, seqlen) at `start_pos` onward.

        With a cache attached, tokens are cached in its first bsz rows and also attend to the `start_pos` positions
        cached there before. Raises ValueError for more rows or positions than fit.
        """
        if tokens.dim() != 2 or tokens.numel() == 0 or start_pos < 0:
            raise ValueError(f"tokens are {tuple(tokens.shape)} at {start_pos}: pass (bsz, seqlen) at 0 or more")
        bsz, seqlen = tokens.shape
        limit = self.params.max_seq_len
        if start_pos + seqlen > limit:
            raise ValueError(f"tokens reach position {start_pos + seqlen}, and max_seq_len is {limit}")
        if self.cache is None:
            if start_pos:
                raise ValueError(f"start_pos is {start_pos}, and no cache is attached: pass the whole sequence at 0")
            return self.logits(self.hidden_states(tokens))
        if bsz > self.params.max_batch_size:
            raise ValueError(f"tokens have {bsz} rows, and max_batch_size is {self.params.max_batch_size}")
        self.cache.tokens = []
        cache = self.cache.window(slice(bsz), start_pos + seqlen)
        start = None if start_pos == 0 else torch.full((bsz,), start_pos, device=tokens.device)
        return self.logits(self.hidden_states(tokens, cache, start))

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, start_pos: Tensor | None = None) -> Tensor:
        """The final norm's output, (bsz, seqlen, dim), for tokens (bsz, seqlen).

        The cache's rows are the batch's. Row i's first token stands at start_pos[i] and attends to the cached positions
        before it; without `start_pos` all rows begin at 0, and rows may be right-padded: no token attends to what
        follows it.
        """
        h = self.tok_embeddings(tokens)
        if self.freqs_cis is None or self.freqs_cis.device != h.device:
            args = self.params
            freqs_cis = precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling_factor)
            self.freqs_cis = freqs_cis.to(h.device)
        rows = torch.arange(tokens.shape[0], device=h.device)[:, None]
        positions = torch.arange(tokens.shape[1], device=h.device)[None]
        mask = None
        if start_pos is not None:
            assert cache is not None
            positions = start_pos[:, None] + positions
            unseen = torch.arange(cache.k.shape[3], device=h.device) > positions[:, None, :, None]
            mask = torch.zeros(unseen.shape, dtype=h.dtype, device=h.device).masked_fill(unseen, -torch.inf)
            mask = mask.repeat(1, 1, self.params.n_heads // self.params.kv_heads, 1)
        span = Span(rows, positions, self.freqs_cis[positions].unsqueeze(2), mask)
        for layer_id, layer in enumerate(self.layers):
            h = layer(h, span, None if cache is None else cache.layer(layer_id))
        return self.norm(h)

    def logits(self, h: Tensor) -> Tensor:
        """(..., vocab_size) float32, for hidden states (..., dim)."""
        return self.output(h).float()
