"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in PEFT's layout, merged into the weights as
they are loaded.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from .files import check_numbers, folder_of, map_tensors, read_json
from .names import Shapes, huggingface_name, interleave, is_rotary

# What an adapter's config may say without a change of the merged weights. Anything else has to be
# unset.
HARMLESS_CONFIG = (
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
    }
    | {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}
    | {
        "lora_alpha",
        "lora_dropout",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "task_type",
        "use_rslora",
    }
)
# others change W
HARMLESS_VALUES: dict[str, list[Any]] = {"bias": ["none"], "init_lora_weights": [True, "gaussian"]}


class Adapter:
    """W + scale × B A for each adapted weight, scale = alpha / r, or alpha / √r with `use_rslora`.

    Raises ValueError for a config that asks for anything else, FileNotFoundError for missing files.
    """

    def __init__(self, adapter_dir: str | os.PathLike[str]):
        self.path = folder_of("adapter_dir", adapter_dir, "adapter_config.json")
        config: dict[str, Any] = {"r": None, "lora_alpha": None} | read_json(
            self.path / "adapter_config.json"
        )
        if (kind := config.get("peft_type")) != "LORA":
            raise ValueError(
                f"adapter_config.json has peft_type {kind!r}: not supported, only 'LORA' is"
            )
        for key, value in config.items():
            if value and key not in HARMLESS_CONFIG and value not in HARMLESS_VALUES.get(key, []):
                said = f"adapter_config.json has {key} {value!r}"
                raise ValueError(f"{said}, which would change the result: not supported")
        self.rank = config["r"]
        alpha = config["lora_alpha"]
        check_numbers(
            "adapter_config.json", {"r": self.rank, "lora_alpha": alpha}, real=("lora_alpha",)
        )
        self.scale = alpha / (math.sqrt(self.rank) if config.get("use_rslora") else self.rank)
        # 0 is a layer
        partial = config.get("layers_to_transform") is not None or config.get("exclude_modules")
        targets = config.get("target_modules")
        self.whole_targets = targets if isinstance(targets, list) and not partial else []
        self.tensors = map_tensors(self.path / "adapter_model.safetensors")

    def stem_of(self, name: str) -> str:
        return "base_model.model." + huggingface_name(name).removesuffix(".weight")

    def check(self, shapes: Shapes) -> None:
        """Raise ValueError unless every tensor of the adapter belongs to a linear weight of these
        names and shapes.
        """
        if not self.tensors:
            raise ValueError(f"adapter {self.path} has no tensors: download it again")
        wanted: Shapes = {}
        for name, shape in shapes.items():
            if len(shape) == 2 and name.startswith("layers."):
                stem = self.stem_of(name)
                pair = {
                    f"{stem}.lora_A.weight": (self.rank, shape[1]),
                    f"{stem}.lora_B.weight": (shape[0], self.rank),
                }
                missing = pair.keys() - self.tensors.keys()
                if len(missing) == 1 or (missing and stem.split(".")[-1] in self.whole_targets):
                    raise ValueError(
                        f"adapter {self.path} lacks tensor {min(missing)}: download it again"
                    )
                wanted |= pair
        for name, tensor in self.tensors.items():
            if name not in wanted:
                modules = ", ".join(sorted({key.split(".")[-3] for key in wanted}))
                raise ValueError(
                    f"adapter {self.path} has tensor {name}: only {modules} of the model can be adapted"
                )
            if tuple(tensor.shape) != wanted[name]:
                raise ValueError(
                    f"adapter {self.path}: {name} has shape {tuple(tensor.shape)}, and the model asks for "
                    f"{wanted[name]}: it is an adapter of another model"
                )

    def add(self, name: str, dim: int, start: int, head_dim: int, out: Tensor) -> None:
        """Add the update of the part of a weight that begins at `start` along `dim` to `out`,
        computed in float32.
        """
        stem = self.stem_of(name)
        if f"{stem}.lora_B.weight" not in self.tensors:
            return
        b, a = (
            self.tensors[f"{stem}.lora_{factor}.weight"].to(out.device, torch.float32)
            for factor in "BA"
        )
        if is_rotary(name):
            b = interleave(b, head_dim)
        length = out.shape[dim]
        b, a = (b.narrow(0, start, length), a) if dim == 0 else (b, a.narrow(1, start, length))
        out.copy_(out.float().addmm_(b, a, alpha=self.scale))
