"""What is asked of a generation, and logits -> next token ids.

Rows are sampled one by one as far as the result goes: no row sees another's logits, options or
random numbers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypedDict

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError, is_list
from .options import check_fields, check_names, option, plain

Streams = Sequence[int]  # for each prompt, which of its seed's random streams it draws from


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued, and what is told of it. Names and neutral values are vLLM's.

    Raises ArgumentError, a ValueError, for a value out of range, and ArgumentTypeError, also a
    TypeError, for one of another type.
    """

    temperature: float = option(
        0.6,
        "0 takes the likeliest token, higher is more varied",
        valid=lambda value: 0 <= value <= sys.float_info.max,
        use="0 for greedy decoding, or a positive number",
    )
    top_p: float = option(
        0.9,
        "draw from the likeliest tokens that have this probability together",
        valid=lambda value: 0 < value <= 1,
        use="more than 0 and at most 1",
    )
    max_tokens: int | None = option(
        None,
        "tokens of an answer; None for as many as max_seq_len has room for",
        valid=lambda value: value >= 0,
        use="0 or more",
    )
    seed: int | None = option(None, "the same seed draws the same text")
    stop: tuple[str, ...] = option(
        (),
        "end an answer before this text",
        valid=all,
        use="strings that are not empty",
    )
    logprobs: bool = option(False, "tell the log-probability of each token", shared=True)
    top_logprobs: int = option(
        0,
        "tell the likeliest tokens in each token's place, so many, with logprobs",
        valid=lambda value: value >= 0,
        use="0 or more",
        shared=True,
    )
    echo: bool = option(False, "begin the answer with the prompt", shared=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_logprobs and not self.logprobs:
            reason = (
                f"is {self.top_logprobs}, and logprobs are not asked for: set logprobs=True too"
            )
            raise ArgumentError("top_logprobs", None, reason)


FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}
PLAIN = (int, float, bool, str, type(None))  # of values that hold for all prompts


class SamplingOptions(TypedDict, total=False):
    """The keywords of every method of Llama that are not parameters of the original's."""

    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | Sequence[Sequence[str]] | None
    top_logprobs: int


def params_of(count: int, options: Mapping[str, Any]) -> list[SamplingParams]:
    """The SamplingParams of each of `count` prompts.

    An option is one value for all prompts, or a list with a value for each. A plain list of stop
    strings holds for all. Raises as SamplingParams does; a value from a list is named with its
    prompt's number.
    """
    if not options.keys() <= FIELDS.keys():
        check_names(SamplingParams, options)
    same: dict[str, Any] = {}
    listed: dict[str, list[Any]] = {}
    for name, value in options.items():
        if type(value) in PLAIN or not varies(name, value):
            same[name] = value
        else:
            listed[name] = values_of(FIELDS[name], value, count)
    shared = SamplingParams(**same)
    if not listed:
        return [shared] * count
    return [with_own(shared, index, listed) for index in range(count)]


def varies(name: str, value: Any) -> bool:
    """Whether an option is given as a list of one value for each prompt."""
    if isinstance(value, (dict, set, frozenset)):  # they have a length, but no order
        reason = f"is {value!r}: pass one value for all prompts, or a list of one for each"
        raise ArgumentTypeError(name, None, reason)
    if name == "stop":
        return is_list(value) and any(is_list(part) or part is None for part in value)
    return is_list(value)


def values_of(field: dataclasses.Field[Any], values: Any, count: int) -> list[Any]:
    if field.metadata["shared"]:
        raise ArgumentTypeError(field.name, None, f"is {values!r}: pass one value for all prompts")
    if len(values) != count:
        reason = f"has {len(values)} values for {count} prompts: pass one for all, or one for each"
        raise ArgumentError(field.name, None, reason)
    return [plain(value) for value in values]


def with_own(shared: SamplingParams, index: int, listed: dict[str, list[Any]]) -> SamplingParams:
    """The options of one prompt."""
    own = {name: values[index] for name, values in listed.items()}
    try:
        return dataclasses.replace(shared, **own)
    except ArgumentError as error:
        raise type(error)(error.name, index, error.reason) from None


def streams_of(count: int, seed: Any) -> Streams:
    """Prompts that share a seed draw from its streams 0, 1, …; each of a list has stream 0."""
    return [0] * count if is_list(seed) else range(count)


def uniform(seed: int, stream: int, number: int) -> float:
    """Random number `number` of a stream, in [0, 1).

    It is a hash of the three, so that no number depends on those that were drawn before it.
    """
    digest = blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """The next id of each row, (n,): the likeliest where temperature is 0, else a draw.

    logits: (n, vocab_size) float32. `uniforms`, in [0, 1), decide each row's draw.
    """
    greedy = logits.argmax(dim=-1)
    if all(own.temperature == 0 for own in params):
        return greedy

    columns = [
        [own.temperature for own in params],
        [own.top_p for own in params],
        uniforms,
    ]
    temperature, top_p, draws = torch.tensor(columns, dtype=logits.dtype, device=logits.device)[
        ..., None
    ]
    # Greedy rows divide by 1: their draw is not used.
    divisor = torch.where(temperature > 0, temperature, 1.0)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / divisor
    probs = torch.softmax(scaled, dim=-1)
    drawn = sample_top_p(probs, top_p, draws)
    return torch.where(temperature[:, 0] > 0, drawn, greedy)


def sample_top_p(probs: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Nucleus sampling by inverting the cumulative distribution.

    Holtzman et al. 2019, section 3.1.

    probs: (n, vocab_size); top_p and uniforms: (n, 1). The nucleus is the likeliest tokens whose
    mass before each one does not exceed `top_p`. Each row takes the first token of its nucleus, in
    the order of ids, whose cumulative mass exceeds `uniforms` times the nucleus' mass: in sorted
    order a rounding error could swap two tokens that are nearly as likely. Returns ids, (n,).
    """
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    outside = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, tokens, before > top_p)
    cumulative = probs.masked_fill(outside, 0.0).cumsum(dim=-1)
    mass = cumulative[:, -1:].contiguous()
    # The last token of the nucleus, where rounding goes beyond it.
    last = torch.searchsorted(cumulative, mass)
    choice = torch.searchsorted(cumulative, uniforms * mass, right=True)
    return choice.minimum(last)[:, 0]


def token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids (n, 1 + k) of each row's token and the k likeliest, and their logprobs, alike.

    logits: (n, vocab_size) float32; tokens: (n,). Logprobs are natural logarithms of
    softmax(logits).
    """
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.cat((tokens[:, None], logprobs.topk(k).indices), dim=1)
    return ids, logprobs.gather(1, ids)
