from __future__ import annotations

import copy
import functools
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, TINY, build_golden, expected
from torch import Tensor, nn

from llama import Llama, compat
from llama.ops import kernels
from llama.parallel import ShardedLinear
from llama.quantization.formats import (
    Int4,
    Int8,
    PackedBFloat16,
    PackedFloat16,
    few_rows_on_gpu,
    pack_float16,
    pack_int4,
    pack_int8,
    select_formats,
)

FLOAT32 = {"dtype": "float32"}
packs = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="an x86 operation"
)
packs_bfloat16 = pytest.mark.skipif(
    not compat.has_bfloat16_products(), reason="needs bfloat16 instructions"
)
float16 = pytest.param("float16", marks=packs)
bfloat16 = pytest.param("bfloat16", marks=packs_bfloat16)


def weight_of(rows: int, columns: int) -> Tensor:
    """Return rows of different magnitudes, some with an outlier, like trained weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(
        rows, 1, generator=generator
    )
    weight[::7, 3] *= 20
    return weight


def as_held(store: nn.Module, columns: int) -> Tensor:
    """Return the exact weight that a store multiplies by: its products with unit vectors."""
    return torch.cat([store(row[None]) for row in torch.eye(columns)]).T


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (512, 64)])
def test_int8_is_off_by_at_most_half_a_scale(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    scale = weight.abs().amax(1, keepdim=True) / 126.5
    error = (as_held(Int8(weight), shape[1]) - weight).abs()
    # The kernel returns bfloat16, which rounds by at most 1/256 of the value.
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
    assert pack_float16(torch.full((64, 64), 65504.0)) is not None
    assert pack_float16(torch.full((64, 64), 65537.0)) is None


@packs_bfloat16
@pytest.mark.parametrize("store", [PackedBFloat16])
def test_bfloat16_is_the_bfloat16_weight(store: Any) -> None:
    weight = weight_of(96, 64)
    assert torch.equal(as_held(store(weight), 64), weight.bfloat16().float())


def mapped_from(path: Path) -> list[range]:
    """Return the address ranges at which this process maps a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(path)]
    return [range(int(first, 16), int(last, 16)) for first, last in spans]


@packs_bfloat16
@pytest.mark.skipif(
    kernels.library() is None or not Path("/proc/self/maps").exists(),
    reason="our kernels were not built, or this is not Linux",
)
@pytest.mark.parametrize("folder", ["mha-mp1", "gqa-mp2"])
def test_bfloat16_weights_stay_on_their_files_pages(folder: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / folder, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.pth"):
        torch.save(
            {name: t.bfloat16() for name, t in torch.load(file, weights_only=True).items()}, file
        )
    llm, wanted = (
        Llama.build(tmp_path, GOLDEN / "tokenizer.model", 64, 2, device="cpu", **own)
        for own in ({}, FLOAT32)
    )
    files = list(tmp_path.glob("*.pth"))
    pages = [span for file in files for span in mapped_from(file)]
    linears = [module for module in llm.model.modules() if isinstance(module, ShardedLinear)]
    in_place = [any(layer.weight.data_ptr() in span for span in pages) for layer in linears]
    # Weights of several shards are joined in one copy.
    assert all(in_place) if len(files) == 1 else not any(in_place)
    for layer, plain in zip(
        linears, (m for m in wanted.model.modules() if isinstance(m, ShardedLinear)), strict=True
    ):
        assert isinstance(layer.weight, torch.nn.Parameter)
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight.float(), plain.weight)


PACK: dict[int, Any] = {8: pack_int8, 4: pack_int4}
built = pytest.mark.skipif(kernels.library() is None, reason="our kernels were not built")
grouped8 = pytest.param(pack_int8, marks=built, id="grouped8")
grouped4 = pytest.param(pack_int4, marks=built, id="grouped4")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (521, 32)])
def test_a_grouped_weight_is_off_by_at_most_half_a_scale(shape: tuple[int, int], bits: int) -> None:
    weight = weight_of(*shape)
    low, high = weight.unflatten(1, (-1, 32)).aminmax(dim=2)
    scale = (high - low) / 15 if bits == 4 else torch.maximum(high, -low) / 127
    error = (PACK[bits](weight).dequantize() - weight).abs()
    # Scales and minimums are rounded to float16, outwards: the range of q still covers the weights.
    bound = scale / 2 + (low.abs() + scale) / 1024
    assert (error <= bound.repeat_interleave(32, 1)).all()


