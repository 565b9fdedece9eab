"""The command line of a function, derived from its signature.

A plain parameter becomes one flag; `Annotated[kind, "help"]` adds its help text. A parameter whose
type is a dataclass of options (BuildOptions, SamplingParams) becomes one flag for each field, with
the field's help text. So a new option needs no code here.

argparse converts the values and formats the help. Before that, `flags_in` rewrites each word as an
unambiguous flag with its value: argparse itself would read "- dash", "--" or "-1" as flags, but a
text must be passed on exactly as typed. The command runs only after all words were parsed and all
dataclasses accepted their values.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from .. import __version__
from ..errors import ArgumentError, did_you_mean

Command = Callable[..., Any]

HELP = {"-h", "--help"}
FLAG = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)  # not "-3" or "- a text"
REQUIRED = inspect.Parameter.empty
WIDTH = 80

# Prepended to each value passed to argparse, because argparse drops a value that is "--".
MARK = "="

# Fields whose flag has a different name: the parameter name in Llama's methods.
FLAG_NAMES = {"max_tokens": "max_gen_len"}


class UsageError(ValueError):
    """An invalid command line."""


class Hidden(tuple[str, ...]):
    """Names of fields for which a command has no flag. Used in the parameter's annotation."""


@dataclass(frozen=True)
class Flag:
    """One flag of a command."""

    name: str
    parameter: str  # the command's parameter
    field: str | None  # the field of that parameter's dataclass; None for a plain parameter
    kinds: tuple[Any, ...]  # the types in its annotation
    help: str
    default: Any
    positional: bool = False

    @property
    def is_switch(self) -> bool:
        return bool in self.kinds

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is tuple for kind in self.kinds)


def flags_of(command: Command) -> dict[str, Flag]:
    """The flags of a command by name. If two fields share a name (`seed`), the first one counts."""
    flags: dict[str, Flag] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        for flag in flags_of_parameter(parameter):
            flags.setdefault(flag.name, flag)
    return flags


def flags_of_parameter(parameter: inspect.Parameter) -> list[Flag]:
    hint = parameter.annotation
    notes: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        notes = tuple(rest)
    if dataclasses.is_dataclass(hint):
        hidden = [name for note in notes if isinstance(note, Hidden) for name in note]
        return flags_of_fields(parameter, hint, hidden)
    help = " ".join(note for note in notes if isinstance(note, str))
    positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    name = parameter.name
    return [Flag(name, name, None, members_of(hint), help, parameter.default, positional)]


def flags_of_fields(
    parameter: inspect.Parameter, options: Any, hidden: Sequence[str]
) -> list[Flag]:
    """A flag for each field. The parameter's default instance provides the defaults."""
    hints = get_type_hints(options)
    flags = []
    for field in dataclasses.fields(options):
        if field.name in hidden:
            continue
        name = FLAG_NAMES.get(field.name, field.name)
        kinds = members_of(hints[field.name])
        default = getattr(parameter.default, field.name)
        help = field.metadata["help"]
        flags.append(Flag(name, parameter.name, field.name, kinds, help, default))
    return flags


def members_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union. Any other annotation is its own only member."""
    if get_origin(hint) in (None, Literal, tuple):
        return (hint,)
    return get_args(hint)


def call(commands: Mapping[str, Command], words: Sequence[str], name: str) -> str | None:
    """Run the command that the first word names. Returns the text to print, if any."""
    word, *rest = words or ["--help"]
    if word in commands:
        command = commands[word]
        name = f"{name} {word}"
        if HELP.isdisjoint(rest):
            return command(**parse(command, rest, name))
        return describe(command, name)
    if word == "--version":
        return f"llama {__version__} (torch {version('torch')})"
    if word in HELP:
        return describe_all(commands, name)
    advice = did_you_mean(word, commands) or f"use {', '.join(commands)}"
    raise UsageError(f"{word!r} is not a command: {advice}")


def parse(command: Command, words: Sequence[str], name: str) -> dict[str, Any]:
    """Parse words to a command's keyword arguments. Raises UsageError if they are not valid."""
    flags = flags_of(command)
    see = f"see {name} --help"
    arranged = flags_in(words, flags, see)
    try:
        values = vars(parser_of(flags).parse_args(arranged))
    except argparse.ArgumentError as error:
        raise UsageError(error.message) from None
    for flag in flags.values():
        if flag.default is REQUIRED and flag.name not in values:
            raise UsageError(f"no {flag.name} is given: {see}")
    return arguments_of(command, flags, values)


def flags_in(words: Sequence[str], flags: Mapping[str, Flag], see: str) -> list[str]:
    """Rewrite words as `--flag==value`. Words without a flag become positional parameters."""
    arranged = []
    texts = []
    given = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        match = FLAG.fullmatch(word)
        if match is None:
            texts.append(word)
            continue
        flag = find(match[1], flags, see)
        given.add(flag.name)
        value = match[2]
        if value is None:
            value = value_after(flag, rest)
        arranged.append(f"--{flag.name}={MARK}{value}")
    places = [flag for flag in flags.values() if flag.positional and flag.name not in given]
    if len(texts) > len(places):
        extra = texts[len(places)]
        raise UsageError(
            f"{extra!r} is one word too many: put a text of several words in quotes, or {see}"
        )
    for flag, text in zip(places, texts, strict=False):
        arranged.append(f"--{flag.name}={MARK}{text}")
    return arranged


