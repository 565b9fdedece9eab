"""GGUF files with random weights, written and read by the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import torch

from llama import ModelArgs, Tokenizer
from llama.checkpoints.names import gguf_name
from llama.checkpoints.vocabulary import pieces_of

Kind = gguf.GGMLQuantizationType
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
K_KINDS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]

# Byte offsets of the factors in a K-quant block, and the largest value of each: with these, weights
# are about as large as trained ones.
FACTORS = {
    Kind.Q2_K: {80: 0.02, 82: 0.02},
    Kind.Q3_K: {108: 0.002},
    Kind.Q4_K: {0: 0.0004, 2: 0.003},
    Kind.Q5_K: {0: 0.0002, 2: 0.003},
    Kind.Q6_K: {208: 0.00004},
}


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> numpy.ndarray[Any, Any]:
    """Return a matrix of random weights as (rows, bytes).

    The weights have a normal distribution if gguf can quantize to this type. Otherwise the blocks
    are random bytes with factors of a realistic size.
    """
    rng = numpy.random.default_rng(seed)
    if kind not in FACTORS:
        weights = rng.standard_normal((rows, columns)).astype(numpy.float32) * numpy.float32(
            1.5 / columns**0.5
        )
        return gguf.quants.quantize(weights, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=numpy.uint8)
    for at, largest in FACTORS[kind].items():
        factors = rng.uniform(largest / 4, largest, (rows, columns // block, 1)).astype(
            numpy.float16
        )
        raw[:, :, at : at + 2] = factors.view(numpy.uint8)
    return raw.reshape(rows, -1)


def dequantized(kind: Kind, blocks: numpy.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind).astype(numpy.float32))


def small_args(tokenizer: Tokenizer) -> ModelArgs:
    """Return widths that are whole blocks, and whole groups of 32 on 1, 2 and 4 ranks."""
    return ModelArgs(
        dim=256,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=tokenizer.n_words,
        multiple_of=256,
        max_seq_len=64,
    )


def write_gguf(
    path: Path,
    args: ModelArgs,
    tokenizer: Tokenizer,
    kind: Kind | dict[str, Kind],
    shapes: dict[str, tuple[int, ...]],
    **metadata: Any,
) -> dict[str, torch.Tensor]:
    """Write a GGUF file and return the values of its tensors.

    `kind` is the type of all matrices, or maps endings of their names to types. `metadata` replaces
    entries of the architecture; the keys omit the prefix `llama.`.
    """
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    eos = metadata.pop("tokenizer.ggml.eos_token_id", None)
    said = {
        "context_length": 4096,
        "embedding_length": args.dim,
        "block_count": args.n_layers,
        "feed_forward_length": args.hidden_dim,
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.kv_heads,
        "rope.dimension_count": args.head_dim,
    } | metadata
    writer.add_layer_norm_rms_eps(args.norm_eps)
    for key, value in said.items():
        if isinstance(value, str):
            writer.add_string(key if "tokenizer" in key else f"llama.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{key}", value)
    add_vocabulary(writer, tokenizer, eos)
    values = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            norm = 1 + 0.1 * numpy.random.default_rng(seed).standard_normal(shape).astype(
                numpy.float32
            )
            writer.add_tensor(gguf_name(name), norm)
            values[name] = torch.from_numpy(norm)
            continue
        own = (
            kind
            if isinstance(kind, Kind)
            else next(k for end, k in kind.items() if name.endswith(f"{end}.weight"))
        )
        blocks = random_blocks(own, *shape, seed=seed)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=own)
        values[name] = dequantized(own, blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, eos: int | None = None) -> None:
    texts, scores, kinds = zip(*pieces_of(tokenizer.sp_model.serialized_model_proto()), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(texts))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id if eos is None else eos)
    writer.add_unk_token_id(tokenizer.sp_model.unk_id())
