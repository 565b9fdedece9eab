"""The fields of a client's call: reading them with a type check, and rejecting unsupported ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ArgumentError, PromptError, PromptTooLong
from ..options import kinds_of
from ..sampling import SamplingParams

MAX_STOP = 4096  # characters in all stop strings of a call; each token is checked against all

# Unsupported fields, each with the values that have no effect and are accepted.
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

CONTEXT_LENGTH = "context_length_exceeded"  # the code by which clients detect an overlong dialog

# For the first type of a SamplingParams field: the accepted JSON types, and their name in errors.
JSON_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    float: ((int, float), "a number"),
    int: ((int,), "an integer"),
    tuple: ((str, list), "a string or a list of strings"),
    str: ((str,), "a string"),
    dict: ((dict,), "an object"),
}


class BadRequest(ValueError):
    """An invalid or unsupported call: the reason, the field, an HTTP status and OpenAI's code."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class Fields:
    """A call's fields. Reading one raises BadRequest if its value has the wrong type."""

    def __init__(self, body: Any, model: str):
        if not isinstance(body, dict):
            raise BadRequest('the body is not a JSON object: send one, such as {"model": …}')
        self.body = body
        for name, neutral in NOT_SUPPORTED.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise BadRequest(f"{name} is not supported: leave it out", name)
        asked = self.text("model", model)
        if asked != model:
            message = f"model {shown(asked)} is not available: use {model!r}"
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
    """The fields of SamplingParams that a call sets, with their types checked.

    Fields in `other` are left out: OpenAI spells them differently, and the caller reads them.
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
    """Convert an error of the library to the client's field names and prompt numbers.

    `prompts` is the field that holds the prompts; the library sees each of them `n` times.
    `spelling` maps option names to OpenAI's names if these differ.
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