def find(word: str, flags: Mapping[str, Flag], see: str = "") -> Flag:
    """Find a flag by its name or its field's name, written with underscores or dashes."""
    name = word.replace("-", "_")
    name = FLAG_NAMES.get(name, name)
    if name not in flags:
        advice = did_you_mean(name, flags, "--") or see
        raise UsageError(f"unknown option --{word}: {advice}")
    return flags[name]


def value_after(flag: Flag, rest: list[str]) -> str:
    """Take the value of a flag written without "=" from the words that follow."""
    following = rest[0] if rest else None
    if flag.is_switch and following not in ("True", "False"):
        return "True"
    if following is None or FLAG.fullmatch(following):
        advice = f"write one that looks like a flag as --{flag.name}=--…"
        raise UsageError(f"--{flag.name} needs a value; {advice}")
    return rest.pop(0)


def parser_of(flags: Mapping[str, Flag], **about: Any) -> argparse.ArgumentParser:
    """An argparse parser. Flags that are not given are missing from its result."""
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        **about,
    )
    options = parser.add_argument_group("options")
    for flag in flags.values():
        action = "append" if flag.is_list else "store"
        help = help_of(flag).replace("%", "%%")
        options.add_argument(
            f"--{flag.name}", action=action, type=converter(flag), metavar="", help=help
        )
    return parser


def help_of(flag: Flag) -> str:
    if flag.default in (REQUIRED, None, ()):
        return flag.help
    return f"{flag.help} (default {flag.default})"


def converter(flag: Flag) -> Callable[[str], Any]:
    """A function that converts the text of a flag to a value of its type."""

    def convert(text: str) -> Any:
        text = text.removeprefix(MARK)
        try:
            return value_of(text, flag.kinds)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"--{flag.name} is {text!r}: use {error}") from None

    return convert


def value_of(text: str, kinds: tuple[Any, ...]) -> Any:
    """Convert a text to one of `kinds`. Raises ValueError with the accepted values if it fails."""
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if text == "None" and type(None) in kinds and str not in kinds:
        return None
    if bool in kinds:
        if text not in ("True", "False"):
            raise ValueError("True or False")
        return text == "True"
    if int in kinds:
        return converted(text, int, "a whole number")
    if float in kinds:
        return as_number(text)
    if choices and text not in choices:
        raise ValueError(" or ".join(choices))
    return os.fsencode(text).decode(errors="replace")  # invalid bytes are replaced


def converted(text: str, kind: Callable[[str], Any], what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(what) from None


def as_number(text: str) -> int | float:
    """Convert a text to a number. An integer stays an int, so that messages show what was typed."""
    try:
        return int(text)
    except ValueError:
        number: float = converted(text, float, "a number")
    if not math.isfinite(number):
        raise ValueError("a number")
    return number


def arguments_of(
    command: Command, flags: Mapping[str, Flag], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The command's keyword arguments. Each dataclass checks the fields that flags have set."""
    arguments: dict[str, Any] = {}
    fields: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        flag = flags[name]
        if flag.field is None:
            arguments[flag.parameter] = value
        else:
            fields.setdefault(flag.parameter, {})[flag.field] = value
    parameters = inspect.signature(command).parameters
    for parameter, changes in fields.items():
        try:
            arguments[parameter] = dataclasses.replace(parameters[parameter].default, **changes)
        except ArgumentError as error:
            name = FLAG_NAMES.get(error.name, error.name)
            raise UsageError(f"{name} {error.reason}") from None
    return arguments


def check_flags(function: Command, words: Iterable[str]) -> None:
    """Raise UsageError if a flag is not a parameter of the function that fire will call."""
    parameters = inspect.signature(function).parameters
    for word in words:
        match = FLAG.fullmatch(word)
        if match is None or word in HELP:
            continue
        name = match[1].replace("-", "_")
        if word.startswith("--") and name not in parameters:
            advice = did_you_mean(name, parameters, "--") or f"use --{', --'.join(parameters)}"
            raise UsageError(f"unknown option --{match[1]}: {advice}")


def describe(command: Command, name: str) -> str:
    """The help text of a command."""
    flags = flags_of(command)
    usage = name
    for flag in flags.values():
        if flag.positional:
            word = flag.name.upper()
            usage += f" {word}" if flag.default is REQUIRED else f" [{word}]"
    usage = textwrap.fill(f"{usage} [--FLAG VALUE ...]", WIDTH - len("usage: "))
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    description = "\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs)
    column = max(len(flag) for flag in flags) + 7
    parser = parser_of(
        flags,
        prog=name,
        usage=usage.replace("%", "%%"),
        description=description.replace("%", "%%"),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, column, WIDTH),
    )
    lines = parser.format_help().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def describe_all(commands: Mapping[str, Command], name: str) -> str:
    """The names of the commands, each with the first sentence of its help text."""
    column = max(map(len, commands)) + 4
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * column)
    rows = []
    for key, command in commands.items():
        sentence = re.split(r"[.;:]\s", f"{inspect.getdoc(command)} ")[0]
        rows.append(wrap.fill(f"  {key}".ljust(column) + sentence))
    opening = f"usage: {name} COMMAND ...\n\n{name} COMMAND --help describes a command.\n"
    return "\n".join([opening, *rows])
