"""A Request, what is asked of a model, and its Answer, what has come of it. Knows nothing of models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ..tokenizer import Detokenizer, Tokenizer
from .drafts import PromptLookup

FinishReason = Literal["stop", "length"]
Pooling = Literal["mean", "last"]


class Score(NamedTuple):
    """How likely a token was, as a natural logarithm, and the likeliest in its place, (id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued. arguments.py makes them of what users pass, and checks it."""

    prompt: Sequence[int]
    max_tokens: int
    end_ids: frozenset[int]  # the ids that end it, and are no part of it
    temperature: float = 0.0
    top_p: float = 1.0
    stream: str = ""  # names the random numbers that it draws, its own, so that no neighbour changes its text
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0  # how many of the likeliest in each token's place, with logprobs
    echo: bool = False
    continues: bool = False  # begins in the middle of a text, so that its first word's space stays
    pooling: Pooling | None = None  # asks for hidden states, not for tokens
    refusal: str | None = None  # the answer to what is not run
    index: int = 0  # its number in the call it came with

    @property
    def scores_prompt(self) -> bool:
        return self.logprobs and self.echo


class Answer:
    """What has come of a request: `ids` is the prompt and, one by one, the tokens after it.

    It is over once it has a `finish_reason`, or an `error`, or was `cancelled`.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.request = request
        self.ids = list(request.prompt)
        self.pieces: list[str] = []  # of the tokens, one each, and so are their scores
        self.scores: list[Score] = []
        self.end: tuple[int, Score] | None = None  # the id that ended it, which is no part of it
        self.text = ""  # of the pieces
        self.prompt_scores = [Score(0.0)] * len(self.ids) if request.scores_prompt else []
        self.kept = 0  # how many of the prompt's ids their states were taken of, where they are wanted
        self.states: Tensor | None = None  # (len(prompt), dim) float32, where they are to be pooled
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self._detokenizer = Detokenizer(tokenizer, at_start=not request.continues)
        self.prompt_pieces = [self._detokenizer.push(token) for token in self.ids] if request.echo else []
        self.lookup = PromptLookup()
        self._random, self._uniforms = random.Random(request.stream), list[float]()
        if request.refusal is not None:
            self.refuse(request.refusal)
        elif request.max_tokens == 0 and not request.scores_prompt and request.pooling is None:
            self.finish("length")

    @property
    def tokens(self) -> list[int]:
        return self.ids[len(self.request.prompt) :]

    @property
    def wants_states(self) -> bool:
        """Whether the hidden states of all of its prompt are still wanted, and none may be left out."""
        return self.request.pooling is not None or (self.request.scores_prompt and not self.pieces)

    @property
    def over(self) -> bool:
        return self.finish_reason is not None or self.error is not None or self.cancelled

    @property
    def generation(self) -> str:
        """The result's text: with echo, the prompt's too."""
        return "".join(self.prompt_pieces) + self.text

    def news(self, sent: int) -> tuple[str, bool]:
        """What is new of `generation` after `sent` characters, without an end that may yet be taken back, as it may be
        the beginning of a stop string; and whether it is the last. Another thread may be appending."""
        over, text = self.finish_reason is not None, self.text  # in this order: what is over does not change
        end = len(text)
        if not over:
            longest = min(max(map(len, self.request.stop), default=1) - 1, len(text))
            begun = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.request.stop))
            end -= next(begun, 0)
        return ("".join(self.prompt_pieces) + text[:end])[sent:], over

    def uniform(self, i: int) -> float:
        """The number in [0, 1) that decides token `i`, whatever was drawn, guessed or cancelled before."""
        while len(self._uniforms) <= i:
            self._uniforms.append(self._random.random())
        return self._uniforms[i]

    def append(self, token: int, score: Score) -> None:
        """Take the next token; may finish the answer."""
        if token in self.request.end_ids:
            self.end = token, score
            return self.finish("stop")
        piece = self._detokenizer.push(token)
        self.ids.append(token)
        self.scores.append(score)
        self.pieces.append(piece)
        if self._say(piece):
            self.finish_reason = "stop"
        elif len(self.pieces) == self.request.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        rest = self._detokenizer.flush()  # bytes of a character that now stays incomplete
        if self.pieces:
            self.pieces[-1] += rest
        elif self.prompt_pieces:
            self.prompt_pieces[-1] += rest
        self.finish_reason = "stop" if self.pieces and self._say(rest) else reason

    def refuse(self, refusal: str) -> None:
        """Answer with `refusal` in place of what the model said or would have said."""
        del self.ids[len(self.request.prompt) :]
        self.pieces, self.scores = [], []
        self.text, self.finish_reason = refusal, "stop"

    def _say(self, piece: str) -> bool:
        """Add to the text. If that completes a stop string, cut it off, and the tokens from there on."""
        text, stop = self.text + piece, self.request.stop
        if not stop:
            self.text = text
            return False
        found = [(text.find(s, max(0, len(self.text) - len(s) + 1)), len(s)) for s in stop]
        # Of two that overlap, the one whose end came first counts, however the text was split into tokens.
        ends = [(at + length, at) for at, length in found if at >= 0]
        end, (_, cut) = len(text), min(ends, default=(0, len(text)))
        while ends and self.pieces and (begin := end - len(self.pieces[-1])) >= cut:
            for per_token in (self.ids, self.pieces, self.scores):
                per_token.pop()
            end = begin
        if ends and self.pieces:  # a token may hold wanted text before the stop string
            self.pieces[-1] = self.pieces[-1][: len(self.pieces[-1]) - (end - cut)]
        self.text = text[:cut]
        return bool(ends)
