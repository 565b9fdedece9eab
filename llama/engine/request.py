"""Prompt: token ids and how to continue them. Request: a prompt and its output so far.

Nothing here depends on the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..errors import (
    ArgumentError,
    EmptyPrompt,
    PromptError,
    PromptTooLong,
    PromptTypeError,
    as_integer,
    is_list,
)
from ..sampling import SamplingParams, Streams
from ..tokenizer import Detokenizer, Tokenizer
from .drafts import PromptLookup

FinishReason = Literal["stop", "length"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Prompt:
    """Token ids and how to continue them, made and checked by `make_prompts`."""

    token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # params.max_tokens, or less if max_seq_len leaves less room
    end_ids: frozenset[int]  # ids that end the output and are not part of it
    index: int = 0  # its index in the call
    stream: int = 0  # which of its seed's random streams it draws from
    starts_text: bool = True  # False: it continues a text, so the first word keeps its space
    pooling: Pooling | None = None  # if set, hidden states are requested, not tokens
    refusal: str | None = None  # if set, this text is the output and nothing is run


class ScoredToken(NamedTuple):
    """A token, its log-probability, and the likeliest (id, logprob) at its position."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """The output so far.

    Frozen: each token makes a new Output, which replaces the old one in a single assignment. An
    interrupt at any point leaves a request with all of a token's data or none of it.
    """

    detokenizer: Detokenizer
    ids: list[int]  # the prompt's, then the generated ones
    tokens: tuple[ScoredToken, ...] = ()  # the generated ones
    pieces: tuple[str, ...] = ()  # the text of each token
    text: str = ""  # all pieces joined
    end: ScoredToken | None = None  # the token that ended the output and is not part of it
    finish_reason: FinishReason | None = None


class Request:
    """A prompt and its output. It ends with a `finish_reason` or an `error`, or is cancelled."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer):
        self.prompt = prompt
        self.error: Exception | None = None
        self.cancelled = False
        self.admitted = 0  # the step at which it was given a slot
        self.lookup: PromptLookup | None = None  # made for the first draft
        # Whether log-probabilities of the prompt's own tokens are requested.
        params = prompt.params
        self.scores_prompt = params.logprobs and params.echo and prompt.refusal is None
        # If the prompt is scored: the scores of its tokens so far.
        self.prompt_scores: tuple[ScoredToken, ...] = ()
        # If the prompt is pooled: the hidden states of its tokens so far, (n, dim) float32.
        self.states: Tensor | None = None
        detokenizer = Detokenizer(tokenizer, prompt.starts_text)
        self._echoed: tuple[str, ...] = ()
        if prompt.params.echo:
            self._echoed, detokenizer = pieces_of(prompt.token_ids, detokenizer)
        self.output = Output(detokenizer, prompt.token_ids)
        if self.scores_prompt:
            self.prompt_scores = (ScoredToken(prompt.token_ids[0]),)
        # How many prompt tokens have their scores or hidden states stored; None once no more are
        # needed. Before that, cached prefixes are not reused: the cache lacks these values.
        self.computed: int | None = 0 if needed_of(prompt) else None
        if prompt.refusal is not None:
            refuse(self, prompt.refusal)
        elif prompt.max_tokens == 0 and self.computed is None:
            self.output = finished(self.output, self.prompt, "length")

    @property
    def token_ids(self) -> list[int]:
        """The prompt's ids, then the generated ones."""
        return self.output.ids

    @property
    def answer_ids(self) -> list[int]:
        return self.output.ids[len(self.prompt.token_ids) :]

    @property
    def prompt_pieces(self) -> tuple[str, ...]:
        """The text of each prompt token if the prompt is echoed, else nothing."""
        output = self.output
        if not self._echoed or output.pieces or output.finish_reason is None:
            return self._echoed
        return (*self._echoed[:-1], self._echoed[-1] + output.detokenizer.flush())

    @property
    def text(self) -> str:
        """The generated text."""
        return self.output.text

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.output.finish_reason

    @property
    def over(self) -> bool:
        return self.output.finish_reason is not None or self.error is not None or self.cancelled

    @property
    def full_text(self) -> str:
        """The generated text, after the prompt's if it is echoed."""
        if not self._echoed:
            return self.output.text
        return "".join(self.prompt_pieces) + self.output.text


def needed_of(prompt: Prompt) -> int:
    """How many of a prompt's tokens, from the first on, need hidden states or scores stored."""
    params = prompt.params
    if prompt.refusal is not None:
        return 0
    if prompt.pooling is not None:
        return len(prompt.token_ids)
    return len(prompt.token_ids) - 1 if params.logprobs and params.echo else 0


def make_prompts(
    tokenizer: Tokenizer,
    token_ids: Sequence[Any],
    params: Sequence[SamplingParams],
    max_seq_len: int,
    *,
    streams: Streams,
    name: str = "prompt",
    end_ids: Iterable[int] = (),
    starts_text: bool = True,
    pooling: Pooling | None = None,
    refusals: Sequence[str | None] | None = None,
) -> list[Prompt]:
    """One Prompt for each list of ids. The ids of refused prompts are ignored.

    `end_ids` end the output, as EOS does. Raises PromptError or ArgumentError for invalid ones.
    """
    prompts = []
    for index, ids in enumerate(token_ids):
        own = params[index]
        refusal = refusals[index] if refusals else None
        checked = [] if refusal is not None else check_ids(tokenizer, name, index, ids, max_seq_len)
        if own.top_logprobs > tokenizer.n_used:
            reason = (
                f"is {own.top_logprobs}: use 0 to {tokenizer.n_used}, the size of the vocabulary"
            )
            raise ArgumentError("top_logprobs", None, reason)
        room = max_seq_len - len(checked)
        prompt = Prompt(
            checked,
            own,
            max_tokens=room if own.max_tokens is None else min(own.max_tokens, room),
            end_ids=frozenset([tokenizer.eos_id, *end_ids]),
            index=index,
            stream=streams[index],
            starts_text=starts_text,
            pooling=pooling,
            refusal=refusal,
        )
        prompts.append(prompt)
    return prompts


