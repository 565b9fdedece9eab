"""The fields that clients send, each of its type, and the refusal of what cannot be done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ArgumentError, PromptError, PromptTooLong
from ..options import kinds_of
from ..sampling import SamplingParams

MAX_STOP = 4096  # characters of a call's stop strings, all of which are looked for after each token

# What is refused, and the values that ask for nothing.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "modalities": (["text"],),
    "audio": (),
    "dimensions": (),
}

CONTEXT_LENGTH = (
    "context_length_exceeded"  # the code by which clients know that a dialog is too long
)

# For a field of SamplingParams with a value of the first type: what JSON may hold, and its name
# in errors.
JSON_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    float: ((int, float), "a number"),
    int: ((int,), "an integer"),
    tuple: ((str, list), "a string or a list of strings"),
    str: ((str,), "a string"),
    dict: ((dict,), "an object"),
}


class BadRequest(ValueError):
    """What a client asked for cannot be done: why, the field, an HTTP status, OpenAI's code."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class Fields:
    """A call's fields. Reading one raises BadRequest where its value is of a wrong type."""

    def __init__(self, body: Any, model: str):
        if not isinstance(body, dict):
            raise BadRequest('the body is no JSON object: send one, as {"model": …}')
        self.body = body
        for name, neutral in NOT_SUPPORTED.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise BadRequest(f"{name} is not supported: leave it out", name)
        asked = self.text("model", model)
        if asked != model:
            message = f"no model {shown(asked)} is here: use {model!r}"
            raise BadRequest(message, "model", 404, "model_not_found")

    def read(self, name: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        is_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not is_kind:
            raise BadRequest(f"{name} is {shown(value)}: use {what}", name)
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        return self.read(name, default, (str,), "a string")

    def integer(
        self, name: str, default: int | None = None, low: int = 0, high: int | None = None
    ) -> Any:
        value = self.read(name, default, (int,), "an integer")
        if value is None:
            return None
        if value < low or (high is not None and value > high):
            limits = f"{low} or more"
            if high is not None:
                limits += f", at most {high}"
            raise BadRequest(f"{name} is {shown(value)}: use {limits}", name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value: bool = self.read(name, default, (bool,), "true or false")
        return value

    def object(self, name: str) -> Any:
        return self.read(name, {}, (dict,), "an object")

    def sequence(self, name: str) -> Any:
        value = self.read(name, None, (list,), "a list")
        if value is None:
            raise BadRequest(f"no {name} is given: send a list", name)
        return value


def shown(value: Any) -> str:
    text = repr(value)
    if len(text) > 100:
        return f"{text[:97]}…"
    return text


def sampling_fields(fields: Fields, other: Iterable[str] = ()) -> dict[str, Any]:
    """What a call says of the fields of SamplingParams, each of its type.

    Left out are those that the call does not have, and those in `other`: OpenAI spells them in
    another way, so that the caller reads them.
    """
    options: dict[str, Any] = {}
    for name, kinds in kinds_of(SamplingParams).items():
        if name in other:
            continue
        allowed, what = JSON_TYPES.get(kinds[0], ((object,), "another value"))
        value = fields.read(name, None, allowed, what)
        if value is not None:
            options[name] = value
    check_stop(options.get("stop", ()))
    return options


def check_stop(stop: str | list[Any]) -> None:
    strings = [stop] if isinstance(stop, str) else stop
    size = sum(len(string) for string in strings if isinstance(string, str))
    if size > MAX_STOP:
        raise BadRequest(f"stop has {size} characters: send at most {MAX_STOP} in a call", "stop")


def refused(
    error: ArgumentError, prompts: str, n: int = 1, spelling: Mapping[str, str] | None = None
) -> BadRequest:
    """The library's refusal, in the names and numbers of the client.

    `prompts` is the field that prompts come in; each of them stands for `n` of the library's.
    `spelling` has OpenAI's names of options that have others.
    """
    if isinstance(error, PromptError):
        if error.index is not None:
            error = type(error)(error.name, error.index // n, error.reason)
        code = CONTEXT_LENGTH if isinstance(error, PromptTooLong) else None
        return BadRequest(str(error), prompts, code=code)
    name = (spelling or {}).get(error.name, error.name)
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    param = name if error.name in known else prompts
    return BadRequest(f"{name} {error.reason}", param)
