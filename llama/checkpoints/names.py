"""The tensors of a Llama 2 model: names in each layout, sharding, and order of rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # of whole tensors, by name in the release


class Entry(NamedTuple):
    dim: int | None  # that is split over the shards; None: every shard has the whole tensor
    huggingface: str
    gguf: str
    # Whether rows are channels of heads, rotated in pairs. Hugging Face pairs other rows.
    rotary: bool = False


# Keys are names in the release. * is a layer's number. Every layout appends ".weight".
TENSORS = {
    "tok_embeddings": Entry(1, "model.embed_tokens", "token_embd"),
    "layers.*.attention_norm": Entry(None, "model.layers.*.input_layernorm", "blk.*.attn_norm"),
    "layers.*.attention.wq": Entry(
        0, "model.layers.*.self_attn.q_proj", "blk.*.attn_q", rotary=True
    ),
    "layers.*.attention.wk": Entry(
        0, "model.layers.*.self_attn.k_proj", "blk.*.attn_k", rotary=True
    ),
    "layers.*.attention.wv": Entry(0, "model.layers.*.self_attn.v_proj", "blk.*.attn_v"),
    "layers.*.attention.wo": Entry(1, "model.layers.*.self_attn.o_proj", "blk.*.attn_output"),
    "layers.*.ffn_norm": Entry(None, "model.layers.*.post_attention_layernorm", "blk.*.ffn_norm"),
    "layers.*.feed_forward.w1": Entry(0, "model.layers.*.mlp.gate_proj", "blk.*.ffn_gate"),
    "layers.*.feed_forward.w2": Entry(1, "model.layers.*.mlp.down_proj", "blk.*.ffn_down"),
    "layers.*.feed_forward.w3": Entry(0, "model.layers.*.mlp.up_proj", "blk.*.ffn_up"),
    "norm": Entry(None, "model.norm", "output_norm"),
    "output": Entry(0, "lm_head", "output"),
}


def entry(name: str) -> Entry:
    """Look up a tensor by its full name, such as `layers.0.attention.wq.weight`."""
    return TENSORS[re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))]


def shard_dim(name: str) -> int | None:
    return entry(name).dim


def part_shape(name: str, whole: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Return the shape of one of `parts` equal parts of a tensor of shape `whole`."""
    shape = list(whole)
    dim = shard_dim(name)
    if dim is not None:
        shape[dim] //= parts
    return tuple(shape)


def whole_shape(name: str, part: Sequence[int], parts: int) -> tuple[int, ...]:
    """Return the shape of a tensor whose `parts` equal parts have shape `part`."""
    shape = list(part)
    dim = shard_dim(name)
    if dim is not None:
        shape[dim] *= parts
    return tuple(shape)


def is_rotary(name: str) -> bool:
    return entry(name).rotary


def huggingface_name(name: str) -> str:
    """Convert layers.0.attention.wq.weight to model.layers.0.self_attn.q_proj.weight."""
    return with_number(entry(name).huggingface, name)


def gguf_name(name: str) -> str:
    """Convert layers.0.attention.wq.weight to blk.0.attn_q.weight."""
    return with_number(entry(name).gguf, name)


def with_number(stem: str, name: str) -> str:
    return stem.replace("*", name.split(".")[1]) + ".weight"


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rotary rows of whole heads from Hugging Face's order to the release's and GGUF's.

    `weight` is (heads × head_dim, …). transformers rotates channel i with i + head_dim / 2; the
    release rotates 2i with 2i + 1.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Undo `interleave`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
