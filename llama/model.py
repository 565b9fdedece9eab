"""The Llama 2 transformer (Touvron et al. 2023, arXiv:2307.09288).

Knows nothing about text, requests or checkpoint files. Without a cache a Transformer attends within its own input and
is differentiable; with one it continues sequences that were cached before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Attended, Batch, KVCache, Runs
from .ops import kernels
from .original import repeat_kv as repeat_kv  # old scripts look for them here
from .original import reshape_for_broadcast as reshape_for_broadcast
from .parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, model_ranks, multiply_together


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
        """Width of the feed-forward layer."""
        return feed_forward_dim(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)


def feed_forward_dim(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Two thirds of `hidden_dim`, as SwiGLU has three matrices in place of two; times the multiplier, rounded up."""
    hidden_dim = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return -(-hidden_dim // multiple_of) * multiple_of


class RMSNorm(nn.Module):
    """x / rms(x) × weight, computed in float32 (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if kernels.fit_norm(x, self.weight):
            return kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0, scaling_factor: float = 1.0) -> Tensor:
    """cis(position / scaling_factor × theta^(-2i / dim)) for i < dim / 2: (end, dim / 2) complex64, on the CPU.

    (Su et al. 2021, RoFormer, section 3.2.2; the linear scaling is of Chen et al. 2023, arXiv:2306.15595.)
    """
    freqs = theta ** -(torch.arange(0, dim, 2, device="cpu", dtype=torch.float32) / dim) / scaling_factor
    angles = torch.outer(torch.arange(end, device="cpu", dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate neighbouring pairs of each head's channels: queries and keys (bsz, seqlen, n_heads, head_dim), freqs_cis
    (seqlen, head_dim / 2), or with a batch dimension before it where rows are at positions of their own."""

    def rotate(x: Tensor) -> Tensor:
        if kernels.fit_rotary(x, freqs_cis):
            return kernels.rotate(x, freqs_cis)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis.unsqueeze(-2)).flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    joined = ("wq", "wk", "wv")  # multiply the same input, and may be held as one matrix

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * self.head_dim)
        self.wk = ColumnParallelLinear(args.dim, args.kv_heads * self.head_dim)
        self.wv = ColumnParallelLinear(args.dim, args.kv_heads * self.head_dim)
        self.wo = RowParallelLinear(args.n_heads * self.head_dim, args.dim)

    def forward(self, x: Tensor, freqs_cis: Tensor, layer_id: int, context: Batch | Runs | None) -> Tensor:
        xq, xk, xv = (y.unflatten(-1, (-1, self.head_dim)) for y in multiply_together(x, self.wq, self.wk, self.wv))
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        if context is None:
            parts = [Attended(slice(None), xk.transpose(1, 2), xv.transpose(1, 2), None)]
        else:
            parts = context.update(layer_id, xk, xv)
        attended = [attend(xq[:, part.tokens], part) for part in parts]
        return self.wo(attended[0] if len(attended) == 1 else torch.cat(attended, dim=1))


