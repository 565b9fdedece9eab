"""Write a checkpoint as a GGUF file for llama.cpp. Requires the package gguf."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..model import ModelArgs
from .folder import Checkpoint
from .huggingface import max_positions_of
from .names import Shapes, gguf_name
from .vocabulary import adds_prefix, pieces_of

TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1")


class GGUFFile:
    """A checkpoint as a GGUF file, with matrices of one of TYPES and vectors in float32.

    Raises ImportError without the package gguf, ValueError if `type` is not one of TYPES or its
    block size does not divide a matrix's inputs, FileNotFoundError if there is no tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint, args: ModelArgs, shapes: Shapes, type: str):
        if type not in TYPES:
            raise ValueError(f"type is {type!r}: use {', '.join(map(repr, TYPES))}")
        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                "writing GGUF needs the package gguf: pip install '.[gguf]'"
            ) from error
        # Otherwise it logs the names of temporary files.
        logging.getLogger("gguf").setLevel(logging.WARNING)
        self.gguf = gguf
        self.checkpoint = checkpoint
        self.args = args
        self.shapes = shapes
        self.matrices = gguf.GGMLQuantizationType[type.upper()]
        self.vectors = gguf.GGMLQuantizationType.F32
        self.tokenizer = checkpoint.open_tokenizer()
        block, _ = gguf.GGML_QUANT_SIZES[self.matrices]
        for name, shape in shapes.items():
            if len(shape) > 1 and shape[-1] % block:
                inputs = f"{name} has {shape[-1]} inputs, and {type} has blocks of {block}"
                raise ValueError(f"{inputs}: use 'f16' or 'bf16'")

    def type_of(self, name: str) -> Any:
        if len(self.shapes[name]) == 1:
            return self.vectors
        return self.matrices

    def bytes_of(self, name: str) -> int:
        block, size = self.gguf.GGML_QUANT_SIZES[self.type_of(name)]
        return math.prod(self.shapes[name]) // block * size

    @property
    def size(self) -> int:
        """The size of the tensors in bytes, without the header."""
        return sum(map(self.bytes_of, self.shapes))

    def write(self, path: Path) -> None:
        """Write the file, holding one tensor in memory at a time."""
        writer = self.gguf.GGUFWriter(path, "llama")
        self.add_shape(writer)
        self.add_vocabulary(writer)
        float32 = torch.empty(0).numpy().dtype
        for name, shape in self.shapes.items():
            writer.add_tensor_info(
                gguf_name(name), shape, float32, self.bytes_of(name), self.type_of(name)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in tqdm(
            self.shapes.items(), desc=path.name, unit="tensor", leave=False, disable=None
        ):
            values = torch.empty(shape)
            self.checkpoint.copy(name, 0, values)
            writer.write_tensor_data(self.gguf.quants.quantize(values.numpy(), self.type_of(name)))
        writer.close()

    def add_shape(self, writer: Any) -> None:
        args = self.args
        writer.add_name(self.checkpoint.name)
        writer.add_file_type(self.gguf.LlamaFileType[f"MOSTLY_{self.matrices.name}"])
        writer.add_vocab_size(args.vocab_size)
        writer.add_context_length(max_positions_of(args, self.checkpoint.source.max_positions))
        writer.add_embedding_length(args.dim)
        writer.add_block_count(args.n_layers)
        writer.add_feed_forward_length(args.hidden_dim)
        writer.add_head_count(args.n_heads)
        writer.add_head_count_kv(args.kv_heads)
        writer.add_rope_dimension_count(args.head_dim)
        writer.add_rope_freq_base(args.rope_theta)
        writer.add_layer_norm_rms_eps(args.norm_eps)
        if args.rope_scaling_factor != 1:
            writer.add_rope_scaling_type(self.gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(args.rope_scaling_factor)
        if self.matrices.name.startswith("Q"):
            writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)

    def add_vocabulary(self, writer: Any) -> None:
        tokenizer = self.tokenizer
        proto = tokenizer.sp_model.serialized_model_proto()
        texts, scores, kinds = zip(*pieces_of(proto), strict=True)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(list(texts))
        writer.add_token_scores(list(scores))
        writer.add_token_types(list(kinds))
        writer.add_bos_token_id(tokenizer.bos_id)
        writer.add_eos_token_id(tokenizer.eos_id)
        writer.add_unk_token_id(tokenizer.sp_model.unk_id())
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(adds_prefix(proto))
        if tokenizer.chat_template is not None:
            writer.add_chat_template(tokenizer.chat_template)
