"""Exceptions for a user's mistakes, and checks of single arguments that several modules share.

A mistake raises a ValueError, TypeError or FileNotFoundError. The message names the value, the
limit and the way out.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import Any


class Refusal(ValueError, AssertionError):
    """A mistake that the original reports with `assert`: scripts may catch AssertionError."""


class ArgumentError(ValueError):
    """An argument with an invalid value.

    `name` is the parameter, `index` the number of the prompt that has the value (None if all do),
    and `reason` the rest of the message. A caller whose clients use other names and numbers, such
    as the HTTP server, can build its own message from them.
    """

    def __init__(self, name: str, index: int | None, reason: str):
        super().__init__(name, index, reason)
        self.name = name
        self.index = index
        self.reason = reason

    @property
    def subject(self) -> str:
        return self.name if self.index is None else f"{self.name} of prompt {self.index}"

    def __str__(self) -> str:
        return f"{self.subject} {self.reason}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of the wrong type."""


class PromptError(ArgumentError):
    """A prompt that cannot be run; `name` is the caller's word for it ("prompt", "dialog")."""

    @property
    def subject(self) -> str:
        return self.name if self.index is None else f"{self.name} {self.index}"


class PromptTypeError(PromptError, TypeError):
    """A prompt of the wrong type."""


class EmptyPrompt(PromptError, Refusal):
    """A prompt without tokens."""


class PromptTooLong(PromptError, Refusal):
    """A prompt that is longer than `max_seq_len`."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A suggestion, or an empty string if no known word is similar."""
    for match in difflib.get_close_matches(word, known, 1):
        return f"did you mean {prefix}{match}?"
    return ""


def is_list(value: Any) -> bool:
    """Whether a value is a list, tuple, range or array of at least one dimension, and not text."""
    if isinstance(value, (str, bytes)):
        return False
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def as_integer(name: str, value: Any, index: int | None = None) -> int:
    """Convert any integer type, also NumPy's or PyTorch's. Raises ArgumentTypeError for others."""
    try:
        return int(operator.index(value))
    except TypeError:
        raise ArgumentTypeError(name, index, f"is {value!r}: use an integer") from None


def check_positive(**arguments: Any) -> None:
    """Raise ArgumentError unless each argument is an integer from 1 to 2^31 - 1."""
    for name, value in arguments.items():
        number = as_integer(name, value)
        if number < 1:
            raise ArgumentError(name, None, f"is {value}: use 1 or more")
        if number >= 2**31:
            raise ArgumentError(name, None, f"is {value}: use 1 or more and less than 2**31")
