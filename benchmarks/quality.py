"""Measure the accuracy and speed of each weight format: python benchmarks/quality.py

Prints for each format the error of a product against float64 with the same weights and with
outliers in the activations, the time of this product for one row, and the perplexity of
llama-2-tiny on documents that it was not trained on.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import torch
from contender import seconds

from llama import Llama, ops
from llama.checkpoints.convert import convert
from llama.cli.perplexity import Window, score
from llama.quantization.formats import INT4, INT8, WeightFormat, fastest_16_bits

TINY = Path(__file__).resolve().parents[1] / "llama-2-tiny"
# Matrices of 1b's feed-forward, and enough of them that none stays in a CPU cache.
ROWS = 5632
COLUMNS = 2048
MATRICES = 12
OUTLIER = 100.0


def documents(count: int) -> list[str]:
    sys.path.insert(0, str(TINY))
    import world  # type: ignore[import-not-found]

    rng = random.Random(2024)
    texts = []
    while len(texts) < count:
        document = world.document(rng, held_out=True)
        if isinstance(document, str):  # not a dialog
            texts.append(document)
    return texts


class Parameter(torch.nn.Module):
    """A weight that is not packed."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight)

    def dequantize(self) -> torch.Tensor:
        return self.weight


def packed(weight: torch.Tensor, format: WeightFormat) -> Any:
    """Return a module that multiplies by a weight in this format."""
    module = None if format.pack is None else format.pack(weight)
    return module or Parameter(weight.to(format.dtype or weight.dtype))


def product(format: WeightFormat) -> tuple[float, float]:
    """Return the relative error, and the milliseconds for one row."""
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for _ in range(MATRICES):
        weight = torch.randn(ROWS, COLUMNS, generator=generator) * COLUMNS**-0.5
        matrices.append(packed(weight, format))
    x = torch.randn(1, 1, COLUMNS, generator=generator)
    x[..., ::256] *= OUTLIER
    exact = x.double() @ matrices[0].dequantize().double().T
    error = ((matrices[0](x) - exact).norm() / exact.norm()).item()
    times = [seconds(lambda: [own(x) for own in matrices]) / MATRICES for _ in range(30)]
    return error, statistics.median(times) * 1e3


def changed_texts(llm: Llama, texts: list[str]) -> int:
    """How many greedy continuations of the texts' beginnings differ between a batch and alone."""
    prompts = [" ".join(text.split()[:5]) for text in texts]
    together = llm.text_completion(prompts, temperature=0, max_gen_len=48)
    changed = 0
    for prompt, result in zip(prompts, together, strict=True):
        llm.clear_cache()
        (alone,) = llm.text_completion([prompt], temperature=0, max_gen_len=48)
        changed += alone["generation"] != result["generation"]
    return changed


@torch.inference_mode()
def main(count: int = 300) -> None:
    """Print the table. `count`: number of documents."""
    texts = documents(count)
    formats = {"int8": INT8, "int4": INT4}
    sixteen = fastest_16_bits()
    if sixteen is not None:
        formats = {"auto": sixteen, **formats}
    print("| format | error of a product | ms, 1 row | perplexity | texts changed by a batch |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        kinds: dict[str, tuple[Path, dict[str, Any]]] = {
            "float32": (TINY, {"dtype": "float32"}),
            "auto": (TINY, {}),
            "int8": (TINY, {"quantize": "int8"}),
            "int4": (TINY, {"quantize": "int4"}),
        }
        for type in ("q8_0", "q4_0", "q4_1"):
            path = Path(scratch, f"{type}.gguf")
            convert(str(TINY), str(path), "gguf", type)
            kinds[f"GGUF {type}"] = path, {}
        for name, (path, options) in kinds.items():
            llm = Llama.build(path, None, 512, 8, device="cpu", **options)
            ids = [llm.tokenizer.encode(text, bos=True, eos=True) for text in texts]
            perplexity = score(llm, [Window(row, len(row) - 1) for row in ids]).perplexity
            error, time = product(formats[name]) if name in formats else (None, None)
            cells = "– | –" if error is None or time is None else f"{error:.1e} | {time:.2f}"
            changed = f"{changed_texts(llm, texts)} of {len(texts)}"
            print(f"| {name} | {cells} | {perplexity:.4f} | {changed} |", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
