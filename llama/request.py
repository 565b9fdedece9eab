"""One prompt on its way to a result: its settings, its text so far, and when it ends. Knows nothing of models."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, NamedTuple

from .tokenizer import Detokenizer, Tokenizer

FinishReason = Literal["stop", "length"]


class Settings(NamedTuple):
    """How prompts are continued: each one value for all of them, or a list of one for each."""

    max_gen_len: int | Sequence[int] | None
    temperature: float | Sequence[float]
    top_p: float | Sequence[float]
    seed: int | Sequence[int]
    stop: str | Sequence[str] | Sequence[Sequence[str]] | None


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
    end_ids: frozenset[int]  # the ids that end it, and are no part of it
    wants_logprobs: bool = False
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

    @property
    def scores_prompt(self) -> bool:
        return self.wants_logprobs and bool(self.prompt_pieces)

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
        """Cut off the stop string that the last `added` characters complete first, and the tokens from there on."""
        found = [(self.text.find(s, max(0, len(self.text) - added - len(s) + 1)), len(s)) for s in self.stop]
        # Of two that overlap, the one whose end came first counts, however the text was split into tokens.
        ends = [(at + length, at) for at, length in found if at >= 0]
        if not ends:
            return False
        end, (_, cut) = len(self.text), min(ends)
        while self.pieces and (begin := end - len(self.pieces[-1])) >= cut:
            for per_token in (self.tokens, self.pieces, self.logprobs):
                per_token.pop()
            end = begin
        if self.pieces:  # a token may hold wanted text before the stop string
            self.pieces[-1] = self.pieces[-1][: len(self.pieces[-1]) - (end - cut)]
        self.text = self.text[:cut]
        return True


def make_requests(
    tokenizer: Tokenizer,
    prompts: Sequence[Any],
    settings: Settings,
    max_seq_len: int,
    *,
    logprobs: bool = False,
    echo: bool = False,
    refusals: Sequence[str | None] | None = None,
    infilling: bool = False,
) -> list[Request]:
    """One request per prompt; with `refusals`, which come with dialogs, the refused ones are finished. Those for
    `infilling` go on in the middle of a text, and end at EOT too.

    Raises ValueError or TypeError, with the prompt's number, for what cannot be run.
    """
    n, what = len(prompts), "prompt" if refusals is None else "dialog"
    max_gen_lens = per_prompt("max_gen_len", settings.max_gen_len, n)
    temperatures, top_ps = per_prompt("temperature", settings.temperature, n), per_prompt("top_p", settings.top_p, n)
    seeds = [integer("seed", seed) for seed in per_prompt("seed", settings.seed, n)]
    stops = stops_of(settings.stop, n)
    one_seed = not is_list(settings.seed)
    end_ids = frozenset({tokenizer.eos_id} | ({tokenizer.eot_id} if infilling else set()))
    requests = []
    for i, prompt in enumerate(prompts):
        refusal = refusals[i] if refusals else None
        tokens = [] if refusal is not None else check_prompt(tokenizer, f"{what} {i}", prompt, max_seq_len)
        max_gen_len = max_seq_len if max_gen_lens[i] is None else integer("max_gen_len", max_gen_lens[i])
        check_settings(max_gen_len, temperatures[i], top_ps[i])
        max_tokens = min(max_gen_len, max_seq_len - len(tokens))
        # Python hashes a str seed, so that streams of neighbouring numbers have nothing in common.
        rng = random.Random(f"{seeds[i]}/{i if one_seed else 0}")
        detokenizer = Detokenizer(tokenizer, at_start=not infilling)
        request = Request(
            i, tokens, max_tokens, temperatures[i], top_ps[i], stops[i], rng, detokenizer, end_ids, logprobs
        )
        if echo:
            request.prompt_pieces = [request.detokenizer.push(token) for token in tokens]
        if refusal is not None:
            request.refuse(refusal)
        elif max_tokens == 0:
            request.finish("length")
        requests.append(request)
    return requests


def is_list(value: Any) -> bool:
    """Lists, tuples, ranges, arrays of one dimension or more."""
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def per_prompt(name: str, value: Any, n: int) -> list[Any]:
    if not is_list(value):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} values for {n} prompts: pass one for all, or one for each")
    return list(value)


def stops_of(stop: Any, n: int) -> list[tuple[str, ...]]:
    """Each prompt's stop strings; a plain list of strings holds for all."""
    if not is_list(stop) or all(isinstance(s, str) for s in stop):
        stop = [stop] * n
    stops = [() if s is None else tuple(s) if is_list(s) else (s,) for s in per_prompt("stop", stop, n)]
    for own in stops:
        if not all(isinstance(s, str) for s in own):
            raise TypeError(f"stop is {list(own)!r}: use strings, or a list of strings for each prompt")
        if not all(own):
            raise ValueError(f"stop is {list(own)!r}: use strings that are not empty")
    return stops


def integer(name: str, value: Any) -> int:
    """Any kind of integer, NumPy's and PyTorch's among them."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: use an integer") from None


def check_positive(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not 1 <= integer(name, value) < 2**31:
            raise ValueError(f"{name} is {value}: use 1 or more" + " and less than 2**31" * (value > 1))


def check_prompt(tokenizer: Tokenizer, name: str, prompt: Any, max_seq_len: int) -> list[int]:
    if not is_list(prompt):
        raise TypeError(f"{name} is {prompt!r}: use a list of token ids")
    if len(prompt) == 0:
        raise ValueError(f"{name} has no tokens: begin it with the tokenizer's bos_id, {tokenizer.bos_id}")
    if len(prompt) > max_seq_len:
        raise ValueError(
            f"{name} has {len(prompt)} tokens, and max_seq_len is {max_seq_len}: "
            "shorten it or build with a larger max_seq_len"
        )
    tokens = [integer(f"a token id of {name}", token) for token in prompt]
    for token in tokens:
        if not 0 <= token < tokenizer.n_words:
            raise ValueError(f"{name} has token id {token}, and the vocabulary has {tokenizer.n_words} pieces")
    return tokens


def check_settings(max_gen_len: int, temperature: Any, top_p: Any) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}: use a number")
    if max_gen_len < 0:
        raise ValueError(f"max_gen_len is {max_gen_len}: use 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: use 0 for greedy decoding, or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: use more than 0 and at most 1")
