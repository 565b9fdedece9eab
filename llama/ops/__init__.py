"""The operations of a layer: each in plain PyTorch, some also in C or Triton.

The model calls an operation, and the operation checks whether its tensors suit a kernel. (Packed
weights choose their own kernels, see quantization/formats.py.) Tests compare the kernels with the
plain forms.
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

# The classes whose calls fused forms may skip, each with the `forward` that it was defined with.
TRANSPARENT: dict[type[nn.Module], Any] = {nn.ModuleList: nn.ModuleList.forward}


def transparent(module: M) -> M:
    """Class decorator: fused forms may skip calls of this class's modules that have no hooks."""
    TRANSPARENT[module] = module.forward
    return module


def must_run_plain(model: nn.Module) -> bool:
    """Whether a pass must call every module. Fused forms and CUDA graphs depend on this alone.

    True if the model contains user code (a hook, a `forward` replaced on an instance or on a class,
    a module of another class) and while gradients, tracing or compilation are active. Evaluated
    once for every pass. A profiler makes no difference: it shows the kernels by their names.
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
    # A Python loop over all modules would take three times as long as map().
    hooked = any(map(FORWARD_HOOKS, parts)) or any(map(PRE_HOOKS, parts))
    return hooked or any("forward" in part for part in parts)


FORWARD_HOOKS = itemgetter("_forward_hooks")
PRE_HOOKS = itemgetter("_forward_pre_hooks")


class Path(threading.local):
    """Whether this thread's pass may use fused forms; False outside a pass."""

    fused = False


path = Path()


def expand_tokens() -> int:
    """Tokens per row from which expanding quantized weights is faster than the few-row kernels.

    The number of rows does not matter, so that a row's next token is rounded in the same way
    however many rows are decoded together.
    """
    return 32 if compat.has_bfloat16_products() else 64


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in x's type, for x (..., in_features) and W (out_features, in_features) of any type.

    If the weight has 16 bits and x has 32, x is rounded to the weight's type; sums are float32.
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
    """Rotate adjacent pairs of each head's channels (Su et al. 2021, RoFormer, section 3.2.2).

    xq and xk: (bsz, seqlen, n_heads, head_dim). freqs_cis: complex64, (seqlen, head_dim / 2), or
    (bsz, seqlen, head_dim / 2) if rows have different positions.
    """
    bsz, seqlen, _, dim = xq.shape
    fits = kernels.fits(xq, xk)
    if fits:  # the angles must fit, too
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
    """x as tokens (n, width), and the stride from one token to the next."""
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
    """Write x (bsz, seqlen, n_kv_heads, head_dim) to positions (bsz, seqlen) of the slots.

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
    """Tokens at `positions` (bsz, seqlen) attend to the keys of their slot up to their own.

    All positions are below `length`. `n_rep` query heads share a key head.
    """

    positions: Tensor
    length: int
    n_rep: int
    made: Tensor | None = None

    def additive(self, dtype: torch.dtype) -> Tensor:
        """The mask to add to scores: 0, or -inf for hidden keys; (bsz, 1, n_rep × seqlen, length).

        Built at first use, because kernels that take positions do not need it.
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
    tensor `mask` is added to the scores; without a mask, every query attends to all keys.
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
        # Query heads that share a key head become further queries of it: no key is repeated.
        groups = queries.reshape(bsz, kv_heads, -1, dim)
        y = F.scaled_dot_product_attention(groups, keys, values, attn_mask=mask.additive(xq.dtype))
        return y.reshape(queries.shape).transpose(1, 2).flatten(2)
    added = mask.to(xq.dtype) if isinstance(mask, Tensor) else None
    causal = isinstance(mask, CausalMask)
    y = F.scaled_dot_product_attention(
        queries, keys, values, added, is_causal=causal, enable_gqa=True
    )
    return y.transpose(1, 2).flatten(2)
