"""Errors that say what a user did wrong, and checks of single arguments that several modules share.

A mistake is a ValueError, a TypeError or a FileNotFoundError whose sentence names the value, the
limit and the way out.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import Any


class Refusal(ValueError, AssertionError):
    """A mistake that the original asserted: scripts that catch AssertionError go on."""


class ArgumentError(ValueError):
    """An argument that cannot be used.

    `name` is the parameter, `index` the number of the prompt whose value it is (None where it holds
    for all prompts), and `reason` the rest of the sentence. They are data, so that a caller whose
    own callers know other names and numbers (an HTTP server, say) can tell the mistake in theirs.
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
    """An argument of a wrong type."""


class PromptError(ArgumentError):
    """A prompt that cannot be run; `name` is what the caller calls it ("prompt", "dialog")."""

    @property
    def subject(self) -> str:
        return self.name if self.index is None else f"{self.name} {self.index}"


class PromptTypeError(PromptError, TypeError):
    """A prompt of a wrong type."""


class EmptyPrompt(PromptError, Refusal):
    """A prompt without a token."""


class PromptTooLong(PromptError, Refusal):
    """A prompt that does not fit into the model's positions."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A suggestion, or nothing where no known word is near."""
    for match in difflib.get_close_matches(word, known, 1):
        return f"did you mean {prefix}{match}?"
    return ""


def is_list(value: Any) -> bool:
    """Whether a value is a list, tuple, range or array of at least one dimension. Text is none."""
    if isinstance(value, (str, bytes)):
        return False
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def as_integer(name: str, value: Any, index: int | None = None) -> int:
    """Any kind of integer, NumPy's and PyTorch's among them."""
    try:
        return int(operator.index(value))
    except TypeError:
        raise ArgumentTypeError(name, index, f"is {value!r}: use an integer") from None


def check_positive(**arguments: Any) -> None:
    """Raise ArgumentError unless each is an integer from 1 to 2^31 - 1."""
    for name, value in arguments.items():
        number = as_integer(name, value)
        if number < 1:
            raise ArgumentError(name, None, f"is {value}: use 1 or more")
        if number >= 2**31:
            raise ArgumentError(name, None, f"is {value}: use 1 or more and less than 2**31")
