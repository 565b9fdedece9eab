"""python -m llama perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from tqdm import tqdm

from ..checkpoints.files import path_of
from ..errors import ArgumentError, check_positive
from ..generation import BuildOptions, Llama
from .allocator import build_llama
from .arguments import Hidden
from .common import ONE_PROMPT, FolderOrFile

MOST_NATS = 709  # exp of more than this overflows a float

NO_DRAWS = ("model_parallel_size", "prompt_lookup_num_tokens", "seed")  # nothing is generated


class Score(NamedTuple):
    """How many tokens were predicted, and the sum of their logprobs in nats."""

    tokens: int
    logprob: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob of a token."""
        mean = -self.logprob / self.tokens
        return math.exp(mean) if mean < MOST_NATS else math.inf


class Window(NamedTuple):
    ids: list[int]
    scored: int  # how many of the last ids are predicted in this window


def perplexity(
    ckpt_dir: FolderOrFile,
    text: Annotated[str, "file of UTF-8 text"],
    *,
    stride: Annotated[int | None, "new tokens predicted in each window of max_seq_len"] = None,
    build: Annotated[BuildOptions, Hidden(NO_DRAWS)] = ONE_PROMPT,
) -> str:
    """Measure how well a model predicts a text file. Under torchrun it is split over the ranks.

    The text is cut into windows of `max_seq_len` tokens. Each window predicts `stride` new tokens.
    By default that is all but its first token, which is the last one of the previous window. With
    a smaller stride each token has more context, and the run takes longer.
    """
    length = build.max_seq_len
    stride = length - 1 if stride is None else stride
    check_positive(stride=stride)
    if stride >= length:
        raise ArgumentError(
            "stride", None, f"is {stride}, and max_seq_len is {length}: use a smaller stride"
        )
    content = read(text)
    llm = build_llama(ckpt_dir, build)
    ids = llm.tokenizer.encode(content, bos=True, eos=False)
    if len(ids) < 2:
        raise ValueError(f"{text} is empty: pass a file with text")
    windows = windows_of(ids, length, stride)
    result = score(llm, windows)
    size = len(content.encode())
    bits = -result.logprob / math.log(2) / size
    return (
        f"perplexity {result.perplexity:.4f} per token, {bits:.4f} bits per byte "
        f"({result.tokens:,} tokens, {size:,} bytes, "
        f"{len(windows)} window(s) of at most {length}, stride {stride})"
    )


def read(text: str) -> str:
    """The content of a text file. Raises OSError if it cannot be read, ValueError if not UTF-8."""
    try:
        return path_of("text", text).read_bytes().decode()
    except OSError as error:
        raise type(error)(f"{text} cannot be read ({error.strerror}): pass a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 ({error}): convert it first") from error


def windows_of(ids: Sequence[int], length: int, stride: int) -> list[Window]:
    """Windows of at most `length` ids that predict each id but the first once.

    After the first window, each predicts `stride` ids; the last one may predict fewer. An id is
    predicted from at least `length - stride` ids before it, or from all ids before it if there are
    fewer.
    """
    first = list(ids[:length])
    windows = [Window(first, len(first) - 1)]
    done = len(first)
    while done < len(ids):
        end = min(done + stride, len(ids))
        windows.append(Window(list(ids[max(0, end - length) : end]), end - done))
        done = end
    return windows


def score(llm: Llama, windows: Sequence[Window]) -> Score:
    """Score the windows. Each token is predicted from the tokens before it in its window."""
    total = 0.0
    count = 0
    rows = llm.model.params.max_batch_size
    starts = range(0, len(windows), rows)
    hidden = llm.model.ranks.rank > 0 or None  # None: hidden if standard error is not a terminal
    for start in tqdm(starts, desc="predicting", unit="batch", leave=False, disable=hidden):
        batch = windows[start : start + rows]
        ids = [window.ids for window in batch]
        _, logprobs = llm.generate(ids, 0, 0, logprobs=True, echo=True)
        assert logprobs is not None
        for window, row in zip(batch, logprobs, strict=True):
            total += math.fsum(row[len(row) - window.scored :])
            count += window.scored
    return Score(count, total)
