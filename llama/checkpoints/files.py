"""Read files as data: never run code from them, and never trust a count in them."""

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
    """Convert an argument to a Path and expand ~.

    Accepts integers, because the command line parses a file name such as 7 as one. Raises TypeError
    for other values that are not paths.
    """
    if type(path) is int:
        path = str(path)
    try:
        return Path(os.path.expanduser(path))
    except TypeError:
        raise TypeError(f"{what} is {path!r}: use a path") from None


def folder_of(what: str, path: Any, contents: str) -> Path:
    """Return the folder at `path`.

    Raises FileNotFoundError if there is no folder, ValueError if `path` is a file, TypeError if it
    is not a path. Error messages include `what`, the name of the argument, and `contents`, the
    files expected in the folder.
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
    """Raise an OSError with a clear message if the file cannot be opened.

    The errors of torch and safetensors do not include the reason.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        advice = "check that it exists, is a file and is readable"
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
    """Raise ValueError unless all values are positive integers; keys in `real` may have floats."""
    for key, value in values.items():
        types: list[type] = [int]
        kind = "integer"
        if key in real:
            types = [int, float]
            kind = "number"
        if type(value) not in types or not 0 < value < 2**31:
            raise ValueError(f"{file} has {key} {value!r}: expected a positive {kind}")


def import_safetensors(path: Path) -> Any:
    """Import safetensors.torch.

    Raises ImportError with `path`, the file that needs the package, if it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def map_tensors(path: Path, types: tuple[torch.dtype, ...] = TYPES) -> dict[str, Tensor]:
    """Map the tensors of a safetensors or torch.save file into memory without reading them.

    Code in a pickle is refused, not run. Raises ValueError if the file is damaged or incomplete, or
    contains anything but dense tensors of these types.
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
    # On damaged data, the unpickler raises any of a dozen exception types.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{broken} ({reason})") from error
    all_tensors = isinstance(tensors, dict) and all(
        isinstance(value, Tensor) for value in tensors.values()
    )
    if not all_tensors:
        raise ValueError(f"{path} is not a dictionary of tensors: is it a Llama 2 checkpoint?")
    for name, tensor in tensors.items():
        if tensor.dtype not in types or tensor.layout != torch.strided or tensor.is_meta:
            dtype = str(tensor.dtype).removeprefix("torch.")
            readable = ", ".join(str(known).removeprefix("torch.") for known in types)
            raise ValueError(f"{path}: {name} has type {dtype}: only dense {readable} are read")
    return tensors


def give_back(mapped: Tensor) -> None:
    """Release a tensor's pages of a mapped file; a later access reads them from the file again."""
    if not hasattr(mmap, "MADV_DONTNEED") or mapped.numel() == 0:
        return
    first = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    # Stop at the last element: memory after the mapping may belong to something else.
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
        # Read small pieces: right after a checkpoint is written, not all memory is free again.
        while data := counted.read(2**20):
            md5.update(data)
    return md5.hexdigest()
