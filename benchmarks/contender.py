"""Measure one contender and print JSON: python benchmarks/contender.py NAME FOLDER

speed.py runs each contender in a process of its own. Every contender gets the same token ids and
decodes greedily through the interface that its users call.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import numpy
import torch
import weights

DECODE_PROMPT = 32
RAGGED_LENGTHS = [8, 512, 33, 256, 90, 17, 384, 64, 128, 450, 12, 200, 300, 48, 150, 24]
RAGGED_NEW = 64


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [1, *random.Random(seed).choices(range(3, weights.VOCAB_SIZE), k=length - 1)]


class Ours:
    """This library. `kind` is a dtype, a quantization, or the type of a GGUF file."""

    @staticmethod
    def convert(folder: Path, kind: str) -> Path:
        return weights.as_gguf(folder, kind) if kind.startswith("q") else folder

    def __init__(self, folder: Path, kind: str, context: int, rows: int):
        from llama.cli.allocator import build_llama  # as the commands do
        from llama.generation import BuildOptions

        options: dict[str, Any] = {"quantize": kind} if kind.startswith("int") else {"dtype": kind}
        if kind.startswith("q"):
            options = {}
        self.llm = build_llama(folder, BuildOptions(None, context, rows, **options))
        # Random weights generate EOS by chance, but no contender may stop early.
        self.llm.tokenizer.eos_id = -1

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return self.llm.generate(prompts, new, temperature=0)[0]


class Transformers:
    """transformers: left-padded batches through model.generate."""

    @staticmethod
    def convert(folder: Path, kind: str) -> Path:
        return weights.as_huggingface(folder)

    def __init__(self, folder: Path, kind: str, context: int, rows: int):
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).to(
            device
        )

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        rows: list[list[int]] = out[:, longest:].tolist()
        return rows


class LlamaCpp:
    """llama-cpp-python's low-level interface.

    Rows are sequences of one batch, as in llama.cpp's own server.
    """

    BATCH = 512  # tokens per call; llama.cpp's default for its physical batch

    @staticmethod
    def convert(folder: Path, kind: str) -> Path:
        return weights.as_gguf(folder, kind)

    def __init__(self, folder: Path, kind: str, context: int, rows: int):
        import llama_cpp

        self.api = llama_cpp
        threads = torch.get_num_threads()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(folder).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * rows
        params.n_batch = self.BATCH
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(self.BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        fed = [
            (row, at, token)
            for row, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        for _ in range(new):
            for first in range(0, len(fed), self.BATCH):
                self.decode(prompts, fed[first : first + self.BATCH], answers)
            fed = [
                (row, len(prompts[row]) + len(ids) - 1, ids[-1]) for row, ids in enumerate(answers)
            ]
        return answers

    def decode(
        self, prompts: list[list[int]], fed: list[tuple[int, int, int]], answers: list[list[int]]
    ) -> None:
        """Run tokens (row, position, id); append the likeliest next token to each row's answer."""
        batch = self.batch
        last = []
        batch.n_tokens = len(fed)
        for i, (row, at, token) in enumerate(fed):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at, 1
            batch.seq_id[i][0] = row
            batch.logits[i] = at >= len(prompts[row]) - 1
            last += [(i, row)] * batch.logits[i]
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        for i, row in last:
            logits = self.api.llama_get_logits_ith(self.context, i)
            scores = numpy.ctypeslib.as_array(logits, shape=(weights.VOCAB_SIZE,))
            answers[row].append(int(scores.argmax()))


CONTENDERS: dict[str, tuple[type[Any], str]] = {
    "llama auto": (Ours, "auto"),
    "llama float32": (Ours, "float32"),
    "llama bfloat16": (Ours, "bfloat16"),
    "llama int8": (Ours, "int8"),
    "llama int4": (Ours, "int4"),
    "llama q8_0": (Ours, "q8_0"),
    "llama q4_0": (Ours, "q4_0"),
    "transformers bfloat16": (Transformers, "bfloat16"),
    "transformers float32": (Transformers, "float32"),
    "llama.cpp f16": (LlamaCpp, "f16"),
    "llama.cpp q8_0": (LlamaCpp, "q8_0"),
    "llama.cpp q4_0": (LlamaCpp, "q4_0"),
    "llama.cpp q4_1": (LlamaCpp, "q4_1"),
}


def names(given: tuple[str, ...] | str) -> list[str]:
    """Split comma-separated names, which fire may have made a tuple."""
    return [
        name.strip()
        for name in (given.split(",") if isinstance(given, str) else given)
        if name.strip()
    ]


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that one run takes.

    There is no need to synchronize a GPU: contenders return token ids that the host has read.
    """
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes.

    Linux's ru_maxrss is not used: it includes the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def measure(name: str, folder: str, quick: bool = False, only: tuple[str, ...] | str = ()) -> None:
    """Measure one contender and print JSON.

    `only`: names of measurements, separated by commas; default: all.
    """
    wanted = names(only)
    kind, option = CONTENDERS[name]
    steps = 8 if quick else 24

    # No prompt shares a prefix with an earlier one, whose keys and values may still be cached.
    seeds = itertools.count(1)

    def prefill(length: int) -> float:
        if torch.cuda.is_available():  # the first product of a shape selects its kernel
            contender.generate([prompt_of(length, next(seeds))], 1)
        prompt = prompt_of(length, next(seeds))
        return length / seconds(lambda: contender.generate([prompt], 1))

    def decode(batch: int) -> float:
        ready, one, more = (
            [prompt_of(DECODE_PROMPT, next(seeds)) for _ in range(batch)] for _ in range(3)
        )
        contender.generate(ready, 2)  # the first step of a shape is captured or compiled
        first = seconds(lambda: contender.generate(one, 1))
        return (seconds(lambda: contender.generate(more, 1 + steps)) - first) / steps * 1e3

    def ragged() -> float:
        prompts = [prompt_of(length, next(seeds)) for length in RAGGED_LENGTHS]
        return seconds(lambda: contender.generate(prompts, RAGGED_NEW))

    works: dict[str, Callable[[], object]] = {
        "prefill_128": lambda: prefill(128),
        "prefill_512": lambda: prefill(512),
        "decode_1": lambda: decode(1),
        "decode_4": lambda: decode(4),
        "decode_16": lambda: decode(16),
        "ragged": ragged,
    }
    if wanted:
        works = {work: run for work, run in works.items() if work in wanted}
    # A preallocated cache is as large as the measurements need.
    context = 1024 if works.keys() & {"prefill_512", "ragged"} else 256
    rows = 16 if works.keys() & {"decode_4", "decode_16", "ragged"} else 1
    converted = kind.convert(Path(folder), option)  # only once, and not part of loading
    start = time.perf_counter()
    contender = kind(converted, option, context, rows)
    result: dict[str, object] = {"load": time.perf_counter() - start}
    contender.generate([prompt_of(128)], 4)  # the first pass allocates
    for work, run in works.items():
        result[work] = run()
    result["tokens"] = contender.generate([prompt_of(DECODE_PROMPT)], 8)[0]
    result["peak"] = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available() and kind is not LlamaCpp
        else peak_resident()
    )
    print(json.dumps(result))


if __name__ == "__main__":
    fire.Fire(measure)