def attend(xq: Tensor, to: Attended) -> Tensor:
    """softmax(q kᵀ / √head_dim) v of each head over what its token sees: (bsz, seqlen, n_local_heads × head_dim), for
    queries (bsz, seqlen, n_local_heads, head_dim)."""
    queries, seen = xq.shape[1] * xq.shape[2] // to.keys.shape[1], to.seen
    if seen is not None and kernels.attends(queries, xq.shape[3]) and kernels.fit(xq, to.keys):
        return kernels.attend(xq, to.keys, to.values, seen.positions).flatten(2)
    xq = xq.transpose(1, 2)
    if seen is None or (mask := seen.mask(xq.dtype)) is None:
        y = F.scaled_dot_product_attention(xq, to.keys, to.values, is_causal=True, enable_gqa=True)
    else:
        # The query heads that share a key head become more rows of it, so that no key is repeated.
        groups = xq.reshape(xq.shape[0], to.keys.shape[1], -1, xq.shape[-1])
        y = F.scaled_dot_product_attention(groups, to.keys, to.values, attn_mask=mask).reshape(xq.shape)
    return y.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) × w3 x)."""

    joined = ("w1", "w3")

    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None):
        """`hidden_dim` is the width of a layer of two matrices, 4 × dim; see feed_forward_dim."""
        super().__init__()
        hidden_dim = feed_forward_dim(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, hidden_dim)
        self.w2 = RowParallelLinear(hidden_dim, dim)
        self.w3 = ColumnParallelLinear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = multiply_together(x, self.w1, self.w3)
        return self.w2(kernels.silu_multiply(gate, up) if kernels.fit(gate, up) else F.silu(gate) * up)


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, context: Batch | Runs | None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, self.layer_id, context)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Token ids -> logits. `cache` is None until one is attached or needed; it is not part of `state_dict`."""

    def __init__(self, params: ModelArgs):
        super().__init__()
        if params.vocab_size < 1:
            raise ValueError(f"vocab_size is {params.vocab_size}: set it to the tokenizer's n_words")
        self.params = params
        self.vocab_size, self.n_layers = params.vocab_size, params.n_layers
        self.ranks = model_ranks()
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(layer_id, params) for layer_id in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        self.cache: KVCache | None = None
        self.moves = 0  # how often the weights were moved or converted
        # Computed at first use, after the memory was checked; not a buffer, whose angles .bfloat16() would round.
        self.freqs_cis: Tensor | None = None

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.params.n_heads // self.params.kv_heads

    @torch.inference_mode(False)  # a tensor made in inference mode could not be written to outside of it
    def allocate_cache(self) -> KVCache:
        """Attach this rank's cache, empty, for `max_batch_size` rows of `max_seq_len` positions."""
        args, like = self.params, self.tok_embeddings.weight
        heads = self.ranks.split(args.kv_heads)
        shape = (args.n_layers, args.max_batch_size, heads, args.max_seq_len, args.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 × NaN would be NaN.
        k, v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.cache = KVCache(k, v)
        return self.cache

    def forward(self, tokens: Tensor, start_pos: int = 0) -> Tensor:
        """Logits of every position, (bsz, seqlen, vocab_size) float32, for tokens (bsz, seqlen) at `start_pos` onward.

        With a cache, tokens are cached in its first bsz rows and also attend to the `start_pos` positions cached there
        before. One is attached at the first call without gradients; where they are computed for the model's parameters,
        tokens attend to each other alone. Raises ValueError for more rows or positions than fit.
        """
        if tokens.dim() != 2 or tokens.numel() == 0 or start_pos < 0:
            raise ValueError(f"tokens are {tuple(tokens.shape)} at {start_pos}: pass (bsz, seqlen) at 0 or more")
        (bsz, seqlen), end, args = tokens.shape, start_pos + tokens.shape[1], self.params
        if end > args.max_seq_len:
            raise ValueError(f"tokens reach position {end}, and max_seq_len is {args.max_seq_len}: pass fewer")
        uncached = torch.is_grad_enabled() and (self.cache is None or any(p.requires_grad for p in self.parameters()))
        if uncached and start_pos:
            raise ValueError(
                f"start_pos is {start_pos}, and no cache is attached where gradients are: call under inference_mode"
            )
        fits = bsz <= args.max_batch_size
        if uncached or (self.cache is None and not start_pos and not fits):
            return self.logits(self.hidden_states(tokens))
        if not fits:
            raise ValueError(f"tokens have {bsz} rows, and max_batch_size is {args.max_batch_size}: pass fewer")
        cache = self.cache or self.allocate_cache()
        positions = torch.arange(start_pos, end, device=tokens.device).expand(bsz, seqlen)
        before = [ids[:start_pos] for ids in cache.held[:bsz]]
        cache.held[:bsz] = [[] for _ in range(bsz)]
        h = self.hidden_states(tokens, Batch(cache, positions, end, self.groups))
        for row, ids in enumerate(tokens.tolist()):
            if len(before[row]) == start_pos:  # else nobody knows what stands before them
                cache.held[row] = before[row] + ids
        return self.logits(h)

    def hidden_states(self, tokens: Tensor, context: Batch | Runs | None = None) -> Tensor:
        """The final norm's output, (bsz, seqlen, dim), for tokens (bsz, seqlen).

        `context` says where they stand in the cache and what they attend to; without it each row stands at 0 and may be
        right-padded, for no token attends to what follows it.
        """
        h = self.tok_embeddings(tokens)
        angles = self.angles(h.device)
        freqs_cis = angles[: tokens.shape[1]] if context is None else angles[context.positions]
        for layer in self.layers:
            h = layer(h, freqs_cis, context)
        return self.norm(h)

    def angles(self, device: torch.device) -> Tensor:
        """precompute_freqs_cis of every position, kept on the device that was last asked for."""
        if self.freqs_cis is None or self.freqs_cis.device != device:
            with torch.inference_mode(False):  # passes with gradients use it too
                args = self.params
                self.freqs_cis = precompute_freqs_cis(
                    args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling_factor
                ).to(device)
        return self.freqs_cis

    def logits(self, h: Tensor) -> Tensor:
        """(..., vocab_size) float32, for hidden states (..., dim)."""
        return self.output(h).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cache is not None:  # .half() and .to(...) take the cache along
            self.cache.k, self.cache.v = fn(self.cache.k), fn(self.cache.v)
            self.cache.clear()
        self.moves += 1
        return self

    def version(self) -> int:
        """Another number once a part of the model is another object, or a parameter was written to or moved: what was
        cached and recorded is of the former."""
        parts = (id(value) for module in self.modules() for value in (module, *vars(module).values()))
        own = ((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())
        return hash((self.moves, *parts, *own))
