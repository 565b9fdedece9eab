"""Measure scheduling, drafts and prefix reuse: python benchmarks/engine.py --shape 110m

- pause: the longest gap between two tokens of one request while a long prompt is prefilled.
- drafts: time per token with and without draft tokens, for outputs that repeat earlier text and
  outputs that do not. Random weights do not quote, so the engine is made to generate given tokens.
- conversations: how many tokens eight conversations of several turns compute.
- import: how long `import llama` takes.
"""

from __future__ import annotations

import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fire
import torch
import weights
from contender import prompt_of
from speed import cpu_name

from llama import Llama
from llama.engine import Request, ScoredToken

LONG_PROMPT = 1500
NEW_TOKENS = 96


def build(folder: Path, kind: str, context: int, rows: int, **options: Any) -> Llama:
    quantised = kind in ("int8", "int4")
    own = {"dtype": "auto" if quantised else kind, "quantize": kind if quantised else None}
    llm = Llama.build(folder, folder / "tokenizer.model", context, rows, **own, **options)
    llm.tokenizer.eos_id = -1  # random weights generate EOS by chance
    return llm


def pause(folder: Path, kind: str) -> tuple[float, float]:
    """Return the longest gap between two tokens of a request, and its usual step, in seconds.

    Three prompts share two slots. The first request runs all the time, the second finishes early,
    and the long prompt takes its slot.
    """
    llm = build(folder, kind, 2048, 2)
    words = [
        llm.tokenizer.decode(prompt_of(n, seed)) for seed, n in enumerate((16, 16, LONG_PROMPT))
    ]
    times = []
    others = []
    for piece in llm.stream_text_completion(words, 0, max_gen_len=[3 * NEW_TOKENS, 32, 8]):
        (times if piece["index"] == 0 else others).append(time.perf_counter())
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return max(gaps[2:]), statistics.median(gaps[-NEW_TOKENS:])


class Forced:
    """Makes an engine generate given ids, whatever its logits are."""

    def __init__(self, llm: Llama, texts: list[list[int]]):
        engine = llm.engine
        inner = type(engine).choose

        def choose(
            requests: list[Request], numbers: list[int], logits: torch.Tensor
        ) -> list[ScoredToken]:
            inner(engine, requests, numbers, logits)  # its time counts
            pairs = zip(requests, numbers, strict=True)
            return [ScoredToken(texts[request.prompt.index][number]) for request, number in pairs]

        engine.choose = choose  # type: ignore[method-assign, assignment]


def unlucky(n: int, rng: random.Random) -> list[int]:
    """Return the same three ids again and again, each time before a new one: no draft is right."""
    phrase = [rng.randrange(3, weights.VOCAB_SIZE) for _ in range(3)]
    return [x for _ in range(n // 4 + 1) for x in (*phrase, rng.randrange(3, weights.VOCAB_SIZE))][
        :n
    ]


def texts_of(kind: str, rows: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and forced outputs for `rows` requests."""
    rng = random.Random(seed)
    prompts = [prompt_of(200, rng.randrange(2**31)) for _ in range(rows)]
    if kind == "quotes":
        return prompts, [prompt[40 : 40 + NEW_TOKENS] for prompt in prompts]
    if kind == "new":
        return prompts, [prompt_of(NEW_TOKENS, rng.randrange(2**31)) for _ in range(rows)]
    return prompts, [unlucky(NEW_TOKENS, rng) for _ in range(rows)]


def drafts(folder: Path, kind: str, rows: int, rounds: int) -> Iterator[str]:
    """Yield table rows: milliseconds per token without and with drafts, and tokens per pass.

    Runs without and with drafts alternate.
    """
    llm = build(folder, kind, 512, rows)
    for text in ("quotes", "new", "unlucky"):
        taken: dict[int, list[float]] = {0: [], 3: []}
        passes = 0
        for seed in range(rounds):
            for n in taken if seed % 2 else reversed(taken):
                llm.engine.scheduler.draft_tokens = n
                prompts, answers = texts_of(text, rows, 2 * seed + bool(n))
                # Put the prompts into the cache, so that the timed call only decodes.
                llm.generate(prompts, 1, 0)
                Forced(llm, answers)
                before = llm.engine.passes
                start = time.perf_counter()
                llm.generate(prompts, NEW_TOKENS, 0)
                taken[n].append((time.perf_counter() - start) / NEW_TOKENS * 1e3)
                passes = llm.engine.passes - before if n else passes
        without, with_drafts = (statistics.median(taken[n]) for n in (0, 3))
        # Compare neighbouring runs: the speed of a machine drifts by more than the difference.
        ratio = statistics.median(b / a for a, b in zip(taken[0], taken[3], strict=True))
        yield (
            f"| {text} | {rows} | {without:.2f} | {with_drafts:.2f} | {ratio:.3f} | {NEW_TOKENS / passes:.2f} |"
        )


def conversations(folder: Path, kind: str) -> tuple[int, int]:
    """Return how many tokens eight conversations compute, and how many of their tokens are new.

    Each conversation has four turns, and there are eight slots.
    """
    llm = build(folder, kind, 1024, 8)
    dialogs: list[list[int]] = [[1] for _ in range(8)]
    new = 0
    for turn in range(4):
        for number, ids in enumerate(dialogs):
            asked = prompt_of(60, 100 * turn + number)[1:]
            answer = llm.generate([ids + asked], 40, 0)[0][0]
            new += len(asked) + len(answer)
            ids += asked + answer
    return llm.engine.tokens, new


def import_seconds(module: str, rounds: int = 7) -> float:
    def one() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    one()
    return statistics.median(one() for _ in range(rounds))


def main(
    shape: str = "110m",
    kind: str = "auto",
    rounds: int = 7,
    folder: str | None = None,
    only: str = "",
) -> None:
    """Print the measurements.

    `kind`: a dtype, int8 or int4. `folder`: keep the weights there. `only`: pause, drafts,
    conversations or import.
    """
    print(
        f"{shape}, {kind}; {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = weights.make(shape, Path(folder or scratch))

        def show_pause() -> None:
            longest, usual = min(
                (pause(checkpoint, kind) for _ in range(3)), key=lambda gaps: gaps[0] / gaps[1]
            )
            print(
                f"longest pause {longest * 1e3:.1f} ms, {longest / usual:.1f} times the usual step of {usual * 1e3:.1f} ms"
            )

        def show_drafts() -> None:
            print(
                "| text | rows | ms per token without drafts | with drafts | ratio | tokens per pass |"
            )
            print("| --- | --- | --- | --- | --- | --- |")
            for rows in (1, 4):
                for line in drafts(checkpoint, kind, rows, rounds):
                    print(line, flush=True)

        def show_conversations() -> None:
            computed, new = conversations(checkpoint, kind)
            print(
                f"eight conversations: {computed} tokens computed, {new} new, ratio {computed / new:.3f}"
            )

        def show_import() -> None:
            torch_alone = import_seconds("torch")
            ours = import_seconds("llama")
            print(
                f"import llama {ours:.2f} s, import torch {torch_alone:.2f} s, ratio {ours / torch_alone:.2f}"
            )

        shows: dict[str, Callable[[], None]] = {
            "pause": show_pause,
            "drafts": show_drafts,
            "conversations": show_conversations,
            "import": show_import,
        }
        for name, show in shows.items():
            if only in ("", name):
                show()


if __name__ == "__main__":
    fire.Fire(main)
