"""What users pass -> checked Requests. What cannot be run is refused here, by the number of its prompt."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

from .engine.request import Pooling, Request
from .original import Refusal
from .tokenizer import Tokenizer


class Settings(NamedTuple):
    """How prompts are continued: each one value for all of them, or a list of one for each; and what is told of it."""

    max_gen_len: int | Sequence[int] | None = None
    temperature: float | Sequence[float] = 0.0
    top_p: float | Sequence[float] = 1.0
    seed: int | Sequence[int] = 1
    stop: str | Sequence[str] | Sequence[Sequence[str]] | None = ()
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False


def make_requests(
    tokenizer: Tokenizer,
    prompts: Sequence[Any],
    settings: Settings,
    max_seq_len: int,
    *,
    what: str = "prompt",
    continues: bool = False,
    pooling: Pooling | None = None,
    end_ids: Iterable[int] = (),
    refusals: Sequence[str | None] | None = None,
) -> list[Request]:
    """One request per prompt; those with a refusal are answered by it, and their prompts may be anything.

    `end_ids` end them beside EOS. Raises ValueError or TypeError, with the prompt's number, for what cannot be run.
    """
    n = len(prompts)
    top_logprobs = integer("top_logprobs", settings.top_logprobs)
    if not 0 <= top_logprobs <= tokenizer.n_used:
        raise ValueError(f"top_logprobs is {top_logprobs}: use 0 to {tokenizer.n_used}, the size of the vocabulary")
    if top_logprobs and not settings.logprobs:
        raise ValueError(f"top_logprobs is {top_logprobs}, and logprobs are not asked for: set logprobs=True too")
    max_gen_lens = per_prompt("max_gen_len", settings.max_gen_len, n)
    temperatures, top_ps = per_prompt("temperature", settings.temperature, n), per_prompt("top_p", settings.top_p, n)
    seeds = [integer("seed", seed) for seed in per_prompt("seed", settings.seed, n)]
    stops, one_seed = stops_of(settings.stop, n), not is_list(settings.seed)
    requests = []
    for i, prompt in enumerate(prompts):
        refusal = refusals[i] if refusals else None
        tokens = [] if refusal is not None else check_prompt(tokenizer, f"{what} {i}", prompt, max_seq_len)
        max_gen_len = max_seq_len if max_gen_lens[i] is None else integer("max_gen_len", max_gen_lens[i])
        check_settings(max_gen_len, temperatures[i], top_ps[i])
        requests.append(
            Request(
                tokens,
                max_tokens=min(max_gen_len, max_seq_len - len(tokens)),
                end_ids=frozenset([tokenizer.eos_id, *end_ids]),
                temperature=float(temperatures[i]),
                top_p=float(top_ps[i]),
                # Python hashes a str seed, so that streams of neighbouring numbers have nothing in common.
                stream=f"{seeds[i]}/{i if one_seed else 0}",
                stop=stops[i],
                logprobs=bool(settings.logprobs),
                top_logprobs=top_logprobs,
                echo=bool(settings.echo),
                continues=continues,
                pooling=pooling,
                refusal=refusal,
                index=i,
            )
        )
    return requests


def is_list(value: Any) -> bool:
    """Lists, tuples, ranges, arrays of one dimension or more."""
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def listed(name: str, values: Any) -> list[Any]:
    """`values` as a list. A lone str or dict is iterable too, of characters or keys, which is never what was meant."""
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is a {type(values).__name__}: pass a list, [{values!r}]")
    return list(values)


def per_prompt(name: str, value: Any, n: int) -> list[Any]:
    if isinstance(value, (dict, set, frozenset)):  # have a length, but no order that is the prompts'
        raise TypeError(f"{name} is {value!r}: pass one value for all prompts, or a list of one for each")
    if not is_list(value):
        return [plain(value)] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} values for {n} prompts: pass one for all, or one for each")
    return [plain(v) for v in value]


def plain(value: Any) -> Any:
    """An array of no dimension, PyTorch's or NumPy's, as the number that it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


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


class TooLong(Refusal):
    """A prompt does not fit into the model's positions."""


def check_prompt(tokenizer: Tokenizer, name: str, prompt: Any, max_seq_len: int) -> list[int]:
    if not is_list(prompt):
        raise TypeError(f"{name} is {prompt!r}: use a list of token ids")
    if len(prompt) == 0:
        raise Refusal(f"{name} has no tokens: begin it with the tokenizer's bos_id, {tokenizer.bos_id}")
    if len(prompt) > max_seq_len:
        raise TooLong(
            f"{name} has {len(prompt)} tokens, and max_seq_len is {max_seq_len}: "
            "shorten it or build with a larger max_seq_len"
        )
    tokens = [integer(f"a token id of {name}", token) for token in prompt]
    for token in tokens:
        if not 0 <= token < tokenizer.n_used:
            raise ValueError(f"{name} has token id {token}, and the vocabulary has {tokenizer.n_used} pieces")
    return tokens


def check_settings(max_gen_len: int, temperature: Any, top_p: Any) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}: use a number")
    if max_gen_len < 0:
        raise ValueError(f"max_gen_len is {max_gen_len}: use 0 or more")
    if not 0 <= temperature <= sys.float_info.max:
        raise ValueError(f"temperature is {temperature}: use 0 for greedy decoding, or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: use more than 0 and at most 1")
