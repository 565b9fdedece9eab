"""The Llama 2 transformer (Touvron et al. 2023, arXiv:2307.09288).

This module does not depend on text, requests or checkpoint files. The engine and scripts that pass
the original's arguments run the same code, `Transformer.forward`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .cache import KVCache, PrefillBatch, Sequences, Uncached, View
from .distributed import model_ranks
from .ops import apply_rotary_emb as apply_rotary_emb
from .original import repeat_kv as repeat_kv  # scripts for the original import these from here
from .original import reshape_for_broadcast as reshape_for_broadcast
from .parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, fused_linear


@dataclass
class ModelArgs:
    """A model's hyperparameters, as in a release's params.json, and the size of its KV cache."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: the same as n_heads
    vocab_size: int = -1  # -1: not set yet
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5

    max_batch_size: int = 32
    max_seq_len: int = 2048

    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0  # positions are divided by this

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
    """Width of a SwiGLU layer that replaces a two-matrix layer of width `hidden_dim`.

    SwiGLU has three matrices, so the width is 2/3 of `hidden_dim`, times `ffn_dim_multiplier`,
    rounded up to a multiple of `multiple_of`.
    """
    hidden_dim = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return -(-hidden_dim // multiple_of) * multiple_of


@ops.transparent
class RMSNorm(nn.Module):
    """x / rms(x) × weight (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def precompute_freqs_cis(
    dim: int, end: int, theta: float = 10000.0, scaling_factor: float = 1.0
) -> Tensor:
    """cis(position / scaling_factor × theta^(-2i / dim)) for position < end and i < dim / 2.

    Returns (end, dim / 2) complex64, on the CPU. See Su et al. 2021, RoFormer, section 3.2.2, and
    for the linear scaling Chen et al. 2023, arXiv:2306.15595.
    """
    exponents = torch.arange(0, dim, 2, device="cpu", dtype=torch.float32) / dim
    freqs = theta**-exponents / scaling_factor
    angles = torch.outer(torch.arange(end, device="cpu", dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


@ops.transparent
class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023).

    A Transformer sets `cache`, its KVCache, and `layer_id`, the index of this layer in it. A layer
    without a cache allocates its own on the first call with an integer `start_pos`.
    """

    fused = ("wq", "wk", "wv")  # these have the same input and may share one packed weight

    def __init__(self, args: ModelArgs):
        super().__init__()
        ranks = model_ranks()
        self.args = args
        self.n_kv_heads = args.kv_heads
        self.n_local_heads = ranks.split(args.n_heads)
        self.n_local_kv_heads = ranks.split(args.kv_heads)
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = args.head_dim
        q_dim = args.n_heads * self.head_dim
        kv_dim = args.kv_heads * self.head_dim
        self.wq = ColumnParallelLinear(args.dim, q_dim, bias=False, gather_output=False)
        self.wk = ColumnParallelLinear(args.dim, kv_dim, bias=False, gather_output=False)
        self.wv = ColumnParallelLinear(args.dim, kv_dim, bias=False, gather_output=False)
        self.wo = RowParallelLinear(q_dim, args.dim, bias=False, input_is_parallel=True)
        self.cache: KVCache | None = None
        self.layer_id = 0  # index of this layer in the cache

    def forward(
        self, x: Tensor, start_pos: int | View, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return (bsz, seqlen, dim) for `x` of the same shape.

        With an integer `start_pos`, `mask`, (seqlen, start_pos + seqlen), is added to the scores. A
        View supplies its own mask.
        """
        bsz, seqlen, _ = x.shape
        xq, xk, xv = fused_linear(x, self.wq, self.wk, self.wv)
        xq = xq.view(bsz, seqlen, self.n_local_heads, self.head_dim)
        xk = xk.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xv = xv.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)

        if not isinstance(start_pos, View):
            self.cache = self.cache or self.own_cache(x.dtype, x.device)
            start_pos = Sequences(operator.index(start_pos), mask)
        parts = start_pos.update(self.cache, self.layer_id, xk, xv)
        attended = [
            ops.attention(xq[:, part.tokens], part.keys, part.values, part.mask) for part in parts
        ]
        return self.wo(attended[0] if len(attended) == 1 else torch.cat(attended, dim=1))

    def own_cache(self, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache for this layer only."""
        args = self.args
        heads = self.n_local_kv_heads
        return KVCache(
            1, args.max_batch_size, heads, args.max_seq_len, self.head_dim, dtype, device
        )

    @property
    def cache_k(self) -> Tensor:
        """This layer's keys, (max_batch_size, max_seq_len, n_local_kv_heads, head_dim).

        This is a view of the cache. Assigning a tensor copies it into the cache.
        """
        return self._cached().k[self.layer_id].transpose(1, 2)

    @cache_k.setter
    def cache_k(self, value: Tensor) -> None:
        overwrite(self._cached(), self.cache_k, value)

    @property
    def cache_v(self) -> Tensor:
        """This layer's values, with the same shape as `cache_k`."""
        return self._cached().v[self.layer_id].transpose(1, 2)

    @cache_v.setter
    def cache_v(self, value: Tensor) -> None:
        overwrite(self._cached(), self.cache_v, value)

    def _cached(self) -> KVCache:
        if self.cache is None:
            like = next(self.parameters())
            self.cache = self.own_cache(like.dtype, like.device)
        return self.cache

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cache: a copied model attaches its own, a lone layer allocates one."""
        return {**self.__dict__, "cache": None, "layer_id": 0}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cache is not None:  # .half() and .to(...) apply to the cache too
            self.cache.apply(self.layer_id, fn)
        return self


def overwrite(cache: KVCache, held: Tensor, value: Tensor) -> None:
    """Copy `value` into `held`, a part of the cache, and empty all slots: their ids are stale."""
    if value.data_ptr() != held.data_ptr():
        held.copy_(value)
        cache.clear()


@ops.transparent
class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) × w3 x)."""

    fused = ("w1", "w3")

    def __init__(
        self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None
    ):
        """`hidden_dim` is the width of a two-matrix layer, 4 × dim; see feed_forward_dim."""
        super().__init__()
        hidden_dim = feed_forward_dim(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, hidden_dim, bias=False, gather_output=False)
        self.w2 = RowParallelLinear(hidden_dim, dim, bias=False, input_is_parallel=True)
        self.w3 = ColumnParallelLinear(dim, hidden_dim, bias=False, gather_output=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused_linear(x, self.w1, self.w3)
        return self.w2(ops.swiglu(gate, up))


@ops.transparent
class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.n_heads = args.n_heads
        self.dim = args.dim
        self.head_dim = args.head_dim
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(
            args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier
        )
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: Tensor, start_pos: int | View, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


@ops.transparent
class Transformer(nn.Module):
    """The Llama 2 model: `model(tokens, start_pos)` returns logits.

    Like the original, it runs in inference mode and keeps a KV cache. The cache is allocated on the
    first call and is not part of `state_dict`. `train()` selects a differentiable pass over whole
    sequences, without a cache; `eval()` switches back. Raises ValueError if `params.vocab_size` is
    not set.
    """

    def __init__(self, params: ModelArgs):
        super().__init__()
        if params.vocab_size < 1:
            raise ValueError(
                f"vocab_size is {params.vocab_size}: set it to the tokenizer's n_words"
            )
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.ranks = model_ranks()
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, bias=False)
        self.cache: KVCache | None = None
        self.moves = 0  # how often the weights were moved or converted
        self.n_rep = params.n_heads // params.kv_heads  # query heads per key head
        # Not a buffer, because .bfloat16() would round the angles. If the model is on the meta
        # device, allocate_cache computes them after the memory check.
        self.freqs_cis = torch.empty(0, dtype=torch.complex64, device="cpu")
        self.rotary = (params.rope_theta, params.rope_scaling_factor)  # the inputs to freqs_cis
        if not self.tok_embeddings.weight.is_meta:
            self.freqs_cis = self.angles()
        self.eval()

    def forward(self, tokens: Tensor, start_pos: int | View = 0) -> Tensor:
        """Return logits, (bsz, seqlen, vocab_size) float32, for tokens (bsz, seqlen).

        With an integer `start_pos`, row i is cached in slot i from that position on. It also
        attends to the `start_pos` tokens cached there before. The engine passes a View instead,
        which determines the position of each token, what it attends to and which logits are
        computed. In training mode, `start_pos` must be 0. Raises ValueError if the tokens exceed
        `max_batch_size` rows or `max_seq_len` positions.
        """
        rotary = (self.params.rope_theta, self.params.rope_scaling_factor)
        if self.rotary != rotary or not len(self.freqs_cis):
            self.freqs_cis = self.angles().to(self.freqs_cis.device)
        if self.training:
            return self._train(tokens, start_pos)
        if torch.compiler.is_compiling() and isinstance(start_pos, View):
            # The caller has already entered inference mode.
            return self._run(tokens, start_pos, self.freqs_cis[start_pos.positions], None)
        with torch.inference_mode():
            fused = ops.path.fused
            ops.path.fused = not ops.must_run_plain(self)
            try:
                if not isinstance(start_pos, View):
                    return self._run_slots(tokens, start_pos)
                return self._run(tokens, start_pos, self.freqs_cis[start_pos.positions], None)
            finally:
                ops.path.fused = fused

    def _run_slots(self, tokens: Tensor, start_pos: int) -> Tensor:
        """Run a pass with an integer `start_pos`: slots 0 to bsz - 1, from that position on."""
        start = self._check(tokens, start_pos)
        cache = self.cache or self.allocate_cache()
        end = start + tokens.shape[1]
        mask = causal_mask(tokens.shape[1], start, cache.k[0])
        return self._run(tokens, start, self.freqs_cis[start:end], mask)

    def _run(
        self, tokens: Tensor, start_pos: int | View, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Run a pass: embedding, all layers, norm, output."""
        h = self.tok_embeddings(tokens)
        if self.cache is not None:
            h = h.to(self.cache.dtype)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        h = self.norm(h)
        if isinstance(start_pos, PrefillBatch):  # compute only the logits that are needed
            start_pos.states = h[0]
            h = h[0, start_pos.wanted][:, None]
        logits: Tensor = self.output(h).float()
        return logits

    def _train(self, tokens: Tensor, start_pos: int | View) -> Tensor:
        """Run a differentiable pass over whole sequences, without a cache."""
        if isinstance(start_pos, View):
            raise ValueError(
                "the model is in training mode, which keeps no cache: call eval() first"
            )
        if start_pos != 0:
            raise ValueError(
                f"start_pos is {start_pos!r} in training mode, which keeps no cache: "
                "call eval() first"
            )
        if tokens.dim() != 2 or tokens.numel() == 0 or tokens.shape[1] > self.params.max_seq_len:
            limit = f"(bsz, seqlen) with seqlen at most max_seq_len, {self.params.max_seq_len}"
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}: pass {limit}")
        freqs_cis = self.freqs_cis[: tokens.shape[1]]
        return self._run(tokens, Uncached(tokens), freqs_cis.to(tokens.device), None)

    def _check(self, tokens: Tensor, start_pos: int) -> int:
        """Return `start_pos` as an int. Raises ValueError if the tokens do not fit the cache."""
        start = operator.index(start_pos)
        args = self.params
        if tokens.dim() != 2 or tokens.numel() == 0 or start < 0:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)} and begin at position {start}: "
                "pass (bsz, seqlen), not empty, at position 0 or later"
            )
        bsz, seqlen = tokens.shape
        if start + seqlen > args.max_seq_len:
            reach = f"tokens reach position {start + seqlen}"
            raise ValueError(f"{reach}, and max_seq_len is {args.max_seq_len}: pass fewer")
        if bsz > args.max_batch_size:
            raise ValueError(
                f"tokens have {bsz} rows, and max_batch_size is {args.max_batch_size}: pass fewer"
            )
        return start

    def angles(self) -> Tensor:
        """Compute freqs_cis for all positions."""
        args = self.params
        self.rotary = (args.rope_theta, args.rope_scaling_factor)
        with torch.inference_mode(False):  # training uses the result too
            return precompute_freqs_cis(args.head_dim, args.max_seq_len, *self.rotary)

    def allocate_cache(self) -> KVCache:
        """Allocate and attach this rank's cache: `max_batch_size` slots of `max_seq_len` tokens.

        Activations and cache use the dtype of the norms' weights, whatever the other weights use.
        An existing cache is reallocated, empty, and remains the same object.
        """
        args = self.params
        like = getattr(self.norm, "weight", None)
        if like is None:
            like = next(p for p in self.parameters() if p.is_floating_point())
        if not len(self.freqs_cis):
            self.freqs_cis = self.angles()
        self.freqs_cis = self.freqs_cis.to(like.device)
        heads = self.ranks.split(args.kv_heads)
        shape = (args.max_batch_size, heads, args.max_seq_len, args.head_dim)
        if self.cache is None:
            self.cache = KVCache(args.n_layers, *shape, like.dtype, like.device)
        else:
            self.cache.allocate(args.n_layers, like.dtype, like.device)
        self.attach_cache()
        return self.cache

    def attach_cache(self) -> None:
        """Assign a layer of the cache to each Attention; new Attentions get new layers."""
        attentions = attentions_of(self)
        for number, attention in enumerate(attentions):
            attention.cache = self.cache
            attention.layer_id = number
        if self.cache is not None:
            self.cache.grow(len(attentions))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.attach_cache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        before = [(p.data_ptr(), p.dtype) for p in self.parameters()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if len(self.freqs_cis):  # move it, but never round it
            probe = torch.empty(0, device=self.freqs_cis.device)
            self.freqs_cis = self.freqs_cis.to(fn(probe).device)
        if before != [(p.data_ptr(), p.dtype) for p in self.parameters()]:
            self.moves += 1
        return self


def attentions_of(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def causal_mask(seqlen: int, start_pos: int, like: Tensor) -> Tensor | None:
    """The mask that the original passes to its layers: -inf for keys after the query, else 0.

    (seqlen, start_pos + seqlen), with the dtype and device of `like`. None for a single token.
    """
    if seqlen == 1:
        return None
    mask = torch.full((seqlen, start_pos + seqlen), -torch.inf, device=like.device)
    return mask.triu_(diagonal=start_pos + 1).type_as(like)
