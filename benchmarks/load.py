"""Compare loading a checkpoint with a plain read of its bytes: python benchmarks/load.py

Loads the shape 1b in bfloat16, as 1, 2 and 4 shards and in the Hugging Face layout, and as GGUF
files that stay quantized. The page cache is warm. Prints Markdown.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fire
import torch
import weights
from contender import names, seconds

from llama import Llama
from llama.checkpoints.convert import reshard


def files_of(folder: Path) -> list[Path]:
    return (
        [folder]
        if folder.is_file()
        else sorted([*folder.glob("*.pth"), *folder.glob("*.safetensors")])
    )


def plain_read(folder: Path) -> None:
    for file in files_of(folder):
        with file.open("rb", buffering=0) as stream:
            room = memoryview(torch.empty(file.stat().st_size, dtype=torch.uint8).numpy())
            while room:  # Linux reads at most 2 GiB at once
                room = room[stream.readinto(room) :]


def main(
    shape: str = "1b",
    rounds: int = 5,
    folder: str | None = None,
    only: tuple[str, ...] | str = ("",),
) -> None:
    """Print the table.

    `folder`: keep the weights there. `only`: parts of layout names, separated by commas.
    """
    with tempfile.TemporaryDirectory() as scratch:
        base = weights.make(shape, Path(folder or scratch))

        def resharded(shards: int) -> Path:
            target = base / f"{shards}-shards"
            if not target.exists():
                reshard(str(base), str(target), shards)
            return target

        makers: dict[str, Callable[[], Path]] = {"1 shard": lambda: base}
        makers |= {f"{shards} shards": partial(resharded, shards) for shards in (2, 4)}
        makers |= {"Hugging Face": lambda: weights.as_huggingface(base)}
        makers |= {
            f"GGUF {kind}": partial(weights.as_gguf, base, kind) for kind in ("q8_0", "q4_0")
        }
        wanted = names(only) or [""]
        folders = {
            name: make() for name, make in makers.items() if any(part in name for part in wanted)
        }

        def build(path: Path) -> None:
            kind = {} if path.is_file() else {"dtype": "bfloat16"}
            Llama.build(
                path,
                None if path.is_file() else base / "tokenizer.model",
                16,
                1,
                device="cpu",
                **kind,
            )

        build(next(iter(folders.values())))  # warms up imports and the page cache
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
        for _ in range(rounds):
            for name, path in folders.items():
                times[name].append(
                    (seconds(partial(plain_read, path)), seconds(partial(build, path)))
                )
        print("| layout | GB | plain read, s (GB/s) | load, s (GB/s) | load / read |")
        print("| --- | --- | --- | --- | --- |")
        for name, path in folders.items():
            read, load = (statistics.median(column) for column in zip(*times[name], strict=True))
            size = sum(file.stat().st_size for file in files_of(path)) / 1e9
            ratio = statistics.median(b / a for a, b in times[name])
            rates = f"{read:.2f} ({size / read:.1f}) | {load:.2f} ({size / load:.1f})"
            print(f"| {name} | {size:.2f} | {rates} | {ratio:.2f} |")


if __name__ == "__main__":
    fire.Fire(main)
