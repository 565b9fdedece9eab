"""The Hugging Face layout of the same weights: config.json with safetensors or .bin files.

Tensors have other names there, and the rows of a head's query and key another order: transformers rotates channel i
with i + head_dim / 2, the release 2i with 2i + 1.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import check_numbers, map_pickle, map_safetensors, read_json

# The release's names -> Hugging Face's: of a layer's tensors, and of the others.
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
IGNORED = "rotary_emb.inv_freq"  # precomputed angles in older files

# config.json's keys -> params.json's
CONFIG_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
}
# What the model must say of itself, where it says anything, for our mathematics to be its own.
REQUIRED_CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}


def huggingface_name(name: str) -> str:
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight"""
    stem = name.removesuffix(".weight")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"


def is_rotated(name: str) -> bool:
    return name.split(".")[-2] in ("wq", "wk")


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads × head_dim, …) of whole heads, from Hugging Face's order to the release's."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def difference(held: Set[str], wanted: Set[str]) -> str | None:
    """What is wrong with the names of the tensors that a file holds, the first of it; None if nothing is."""
    if extra := held - wanted:
        return f"holds unknown tensor {min(extra)}"
    if missing := wanted - held:
        return f"lacks tensor {min(missing)}"
    return None


class HuggingFace:
    """A folder in this layout, opened but not read."""

    layout = "Hugging Face"
    params_file = "config.json"

    def __init__(self, path: Path):
        self.path = path
        config = read_json(path / "config.json")
        self.params = params_of(config)
        self.head_dim = self.params["dim"] // self.params["n_heads"]
        self.files = find_files(path)
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            self.tensors |= map_safetensors(file) if file.suffix == ".safetensors" else map_pickle(file)
        embedding = "model.embed_tokens.weight"
        if embedding not in self.tensors or self.tensors[embedding].dim() != 2:
            raise ValueError(f"{path} lacks tensor {embedding}: is it a language model of the Llama family?")
        if config.get("tie_word_embeddings"):
            self.tensors["lm_head.weight"] = self.tensors[embedding]

    def __contains__(self, name: str) -> bool:
        return huggingface_name(name) in self.tensors

    def dtype_of(self, name: str) -> torch.dtype:
        return self.tensors[huggingface_name(name)].dtype

    @property
    def vocab_size(self) -> int:
        return self.tensors["model.embed_tokens.weight"].shape[0]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold exactly the tensors of these names, the release's, and shapes."""
        wanted = {huggingface_name(name): shape for name, shape in shapes.items()}
        if what := difference({name for name in self.tensors if not name.endswith(IGNORED)}, wanted.keys()):
            raise ValueError(f"{self.path} {what}: config.json is of another model, or the files are not of a Llama 2")
        for name, shape in wanted.items():
            if tuple(self.tensors[name].shape) != shape:
                raise ValueError(
                    f"{self.path}: {name} has shape {tuple(self.tensors[name].shape)}, and config.json asks for {shape}"
                )

    def copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        """Fill `out` with the part of a tensor of the release's name that begins at `start` along `dim`."""
        part = self.tensors[huggingface_name(name)].narrow(dim, start, out.shape[dim])
        out.copy_(interleave(part, self.head_dim) if is_rotated(name) else part)


def find_files(path: Path) -> list[Path]:
    """The files with weights: safetensors where there are any, one or as their index lists them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).exists():
            return [path / name]
        if index.exists():
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(p, str) and Path(p).name == p for p in parts.values()):
                raise ValueError(f"{index} has no weight_map of file names in its folder: download it again")
            files = [path / part for part in sorted(set(parts.values()))]
            for file in files:
                if not file.exists():
                    raise FileNotFoundError(f"{file} is missing: {index.name} lists it; download it")
            return files
    raise FileNotFoundError(f"no model.safetensors, pytorch_model.bin or index of either in {path}/: download it again")


def params_of(config: dict[str, Any]) -> dict[str, Any]:
    """params.json's values for a config.json. Raises ValueError for what would need other mathematics."""
    given = {key: value for key, value in config.items() if value is not None}
    for key, wanted in REQUIRED_CONFIG.items():
        if given.get(key, wanted) != wanted:
            raise ValueError(f"config.json has {key} {config[key]!r}: not supported, only {wanted!r} is")
    for key, kind in (("architectures", list), ("rope_scaling", dict), ("rope_parameters", dict)):
        if not isinstance(given.get(key, kind()), kind):
            raise ValueError(f"config.json has {key} {config[key]!r}: expected a {kind.__name__}")
    for architecture in given.get("architectures", ()):
        if str(architecture).lower() != "llamaforcausallm":
            raise ValueError(
                f"config.json has architecture {architecture!r}: not supported, only 'LlamaForCausalLM' is"
            )
    defaults = {"num_key_value_heads": config.get("num_attention_heads"), "rms_norm_eps": 1e-6}
    values: dict[str, Any] = {key: (defaults | given).get(key) for key in (*CONFIG_KEYS, "intermediate_size")}
    for key, value in values.items():
        if value is None:
            raise ValueError(f"config.json lacks key '{key}': download it again")
    check_numbers("config.json", values, real=("rms_norm_eps",))
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    if config.get("head_dim") not in (None, dim // heads):
        raise ValueError(f"config.json has head_dim {config['head_dim']}: not supported, only {dim // heads} is")
    params = {ours: values[theirs] for theirs, ours in CONFIG_KEYS.items()}
    if params["n_kv_heads"] == heads:
        del params["n_kv_heads"]  # as releases have it
    return params | feed_forward_params(dim, values["intermediate_size"]) | rope_params(config)


def feed_forward_params(dim: int, hidden_dim: int) -> dict[str, Any]:
    """Values from which ModelArgs computes this width, rounding down and then up: the release's where they give it."""
    base = int(8 * dim / 3)
    if -(-base // 256) * 256 == hidden_dim:
        return {"multiple_of": 256}
    return {"multiple_of": hidden_dim} | (
        {"ffn_dim_multiplier": (hidden_dim + 0.5) / base} if base > hidden_dim else {}
    )


def rope_params(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}  # of transformers 5, which holds all of it
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"config.json has rope_scaling of type {kind!r}: not supported, only 'linear' is")
    thetas = (rope.get("rope_theta"), config.get("rope_theta"), 10000.0)
    values = {"rope_theta": next(theta for theta in thetas if theta is not None)}
    if kind == "linear":
        values["rope_scaling_factor"] = scaling.get("factor")
    check_numbers("config.json", values, real=tuple(values))
    return values


def config_of(params: dict[str, Any], hidden_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json's values for a model of these params.json values, `vocab_size` and all."""
    config = {theirs: params[ours] for theirs, ours in CONFIG_KEYS.items()}
    factor = params["rope_scaling_factor"]
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": hidden_dim,
        "rope_theta": params["rope_theta"],
        "rope_scaling": None if factor == 1 else {"type": "linear", "factor": factor},
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