@built
def test_four_bits_of_weights_that_are_nearly_the_same() -> None:
    weight = 1 + weight_of(64, 64).clamp(-1, 1) / 1000
    error = (pack_int4(weight).dequantize() - weight).abs().max()
    # A minimum may be off by 2^-11, the spacing of float16 below 1.
    assert error <= (0.002 + 2**-11) / 15 / 2 * 1.01
    scales, zeros = Int4(weight).scales_and_zeros.float().repeat_interleave(32, 0).unbind(2)
    assert (zeros - 8.5 * scales <= weight.T).all() and (zeros + 7.5 * scales >= weight.T).all()


@pytest.fixture(params=[0, 1, 2], ids=["plain C", "AVX2", "AVX512"])
def kernel(request: pytest.FixtureRequest) -> Any:
    """Each variant of the kernels that this processor supports."""
    library = kernels.library()
    if library is None or library.choose(request.param) != request.param:
        pytest.skip("not built, or not supported by this processor")
    yield library
    library.choose(kernels.BEST)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 32), (48, 352), (521, 64), (40, 88), (16, 168)])
def test_kernels_are_near_float64_of_the_same_weights(
    kernel: Any, bits: int, shape: tuple[int, int]
) -> None:
    if bits == 4 and shape[1] % 32:
        return
    store = PACK[bits](weight_of(*shape))
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31):
        x = torch.randn(rows, 1, shape[1], generator=torch.Generator().manual_seed(rows))
        x[:, :, 5] *= 100  # an outlier channel
        exact = x.double() @ store.dequantize().double().T
        assert (store(x) - exact).norm() <= 2e-4 * exact.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_take_what_the_plain_product_takes(kernel: Any, bits: int) -> None:
    weight = torch.cat((weight_of(16, 64), torch.zeros(16, 64), torch.full((16, 64), 65504.0)))
    store = PACK[bits](weight)
    x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, 0, 7] = torch.nan
    x[3] *= 1e30
    y, exact = store(x), x @ store.dequantize().T
    assert torch.equal(y[1], exact[1]) and torch.equal(
        y[:, :, 16:32][[0, 1, 3]], exact[:, :, 16:32][[0, 1, 3]]
    )
    assert y[2].isnan().all()
    assert (y[[0, 3]] - exact[[0, 3]]).norm() <= 2e-4 * exact[[0, 3]].norm()
    assert y[3].isfinite().all()


def test_without_our_kernels_one_line_says_so_and_pytorchs_operations_multiply(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels, "library", functools.cache(kernels.library.__wrapped__))
    weight, x = weight_of(64, 64), torch.ones(2, 1, 64)
    assert isinstance(pack_int8(weight), Int8) and isinstance(pack_int4(weight), Int4)
    assert caplog.messages == [
        "decoding without our own kernels, more slowly (they were not built: install again where there is a C compiler "
        "with OpenMP)"
    ]
    torch.testing.assert_close(pack_int8(weight)(x), x @ weight.T, atol=0.5, rtol=0.02)


@built
def test_kernels_of_another_version_are_not_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(kernels.SIGNATURES, "a_later_one", "p")
    monkeypatch.setattr(kernels, "library", functools.cache(kernels.library.__wrapped__))
    assert not kernels.available() and not kernels.multiplies_bfloat16()
    assert caplog.messages == [
        "decoding without our own kernels, more slowly (they are of another version: install again)"
    ]


