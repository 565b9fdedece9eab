from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY, build_golden, expected
from torch import Tensor, nn

from llama import Llama
from llama.parallel import ShardedLinear
from llama.quantize import Int4, Int8, PackedFloat16, packed_or_plain, select_store

packs = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="an x86 operation")


def weight_of(rows: int, columns: int) -> Tensor:
    """Rows of different size, some with an outlier, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[::7, 3] *= 20
    return weight


def as_held(store: nn.Module, columns: int) -> Tensor:
    """The weight that a store multiplies by, exactly: its product with one unit vector at a time."""
    return torch.cat([store(row[None]) for row in torch.eye(columns)]).T


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (512, 64)])
def test_int8_is_off_by_at_most_half_a_scale(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    scale = weight.abs().amax(1, keepdim=True) / 126.5
    error = (as_held(Int8(weight), shape[1]) - weight).abs()
    # The kernel answers in bfloat16, which rounds by a 256th of the value.
    assert (error <= 0.51 * scale + weight.abs() / 256).all()


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (512, 64)])
def test_int4_is_off_by_at_most_half_a_scale_of_its_group(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    groups = weight.unflatten(1, (-1, 32))
    scale = ((groups.amax(2) - groups.amin(2)) / 15).repeat_interleave(32, 1)
    error = (as_held(Int4(weight), shape[1]) - weight).abs()
    assert (error <= 0.6 * scale + weight.abs() / 100).all()


@packs
def test_packed_float16_is_the_float16_weight() -> None:
    weight = weight_of(96, 64)
    assert torch.equal(as_held(PackedFloat16(weight), 64), weight.half().float())


@packs
def test_a_weight_beyond_float16_is_not_packed() -> None:
    assert packed_or_plain(torch.full((64, 64), 65504.0)) is not None
    assert packed_or_plain(torch.full((64, 64), 65537.0)) is None


@pytest.mark.parametrize("store", [Int8, Int4, pytest.param(PackedFloat16, marks=packs)])
def test_a_row_is_multiplied_the_same_alone_and_among_many(store: Any) -> None:
    held, x = (
        store(weight_of(96, 64)),
        torch.randn(80, 64, generator=torch.Generator().manual_seed(1)),
    )  # enough rows for int8 to expand
    many = held(x.view(2, 40, 64)).view(80, 96)
    alone = torch.cat([held(row[None]) for row in x])
    # bfloat16 answers of the quantised kernels: a 256th of the largest
    torch.testing.assert_close(many, alone, atol=float(alone.abs().max()) / 128, rtol=0)


def quantised(name: str, **options: Any) -> Llama:
    return build_golden(quantize=name if name != "packed" else None, dtype="auto", **options)


# How far a row of logits may be from float32's, relative to its norm. Random weights forgive less than trained ones.
BOUNDS = {"packed": 1e-3, "int8": 0.05, "int4": 0.7}


@pytest.mark.parametrize("folder", ["mha-mp2", "gqa-mp4"])
@pytest.mark.parametrize("name", ["int8", "int4", pytest.param("packed", marks=packs)])
def test_logits_stay_near_those_of_float32(name: str, folder: str) -> None:
    tokens = torch.tensor(expected(folder)["prompt_tokens"][:1])
    exact, near = build_golden(folder).model(tokens, 0), quantised(name, folder=folder).model(tokens, 0)
    error = ((near - exact).norm(dim=-1) / exact.norm(dim=-1)).max()
    assert error < BOUNDS[name]


@pytest.mark.parametrize("name", ["int8", "int4", pytest.param("packed", marks=packs)])
def test_every_linear_weight_is_stored_and_nothing_else(name: str) -> None:
    model = quantised(name).model
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    assert len(linears) == 2 * 7 + 1
    assert all(linear.store is not None and "weight" not in linear._parameters for linear in linears)
    assert {n.split(".")[-2] for n in model.state_dict()} == {
        "tok_embeddings",
        "attention_norm",
        "ffn_norm",
        "norm",
    }


@pytest.mark.parametrize("name", ["int8", pytest.param("packed", marks=packs)])
def test_llama_2_tiny_scores_the_same_quantised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TINY)
    import world

    options: dict[str, Any] = {"quantize": "int8"} if name == "int8" else {"dtype": "auto"}
    scores = []
    for own in ({"dtype": "float32"}, options):
        llm = Llama.build(TINY, TINY / "tokenizer.model", 512, 50, device="cpu", **own)
        scores.append(0)
        for tasks in world.evaluation(count=50).values():
            answers = llm.chat_completion([task.dialog for task in tasks], temperature=0, max_gen_len=64)
            scores[-1] += sum(t.passed(a["generation"]["content"]) for t, a in zip(tasks, answers, strict=True))
    assert abs(scores[1] - scores[0]) <= 4  # of 200


def test_wrong_names_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="quantize is 'int3': use 'int8', 'int4' or None"):
        select_store("int3", "auto", torch.device("cpu"))
    with pytest.raises(ValueError, match="int4 stores groups of 32 inputs, and this rank's weight has 48: use fewer"):
        Int4(torch.ones(64, 48))
