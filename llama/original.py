"""Functions that only scripts for the original release call; re-exported from their old modules."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import Refusal as Refusal


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat each key or value head n_rep times.

    (bsz, seqlen, heads, head_dim) -> (bsz, seqlen, heads × n_rep, head_dim).
    """
    return x.repeat_interleave(n_rep, dim=2)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """A view of freqs_cis (seqlen, channels) that multiplies x (bsz, seqlen, ..., channels)."""
    if x.ndim < 3 or freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise Refusal(
            f"freqs_cis is {tuple(freqs_cis.shape)} and x is {tuple(x.shape)}: "
            "pass (seqlen, channels) for (bsz, seqlen, ..., channels)"
        )
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Sample ids (..., 1) from the nucleus of probs (..., vocab_size), with PyTorch's generator.

    In order of decreasing probability, an id is in the nucleus if the total probability of the ids
    before it does not exceed `p`. Llama itself uses `llama.sampling`, with one random stream per
    request.
    """
    ordered, ids = probs.sort(dim=-1, descending=True)
    nucleus = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered > p, 0.0)
    drawn = torch.multinomial(nucleus.reshape(-1, nucleus.shape[-1]), num_samples=1)
    return ids.gather(-1, drawn.view(*probs.shape[:-1], 1))
