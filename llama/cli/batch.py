"""python -m llama batch: answers the prompts in a file and writes the results to another file."""

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

# How many lines are read ahead of the first unanswered line, for each slot of the batch. Answers
# are written in order, so a long answer can delay that many others.
AHEAD = 32

MOST_SEEDS = 2**32  # each seed has room for 2^40 lines

MANY_PROMPTS = BuildOptions(max_seq_len=2048, max_batch_size=16)

Write = Callable[[list[Line]], None]


def batch(
    ckpt_dir: FolderOrFile,
    input: Annotated[str, "file with one line of JSON for each prompt"],
    output: Annotated[str, "file for the answers, one line each"],
    *,
    build: BuildOptions = MANY_PROMPTS,
    sampling: Annotated[SamplingParams, Hidden(NO_FLAG)] = SAMPLING,
) -> str:
    """Answer the prompts in a file, one per line, and write the answers to another file.

    A line is {"prompt": …} or {"messages": …}, or a request in OpenAI's batch format. It may set
    its own options (temperature, top_p, max_tokens, stop, seed, …). An interrupted run resumes
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
    """Defaults for the fields of OpenAI's API that a line does not set."""
    defaults: dict[str, Any] = {"seed": build.seed}
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if field.name not in NO_FLAG and value is not None:
            defaults[field.name] = value
    defaults["stop"] = list(sampling.stop)  # a list, as in JSON
    # Use all the room there is. OpenAI's default of 16 tokens is only for lines in its format.
    defaults.setdefault("max_tokens", build.max_seq_len)
    return defaults


def files_of(input: str, output: str) -> tuple[Path, Path]:
    """The two paths. Raises FileNotFoundError or ValueError if they cannot be read or written."""
    source = path_of("input", input)
    target = path_of("output", output)
    if not source.is_file():
        raise FileNotFoundError(f"no file {input}: pass one with a line of JSON for each prompt")
    if target.exists() and source.samefile(target):
        raise ValueError(f"{output} is the input: choose another name for the output")
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        advice = "pass the name of a file in an existing folder"
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
        return f"{count} lines, all of them answered earlier"
    done, tokens = answer_share(llm, source, parts[share.start], share, count, defaults)
    counts = gathered(everyone, (done, tokens))
    if groups > 1 and everyone.rank == 0:
        merge(parts, target)
    firsts = counts[:: ranks.size]  # those of the first rank of each group
    done = sum(own for own, _ in firsts)
    tokens = sum(own for _, own in firsts)
    return f"{count} lines, {done} of them answered earlier, {tokens} tokens generated now"


def answer_share(
    llm: Llama, source: Path, own: Path, share: slice, count: int, defaults: dict[str, Any]
) -> tuple[int, int]:
    """Answer this group's share of the lines. The group's first rank writes the results.

    Returns how many lines were answered earlier, and how many tokens were generated now.
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
    """The values of all ranks. Waits until every rank has called it."""
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
    """Answer lines, in order. Returns how many tokens were generated.

    Raises errors that no single request has caused, such as a lack of memory. Such a run can be
    resumed.
    """
    engine = llm.engine
    slots = llm.model.params.max_batch_size
    pending = deque[Line]()
    tokens = 0
    start = time.monotonic()
    # None hides the progress bar if standard error is not a terminal.
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
    """Remove and return the answered lines at the front of the pending ones."""
    ready = []
    while pending and pending[0].over:
        for request in pending[0].requests:
            if request.error is not None and not isinstance(request.error, ValueError):
                raise request.error
        ready.append(pending.popleft())
    return ready