def check_ids(tokenizer: Tokenizer, name: str, index: int, ids: Any, max_seq_len: int) -> list[int]:
    """A prompt's ids as a list.

    Raises PromptError, with the prompt's number, if they are invalid.
    """
    if not isinstance(ids, list) and not is_list(ids):
        raise PromptTypeError(name, index, f"is {ids!r}: use a list of token ids")
    if len(ids) == 0:
        reason = f"has no tokens: begin it with the tokenizer's bos_id, {tokenizer.bos_id}"
        raise EmptyPrompt(name, index, reason)
    if len(ids) > max_seq_len:
        reason = (
            f"has {len(ids)} tokens, and max_seq_len is {max_seq_len}: "
            "shorten it or build with a larger max_seq_len"
        )
        raise PromptTooLong(name, index, reason)
    tokens = []
    for token in ids:
        if type(token) is not int:
            token = as_token_id(name, index, token)
        tokens.append(token)
        if not 0 <= token < tokenizer.n_used:
            reason = f"has token id {token}, and the vocabulary has {tokenizer.n_used} pieces"
            raise PromptError(name, index, reason)
    return tokens


def as_token_id(name: str, index: int, token: Any) -> int:
    try:
        return as_integer("", token)
    except TypeError:
        reason = f"has token id {token!r}: use integers"
        raise PromptTypeError(name, index, reason) from None


def extended(output: Output, prompt: Prompt, token: ScoredToken) -> Output:
    """The output with one more token, which may finish it."""
    if token.id in prompt.end_ids:
        return finished(replace(output, end=token), prompt, "stop")
    piece, detokenizer = output.detokenizer.push(token.id)
    longer = Output(
        detokenizer,
        [*output.ids, token.id],
        (*output.tokens, token),
        (*output.pieces, piece),
        output.text + piece,
    )
    if prompt.params.stop:
        stopped = cut_at_stop(longer, prompt.params.stop, len(piece))
        if stopped is not None:
            return stopped
    if len(longer.tokens) == prompt.max_tokens:
        return finished(longer, prompt, "length")
    return longer


def finished(output: Output, prompt: Prompt, reason: FinishReason) -> Output:
    """The finished output. Bytes of an incomplete character are added to its last piece."""
    if not output.detokenizer.bytes or not output.pieces:
        return replace(output, finish_reason=reason)
    rest = output.detokenizer.flush()
    pieces = (*output.pieces[:-1], output.pieces[-1] + rest)
    whole = replace(output, pieces=pieces, text=output.text + rest)
    stopped = cut_at_stop(whole, prompt.params.stop, len(rest))
    return stopped or replace(whole, finish_reason=reason)


def cut_at_stop(output: Output, stop: Sequence[str], new: int) -> Output | None:
    """The output up to its first stop string; None if its last `new` characters complete none.

    If two stop strings overlap, the one that ends first counts, however the text was split into
    tokens. Tokens entirely after the cut are removed; a token with text before it is kept.
    """
    ends = []
    for string in stop:
        start = output.text.find(string, max(0, len(output.text) - new - len(string) + 1))
        if start >= 0:
            ends.append((start + len(string), start))
    if not ends:
        return None
    cut = min(ends)[1]
    kept = len(output.pieces)
    end = len(output.text)
    while kept and end - len(output.pieces[kept - 1]) >= cut:
        end -= len(output.pieces[kept - 1])
        kept -= 1
    pieces = output.pieces[:kept]
    if end > cut:
        pieces = (*pieces[:-1], pieces[-1][: cut - end])
    return replace(
        output,
        ids=output.ids[: len(output.ids) - len(output.tokens) + kept],
        tokens=output.tokens[:kept],
        pieces=pieces,
        text=output.text[:cut],
        finish_reason="stop",
    )


def refuse(request: Request, refusal: str) -> None:
    """Make `refusal` the output, in place of any generated text."""
    detokenizer = request.output.detokenizer
    ids = request.prompt.token_ids
    request.output = Output(detokenizer, ids, text=refusal, finish_reason="stop")


def delta(request: Request, sent: int) -> tuple[str, bool]:
    """The part of `full_text` after `sent` characters, and whether it is the last.

    An ending that may be the start of a stop string is held back. `output` is read once, because
    another thread may replace it.
    """
    output = request.output
    over = output.finish_reason is not None
    end = len(output.text)
    if not over:
        end -= begun_stop(output.text, request.prompt.params.stop)
    return ("".join(request.prompt_pieces) + output.text[:end])[sent:], over


def begun_stop(text: str, stop: Sequence[str]) -> int:
    """The length of the longest ending of `text` that may be the start of a stop string."""
    longest = max((len(string) for string in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        ending = text[-length:]
        if any(string.startswith(ending) for string in stop):
            return length
    return 0


def pieces_of(ids: Sequence[int], detokenizer: Detokenizer) -> tuple[tuple[str, ...], Detokenizer]:
    """The text of each id, and the detokenizer for the ids after them."""
    pieces = []
    for token in ids:
        piece, detokenizer = detokenizer.push(token)
        pieces.append(piece)
    return tuple(pieces), detokenizer
