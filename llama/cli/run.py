"""python -m llama run: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Annotated

from ..chat import Message
from ..distributed import Ranks, patient_ranks
from ..generation import BuildOptions, Piece
from ..sampling import SamplingParams
from .allocator import build_llama
from .arguments import Hidden
from .common import (
    NO_FLAG,
    ONE_PROMPT,
    SAMPLING,
    FolderOrFile,
    System,
    keywords_of,
    system_message,
)
from .terminal import is_terminal, show


def run(
    ckpt_dir: FolderOrFile,
    prompt: Annotated[
        str | None, "the prompt; read from standard input if it is - or left out"
    ] = None,
    *,
    system: System = None,
    plain: Annotated[bool, "continue the text instead of answering it"] = False,
    build: Annotated[BuildOptions, Hidden(["max_batch_size", "model_parallel_size"])] = ONE_PROMPT,
    sampling: Annotated[SamplingParams, Hidden(NO_FLAG)] = SAMPLING,
) -> None:
    """Answer one prompt, or continue its text with --plain. Prints the speed to standard error."""
    if plain and system:
        raise ValueError("a system message is for answers: leave out --system or --plain")
    opening = system_message(system)
    llm = build_llama(ckpt_dir, build)
    ranks = patient_ranks()
    text = read_prompt(ranks, prompt)
    options = keywords_of(sampling)
    if plain:
        print_stream(ranks, llm.stream_text_completion([text], logprobs=True, **options))
    elif text.strip():
        dialog = [*opening, Message(role="user", content=text)]
        print_stream(ranks, llm.stream_chat_completion([dialog], logprobs=True, **options))
    else:
        raise ValueError("the prompt is empty: pass a text, or send one to standard input")


def read_prompt(ranks: Ranks, prompt: str | None) -> str:
    if prompt is None or prompt == "-":
        return ranks.ask_first(read_stdin)
    return prompt


def read_stdin() -> str:
    """All of standard input, without its last newline."""
    if is_terminal(sys.stdin):
        print("(type the prompt, then Ctrl-D on a line of its own)", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def print_stream(ranks: Ranks, stream: Iterator[Piece]) -> None:
    """Print the pieces of an answer and, on standard error, the generation speed."""
    start = time.perf_counter()
    first = None
    for piece in stream:
        if first is None:
            first = time.perf_counter() - start
        show(piece["text"])
    show("\n")
    seconds = time.perf_counter() - start
    count = len(piece["tokens"])
    if ranks.rank == 0:
        rate = f"{count} tokens, {count / seconds:.1f} tokens/s"
        print(f"{rate}, the first after {first or 0.0:.2f} s", file=sys.stderr)
