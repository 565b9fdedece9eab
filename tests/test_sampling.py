from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from llama import Llama
from llama.errors import ArgumentError
from llama.generation import BuildKeywords, BuildOptions
from llama.sampling import (
    SamplingOptions,
    SamplingParams,
    params_of,
    sample,
    sample_top_p,
    streams_of,
    uniform,
)

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.3])


def draw(top_p: float, uniform: float, probs: torch.Tensor = PROBS) -> int:
    return int(sample_top_p(probs[None], torch.tensor([[top_p]]), torch.tensor([[uniform]])))


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
    params = params_of(4, {"temperature": [0.0, 1.0, 1.0, 1e-3], "top_p": [1.0, 1.0, 0.3, 1.0]})
    tokens = sample(logits, params, [0.99, 0.99, 0.99, 0.5])
    assert tokens.tolist() == [1, 3, 1, 1]


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 100, generator=generator)
    temperature, top_p, uniforms = torch.rand(3, 16, generator=generator).tolist()
    params = params_of(16, {"temperature": temperature, "top_p": top_p})
    together = sample(logits, params, uniforms)
    alone = [
        sample(logits[i : i + 1], params[i : i + 1], uniforms[i : i + 1])[0] for i in range(16)
    ]
    assert together.tolist() == [int(token) for token in alone]


def test_a_temperature_however_small_draws_the_likeliest_token() -> None:
    for temperature in (1e-3, 1e-38, 1e-44):
        params = [SamplingParams(temperature=temperature, top_p=1.0)]
        assert sample(1e3 * PROBS[None], params, [0.999]).tolist() == [1]


# The options that are parameters of the original's methods.
PARAMETERS = {"temperature", "top_p", "max_tokens", "logprobs", "echo"}


def test_every_option_is_a_parameter_or_a_keyword_of_every_method() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SamplingOptions.__annotations__) | PARAMETERS == fields
    assert not set(SamplingOptions.__annotations__) & PARAMETERS


def test_every_build_option_is_a_parameter_or_a_keyword_of_build() -> None:
    fields = {field.name for field in dataclasses.fields(BuildOptions)}
    parameters = set(inspect.signature(Llama.build).parameters) - {"ckpt_dir", "options"}
    assert set(BuildKeywords.__annotations__) | parameters == fields
    assert not set(BuildKeywords.__annotations__) & parameters


def test_an_unknown_option_is_refused_by_every_method(llm: Llama) -> None:
    hi = [[{"role": "user", "content": "hi"}]]
    for method, asked in (
        *(("text_completion", ["hi"]), ("stream_text_completion", ["hi"]), ("generate", [[1, 30]])),
        *(("chat_completion", hi), ("stream_chat_completion", hi)),
    ):
        options: dict[str, Any] = {"temprature": 0, "max_gen_len": 3}
        with pytest.raises(TypeError, match="unknown option temprature: did you mean temperature?"):
            getattr(llm, method)(asked, **options)
    with pytest.raises(TypeError, match="unknown option quantise: did you mean quantize?"):
        Llama.build("nowhere", quantise="int8")  # type: ignore[call-arg]


def test_an_error_carries_name_index_and_reason_as_data() -> None:
    for options, name, index in (
        ({"temperature": -1}, "temperature", None),
        ({"temperature": [0.5, -1, 2]}, "temperature", 1),
        ({"stop": [["a"], [""], "b"]}, "stop", 1),
        ({"max_tokens": [1, 2]}, "max_tokens", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
    ):
        with pytest.raises(ArgumentError) as caught:
            params_of(3, options)
        assert (caught.value.name, caught.value.index) == (name, index)
        assert str(caught.value).startswith(name) and str(caught.value).endswith(
            caught.value.reason
        )
    assert str(ArgumentError("top_p", 2, "is 7: use less")) == "top_p of prompt 2 is 7: use less"


def test_params_are_of_their_own_types_whatever_was_passed() -> None:
    np = pytest.importorskip("numpy")
    given = {
        "temperature": np.float32(0.5),
        "max_tokens": torch.tensor(7),
        "seed": np.int64(3),
        "stop": "x",
    }
    (params,) = params_of(1, given)
    assert params == SamplingParams(temperature=0.5, max_tokens=7, seed=3, stop=("x",))
    assert [type(value) for value in (params.temperature, params.max_tokens, params.seed)] == [
        float,
        int,
        int,
    ]
    assert params_of(2, {"seed": np.arange(2)})[1].seed == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4  # type: ignore[misc]


def test_random_numbers_are_even_and_depend_on_seed_stream_and_number_alone() -> None:
    numbers = [
        uniform(seed, stream, i) for seed in range(5) for stream in range(20) for i in range(100)
    ]
    assert len(set(numbers)) == len(numbers) and all(0 <= number < 1 for number in numbers)
    counts = torch.histc(torch.tensor(numbers), bins=10, min=0, max=1)
    assert (counts - 1000).abs().max() < 150
    assert uniform(3, 1, 41) == uniform(3, 1, 41)
    assert list(streams_of(3, 7)) == [0, 1, 2] and list(streams_of(3, [7, 7, 7])) == [0, 0, 0]
