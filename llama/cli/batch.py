"""python -m llama batch: thousands of prompts from a file to a file."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
from tqdm import tqdm

from ..checkpoints.files import path_of
from ..distributed import Ranks, patient_ranks
from ..errors import ArgumentError
from ..generation import BuildOptions, Llama
from ..sampling import SamplingParams
from .allocator import build_llama
from .arguments import Hidden
from .batch_lines import Line, count_lines, lines_of
from .batch_parts import Results, check_whole, merge, parts_of
from .common import NO_FLAG, SAMPLING, FolderOrFile

# Lines that are read ahead of the first one that is not answered, for each slot of the batch.
# Answers are written in order, so that a long one lets as many others wait for it.
AHEAD = 32

MOST_SEEDS = 2**32  # each has 2^40 lines

MANY_PROMPTS = BuildOptions(max_seq_len=2048, max_batch_size=16)

Write = Callable[[list[Line]], None]


def batch(
    ckpt_dir: FolderOrFile,
    input: Annotated[str, "file with a line of JSON for each prompt"],
    output: Annotated[str, "file to write answers to, line by line"],
    *,
    build: BuildOptions = MANY_PROMPTS,
    sampling: Annotated[SamplingParams, Hidden(NO_FLAG)] = SAMPLING,
) -> str:
    """Answer each line of a file in a line of another.

    A line is {"prompt": …} or {"messages": …}, or has the shape of OpenAI's batches. It may have
    options of its own (temperature, top_p, max_tokens, stop, seed, …). An interrupted run resumes
    when it is started again. Under torchrun with a --model_parallel_size smaller than the number
    of ranks, each group of ranks answers a share of the lines.
    """
    if not 0 <= build.seed < MOST_SEEDS:
        reason = f"is {build.seed}: use 0 or more and less than {MOST_SEEDS}"
        raise ArgumentError("seed", None, reason)
    source, target = files_of(input, output)
    llm = build_llama(ckpt_dir, build)
    summary = answer_file(llm, source, target, defaults_of(sampling, build))
    return f"{output}: {summary}"


def defaults_of(sampling: SamplingParams, build: BuildOptions) -> dict[str, Any]:
    """The fields of OpenAI's API that hold where a line says nothing."""
    defaults: dict[str, Any] = {"seed": build.seed}
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if field.name not in NO_FLAG and value is not None:
            defaults[field.name] = value
    defaults["stop"] = list(sampling.stop)  # as JSON has it
    # All that there is room for: OpenAI's 16 tokens are for lines in its shape.
    defaults.setdefault("max_tokens", build.max_seq_len)
    return defaults


def files_of(input: str, output: str) -> tuple[Path, Path]:
    """Raises FileNotFoundError or ValueError for what cannot be read, or written to."""
    source = path_of("input", input)
    target = path_of("output", output)
    if not source.is_file():
        raise FileNotFoundError(f"no file {input}: pass one with a line of JSON for each prompt")
    if target.exists() and source.samefile(target):
        raise ValueError(f"{output} is the input: choose another name for the output")
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        advice = "pass the name of a file in a folder that is there"
        raise FileNotFoundError(f"{output} cannot be written: {advice}")
    return source, target


def answer_file(llm: Llama, source: Path, target: Path, defaults: dict[str, Any]) -> str:
    """Answer this group's share of the lines, then merge what all groups wrote."""
    ranks = llm.model.ranks
    everyone = patient_ranks()
    groups = everyone.size // ranks.size
    share = slice(everyone.rank // ranks.size, None, groups)
    parts = parts_of(target, groups)
    count = count_lines(source)
    if groups > 1 and target.exists():
        everyone.ask_first(lambda: check_whole(target, source, count, parts))
        return f"{count} lines, all of them from before"
    done, tokens = answer_share(llm, source, parts[share.start], share, count, defaults)
    counts = gathered(everyone, (done, tokens))
    if groups > 1 and everyone.rank == 0:
        merge(parts, target)
    firsts = counts[:: ranks.size]  # of each group, the first rank's
    done = sum(own for own, _ in firsts)
    tokens = sum(own for _, own in firsts)
    return f"{count} lines, {done} of them from before, {tokens} tokens generated now"


def answer_share(
    llm: Llama, source: Path, own: Path, share: slice, count: int, defaults: dict[str, Any]
) -> tuple[int, int]:
    """How many lines were answered before, and how many tokens were generated now.

    The first of the ranks that share a model writes.
    """
    opened: list[Results] = []

    def open_results() -> int:
        opened.append(Results(own, lines_of(source, share)))
        return opened[0].done

    def write(lines: list[Line]) -> None:
        for results in opened:
            results.write(lines)

    done = llm.model.ranks.ask_first(open_results)
    total = len(range(share.start, count, share.step))
    try:
        tokens = answer_lines(llm, lines_of(source, share, done), done, total, write, defaults)
    finally:
        for results in opened:
            results.close()
    return done, tokens


def gathered(everyone: Ranks, value: Any) -> list[Any]:
    """The value of each rank, once all have come here."""
    values = [value] * everyone.size
    if everyone.size > 1:
        dist.all_gather_object(values, value, group=everyone.group)
    return values


def answer_lines(
    llm: Llama,
    lines: Iterator[Line],
    done: int,
    total: int,
    write: Write,
    defaults: dict[str, Any],
) -> int:
    """Answer lines, in order; returns how many tokens were generated.

    Raises what fails for no fault of a request's own, of memory for instance: such a run can be
    resumed.
    """
    engine = llm.engine
    slots = llm.model.params.max_batch_size
    pending = deque[Line]()
    tokens = 0
    start = time.monotonic()
    # None hides the bar where standard error is no terminal.
    hidden = bool(llm.model.ranks.rank or dist.get_rank()) or None
    more = True
    with tqdm(total=total, initial=done, desc="answering", unit="line", disable=hidden) as bar:
        while more or pending:
            while more and len(pending) < AHEAD * slots and len(engine.scheduler.waiting) < slots:
                line = next(lines, None)
                if line is None:
                    more = False
                else:
                    line.submit(llm, defaults)
                    pending.append(line)
            if engine.busy:
                engine.step()
            ready = take_answered(pending)
            if ready:
                write(ready)
                tokens += sum(len(own.output.tokens) for line in ready for own in line.requests)
                rate = tokens / (time.monotonic() - start)
                bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
                bar.update(len(ready))
    return tokens


def take_answered(pending: deque[Line]) -> list[Line]:
    """The first lines that are answered, taken from those that are not written."""
    ready = []
    while pending and pending[0].over:
        for request in pending[0].requests:
            if request.error is not None and not isinstance(request.error, ValueError):
                raise request.error
        ready.append(pending.popleft())
    return ready
