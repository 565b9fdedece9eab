"""The release's layout: consolidated.NN.pth, one for each rank it was made for, and params.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import check_numbers, give_back, map_pickle, read_json
from .source import Source

REQUIRED_PARAMS = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
OPTIONAL_PARAMS = ("n_kv_heads", "ffn_dim_multiplier", "vocab_size", "rope_theta", "rope_scaling_factor")
REAL_PARAMS = ("norm_eps", "rope_theta", "rope_scaling_factor", "ffn_dim_multiplier")
NEWER_PARAMS = {"use_scaled_rope": " (Llama 3.1)"}


class Release(Source):
    """A folder in this layout. Raises FileNotFoundError and ValueError as `find_shards` and `read_params` do."""

    layout = "release"
    params_file = "params.json"
    ignored = "rope.freqs"

    def __init__(self, path: Path):
        files = find_shards(path)
        super().__init__(files, read_params(path / self.params_file), {file: map_pickle(file) for file in files})

    def place(self, name: str, part: Tensor, out: Tensor) -> None:
        out.copy_(part)
        give_back(part)


def find_shards(path: Path) -> list[Path]:
    """consolidated.00.pth to the last one. Raises FileNotFoundError where one is missing in between, or all are."""
    found = sorted(p.name for p in path.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", p.name))
    if not found:
        raise FileNotFoundError(f"no consolidated.*.pth in {path}/: is this the folder that download.sh made?")
    numbers = [name.split(".")[1] for name in found]
    for number in range(int(numbers[-1])):
        if f"{number:02}" not in numbers:
            raise FileNotFoundError(
                f"consolidated.{number:02}.pth is missing: shards {', '.join(numbers)} are there: download it again"
            )
    return [path / name for name in found]


def read_params(path: Path) -> dict[str, Any]:
    """params.json. Raises ValueError for a key that is unknown, as it may change the mathematics, or missing."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}/: is this the folder that download.sh made?")
    params = read_json(path)
    for key in params:
        if key not in REQUIRED_PARAMS + OPTIONAL_PARAMS:
            raise ValueError(f"params.json has unknown key '{key}'{NEWER_PARAMS.get(key, '')}: not supported")
    for key in REQUIRED_PARAMS:
        if key not in params:
            raise ValueError(f"params.json lacks key '{key}': download it again")
    given = {key: value for key, value in params.items() if value is not None or key in REQUIRED_PARAMS}
    sizes = {key: value for key, value in given.items() if (key, value) != ("vocab_size", -1)}
    check_numbers("params.json", sizes, real=REAL_PARAMS)
    return given
