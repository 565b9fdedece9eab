"""Logits -> next token ids, row by row: no row sees another's logits, settings or random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The next id of each row: the most likely one where temperature is 0, else a draw from the top-p nucleus.

    logits: (bsz, vocab_size) float32. temperature, top_p, uniform: (bsz,); `uniform` in [0, 1) decides the draw.
    """
    greedy = logits.argmax(dim=-1)
    if not temperature.any():
        return greedy
    # Any positive temperature will do for the greedy rows: their draw is not used.
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    drawn = sample_top_p(torch.softmax(scaled, dim=-1), top_p, uniform)
    return torch.where(temperature > 0, drawn, greedy)


def sample_top_p(probs: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019, section 3.1) by inversion of the cumulative distribution.

    The nucleus is the most likely tokens whose mass before each one does not exceed `top_p`. Each row takes its first
    token whose cumulative mass exceeds `uniform` of the nucleus' mass.
    """
    probs, tokens = probs.sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(dim=-1)
    outside = cumulative - probs > top_p[:, None]
    outside[:, 0] = False  # rounding must not empty the nucleus
    last = (~outside).sum(dim=-1, keepdim=True) - 1
    mass = cumulative.gather(-1, last)
    choice = torch.searchsorted(cumulative, uniform[:, None].to(mass.dtype) * mass, right=True).minimum(last)
    return tokens.gather(-1, choice)[:, 0]
