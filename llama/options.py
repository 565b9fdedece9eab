"""Dataclasses of options: each field carries its help text and its check.

SamplingParams and BuildOptions consist of such fields. The methods of Llama, the HTTP server, batch
files and the command line all read the fields, so a new option is defined in one place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, get_args, get_type_hints

from .errors import ArgumentError, ArgumentTypeError, as_integer, did_you_mean, is_list


def option(
    default: Any,
    help: str,
    *,
    valid: Callable[[Any], bool] | None = None,
    use: str = "",
    shared: bool = False,
) -> Any:
    """A dataclass field with its help text and its check.

    If `valid` rejects a value of the field's type, the error message ends with "use {use}". A
    `shared` option has one value for all prompts of a call.
    """
    metadata = {"help": help, "valid": valid, "use": use, "shared": shared}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def kinds_of(options: type[Any]) -> dict[str, tuple[type, ...]]:
    """The types of each field: (int, NoneType) for `int | None`."""
    hints = get_type_hints(options)
    return {field.name: members_of(hints[field.name]) for field in dataclasses.fields(options)}


def members_of(hint: Any) -> tuple[type, ...]:
    """The plain types of an annotation: a union's members, a literal's type, a generic's origin."""
    if isinstance(hint, type):
        return (hint,)
    arguments = get_args(hint)
    if all(isinstance(argument, str) for argument in arguments):
        return (str,)
    if getattr(hint, "__origin__", None) is tuple:
        return (tuple,)
    return tuple(kind for argument in arguments for kind in members_of(argument))


def check_fields(options: Any) -> None:
    """Check every field of a frozen dataclass, and convert it to the field's type.

    Raises ArgumentError if a value is out of range, ArgumentTypeError if its type is wrong.
    """
    kinds = kinds_of(type(options))  # type: ignore[arg-type]
    for field in dataclasses.fields(options):
        name = field.name
        value = getattr(options, name)
        if type(value) not in kinds[name]:
            value = converted(name, kinds[name], value)
            object.__setattr__(options, name, value)
        if kinds[name][0] is tuple and not all(isinstance(part, str) for part in value):
            raise strings_wanted(name, value)
        valid = field.metadata["valid"]
        if value is not None and valid is not None and not valid(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise ArgumentError(name, None, f"is {shown!r}: use {field.metadata['use']}")


def converted(name: str, kinds: tuple[type, ...], value: Any) -> Any:
    """Convert a value to one of its field's types. Raises ArgumentTypeError if that fails."""
    value = plain(value)
    if bool in kinds:
        if value is None:
            return False
        if not isinstance(value, Real):
            raise ArgumentTypeError(name, None, f"is {value!r}: use True or False")
        return bool(value)
    if float in kinds:
        if not isinstance(value, Real):
            raise ArgumentTypeError(name, None, f"is {value!r}: use a number")
        return int(value) if isinstance(value, int) else float(value)
    if int in kinds:
        return as_integer(name, value)
    if tuple in kinds:
        if value is None:
            return ()
        return tuple(value) if is_list(value) else (value,)
    return value


def strings_wanted(name: str, value: tuple[Any, ...]) -> ArgumentTypeError:
    return ArgumentTypeError(
        name, None, f"is {list(value)!r}: use strings, or a list of strings for each prompt"
    )


def plain(value: Any) -> Any:
    """A zero-dimensional PyTorch or NumPy array as a number; any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_names(options: type[Any], given: Iterable[str]) -> None:
    """Raise TypeError if a keyword is not a field."""
    known = [field.name for field in dataclasses.fields(options)]
    for name in given:
        if name not in known:
            advice = did_you_mean(name, known) or f"use {', '.join(known)}"
            raise TypeError(f"unknown option {name}: {advice}")
