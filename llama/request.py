"""One prompt on its way to a result: its settings, its text so far, and when it ends. Knows nothing of models."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .tokenizer import Detokenizer, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass
class Request:
    index: int
    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    rng: random.Random  # of this request alone, so that its text does not depend on its neighbours
    detokenizer: Detokenizer
    prompt_pieces: list[str] = field(default_factory=list)  # with echo: the prompt's text, one string per token
    prompt_logprobs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # generated so far; then pieces and logprobs, one each
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""  # of pieces
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def append(self, token: int, logprob: float) -> None:
        """Take a generated token that is not EOS; may finish the request."""
        piece = self.detokenizer.push(token)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.pieces.append(piece)
        self.text += piece
        if self._cut_at_stop(len(piece)):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        rest = self.detokenizer.flush()  # bytes of a character that now stays incomplete
        if self.pieces:
            self.pieces[-1] += rest
            self.text += rest
        elif self.prompt_pieces:
            self.prompt_pieces[-1] += rest
        self.finish_reason = "stop" if self._cut_at_stop(len(rest)) else reason

    def refuse(self, refusal: str) -> None:
        """Answer with `refusal` in place of what the model said or would have said."""
        self.tokens, self.pieces, self.logprobs = [], [], []
        self.text, self.finish_reason = refusal, "stop"

    def _cut_at_stop(self, added: int) -> bool:
        """Cut off the first stop string that the last `added` characters complete, and the tokens from there on."""
        found = [self.text.find(s, max(0, len(self.text) - added - len(s) + 1)) for s in self.stop]
        found = [at for at in found if at >= 0]
        if not found:
            return False
        end, cut = len(self.text), min(found)
        while self.pieces and (begin := end - len(self.pieces[-1])) >= cut:
            for per_token in (self.tokens, self.pieces, self.logprobs):
                per_token.pop()
            end = begin
        if self.pieces:  # a token may hold wanted text before the stop string
            self.pieces[-1] = self.pieces[-1][: len(self.pieces[-1]) - (end - cut)]
        self.text = self.text[:cut]
        return True

    @property
    def generation(self) -> str:
        """The result's text: with echo, the prompt's too."""
        return "".join(self.prompt_pieces) + self.text if self.prompt_pieces else self.text

    @property
    def held_back(self) -> int:
        """How many of the last characters may be the beginning of a stop string, and so may yet be taken back."""
        if self.finish_reason is None:
            for n in range(min(max(map(len, self.stop), default=1) - 1, len(self.text)), 0, -1):
                if any(s.startswith(self.text[-n:]) for s in self.stop):
                    return n
        return 0


def make_requests(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int] | None],
    max_seq_len: int,
    default_seed: int,
    max_gen_len: Any,
    temperature: Any,
    top_p: Any,
    seed: Any,
    stop: Any,
    *,
    echo: bool,
) -> list[Request]:
    """One request per prompt; None stands for one that the caller refuses. Settings are one for all, or one each.

    Raises ValueError or TypeError, with the prompt's number, for what cannot be run.
    """
    n = len(prompts)
    seed = default_seed if seed is None else seed
    max_gen_len = max_seq_len - 1 if max_gen_len is None else max_gen_len
    stops = stop if not isinstance(stop, str) and any(not isinstance(s, str) for s in stop) else [stop] * n
    settings = {
        "max_gen_len": per_prompt("max_gen_len", max_gen_len, n),
        "temperature": per_prompt("temperature", temperature, n),
        "top_p": per_prompt("top_p", top_p, n),
        "stop": per_prompt("stop", [(s,) if isinstance(s, str) else tuple(s) for s in stops], n),
    }
    # Python hashes a str seed, so that streams of neighbouring numbers have nothing in common.
    streams = [(seed, i) for i in range(n)] if isinstance(seed, int) else [(s, 0) for s in per_prompt("seed", seed, n)]
    requests = []
    for index, prompt in enumerate(prompts):
        if prompt is None:
            prompt = []
        else:
            check_prompt(tokenizer, index, prompt, max_seq_len)
        own = {name: values[index] for name, values in settings.items()}
        check_settings(**own)
        max_tokens = min(own.pop("max_gen_len"), max_seq_len - len(prompt))
        rng = random.Random("{}/{}".format(*streams[index]))
        request = Request(index, list(prompt), max_tokens, rng=rng, detokenizer=Detokenizer(tokenizer), **own)
        if echo:
            request.prompt_pieces = [request.detokenizer.push(token) for token in prompt]
        if max_tokens == 0:
            request.finish("length")
        requests.append(request)
    return requests


def per_prompt(name: str, value: Any, n: int) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} values for {n} prompts: pass one for all, or one for each")
    return value


def check_prompt(tokenizer: Tokenizer, index: int, prompt: Sequence[int], max_seq_len: int) -> None:
    if len(prompt) == 0:
        raise ValueError(f"prompt {index} has no tokens: begin it with the tokenizer's bos_id, {tokenizer.bos_id}")
    if len(prompt) > max_seq_len:
        raise ValueError(
            f"prompt {index} has {len(prompt)} tokens, and max_seq_len is {max_seq_len}: "
            "shorten it or build with a larger max_seq_len"
        )
    for token in prompt:
        if not isinstance(token, int):
            raise TypeError(f"prompt {index} has a {type(token).__name__} ({token!r}) among its token ids")
        if not 0 <= token < tokenizer.n_words:
            raise ValueError(f"prompt {index} has token id {token}, and the vocabulary has {tokenizer.n_words} pieces")


def check_settings(max_gen_len: int, temperature: float, top_p: float, stop: tuple[str, ...]) -> None:
    if not isinstance(max_gen_len, int):
        raise TypeError(f"max_gen_len is {max_gen_len!r}: use an integer")
    if max_gen_len < 0:
        raise ValueError(f"max_gen_len is {max_gen_len}: use 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: use 0 for greedy decoding, or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: use more than 0 and at most 1")
    if not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop is {list(stop)!r}: use strings that are not empty")
