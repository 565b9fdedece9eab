"""A layer's operations: each in plain PyTorch and, where there is a faster form, in C or Triton.

The only place that knows what a device does fast. The model calls an operation; whether its tensors
suit our kernels is decided here. The plain form of an operation is also its tests' judge.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compat
from . import kernels
from .kernels import GROUP, PANEL

__all__ = [
    "GROUP",
    "PANEL",
    "TRANSPARENT",
    "CausalMask",
    "apply_rotary_emb",
    "attention",
    "expand_tokens",
    "linear",
    "must_run_plain",
    "path",
    "rms_norm",
    "swiglu",
    "transparent",
    "write_cache",
]

M = TypeVar("M", bound=type[nn.Module])

# The `forward` of each class of which a fused form may skip a call, as it was defined.
TRANSPARENT: dict[type[nn.Module], Any] = {nn.ModuleList: nn.ModuleList.forward}


def transparent(module: M) -> M:
    """Class decorator: a fused form may skip calls of modules of this class that nobody watches."""
    TRANSPARENT[module] = module.forward
    return module


def must_run_plain(model: nn.Module) -> bool:
    """Whether a pass has to call every module. Fused forms and CUDA graphs ask nothing else.

    Yes where somebody's Python is in the model (a hook, a `forward` replaced on an instance or on a
    class, a module of another class) and where PyTorch looks on (gradients, tracing, compilation).
    Asked once for every pass. A profiler does not count: our kernels appear in a profile by their
    names.
    """
    if torch.compiler.is_compiling() or compat.is_tracing() or any(compat.GLOBAL_HOOKS):
        return True
    if not torch.is_inference_mode_enabled():
        return True
    modules: list[Any] = [model]
    for module in modules:
        if module.__dict__["_modules"]:
            modules += [child for child in module._modules.values() if child is not None]
    kinds: set[Any] = set(map(type, modules))
    for kind in kinds:
        if TRANSPARENT.get(kind) is not kind.forward:
            return True
    parts = list(map(vars, modules))
    # Maps over all modules: a loop in Python would take three times as long.
    hooked = any(map(FORWARD_HOOKS, parts)) or any(map(PRE_HOOKS, parts))
    return hooked or any("forward" in part for part in parts)


FORWARD_HOOKS = itemgetter("_forward_hooks")
PRE_HOOKS = itemgetter("_forward_pre_hooks")


class Path(threading.local):
    """Whether this thread's pass may take fused forms. Outside of a pass it may not."""

    fused = False


path = Path()


