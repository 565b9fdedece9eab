from __future__ import annotations

import torch

from llama.sampling import sample, sample_top_p

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.3])


def draw(top_p: float, uniform: float, probs: torch.Tensor = PROBS) -> int:
    return int(sample_top_p(probs[None], torch.tensor([top_p]), torch.tensor([uniform])))


def test_the_nucleus_is_the_tokens_whose_mass_before_them_does_not_exceed_top_p() -> None:
    grid = [i / 1000 for i in range(1000)]
    assert {draw(0.3, u) for u in grid} == {1}
    assert {draw(0.5, u) for u in grid} == {1, 3}
    assert {draw(0.8, u) for u in grid} == {1, 3, 2}
    assert {draw(1.0, u) for u in grid} == {0, 1, 2, 3}


def test_draws_follow_the_renormalised_probabilities() -> None:
    counts = torch.zeros(4)
    for i in range(1000):
        counts[draw(0.5, (i + 0.5) / 1000)] += 1
    assert torch.allclose(counts / 1000, torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=2e-3)


def test_a_token_of_no_probability_is_never_drawn() -> None:
    probs = torch.tensor([0.0, 1.0, 0.0])
    assert {draw(1.0, u, probs) for u in (0.0, 0.5, 1 - 2**-24, 1.0)} == {1}


def test_rows_have_their_own_temperature_top_p_and_draw() -> None:
    logits = PROBS.log().repeat(4, 1)
    tokens = sample(
        logits,
        temperature=[0.0, 1.0, 1.0, 1e-3],
        top_p=[1.0, 1.0, 0.3, 1.0],
        uniform=[0.99, 0.99, 0.99, 0.5],
    )
    assert tokens.tolist() == [1, 0, 1, 1]


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 100, generator=generator)
    settings = torch.rand(3, 16, generator=generator).tolist()
    together = sample(logits, *settings)
    alone = [sample(logits[i : i + 1], *(s[i : i + 1] for s in settings))[0] for i in range(16)]
    assert together.tolist() == [int(token) for token in alone]


def test_a_temperature_however_small_draws_the_likeliest_token() -> None:
    for temperature in (1e-3, 1e-38, 1e-44):
        assert sample(1e3 * PROBS[None], [temperature], [1.0], [0.999]).tolist() == [1]
