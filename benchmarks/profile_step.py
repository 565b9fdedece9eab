"""Profile one decode step and one prompt: python benchmarks/profile_step.py --shape 1b

Prints, for each, the operations that take the most time on the CPU or the GPU, and the share of
matrix products.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import fire
import torch
import weights
from contender import Ours, prompt_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Products with weights, by the names of their kernels in a profile.
PRODUCTS = (
    *("llama::multiply", "linear_pointwise", "linear_dynamic_fp16", "aten::mm", "aten::addmm"),
    # On a GPU.
    *("int8pack_mm", "int4pack_mm", "_multiply", "gemm", "nvjet", "splitK"),
)


def show(what: str, profiled: profile, repeats: int, rows: int = 12) -> None:
    gpu = torch.cuda.is_available()
    events = [
        event
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CUDA or not gpu
    ]

    def own(event: Any) -> float:
        """Return the milliseconds in the operation itself, or in the kernel on a GPU."""
        return (
            float(event.self_device_time_total if gpu else event.self_cpu_time_total)
            / repeats
            / 1e3
        )

    total = sum(map(own, events))
    products = sum(own(event) for event in events if any(name in event.key for name in PRODUCTS))
    print(f"\n{what}: {total:.2f} ms, {products / total:.0%} of it in matrix products\n")
    print(f"{'operation':<50} {'ms':>9} {'share':>6} {'calls':>6}")
    for event in sorted(events, key=own, reverse=True)[:rows]:
        print(
            f"{event.key[:50]:<50} {own(event):>9.3f} {own(event) / total:>6.1%} {event.count / repeats:>6.0f}"
        )


def main(
    shape: str = "1b",
    kind: str = "auto",
    batch: int = 1,
    length: int = 128,
    folder: str | None = None,
) -> None:
    """Print the profiles.

    `kind`: a dtype, int8 or int4. `batch`: rows per step. `length`: tokens in the prompt.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    repeats = 16
    with tempfile.TemporaryDirectory() as scratch:
        contender = Ours(weights.make(shape, Path(folder or scratch)), kind, length + 128, batch)
        contender.generate([prompt_of(length)], 1)  # the first pass allocates
        with profile(activities=activities) as prompt:
            contender.generate([prompt_of(length, 1)], 1)
        show(f"prompt of {length} tokens", prompt, 1)
        texts = [f"{seed}" for seed in range(batch)]
        steps = contender.llm.stream_text_completion(texts, temperature=0, max_gen_len=repeats + 8)
        for _ in range(4 * batch):
            next(steps)
        with profile(activities=activities) as decode:
            for _ in range(repeats * batch):
                next(steps)
        show(f"decode step of {batch} row(s)", decode, repeats)


if __name__ == "__main__":
    fire.Fire(main)
