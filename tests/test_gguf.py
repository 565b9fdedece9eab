"""GGUF files, compared with the package gguf and llama.cpp."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from conftest import (
    GOLDEN,
    TINY,
    random_state,
    real_tokenizer_path,
    run_python,
    run_ranks,
    write_release,
)
from gguf_files import K_KINDS, KINDS, Kind, dequantized, random_blocks, small_args, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.checkpoints import Checkpoint
from llama.checkpoints.convert import convert, reshard
from llama.checkpoints.gguf import read_file
from llama.checkpoints.gguf_types import TYPES, Blocks
from llama.checkpoints.names import gguf_name
from llama.checkpoints.vocabulary import piece, pieces_of, proto_of
from llama.cli.info import info, verify
from llama.ops import kernels
from llama.parallel import ShardedLinear
from llama.quantization.formats import Grouped

TOKENIZER = Tokenizer(GOLDEN / "tokenizer.model")
TOKENS = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(0))
built = pytest.mark.skipif(kernels.library() is None, reason="our kernels were not built")


def shapes_of(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape) for name, tensor in Transformer(args).state_dict().items()
        }


def small_file(
    path: Path, kind: Kind | dict[str, Kind], **metadata: Any
) -> dict[str, torch.Tensor]:
    args = small_args(TOKENIZER)
    return write_gguf(path, args, TOKENIZER, kind, shapes_of(args), **metadata)


@cache
def whole_file() -> bytes:
    """Return the bytes of a small Q4_0 file."""
    with tempfile.TemporaryDirectory() as folder:
        small_file(Path(folder, "a.gguf"), Kind.Q4_0)
        return Path(folder, "a.gguf").read_bytes()


def model_of(values: dict[str, torch.Tensor]) -> Transformer:
    model = Transformer(small_args(TOKENIZER))
    model.load_state_dict(values)
    return model


def build(path: Path, max_seq_len: int = 64, max_batch_size: int = 2, **options: Any) -> Llama:
    return Llama.build(path, None, max_seq_len, max_batch_size, device="cpu", **options)


@pytest.mark.parametrize("kind", KINDS + K_KINDS, ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_gguf_decodes_it(kind: Kind) -> None:
    type = TYPES[kind.value]
    assert (type.name, type.block, type.bytes) == (kind.name, *gguf.GGML_QUANT_SIZES[kind])
    raw = random_blocks(kind, 150, 768)
    values, wanted = torch.empty(150, 768), dequantized(kind, raw)
    blocks = Blocks(torch.from_numpy(raw).view(150, -1, type.bytes), type)
    blocks.copy_to(values)
    assert torch.equal(values, wanted)
    part, some = blocks.narrow(1, 96, 544).narrow(0, 3, 140), torch.empty(140, 544)
    part.copy_to(some)
    assert torch.equal(some, wanted[3:143, 96:640])
    if type.bits is not None:
        store = Grouped(part.groups())
        assert torch.equal(store.dequantize(), some)
        assert (
            sum(buffer.nbytes for buffer in store.buffers()) == 144 * 544 * blocks.bytes_per_weight
        )
        x = torch.randn(3, 1, 544, generator=torch.Generator().manual_seed(0))
        exact = x.double() @ some.double().T
        assert (store(x) - exact).norm() <= 2e-4 * exact.norm()


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, *KINDS, *K_KINDS], ids=lambda kind: kind.name
)
def test_a_file_is_the_model_of_its_values(tmp_path: Path, kind: Kind) -> None:
    values = small_file(tmp_path / "a.gguf", kind)
    wanted = model_of(values)(TOKENS).detach()
    exact = build(tmp_path / "a.gguf", dtype="float32")
    assert all(
        torch.equal(values[name], tensor) for name, tensor in exact.model.state_dict().items()
    )
    torch.testing.assert_close(exact.model(TOKENS), wanted, atol=1e-4, rtol=0)
    own = build(tmp_path / "a.gguf")
    off = (own.model(TOKENS) - wanted).norm() / wanted.norm()
    # Matrices that keep the bits of the file are exact. Otherwise 16-bit weights round activations,
    # and types with a scale for every 16 inputs are quantized to 8 bits again.
    in_own_bits = TYPES[kind.value].bits if kind.value in TYPES else None
    assert off < (2e-3 if in_own_bits and kernels.available() else 0.03)


@built
@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_0, Kind.Q5_1, Kind.Q5_K, Kind.Q8_0]
)
def test_a_file_is_held_in_its_own_bits_where_a_store_has_them_exactly(
    tmp_path: Path, kind: Kind
) -> None:
    values = small_file(tmp_path / "a.gguf", kind)
    llm = build(tmp_path / "a.gguf")
    layers = {
        name: module
        for name, module in llm.model.named_modules()
        if isinstance(module, ShardedLinear)
    }
    bits = {getattr(layer.packed, "shared", layer.packed).bits for layer in layers.values()}
    assert bits == {4 if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K) else 8}
    for name, layer in layers.items():
        assert torch.equal(layer.packed.dequantize(), values[f"{name}.weight"])
    assert (
        llm.model.layers[0].attention.wq.packed.shared
        is llm.model.layers[0].attention.wv.packed.shared
    )


@built
def test_a_file_of_several_types_holds_each_in_what_fits_it(tmp_path: Path) -> None:
    kinds = {
        "wv": Kind.Q6_K,
        "w2": Kind.Q6_K,
        "output": Kind.Q6_K,
        "tok_embeddings": Kind.Q4_K,
        "": Kind.Q4_K,
    }
    values = small_file(tmp_path / "a.gguf", kinds)
    llm = build(tmp_path / "a.gguf")
    attention = llm.model.layers[0].attention
    assert [layer.packed.bits for layer in (attention.wq, attention.wk, attention.wv)] == [4, 4, 8]
    assert (
        llm.model.layers[0].feed_forward.w1.packed.shared
        is llm.model.layers[0].feed_forward.w3.packed.shared
    )
    wanted = model_of(values)(TOKENS)
    assert (llm.model(TOKENS) - wanted).norm() / wanted.norm() < 0.02
    for quantize, bits in (("int8", 8), ("int4", 4)):
        held = build(tmp_path / "a.gguf", quantize=quantize).model
        stores = [module.packed for module in held.modules() if isinstance(module, ShardedLinear)]
        assert {getattr(store, "shared", store).bits for store in stores} == {bits}
    sixteen = build(tmp_path / "a.gguf", dtype="bfloat16").model
    assert torch.equal(sixteen.output.weight, values["output.weight"].bfloat16())


def test_without_our_kernels_a_file_is_held_in_16_bits_or_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = small_file(tmp_path / "a.gguf", Kind.Q4_0)
    monkeypatch.setattr(kernels, "available", lambda: False)
    llm = build(tmp_path / "a.gguf")
    assert not any(isinstance(module, Grouped) for module in llm.model.modules())
    wanted = model_of(values)(TOKENS)
    assert (llm.model(TOKENS) - wanted).norm() / wanted.norm() < 0.02
    assert build(tmp_path / "a.gguf", quantize="int4").generate([[1, 30]], 4, 0)[0]


@pytest.mark.slow
def test_a_compiled_step_takes_a_files_own_bits(tmp_path: Path) -> None:
    small_file(tmp_path / "a.gguf", Kind.Q4_K)
    wanted = build(tmp_path / "a.gguf").generate([[1, 30, 40]], 6, 0)
    assert build(tmp_path / "a.gguf", compile=True).generate([[1, 30, 40]], 6, 0) == wanted


@pytest.mark.parametrize("kind", [Kind.F16, *KINDS, *K_KINDS], ids=lambda kind: kind.name)
def test_llama_cpp_computes_the_same_from_the_same_file(tmp_path: Path, kind: Kind) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    small_file(tmp_path / "a.gguf", kind)
    theirs = llama_cpp.Llama(
        str(tmp_path / "a.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1
    )
    theirs.eval(TOKENS[0].tolist())
    scores = torch.from_numpy(numpy.array(theirs.scores[: TOKENS.shape[1]])).log_softmax(-1)
    ours = build(tmp_path / "a.gguf", dtype="float32" if kind == Kind.F16 else "auto").model(
        TOKENS[:1]
    )[0]
    off = (ours.log_softmax(-1) - scores).abs() / scores.std()
    # llama.cpp rounds activations to float16 for 16-bit weights, and to 8 bits for smaller ones.
    assert off.max() < (0.02 if kind == Kind.F16 else 0.3) and off.mean() < (
        0.003 if kind == Kind.F16 else 0.05
    )
    assert (ours.argmax(-1) == scores.argmax(-1)).float().mean() > (
        0.99 if kind == Kind.F16 else 0.8
    )


def test_a_file_in_parts_is_one_model(tmp_path: Path) -> None:
    values = small_file(tmp_path / "a.gguf", Kind.Q8_0)
    metadata, tensors = read_file(tmp_path / "a.gguf")
    wanted = build(tmp_path / "a.gguf").generate([[1, 30, 40]], 8, 0)
    parts = [tmp_path / f"llama-2-0000{number}-of-00002.gguf" for number in (1, 2)]
    subprocess_split(tmp_path / "a.gguf", parts)
    for path in parts:
        assert build(path).generate([[1, 30, 40]], 8, 0) == wanted
    assert info(str(parts[1])).startswith(
        "llama-2-00002-of-00002.gguf: GGUF layout, 2 file(s) of weights, "
    )
    parts[0].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"llama-2-00001-of-00002\.gguf is missing beside .*: download it"
    ):
        build(parts[1])
    assert len(values) == len(tensors) and metadata["general.architecture"] == "llama"


def subprocess_split(whole: Path, parts: list[Path]) -> None:
    """Write the file's tensors to two files with gguf; only the first has the metadata."""
    reader = gguf.GGUFReader(whole)
    half = len(reader.tensors) // 2
    for number, (path, tensors) in enumerate(
        zip(parts, (reader.tensors[:half], reader.tensors[half:]), strict=True)
    ):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind = field.types[0]
                    sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), kind, sub)
        writer.add_uint16("split.no", number)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_file_as_one_rank_holds_it(tmp_path: Path, world_size: int) -> None:
    kinds = {"wv": Kind.Q6_K, "w2": Kind.Q6_K, "wo": Kind.Q4_0, "w3": Kind.Q8_0, "": Kind.Q4_K}
    small_file(tmp_path / "a.gguf", kinds)
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import torch
from llama import Llama
tokens = torch.arange(3, 40)[None]
logits = [
    Llama.build("{tmp_path}/a.gguf", None, 64, 1, device="cpu", dtype=dtype).model(tokens, 0)
    for dtype in ("auto", "float32")
]
torch.save(logits, "{tmp_path}/logits")
""")
    job = run_ranks(world_size, script)
    assert job.returncode == 0, job.stderr
    own, exact = torch.load(tmp_path / "logits")
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(
        exact, build(tmp_path / "a.gguf", dtype="float32").model(tokens), atol=1e-4, rtol=0
    )
    wanted = build(tmp_path / "a.gguf").model(tokens)
    assert (own - wanted).norm() / wanted.norm() < 0.01


@pytest.mark.slow
@built
def test_ranks_that_would_cut_a_group_are_told_which_counts_work(tmp_path: Path) -> None:
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=512, multiple_of=64)
    write_gguf(tmp_path / "a.gguf", args, TOKENIZER, Kind.Q4_0, shapes_of(args))
    script = tmp_path / "ranks.py"
    script.write_text(f"""