def expand_tokens() -> int:
    """How many tokens of a row make expanding quantised weights faster than the few-row kernels.

    Rows do not count: the next token of a row is rounded in one way, however many are decoded
    beside it.
    """
    return 32 if compat.has_bfloat16_products() else 64


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in x's type, for x (..., in_features) and W (out_features, in_features) of any type.

    Where the weight has 16 bits and x has 32, x is rounded to the weight's type; sums are float32.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    if kernels.fits_bfloat16(x, weight) and x.shape[-2] < expand_tokens():
        return kernels.multiply_bfloat16(x, weight)
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) × weight over the last dimension, computed in float32."""
    dim = x.shape[-1]
    if not kernels.fits(x, weight) or weight.shape != x.shape[-1:] or not weight.is_contiguous():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    kernels.call("rms_norm", x, weight, eps, x.numel() // dim, dim, y, kernels.threads())
    return y


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate neighbouring pairs of each head's channels.

    Queries and keys: (bsz, seqlen, n_heads, head_dim).

    freqs_cis: (seqlen, head_dim / 2), or (bsz, seqlen, head_dim / 2) where rows are at positions of
    their own, complex64 (Su et al. 2021, RoFormer, section 3.2.2).
    """
    bsz, seqlen, _, dim = xq.shape
    fits = kernels.fits(xq, xk)
    if fits:  # and the angles are the original's
        known = freqs_cis.shape in ((seqlen, dim // 2), (bsz, seqlen, dim // 2))
        fits = known and freqs_cis.dtype is torch.complex64 and not freqs_cis.is_conj()
        fits = fits and freqs_cis.is_cpu
    rotated = []
    if not fits:
        for x in (xq, xk):
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            y = torch.view_as_real(pairs * freqs_cis.unsqueeze(-2)).flatten(-2)
            rotated.append(y.type_as(x))
        return rotated[0], rotated[1]
    cis = freqs_cis.contiguous()
    angles = cis.numel() // cis.shape[-1]
    for x in (xq, xk):
        y = x.new_empty(x.shape)
        heads = x.shape[2]
        flat, stride = as_tokens(x, heads * dim)
        kernels.call(
            "rotate", flat, stride, cis, angles, len(flat), heads, dim, y, kernels.threads()
        )
        rotated.append(y)
    return rotated[0], rotated[1]


def as_tokens(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x as tokens (n, width), and how far apart they are."""
    flat = x.reshape(-1, width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) × up, element by element."""
    if not kernels.fits(gate, up):
        return F.silu(gate) * up
    y = gate.new_empty(gate.shape)
    gates, stride = as_tokens(gate, gate.shape[-1])
    ups, other_stride = as_tokens(up, up.shape[-1])
    if stride != other_stride:
        gates = gates.contiguous()
        ups = ups.contiguous()
        stride = gates.shape[1]
    kernels.call("gate", gates, ups, stride, *gates.shape, y, kernels.threads())
    return y


def write_cache(x: Tensor, positions: Tensor, cached: Tensor) -> None:
    """Put x (bsz, seqlen, n_kv_heads, head_dim) to positions (bsz, seqlen) of the slots.

    cached: (bsz, n_kv_heads, length, head_dim).
    """
    if not kernels.fits(x, cached):
        slots = torch.arange(len(positions), device=positions.device)[:, None]
        cached[slots, :, positions] = x.to(cached.dtype)
        return
    flat, stride = as_tokens(x, x.shape[2] * x.shape[3])
    strides = cached.stride()[:2]
    kernels.call("write_cache", flat, stride, positions.contiguous(), *x.shape, cached, *strides)


@dataclass
class CausalMask:
    """Tokens at `positions` (bsz, seqlen) see their slot's first `length` up to their own.

    `n_rep` query heads share a key head.
    """

    positions: Tensor
    length: int
    n_rep: int
    made: Tensor | None = None

    def additive(self, dtype: torch.dtype) -> Tensor:
        """-inf where a token sees nothing, else 0: (bsz, 1, n_rep × seqlen, length).

        Made when it is first asked for: kernels that go by positions need none.
        """
        if self.made is None or self.made.dtype != dtype:
            columns = torch.arange(self.length, device=self.positions.device)
            unseen = columns > self.positions[:, None, :, None]
            mask = unseen.to(dtype).masked_fill_(unseen, -torch.inf)
            self.made = mask.repeat(1, 1, self.n_rep, 1)
        return self.made


def attention(xq: Tensor, keys: Tensor, values: Tensor, mask: CausalMask | Tensor | None) -> Tensor:
    """softmax(q kᵀ / √head_dim + mask) v: (bsz, seqlen, n_heads × head_dim).

    xq: (bsz, seqlen, n_heads, head_dim); keys and values: (bsz, n_kv_heads, length, head_dim). A
    tensor `mask` is added to the scores; without a mask every query sees all keys.
    """
    bsz, seqlen, heads, dim = xq.shape
    kv_heads = keys.shape[1]
    few = seqlen * heads // kv_heads <= kernels.FEW_QUERIES
    suits = few and dim % kernels.LANES == 0 and dim <= kernels.LARGEST_HEAD
    dense = keys.stride()[2:] == (dim, 1) and values.stride() == keys.stride()
    if isinstance(mask, CausalMask) and suits and dense and kernels.fits(xq, keys, values):
        xq = xq.contiguous()
        y = torch.empty_like(xq)
        sizes = (bsz, seqlen, heads, kv_heads, dim)
        strides = keys.stride()[:2]
        positions = mask.positions.contiguous()
        kernels.call(
            "attend", xq, keys, values, *strides, positions, *sizes, dim**-0.5, y, kernels.threads()
        )
        return y.flatten(2)
    queries = xq.transpose(1, 2)
    if isinstance(mask, CausalMask) and seqlen < mask.length:
        # The query heads that share a key head become more rows of it, so that no key is repeated.
        groups = queries.reshape(bsz, kv_heads, -1, dim)
        y = F.scaled_dot_product_attention(groups, keys, values, attn_mask=mask.additive(xq.dtype))
        return y.reshape(queries.shape).transpose(1, 2).flatten(2)
    added = mask.to(xq.dtype) if isinstance(mask, Tensor) else None
    causal = isinstance(mask, CausalMask)
    y = F.scaled_dot_product_attention(
        queries, keys, values, added, is_causal=causal, enable_gqa=True
    )
    return y.transpose(1, 2).flatten(2)
