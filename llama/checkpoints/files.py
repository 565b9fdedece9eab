"""Reading files as data: no code in them runs, and no count in them is trusted."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def size_text(n: int) -> str:
    if n >= 1e8:
        return f"{n / 1e9:.1f} GB"
    return f"{n / 1e6:.1f} MB"


def path_of(what: str, path: Any) -> Path:
    """A path with ~ for a home; a command line makes an integer of a name such as 7.

    Raises TypeError for what is no path.
    """
    if type(path) is int:
        path = str(path)
    try:
        return Path(os.path.expanduser(path))
    except TypeError:
        raise TypeError(f"{what} is {path!r}: use a path") from None


def folder_of(what: str, path: Any, contents: str) -> Path:
    """The folder at `path`. Errors name its `contents`, and `what` the path is.

    Raises FileNotFoundError or, for a file, ValueError, saying what to do.
    """
    folder = path_of(what, path)
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file: pass the folder that holds it, {folder.absolute().parent}"
        )
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.parent.exists()
        advice = ""
        if hub:
            fetch = f"run hf download {path} --local-dir {folder.name} and pass {folder.name}"
            advice = f"; if it is a name on the Hugging Face hub, {fetch}"
        raise FileNotFoundError(f"no folder {path}: pass the folder that holds {contents}{advice}")
    return folder


def check_readable(path: Path) -> None:
    """Raise what opening the file raises, as a sentence.

    The errors of torch and safetensors do not name the reason.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        advice = "check that it is there, a file, and yours to read"
        raise type(error)(f"{path} cannot be read ({error.strerror}): {advice}") from error


def read_json(path: Path) -> dict[str, Any]:
    check_readable(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return value


def check_numbers(file: str, values: dict[str, Any], real: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless all are positive integers; those named in `real` may be floats."""
    for key, value in values.items():
        types: list[type] = [int]
        kind = "integer"
        if key in real:
            types = [int, float]
            kind = "number"
        if type(value) not in types or not 0 < value < 2**31:
            raise ValueError(f"{file} has {key} {value!r}: expected a positive {kind}")


def import_safetensors(path: Path) -> Any:
    """The package's functions for torch. Errors name `path`, the file that needs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def map_tensors(path: Path, types: tuple[torch.dtype, ...] = TYPES) -> dict[str, Tensor]:
    """The tensors of a file of safetensors, or of torch.save, mapped and not read.

    Code in a pickle is refused, not run. Raises ValueError for what is no whole file of dense
    tensors of these types.
    """
    broken = f"{path} is not a whole PyTorch checkpoint: download it again"
    load: Callable[[Path], Any] = partial(
        torch.load, map_location="cpu", mmap=True, weights_only=True
    )
    if path.suffix == ".safetensors":
        broken = f"{path} is not a whole safetensors file: download it again"
        load = import_safetensors(path).load_file
    check_readable(path)
    try:
        tensors = load(path)
    # The unpickler raises any of a dozen types over damaged bytes.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{broken} ({reason})") from error
    all_tensors = isinstance(tensors, dict) and all(
        isinstance(value, Tensor) for value in tensors.values()
    )
    if not all_tensors:
        raise ValueError(f"{path} is not a dictionary of tensors: is it a checkpoint of Llama 2?")
    for name, tensor in tensors.items():
        if tensor.dtype not in types or tensor.layout != torch.strided or tensor.is_meta:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path}: {name} is of {dtype}: only dense float32, bfloat16 and float16 are read"
            )
    return tensors


def give_back(mapped: Tensor) -> None:
    """Take a tensor's pages of a mapped file out of this process; they can be read in again."""
    if not hasattr(mmap, "MADV_DONTNEED") or mapped.numel() == 0:
        return
    first = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    # Not beyond the last element: what follows a file's pages is not the file's.
    extent = 1
    for n, stride in zip(mapped.shape, mapped.stride(), strict=True):
        extent += (n - 1) * stride
    length = mapped.data_ptr() - first + extent * mapped.element_size()
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def md5_of(file: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    size = file.stat().st_size
    with (
        file.open("rb") as stream,
        tqdm.wrapattr(stream, "read", size, desc=file.name, leave=False, disable=None) as counted,
    ):
        # in small pieces: after a checkpoint was written, not all memory is given back yet
        while data := counted.read(2**20):
            md5.update(data)
    return md5.hexdigest()