from llama import Llama
for dtype in ("bfloat16", "auto"):
    Llama.build("{tmp_path}/a.gguf", None, 64, 1, device="cpu", dtype=dtype)
    print(dtype, flush=True)
""")
    job = run_ranks(4, script)
    assert job.returncode != 0
    assert (
        "ValueError: a.gguf has 64 inputs of layers.0.attention.wo.weight in groups of 32, which 4 ranks would cut: "
        "use 1 or 2, or dtype='bfloat16'" in job.stderr
    )


def test_an_adapter_is_merged_into_what_a_file_has_in_fewer_bits(tmp_path: Path) -> None:
    values = small_file(tmp_path / "a.gguf", Kind.Q4_0)
    adapter, generator = tmp_path / "adapter", torch.Generator().manual_seed(0)
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.v_proj"
    a, b = (
        torch.randn(4, 256, generator=generator) / 16,
        torch.randn(128, 4, generator=generator) / 2,
    )
    import safetensors.torch

    safetensors.torch.save_file(
        {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["v_proj"],
        "layers_to_transform": [0],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    llm = build(tmp_path / "a.gguf", adapter_dir=adapter, dtype="float32")
    values["layers.0.attention.wv.weight"] += b @ a
    torch.testing.assert_close(
        llm.model(TOKENS), model_of(values)(TOKENS).detach(), atol=1e-4, rtol=0
    )
    build(tmp_path / "a.gguf", adapter_dir=adapter)


def test_an_output_that_is_the_embedding_is_found_there(tmp_path: Path) -> None:
    args = small_args(TOKENIZER)
    shapes = shapes_of(args)
    del shapes["output.weight"]
    values = write_gguf(tmp_path / "a.gguf", args, TOKENIZER, Kind.Q8_0, shapes)
    state = build(tmp_path / "a.gguf", dtype="float32").model.state_dict()
    assert torch.equal(state["output.weight"], values["tok_embeddings.weight"])


# Vocabulary


def vocabulary_only(path: Path, tokenizer: Tokenizer, **metadata: Any) -> Tokenizer:
    """Return the tokenizer after a round trip through a GGUF file."""
    args = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=tokenizer.n_words, multiple_of=32)
    write_gguf(path, args, tokenizer, Kind.F16, shapes_of(args), **metadata)
    return Checkpoint(path).open_tokenizer()


def test_the_rebuilt_tokenizer_is_the_original() -> None:
    same_as(
        TINY / "tokenizer.model",
        json.loads((TINY / "params.json").read_text()) and ["Once upon a time", " a  b\n"],
    )


def same_as(model: Path, texts: list[str]) -> None:
    original = Tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        rebuilt = vocabulary_only(Path(folder, "a.gguf"), original)
    attributes = (
        "n_words",
        "bos_id",
        "eos_id",
        "pad_id",
        "prefix_id",
        "suffix_id",
        "middle_id",
        "eot_id",
    )
    assert all(getattr(rebuilt, name) == getattr(original, name) for name in attributes)
    for text in texts:
        ids = original.encode(text, bos=True, eos=True)
        assert rebuilt.encode(text, bos=True, eos=True) == ids
        assert rebuilt.decode(ids) == original.decode(ids)

    @settings(max_examples=1000, deadline=None)
    @given(st.text(max_size=60))
    def alike(text: str) -> None:
        text = text.encode(errors="ignore").decode()
        assert rebuilt.encode(text, bos=False, eos=False) == original.encode(
            text, bos=False, eos=False
        )

    alike()


def test_the_rebuilt_llama_2_tokenizer_is_the_original() -> None:
    cases = json.loads((GOLDEN / "llama2-tokenizer-cases.json").read_text())
    same_as(real_tokenizer_path(), [case["text"] for case in cases])


def test_pieces_that_end_a_text_do_so_whatever_kind_they_are_of(tmp_path: Path) -> None:
    more = [("<|im_end|>", 0.0, 4), ("plain", 0.0, 1)]
    proto = (GOLDEN / "tokenizer.model").read_bytes() + b"".join(piece(*each) for each in more)
    extended = Tokenizer.from_proto(proto, "extended")
    for eos in (512, 513):
        tokenizer = vocabulary_only(
            tmp_path / "a.gguf", extended, **{"tokenizer.ggml.eos_token_id": eos}
        )
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, eos)


def test_pieces_that_sentencepiece_does_not_take_are_unused(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "", "a", "a"]
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    metadata |= {
        "tokenizer.ggml.scores": [0.0] * 6,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    }
    tokenizer = Tokenizer.from_proto(proto_of("a.gguf", metadata), "a.gguf")
    assert (tokenizer.n_words, tokenizer.n_used, tokenizer.bos_id, tokenizer.eos_id) == (6, 5, 1, 2)
    assert tokenizer.encode("a", bos=False, eos=False)[-1] == 4


def test_padding_ids_are_no_prompt(tmp_path: Path) -> None:
    args = small_args(TOKENIZER)
    args.vocab_size = 520
    proto = (GOLDEN / "tokenizer.model").read_bytes() + b"".join(
        piece(f"[PAD{i}]", 0.0, 5) for i in range(8)
    )
    write_gguf(
        tmp_path / "a.gguf", args, Tokenizer.from_proto(proto, "padded"), Kind.Q8_0, shapes_of(args)
    )
    llm = build(tmp_path / "a.gguf")
    with pytest.raises(
        ValueError, match="prompt 0 has token id 512, and the vocabulary has 512 pieces"
    ):
        llm.generate([[1, 512]], 2)
    with pytest.raises(
        ValueError, match="top_logprobs is 513: use 0 to 512, the size of the vocabulary"
    ):
        llm.text_completion(["a"], logprobs=True, top_logprobs=513)


def test_a_chat_template_of_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    dialog = [{"role": "user", "content": "Hello"}]
    small_file(
        tmp_path / "a.gguf",
        Kind.Q4_0,
        **{"tokenizer.chat_template": "{{ '<|im_start|>' + message }}"},
    )
    llm = build(tmp_path / "a.gguf")
    with pytest.raises(
        ValueError, match=r"the model's chat template has no \[INST\]: it is not a Llama"
    ):
        llm.chat_completion([dialog], max_gen_len=2)
    assert llm.text_completion(["Hello"], max_gen_len=2)
    small_file(
        tmp_path / "b.gguf", Kind.Q4_0, **{"tokenizer.chat_template": "{{ '[INST] ' + message }}"}
    )
    assert build(tmp_path / "b.gguf").chat_completion([dialog], max_gen_len=2)


# Refused files


def test_a_file_cut_anywhere_is_refused_with_a_sentence(tmp_path: Path) -> None:
    data, path = whole_file(), tmp_path / "a.gguf"
    for number in range(200):
        path.write_bytes(data[: len(data) * number // 200])
        with pytest.raises(ValueError, match="download it again|does not begin with GGUF"):
            build(path)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_bytes_are_refused_with_a_sentence_or_do_not_matter(
    flips: list[tuple[int, int]],
) -> None:
    data = bytearray(whole_file())
    for at, value in flips:
        data[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.gguf")
        path.write_bytes(data)
        try:
            Checkpoint(path).open_tokenizer()
            Checkpoint(path).model_args(8, 1)
        except ValueError as error:
            assert "a.gguf" in str(error) or "tokenizer has" in str(error), error


def header(*values: bytes, tensors: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, len(values)) + b"".join(values)


def text(value: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value.encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty: download it again"),
        (b"PK" * 40, "is not a GGUF file: it does not begin with GGUF"),
        (
            header(version=1),
            "is a GGUF file of version 1: not supported, only versions 2 and 3 are",
        ),
        (
            b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
            "is a GGUF file in big-endian order: not supported",
        ),
        (header(tensors=10**18), "it ends at byte 24, in its header"),
        (header(text("a", 10**18)), "it ends at byte 33, in its header"),
        (
            header(text("a") + struct.pack("<IIQ", 9, 8, 10**18)),
            "an array of 1000000000000000000 values",
        ),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 10**6)), "it ends at byte"),
        (header(text("a") + struct.pack("<IIQ", 9, 4, 10**6)), "it ends at byte"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1)), "an array of 1 values of kind 9"),
        (header(text("a") + struct.pack("<I", 77)), "a value of kind 77"),
        (
            header(text("a") + struct.pack("<I", 8) + struct.pack("<Q", 2) + b"\xff\xff"),
            "can't decode byte",
        ),
        (header(tensors=1) + text("t") + struct.pack("<I", 9), "t has 9 dimensions"),
        (
            header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 2**60, 0, 0),
            r"t is \(1152921504606846976,\)",
        ),
        (
            header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**63),
            "t is .* at byte 92",
        ),
        (
            header(tensors=1) + text("t") + struct.pack("<IQQIQ", 2, 33, 2, 2, 0),
            r"t is \(2, 33\) at byte",
        ),
        (
            header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 32, 23, 0),
            "t is of type IQ4_XS: not supported",
        ),
        (
            header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 32, 99, 0),
            "t is of type 99: not supported, only",
        ),
        (
            header(text("general.alignment") + struct.pack("<II", 4, 3)),
            "has general.alignment 3: download it again",
        ),
        (header(), "has general.architecture None: not supported, only 'llama' is"),
    ],
)
def test_what_lies_in_a_header_is_refused_before_memory_is_taken(
    tmp_path: Path, data: bytes, said: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"a.gguf.*{said}"):
        build(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (
            {"architecture": "gemma"},
            "has general.architecture 'gemma': not supported, only 'llama' is",
        ),
        (
            {"rope.scaling.type": "yarn"},
            "has llama.rope.scaling.type 'yarn': not supported, only 'linear' is",
        ),
        ({"expert_count": 8}, "has llama.expert_count 8: not supported, only 0 is"),
        (
            {"attention.key_length": 64},
            "has llama.attention.key_length 64: not supported, only 32 is",
        ),
        (
            {"rope.dimension_count": 16},
            "has llama.rope.dimension_count 16: not supported, only 32 is",
        ),
        (
            {"tokenizer.ggml.pre": "x", "embedding_length": 0},
            "has llama.embedding_length 0: expected a positive integer",
        ),
        (
            {"embedding_length": 128, "rope.dimension_count": None},
            r"has shape \(512, 256\), and a\.gguf requires \(512, 128\)",
        ),
        (
            {"block_count": 3},
            "lacks tensor layers.2.attention_norm.weight: a.gguf is from another model",
        ),
        ({"block_count": 1}, r"holds unknown tensor blk\.1\."),
        ({"attention.head_count": 7, "rope.dimension_count": None}, "7 attention heads"),
        ({"feed_forward_length": None}, "lacks key llama.feed_forward_length: download it again"),
        (
            {"feed_forward_length": 1000},
            r"has shape \(768, 256\), and a\.gguf requires \(1000, 256\)",
        ),
        ({"vocab_size": 500}, "has vocab_size 500, the checkpoint's embedding 512 rows"),
    ],
)
def test_metadata_of_another_model_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, Any], said: str
) -> None:
    small_file(tmp_path / "a.gguf", Kind.Q4_0, **metadata)
    with pytest.raises(ValueError, match=said):
        build(tmp_path / "a.gguf")


def test_linear_scaling_of_positions_is_kept(tmp_path: Path) -> None:
    values = small_file(
        tmp_path / "a.gguf", Kind.F32, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    )
    llm = build(tmp_path / "a.gguf", dtype="float32")
    model = model_of(values)
    model.params.rope_scaling_factor = 4.0
    torch.testing.assert_close(llm.model(TOKENS), model(TOKENS).detach(), atol=1e-4, rtol=0)


def test_a_factor_alone_scales_linearly(tmp_path: Path) -> None:
    small_file(tmp_path / "a.gguf", Kind.Q8_0, **{"rope.scaling.factor": 2.0})
    assert build(tmp_path / "a.gguf").model.params.rope_scaling_factor == 2
    small_file(
        tmp_path / "a.gguf", Kind.Q8_0, **{"rope.scaling.factor": 2.0, "rope.scaling.type": "none"}
    )
    assert build(tmp_path / "a.gguf").model.params.rope_scaling_factor == 1


def test_vocabularies_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    args = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=512, multiple_of=32)
    path = tmp_path / "a.gguf"

    def rewritten(**changes: Any) -> Path:
        write_gguf(tmp_path / "b.gguf", args, TOKENIZER, Kind.F16, shapes_of(args))
        reader = gguf.GGUFReader(tmp_path / "b.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        for field in reader.fields.values():
            key, value = field.name.removeprefix("tokenizer.ggml."), field.contents()
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                if key not in changes or changes[key] is not None:
                    writer.add_key_value(field.name, changes.get(key, value), field.types[0], sub)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    scores = [score for _, score, _ in pieces()]
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"model": "gpt2"},
            "has tokenizer.ggml.model 'gpt2': not supported, only 'llama' .SentencePiece. is",
        ),
        (
            {"scores": [-1000.0] * 512},
            "has a vocabulary without scores, converted without tokenizer.model",
        ),
        (
            {"scores": scores[:9]},
            "lacks tokenizer.ggml.tokens, scores or token_type, or their lengths differ",
        ),
        (
            {"scores": [float("nan"), *scores[1:]]},
            r"has a vocabulary with piece 0 \('<unk>', nan, 2\)",
        ),
        ({"token_type": [1] * 512}, "has a vocabulary with 0 unknown pieces"),
        ({"token_type": [2, 9, *[1] * 510]}, "has a vocabulary with piece 1"),
        ({"eos_token_id": 512}, "has tokenizer.ggml.eos_token_id 512"),
    ]
    for changes, said in cases:
        with pytest.raises(ValueError, match=said):
            build(rewritten(**changes))
    assert build(rewritten()).tokenizer.n_words == 512


def pieces() -> list[tuple[str, float, int]]:
    return pieces_of((GOLDEN / "tokenizer.model").read_bytes())


def test_paths_that_are_no_file_or_hold_one_are_told_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"m-00001-of-00000\.gguf is named as part 1 of 0: restore its original"
    ):
        build(tmp_path / "m-00001-of-00000.gguf")
    with pytest.raises(
        FileNotFoundError,
        match=r"nowhere\.gguf cannot be read \(No such file or directory\): check",
    ):
        build(tmp_path / "nowhere.gguf")
    (tmp_path / "b.Q4_0.gguf").touch()
    with pytest.raises(
        ValueError, match=r"has no params\.json or config\.json, but b\.Q4_0\.gguf: pass"
    ):
        build(tmp_path)
    small_file(tmp_path / "llama-2-7b", Kind.Q4_0)  # without .gguf, like ollama's files
    assert build(tmp_path / "llama-2-7b").model.n_layers == 2


# Export


@pytest.fixture
def release(tmp_path: Path) -> Path:
    args = small_args(TOKENIZER)
    folder = write_release(tmp_path / "release", args, random_state(args))
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_a_written_file_holds_what_gguf_makes_of_the_weights(release: Path, type: str) -> None:
    out = release.parent / "out.gguf"
    assert convert(str(release), str(out), "gguf", type).startswith(f"{out}: 21 tensors, ")
    kind = Kind[type.upper()]
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for name, tensor in random_state(small_args(TOKENIZER)).items():
        own = Kind.F32 if tensor.dim() == 1 else kind
        data = gguf.quants.quantize(tensor.numpy(), own)
        assert read[gguf_name(name)].tensor_type == own
        assert numpy.array_equal(
            read[gguf_name(name)].data.view(numpy.uint8), data.view(numpy.uint8)
        )
    ours, source = Checkpoint(out), Checkpoint(release)
    assert ours.model_args(8, 8) == source.model_args(8, 8)
    proto = release / "tokenizer.model"
    assert [ours.open_tokenizer().encode(t, False, False) for t in ("a b", "É\n")] == [
        Tokenizer(proto).encode(t, False, False) for t in ("a b", "É\n")
    ]
    if type == "f16":
        wanted = build(release, dtype="float16").generate([[1, 30, 40]], 8, 0)
        assert build(out, dtype="float16").generate([[1, 30, 40]], 8, 0) == wanted
    assert verify(str(out)) == "21 tensors are whole, as far as can be seen without a checklist.chk"


def test_llama_cpp_loads_what_is_written_and_answers_alike(release: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    for type in ("f16", "q8_0", "q4_0"):
        out = release.parent / f"{type}.gguf"
        convert(str(release), str(out), "gguf", type)
        theirs = llama_cpp.Llama(str(out), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
        ids = build(out).tokenizer.encode("Hello there", bos=True, eos=False)
        assert theirs.tokenize(b"Hello there") == ids
        theirs.eval(ids)
        scores = torch.from_numpy(numpy.array(theirs.scores[: len(ids)])).log_softmax(-1)
        ours = build(out, dtype="float32").model(torch.tensor([ids]))[0].log_softmax(-1)
        assert ((ours - scores).abs() / scores.std()).mean() < (0.003 if type == "f16" else 0.05)


def test_a_file_becomes_a_folder_of_either_layout(tmp_path: Path) -> None:
    values = small_file(tmp_path / "a.gguf", Kind.Q4_K)
    convert(str(tmp_path / "a.gguf"), str(tmp_path / "hf"), "hf")
    reshard(str(tmp_path / "a.gguf"), str(tmp_path / "two"), 2)
    for folder in ("hf", "two"):
        state = build(tmp_path / folder, dtype="float32").model.state_dict()
        assert all(
            torch.equal(state[name], value.half().float())
            for name, value in values.items()
            if value.dim() > 1
        )
        assert verify(str(tmp_path / folder)).endswith("file(s) are whole")


def test_what_cannot_be_written_as_gguf_is_refused_and_leaves_nothing(
    release: Path, args: ModelArgs
) -> None:
    with pytest.raises(
        ValueError, match="type is 'q4_k_m': use 'f16', 'bf16', 'q8_0', 'q4_0', 'q4_1'"
    ):
        convert(str(release), str(release.parent / "a.gguf"), "gguf", "q4_k_m")
    odd = ModelArgs(dim=48, n_layers=1, n_heads=2, vocab_size=512, multiple_of=24)
    folder = write_release(release.parent / "odd", odd, random_state(odd))
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    with pytest.raises(
        ValueError, match=r"has 48 inputs, and q8_0 has blocks of 32: use 'f16' or 'bf16'"
    ):
        convert(str(folder), str(release.parent / "a.gguf"), "gguf", "q8_0")
    assert not list(release.parent.glob("*a.gguf*"))


def test_info_says_what_a_rank_needs_in_the_files_own_bits(tmp_path: Path) -> None:
    small_file(tmp_path / "a.gguf", {"w2": Kind.Q6_K, "": Kind.Q4_0})
    said = info(str(tmp_path / "a.gguf"))
    assert (
        said.startswith("a.gguf: GGUF layout, 1 file(s) of weights, ")
        and "parameters, Q4_0 and Q6_K\n" in said
    )
    heads, first = said.splitlines()[4:6]
    assert heads.split()[-3:] == ["own", "cache", "pass"] and len(first.split()) == 1 + 2 * 7


def test_verify_names_the_tensors_whose_values_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    small_file(path, Kind.Q8_0)
    reader = gguf.GGUFReader(path, "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight").data[
        5, :2
    ] = [0, 0x7C]
    reader.data.flush()
    with pytest.raises(
        ValueError, match=r"a\.gguf: blk\.1\.ffn_up\.weight has values that are not finite"
    ):
        verify(str(path))


@pytest.mark.slow
def test_a_command_line_runs_a_file(tmp_path: Path) -> None:
    small_file(tmp_path / "a.gguf", Kind.Q4_0)
    job = run_python(
        "-m", "llama", "run", tmp_path / "a.gguf", "Hello", "--max_gen_len", "4", "--plain"
    )
    assert job.returncode == 0, job.stderr
