"""The options of a request, and logits -> next token ids.

Rows are independent: a row's result does not depend on other rows' logits, options or random
numbers.
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

Streams = Sequence[int]  # for each prompt, which of its seed's random streams it uses


@dataclass(frozen=True)
class SamplingParams:
    """The options of one request: how its output is sampled, and what is returned.

    `temperature` 0 is greedy decoding; otherwise tokens are sampled from the `top_p` nucleus. The
    output has at most `max_tokens` tokens (None: up to `max_seq_len`) and ends before the first of
    the `stop` strings. The same `seed` gives the same output; None uses the seed of `Llama.build`.
    `logprobs` returns the log-probability of each token, and `top_logprobs` k also the k most
    likely tokens at its position. `echo` puts the prompt before the output. Names and neutral
    values are vLLM's.

    Raises ArgumentError, a ValueError, if a value is out of range, and ArgumentTypeError, also a
    TypeError, if its type is wrong.
    """

    temperature: float = option(
        0.6,
        "0 is greedy; higher values are more varied",
        valid=lambda value: 0 <= value <= sys.float_info.max,
        use="0 for greedy decoding, or a positive number",
    )
    top_p: float = option(
        0.9,
        "sample from the most likely tokens that add up to this probability",
        valid=lambda value: 0 < value <= 1,
        use="more than 0 and at most 1",
    )
    max_tokens: int | None = option(
        None,
        "maximum length of an answer, in tokens; None: up to max_seq_len",
        valid=lambda value: value >= 0,
        use="0 or more",
    )
    seed: int | None = option(None, "the same seed gives the same text")
    stop: tuple[str, ...] = option(
        (),
        "end the answer before this text",
        valid=all,
        use="strings that are not empty",
    )
    logprobs: bool = option(False, "return the log-probability of each token", shared=True)
    top_logprobs: int = option(
        0,
        "with logprobs: also return this many of the most likely tokens at each position",
        valid=lambda value: value >= 0,
        use="0 or more",
        shared=True,
    )
    echo: bool = option(False, "put the prompt before the answer", shared=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_logprobs and not self.logprobs:
            reason = f"is {self.top_logprobs}, and logprobs is False: set logprobs=True too"
            raise ArgumentError("top_logprobs", None, reason)


FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}
PLAIN = (int, float, bool, str, type(None))  # types of values that apply to all prompts


class SamplingOptions(TypedDict, total=False):
    """The keywords of every method of Llama, beyond the original's parameters."""

    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | Sequence[Sequence[str]] | None
    top_logprobs: int


def params_of(count: int, options: Mapping[str, Any]) -> list[SamplingParams]:
    """The SamplingParams of each of `count` prompts.

    An option is one value for all prompts, or a list with one value per prompt. A flat list of stop
    strings applies to all prompts. Raises the errors of SamplingParams; if the value comes from a
    list, the error gives the prompt's number.
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
    """Whether an option is given as a list with one value per prompt."""
    if isinstance(value, (dict, set, frozenset)):  # these have a length, but are not lists
        reason = f"is {value!r}: pass one value for all prompts, or a list with one for each"
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
    """The options of prompt `index`: `shared`, with its own values from the lists."""
    own = {name: values[index] for name, values in listed.items()}
    try:
        return dataclasses.replace(shared, **own)
    except ArgumentError as error:
        raise type(error)(error.name, index, error.reason) from None


def streams_of(count: int, seed: Any) -> Streams:
    """Each prompt's stream: 0, 1, ... if they share a seed, 0 if each has its own."""
    return [0] * count if is_list(seed) else range(count)


def uniform(seed: int, stream: int, number: int) -> float:
    """Random number `number` of a stream, in [0, 1).

    It is a hash of the three arguments, so it does not depend on what was drawn before.
    """
    digest = blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """The next id of each row, (n,): the most likely one if temperature is 0, else a random draw.

    logits: (n, vocab_size) float32. `uniforms` has the random number of each row, in [0, 1).
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
    # Greedy rows divide by 1; their draw is not used.
    divisor = torch.where(temperature > 0, temperature, 1.0)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / divisor
    probs = torch.softmax(scaled, dim=-1)
    drawn = sample_top_p(probs, top_p, draws)
    return torch.where(temperature[:, 0] > 0, drawn, greedy)


def sample_top_p(probs: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019, section 3.1), by inverting the distribution.

    probs: (n, vocab_size); top_p and uniforms: (n, 1). Returns ids, (n,).

    In order of decreasing probability, a token is in the nucleus if the total probability of the
    tokens before it does not exceed `top_p`. Each row takes the first token of its nucleus, in
    order of ids, at which the cumulative probability exceeds `uniforms` times the nucleus's total.
    Sorted order is not used here: a rounding error could swap two tokens of nearly equal
    probability.
    """
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    outside = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, tokens, before > top_p)
    cumulative = probs.masked_fill(outside, 0.0).cumsum(dim=-1)
    mass = cumulative[:, -1:].contiguous()
    # The last token of the nucleus: rounding could lead beyond it.
    last = torch.searchsorted(cumulative, mass)
    choice = torch.searchsorted(cumulative, uniforms * mass, right=True)
    return choice.minimum(last)[:, 0]


def token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids of each row's token and the k most likely ones, (n, 1 + k), and their logprobs.

    logits: (n, vocab_size) float32; tokens: (n,). Logprobs are natural logarithms of
    softmax(logits).
    """
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.cat((tokens[:, None], logprobs.topk(k).indices), dim=1)
    return ids, logprobs.gather(1, ids)