@built
def test_a_grouped_weight_multiplies_where_there_are_no_kernels_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1))
    for bits in (8, 4):
        store = PACK[bits](weight_of(50, 64))
        near, weight = store(x), store.dequantize()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda: False)
            patch.setattr(compat, "has_bfloat16_products", lambda: False)
            assert torch.equal(store.dequantize(), weight)
            torch.testing.assert_close(store(x), near, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@built
def test_the_compiler_takes_our_products_as_they_are() -> None:
    store, x = pack_int4(weight_of(48, 64)), torch.randn(3, 1, 64)
    compiled = torch.compile(lambda x: store(x) * 2, fullgraph=True)
    assert torch.equal(compiled(x), store(x) * 2)


@pytest.mark.parametrize("width", [88, 168, 344])
def test_int8_takes_any_width(width: int) -> None:
    weight, x = (
        weight_of(40, width),
        torch.randn(3, 1, width, generator=torch.Generator().manual_seed(0)),
    )
    for hold in (Int8, pack_int8):
        torch.testing.assert_close(hold(weight)(x), x @ weight.T, atol=1, rtol=0.02)


@pytest.mark.parametrize("rows", [521, 88])
def test_int4_takes_any_number_of_rows(rows: int) -> None:
    weight, x = weight_of(rows, 64), torch.eye(64)[:, None]
    for hold in (Int4, pack_int4):
        assert hold(weight)(x).shape == (64, 1, rows)
        torch.testing.assert_close(
            hold(weight)(x)[:, 0].T, hold(weight).dequantize(), atol=0.02, rtol=0.01
        )


def test_int8_expanded_stays_within_float16() -> None:
    store, x = Int8(torch.full((8, 4096), 0.01)), torch.ones(1, 4096, dtype=torch.float16)
    torch.testing.assert_close(
        store.expanded(x), torch.full((1, 8), 40.96).half(), atol=0.5, rtol=0
    )


PACKED = [
    Int8,
    Int4,
    grouped8,
    grouped4,
    pytest.param(PackedFloat16, marks=packs),
    pytest.param(PackedBFloat16, marks=packs_bfloat16),
]


@pytest.mark.parametrize("store", PACKED)
def test_a_row_is_multiplied_the_same_alone_and_among_many(store: Any) -> None:
    held, x = (
        store(weight_of(96, 64)),
        torch.randn(80, 64, generator=torch.Generator().manual_seed(1)),
    )  # enough rows for int8 to dequantize its weights
    many = held(x.view(2, 40, 64)).view(80, 96)
    alone = torch.cat([held(row[None]) for row in x])
    # The quantized kernels return bfloat16: each side is off by up to 1/256 of the largest value.
    torch.testing.assert_close(many, alone, atol=float(alone.abs().max()) / 128, rtol=0)


@pytest.fixture
def options(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Build options that give linear weights the format `name`."""
    if name in ("int8", "int4"):
        return {"quantize": name}
    monkeypatch.setattr(compat, "has_bfloat16_products", lambda: name == "bfloat16")
    return {"dtype": "auto"}


# The largest error of a row of logits against float32, relative to its norm. Random weights
# tolerate less rounding than trained ones.
BOUNDS = {"float16": 1e-3, "bfloat16": 0.03, "int8": 0.05, "int4": 0.7}


@pytest.mark.parametrize("folder", ["mha-mp2", "gqa-mp4"])
@pytest.mark.parametrize("name", ["int8", "int4", float16, bfloat16])
def test_logits_stay_near_those_of_float32(name: str, options: dict[str, Any], folder: str) -> None:
    tokens = torch.tensor(expected(folder)["prompt_tokens"][:1])
    exact, near = (
        build_golden(folder).model(tokens, 0),
        build_golden(folder, **options).model(tokens, 0),
    )
    error = ((near - exact).norm(dim=-1) / exact.norm(dim=-1)).max()
    assert error < BOUNDS[name]


@pytest.mark.parametrize("name", ["int8", "int4", float16])
def test_every_linear_weight_is_packed_and_nothing_else(name: str, options: dict[str, Any]) -> None:
    model = build_golden(**options).model
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    assert len(linears) == 2 * 7 + 1
    assert not any("weight" in linear._parameters for linear in linears)
    assert {n.split(".")[-2] for n, _ in model.named_parameters()} == {
        "tok_embeddings",
        "attention_norm",
        "ffn_norm",
        "norm",
    }


@pytest.mark.parametrize("name", ["int8", float16])
def test_layers_that_share_a_store_still_work_alone(name: str, options: dict[str, Any]) -> None:
    plain, held = build_golden("gqa-mp2").model, build_golden("gqa-mp2", **options).model
    x = torch.randn(3, plain.params.dim, generator=torch.Generator().manual_seed(0))
    for layer in (
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "feed_forward.w1",
        "feed_forward.w3",
    ):
        y, near = (model.layers[1].get_submodule(layer)(x) for model in (plain, held))
        torch.testing.assert_close(near, y, atol=0.02 * float(y.abs().max()), rtol=0)


@packs
def test_weights_beyond_float16_stay_apart_and_exact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compat, "has_bfloat16_products", lambda: False)
    shutil.copytree(GOLDEN / "mha-mp1", tmp_path, dirs_exist_ok=True)
    shard = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    shard["layers.1.attention.wk.weight"][0, 0] = 1e6
    torch.save(shard, tmp_path / "consolidated.00.pth")
    model = Llama.build(tmp_path, GOLDEN / "tokenizer.model", 64, 1, device="cpu").model
    for name in ("wq", "wk", "wv"):
        assert torch.equal(
            model.layers[1].get_submodule(f"attention.{name}").weight,
            shard[f"layers.1.attention.{name}.weight"],
        )
    assert "weight" not in model.layers[0].attention.wk._parameters


@pytest.mark.parametrize("name", ["int8", float16, bfloat16])
def test_llama_2_tiny_scores_the_same_quantised(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(TINY)
    import world

    scores = []
    for own in ({"dtype": "float32"}, options):
        llm = Llama.build(TINY, TINY / "tokenizer.model", 512, 50, device="cpu", **own)
        scores.append(0)
        for tasks in world.evaluation(count=50).values():
            answers = llm.chat_completion(
                [task.dialog for task in tasks], temperature=0, max_gen_len=64
            )
            scores[-1] += sum(
                t.passed(a["generation"]["content"]) for t, a in zip(tasks, answers, strict=True)
            )
    assert abs(scores[1] - scores[0]) <= 4  # of 200 tasks


def test_wrong_names_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="quantize is 'int3': use 'int8', 'int4' or None"):
        select_formats("int3", "auto", torch.device("cpu"))
    with pytest.raises(
        ValueError,
        match="int4 stores groups of 32 inputs, and this rank's weight has 48: use fewer",
    ):
        Int4(torch.ones(64, 48))


@pytest.mark.parametrize("name", ["int8", "int4", float16, bfloat16])
def test_state_dict_is_whole_and_a_copy_computes_the_same(
    name: str, options: dict[str, Any]
) -> None:
    plain, model = build_golden("gqa-mp2").model, build_golden("gqa-mp2", **options).model
    wanted, held = plain.state_dict(), model.state_dict()
    assert {key: tensor.shape for key, tensor in held.items()} == {
        key: tensor.shape for key, tensor in wanted.items()
    }
    for key, tensor in wanted.items():
        close = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 0.02, "int4": 0.3}[name] * float(
            tensor.abs().max()
        )
        torch.testing.assert_close(held[key].float(), tensor, atol=close, rtol=0)
    tokens = torch.tensor(expected("gqa")["prompt_tokens"][:1])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(tokens), model(tokens))
        mine, other = (own.layers[0].attention.wq for own in (model, copied))
        assert (mine.packed or mine.weight) is not (other.packed or other.weight)
    # The dequantized weights, in a plain model.
    plain.load_state_dict({key: tensor.float() for key, tensor in held.items()})
    error = (plain(tokens) - model(tokens)).norm() / model(tokens).norm()
    assert error < (0.2 if name == "int4" else 0.03)


@pytest.mark.parametrize("name", ["int8", float16, bfloat16])
def test_hooks_on_every_linear_layer_fire(name: str, options: dict[str, Any]) -> None:
    model = build_golden(**options).model
    tokens = torch.tensor([[1, 30, 40]])
    want = model(tokens)
    fired = []
    for path, module in model.named_modules():
        if isinstance(module, ShardedLinear):
            module.register_forward_hook(lambda *_, path=path: fired.append(path))
    torch.testing.assert_close(model(tokens), want)
    assert len(fired) == len(set(fired)) == 2 * 7 + 1


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_next_token_is_rounded_in_one_way_however_many_rows_are_decoded(
    name: str, options: dict[str, Any]
) -> None:
    linear = build_golden(max_seq_len=32, **options).model.layers[1].feed_forward.w2
    x = torch.randn(
        64, 1, linear.packed.dequantize().shape[1], generator=torch.Generator().manual_seed(0)
    )
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (2, 4, 31, 32, 64):
        assert torch.equal(linear(x[:rows]), alone[:rows])


def test_weights_of_other_types_move_and_convert_with_the_model() -> None:
    for options in ({"quantize": "int8"}, {"dtype": "auto"}):
        llm = build_golden(**options)
        llm.model.bfloat16()
        assert llm.model.cache.dtype == torch.bfloat16
        assert len(llm.generate([[1, 30, 40]], 5, 0)[0][0]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run the kernel")
def test_where_the_gpu_kernel_does_not_run_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    few_rows_on_gpu.cache_clear()
    assert few_rows_on_gpu(torch.float32) is None and few_rows_on_gpu(torch.float32) is None
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "int8 expands its weights at every step"
    ]
