"""How well a model predicts a text: perplexity, and bits for each of its bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tqdm import tqdm

from ..arguments import check_positive
from ..checkpoints.files import path_of
from ..generation import Llama

MOST_NATS = 709  # of which exp is a float


class Score(NamedTuple):
    """What was predicted: so many tokens, with the sum of their logprobs, in nats."""

    tokens: int
    logprob: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob of a token."""
        mean = -self.logprob / self.tokens
        return math.exp(mean) if mean < MOST_NATS else math.inf


class Window(NamedTuple):
    ids: list[int]
    scored: int  # how many of them, at the end, are predicted in this window


def windows_of(ids: Sequence[int], length: int, stride: int) -> list[Window]:
    """Windows of at most `length` ids that predict each id but the first once, `stride` of them in each but the last.

    An id is predicted from at least length - stride ids before it, or from all where there are fewer.
    """
    windows = [Window(list(ids[:length]), min(length, len(ids)) - 1)]
    done = len(windows[0].ids)
    while done < len(ids):
        end = min(done + stride, len(ids))
        windows.append(Window(list(ids[max(0, end - length) : end]), end - done))
        done = end
    return windows


def score(llm: Llama, windows: Sequence[Window]) -> Score:
    """The windows' tokens, each predicted from those before it in its window."""
    total, count = 0.0, 0
    rows = llm.model.params.max_batch_size
    batches = range(0, len(windows), rows)
    quiet = llm.model.ranks.rank > 0 or None
    for first in tqdm(batches, desc="predicting", unit="batch", leave=False, disable=quiet):
        batch = windows[first : first + rows]
        logprobs = llm.generate([window.ids for window in batch], 0, 0, logprobs=True, echo=True)[1]
        assert logprobs is not None
        for window, row in zip(batch, logprobs, strict=True):
            total, count = total + math.fsum(row[len(row) - window.scored :]), count + window.scored
    return Score(count, total)


def perplexity(
    ckpt_dir: str,
    text: str,
    *,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    stride: int | None = None,
    max_batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
) -> str:
    """How well a model predicts a text file. Under torchrun, with a model that is split over the ranks.

    The text is cut into windows of `max_seq_len` tokens, which predict `stride` new ones each (default: all but the
    first, which is the last of the window before). A smaller stride takes longer, and lets each token see more.
    """
    stride = max_seq_len - 1 if stride is None else stride
    check_positive(max_seq_len=max_seq_len, stride=stride)
    if max_seq_len < 2 or stride >= max_seq_len:
        raise ValueError(f"stride is {stride}, and max_seq_len {max_seq_len}: use a stride below it")
    try:
        content = path_of("text", text).read_bytes().decode()
    except OSError as error:
        raise type(error)(f"{text} cannot be read ({error.strerror}): pass a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 ({error}): convert it first") from error
    llm = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size,
        device=device,
        dtype=dtype,
        quantize=quantize,
        adapter_dir=adapter_dir,
    )
    ids = llm.tokenizer.encode(content, bos=True, eos=False)
    if len(ids) < 2:
        raise ValueError(f"{text} is empty: pass a file with text")
    windows, size = windows_of(ids, max_seq_len, stride), len(content.encode())
    result = score(llm, windows)
    bits = -result.logprob / math.log(2) / size
    return (
        f"perplexity {result.perplexity:.4f} per token, {bits:.4f} bits per byte ({result.tokens:,} tokens, "
        f"{size:,} bytes, {len(windows)} window(s) of at most {max_seq_len}, stride {stride})"
    )
