"""Read Hugging Face's layout of the same weights: config.json and safetensors or .bin files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import ModelArgs
from .files import TYPES, check_numbers, map_tensors, read_json
from .names import huggingface_name
from .packed import packing_of, unpacked
from .quantized import Quantized
from .release import Source

# config.json keys -> params.json keys.
CONFIG_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
}
NUMBERS = (*CONFIG_KEYS, "intermediate_size")
MAX_POSITIONS = "max_position_embeddings"
# The supported values of these config.json keys. A key may be missing.
REQUIRED_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


def open_huggingface(path: Path) -> Source:
    """Open a folder in this layout.

    Raises FileNotFoundError and ValueError as `find_files` and `params_of` do.
    """
    config = read_json(path / "config.json")
    params = params_of(config)
    files = find_files(path)
    packing = packing_of(path, config)
    types: tuple[torch.dtype, ...] = TYPES
    if packing is not None:
        types = (*TYPES, torch.int32)
    plain: dict[str, Tensor] = {}
    for file in files:
        plain |= map_tensors(file, types)
    tensors: dict[str, Tensor | Quantized] = {**plain}
    if packing is not None:
        tensors = unpacked(plain, packing)
    embedding = huggingface_name("tok_embeddings.weight")
    if config.get("tie_word_embeddings") and embedding in tensors:
        tensors[huggingface_name("output.weight")] = tensors[embedding]
    return Source(
        layout="Hugging Face",
        params_file="config.json",
        params=params,
        files=files,
        shards={path: tensors},
        name_of=huggingface_name,
        in_halves=True,
        max_positions=config.get(MAX_POSITIONS),
        added_tokens=partial(added_tokens, path),
    )


def added_tokens(path: Path) -> dict[int, str]:
    """Return the ids and texts of the tokens that were added to a folder's vocabulary.

    Raises ValueError if the JSON does not have the expected structure.
    """
    pairs: list[tuple[Any, Any]] = []
    file = path / "added_tokens.json"
    if file.exists():
        pairs = [(token, text) for text, token in read_json(file).items()]
    else:
        file = path / "tokenizer.json"
        entries: Any = []
        if file.exists():
            entries = read_json(file).get("added_tokens", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(
                f"{file} has added_tokens that are not a list of objects: download it again"
            )
        pairs = [(entry.get("id"), entry.get("content")) for entry in entries]
    for token, text in pairs:
        if type(token) is not int or not isinstance(text, str) or not text:
            raise ValueError(
                f"{file} has an added token {text!r} with id {token!r}: download it again"
            )
    return dict(pairs)


def find_files(path: Path) -> list[Path]:
    """Find the weight files: one file, or the files in an index. Prefers safetensors.

    Raises FileNotFoundError if a file is missing, ValueError if the index is broken.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).exists():
            return [path / name]
        if index.exists():
            return indexed_files(index)
    others = list(path.glob("*.safetensors"))
    if len(others) == 1:  # such as gptq_model-4bit-128g.safetensors
        return others
    raise FileNotFoundError(
        f"no model.safetensors, pytorch_model.bin or index of either in {path}/: download it again"
    )


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index lists, each once.

    Raises ValueError if it names a file in another folder, FileNotFoundError if a file is missing.
    """
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(map(is_file_name, parts.values())):
        raise ValueError(
            f"{index} has no weight_map of file names in its folder: download it again"
        )
    files = [index.parent / part for part in sorted(set(parts.values()))]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: {index.name} lists it; download it")
    return files


def is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def params_of(config: dict[str, Any]) -> dict[str, Any]:
    """Convert config.json to the values of params.json.

    Raises ValueError if the model requires computations that are not supported.
    """
    given = {key: value for key, value in config.items() if value is not None}
    for key, wanted in REQUIRED_CONFIG.items():
        value = given.get(key, wanted)
        # Ignore case: some files have LLaMAForCausalLM.
        if value != wanted and str(value).lower() != str(wanted).lower():
            raise ValueError(f"config.json has {key} {value!r}: not supported, only {wanted!r} is")
    defaults: dict[str, Any] = {
        "num_key_value_heads": given.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
    }
    values = defaults | {key: given[key] for key in (*NUMBERS, MAX_POSITIONS) if key in given}
    for key in NUMBERS:
        if key not in values:
            raise ValueError(f"config.json lacks key '{key}': download it again")
    check_numbers("config.json", values, real=("rms_norm_eps",))
    dim = values["hidden_size"]
    heads = values["num_attention_heads"]
    if config.get("head_dim") not in (None, dim // heads):
        raise ValueError(
            f"config.json has head_dim {config['head_dim']}: not supported, only {dim // heads} is"
        )
    params = {ours: values[theirs] for theirs, ours in CONFIG_KEYS.items()}
    if params["n_kv_heads"] == heads:
        del params["n_kv_heads"]  # as in the releases
    return params | feed_forward_params(dim, values["intermediate_size"]) | rope_params(config)


def feed_forward_params(dim: int, hidden_dim: int) -> dict[str, Any]:
    """Return the parameters from which ModelArgs computes the feed-forward width `hidden_dim`.

    ModelArgs rounds the width down to an integer, then up to a multiple of `multiple_of`, which is
    256, as in the release, if that gives this width.
    """
    base = int(8 * dim / 3)
    if base > hidden_dim:
        return {"multiple_of": hidden_dim, "ffn_dim_multiplier": (hidden_dim + 0.5) / base}
    if -(-base // 256) * 256 == hidden_dim:
        return {"multiple_of": 256}
    return {"multiple_of": hidden_dim}


def rope_params(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"config.json has {key} {config[key]!r}: expected a dict")
    rope = config.get("rope_parameters") or {}  # transformers 5: theta and scaling
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(
            f"config.json has rope_scaling of type {kind!r}: not supported, only 'linear' is"
        )
    thetas = (rope.get("rope_theta"), config.get("rope_theta"), 10000.0)
    values = {"rope_theta": next(theta for theta in thetas if theta is not None)}
    if kind == "linear":
        values["rope_scaling_factor"] = scaling.get("factor")
    check_numbers("config.json", values, real=tuple(values))
    return values


def max_positions_of(args: ModelArgs, said: int | None) -> int:
    """Return a model's context length: the layout's value, or else the default of its family."""
    if said:
        return said
    if args.rope_theta == 1e6:  # Code Llama
        return 16384
    return 4096


def config_of(
    args: ModelArgs, dtype: torch.dtype, max_positions: int | None = None
) -> dict[str, Any]:
    """Return the values of config.json for a model."""
    scaling = None
    if args.rope_scaling_factor != 1:
        scaling = {"type": "linear", "factor": args.rope_scaling_factor}
    return {theirs: getattr(args, ours) for theirs, ours in CONFIG_KEYS.items()} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": args.kv_heads,
        "intermediate_size": args.hidden_dim,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        MAX_POSITIONS: max_positions_of(args, max_positions),
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
