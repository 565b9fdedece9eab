"""Logits -> next token ids, row by row: no row sees another's logits, settings or random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: Sequence[float], top_p: Sequence[float], uniform: Sequence[float]) -> Tensor:
    """The next id of each row: the most likely one where temperature is 0, else a draw from the top-p nucleus.

    logits: (bsz, vocab_size) float32; `uniform` in [0, 1) decides each row's draw.
    """
    greedy = logits.argmax(dim=-1)
    if not any(temperature):
        return greedy
    temperatures, top_ps, uniforms = torch.tensor(
        [temperature, top_p, uniform], dtype=logits.dtype, device=logits.device
    )
    # Any positive temperature will do for the greedy rows: their draw is not used.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    drawn = sample_top_p(torch.softmax(scaled, dim=-1), top_ps, uniforms)
    return torch.where(temperatures > 0, drawn, greedy)


def sample_top_p(probs: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019, section 3.1) by inversion of the cumulative distribution.

    The nucleus is the most likely tokens whose mass before each one does not exceed `top_p`. Each row takes its first
    token whose cumulative mass exceeds `uniform` of the nucleus' mass.
    """
    probs, tokens = probs.sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(dim=-1)
    outside = (cumulative - probs > top_p[:, None]) | (probs == 0)
    last = (~outside).sum(dim=-1, keepdim=True) - 1
    mass = cumulative.gather(-1, last)
    choice = torch.searchsorted(cumulative, uniform[:, None].to(mass.dtype) * mass, right=True).minimum(last)
    return tokens.gather(-1, choice)[:, 0]
