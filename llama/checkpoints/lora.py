"""LoRA adapters in PEFT's layout, merged into the weights as they are loaded.

Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from .files import check_numbers, folder_of, map_tensors, read_json
from .names import Shapes, huggingface_name, interleave, is_rotary

# Keys of an adapter's config that are supported or do not change the merged weights. All others
# must be unset.
HARMLESS_CONFIG = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Any other value of these keys changes W.
HARMLESS_VALUES: dict[str, list[Any]] = {"bias": ["none"], "init_lora_weights": [True, "gaussian"]}


class Adapter:
    """A LoRA adapter: W + scale × B A, with scale = alpha / r, or alpha / √r with `use_rslora`.

    Raises ValueError if the config requires anything else, FileNotFoundError if a file is missing.
    """

    def __init__(self, adapter_dir: str | os.PathLike[str]):
        self.path = folder_of("adapter_dir", adapter_dir, "adapter_config.json")
        defaults: dict[str, Any] = {"r": None, "lora_alpha": None}
        config = defaults | read_json(self.path / "adapter_config.json")
        kind = config.get("peft_type")
        if kind != "LORA":
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
        self.scale = alpha / self.rank
        if config.get("use_rslora"):
            self.scale = alpha / math.sqrt(self.rank)
        # Compare with None: layers_to_transform may be 0, the number of a layer.
        partial = config.get("layers_to_transform") is not None or config.get("exclude_modules")
        targets = config.get("target_modules")
        # Modules that must be adapted in every layer.
        self.whole_targets: list[Any] = []
        if isinstance(targets, list) and not partial:
            self.whole_targets = targets
        self.tensors = map_tensors(self.path / "adapter_model.safetensors")

    def stem_of(self, name: str) -> str:
        return "base_model.model." + huggingface_name(name).removesuffix(".weight")

    def check(self, shapes: Shapes) -> None:
        """Raise ValueError unless every tensor of the adapter fits a linear weight of the model.

        `shapes` are the shapes of the model's tensors.
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
                    f"adapter {self.path} has tensor {name}: "
                    f"only {modules} of the model can be adapted"
                )
            if tuple(tensor.shape) != wanted[name]:
                raise ValueError(
                    f"adapter {self.path}: {name} has shape {tuple(tensor.shape)}, "
                    f"and the model requires {wanted[name]}: it is an adapter for another model"
                )

    def add(self, name: str, dim: int, start: int, head_dim: int, out: Tensor) -> None:
        """Add the update for a part of a weight to `out`, computing in float32.

        The part begins at index `start` of dimension `dim`.
        """
        stem = self.stem_of(name)
        if f"{stem}.lora_B.weight" not in self.tensors:
            return
        a = self.tensors[f"{stem}.lora_A.weight"].to(out.device, torch.float32)
        b = self.tensors[f"{stem}.lora_B.weight"].to(out.device, torch.float32)
        if is_rotary(name):
            b = interleave(b, head_dim)
        length = out.shape[dim]
        if dim == 0:
            b = b.narrow(0, start, length)
        else:
            a = a.narrow(1, start, length)
        out.copy_(out.float().addmm_(b, a, alpha=self.scale))
