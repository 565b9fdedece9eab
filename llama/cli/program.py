"""How a program begins and ends: its command line, log lines of the first rank, errors as sentences, Ctrl-C, pipes."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import json
import logging
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import fire

from .. import __version__

# A rank that fails waits so long for each before it, up to three, to have told the same: torchrun, on busy cores, takes
# seconds to stop the others.
FAIL_SECONDS = 4

REPORT = "TORCHELASTIC_ERROR_FILE"  # set by torchrun

Command = Callable[..., Any]

HELP = {"-h", "--help"}
FLAG = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)  # "-3" and "- a text" are none
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}

# What a parameter of this name means, in whichever program.
FLAGS = {
    "ckpt_dir": "folder of weights, or GGUF file",
    "prompt": "the text; read from standard input if it is - or left out",
    "input": "file with a line of JSON for each prompt",
    "output": "file to write answers to, line by line",
    "text": "file of UTF-8 text",
    "stride": "new tokens in each window of max_seq_len",
    "out": "folder or GGUF file to write, which must not be there yet",
    "to": "hf for Hugging Face's layout, meta for the release's, gguf for llama.cpp's",
    "type": "of a GGUF file's matrices: f16, bf16, q8_0, q4_0 or q4_1",
    "model_parallel_size": "number of shards to write, or of ranks that share a model",
    "tokenizer_path": "tokenizer.model, if it is neither in the folder nor beside it",
    "system": "system message: how the model is to answer",
    "plain": "continue the text instead of answering it",
    "temperature": "0 takes the likeliest token, higher is more varied",
    "top_p": "draw from the likeliest tokens that have this probability together",
    "max_seq_len": "tokens of prompt and answer together",
    "max_gen_len": "tokens of an answer; None for as many as max_seq_len has room for",
    "max_batch_size": "how many prompts run at once",
    "seed": "the same seed draws the same text",
    "device": "cuda, mps, cpu, or auto for the first of them that there is",
    "dtype": "float32, bfloat16, float16, or auto for the fastest of 16 bits or more",
    "quantize": "int8 or int4: hold linear weights in 8 or 4 bits",
    "compile": "compile the decode step, which takes minutes once",
    "host": "address to listen on; 0.0.0.0 for all of this machine's",
    "port": "0 takes a free one, and says which",
    "api_key": "what clients have to send; better in LLAMA_API_KEY, an environment variable, which nobody else sees",
    "allow_origin": "another server whose pages may ask this one, as https://example.org; * for all",
    "model_name": "what clients call the model, in place of its folder's name",
    "max_waiting": "requests that wait while others run; beyond them, clients are told to come again",
    "drain": "seconds that running answers have left when the server is told to end",
    "adapter_dir": "LoRA adapter in PEFT's layout, which is merged into the weights",
}


class UsageError(ValueError):
    """The command line says what cannot be done."""


def run(command: Command | Mapping[str, Command], name: str | None = None) -> None:
    """Call what the command line asks for: the function, or the one of several that its first word names.

    Nothing runs unless every word is understood; text arrives as typed. In place of a function may stand a class whose
    objects are called. A string that comes back is printed. For programs that torchrun may start.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_first() else logging.WARNING)
    repair_streams()
    if REPORT not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        call, words = understand(command, sys.argv[1:], name or f"python {Path(sys.argv[0]).name}")
        fire.Fire(call, command=words, serialize=lambda said: said if is_first() else None)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)  # the number that shells give it
    except BrokenPipeError:
        sys.exit(141)  # and to a program whose reader has gone, as head does
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(f"error: {error}", status=2 if isinstance(error, UsageError) else 1)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would flush once more at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_first() -> bool:
    """Whether this is the first rank, or the only one, before any process group says so."""
    return os.environ.get("RANK", "0") == "0"


def fail(sentence: str, status: int = 1) -> None:
    """Exit with the sentence as the last thing printed, once for all ranks.

    torchrun ends its report with what it finds in a rank's error file, and stops the other ranks as soon as one has
    failed. A mistake that all of them see is therefore left to the first to tell: each waits for those before it.
    """
    report = os.environ.get(REPORT)
    if report is None:
        print(sentence, file=sys.stderr)
    else:
        time.sleep(FAIL_SECONDS * min(int(os.environ["RANK"]), 3))
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": message}))
    sys.exit(status)


def interrupt(*_: object) -> None:
    """The first Ctrl-C ends what runs; another ends the process at once, whatever the first is still tidying up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def repair_streams() -> None:
    """Streams that were closed (<&-) are empty ones, and no character of a text ends the program."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's own may not have it
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def understand(command: Command | Mapping[str, Command], words: list[str], name: str) -> tuple[Command, list[str]]:
    """What fire is to call, and with which words. Raises UsageError where there is no such thing."""
    if isinstance(command, Mapping):
        word, *rest = words or ["--help"]
        if word in command:
            return understand(command[word], rest, f"{name} {word}")
        if word == "--version":
            return lambda: f"llama {__version__} (torch {version('torch')})", []
        if word not in HELP:
            raise UsageError(f"{word!r} is no command: {did_you_mean(word, command) or 'use ' + ', '.join(command)}")
    elif not HELP & set(words):
        parameters = inspect.signature(command, eval_str=True).parameters
        readers = {key: functools.partial(value_of, key, p.annotation) for key, p in parameters.items()}
        # By itself, fire would read numbers and lists in what is a text.
        return fire.decorators.SetParseFns(**readers)(command), as_flags(words, parameters, name)
    return lambda: describe(command, name), []


def as_flags(words: list[str], parameters: Mapping[str, inspect.Parameter], name: str) -> list[str]:
    """The words as --key=text. Raises UsageError for what has no place, before anything runs."""
    texts, rest, see = [], list(words), f"see {name} --help"
    given: dict[str, str] = {}
    while rest:
        word = rest.pop(0)
        flag = FLAG.fullmatch(word)
        if flag is None:
            texts.append(word)
        elif (key := flag[1].replace("-", "_")) not in parameters:
            hint = did_you_mean(key, parameters, "--") or see
            raise UsageError(f"{word.partition('=')[0]} is no flag of {name.split()[-1]}: {hint}")
        elif flag[2] is not None:
            given[key] = flag[2]
        elif parameters[key].annotation is bool and rest[:1] not in (["True"], ["False"]):
            given[key] = "True"
        elif not rest or FLAG.fullmatch(rest[0]):
            raise UsageError(f"--{key} needs a value; one that looks like a flag is written --{key}=--…")
        else:
            given[key] = rest.pop(0)
    places = [key for key, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and key not in given]
    if len(texts) > len(places):
        raise UsageError(f"{texts[len(places)]!r} is one word too many: put a text of several in quotes, or {see}")
    given |= zip(places, texts, strict=False)
    for key, p in parameters.items():
        if p.default is p.empty and key not in given:
            raise UsageError(f"no {key} is given: {see}")
    return [f"--{key}={text}" for key, text in given.items()]


def value_of(name: str, annotation: Any, text: str) -> Any:
    """What a parameter is given as `text`: numbers, True, False and None where its type has them, else the text."""
    kinds = get_args(annotation) or (annotation,)  # X | None are two
    if str not in kinds:
        with contextlib.suppress(SyntaxError, ValueError):
            value = ast.literal_eval(text)
            if type(value) in kinds or (type(value) is int and float in kinds):
                return value
    if kinds[0] in KINDS:
        raise UsageError(f"--{name} is {text!r}: use {KINDS[kinds[0]]}")
    return os.fsencode(text).decode(errors="replace")  # bytes that are no text


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    return "".join(f"did you mean {prefix}{match}?" for match in difflib.get_close_matches(word, known, 1))


def describe(command: Command | Mapping[str, Command], name: str) -> str:
    """The text of --help."""
    if isinstance(command, Mapping):
        usage, text = f"Usage: {name} COMMAND ...", f"{name} COMMAND --help describes a command."
        # Of each, its docstring's first part.
        rows = [(key, re.split(r"[.;]\s", f"{inspect.getdoc(function)} ")[0]) for key, function in command.items()]
    else:
        usage, text, rows = f"Usage: {name}", inspect.getdoc(command) or "", []
        for key, p in inspect.signature(command).parameters.items():
            if p.kind is p.POSITIONAL_OR_KEYWORD:
                usage += f" {key.upper()}" if p.default is p.empty else f" [{key.upper()}]"
            default = "" if p.default in (p.empty, None) else f" (default {p.default})"
            rows.append((f"--{key}", FLAGS.get(key, "") + default))
        usage += " [--FLAG VALUE ...]"
    column = max(len(left) for left, _ in rows) + 4
    wrap = textwrap.TextWrapper(80, subsequent_indent=" " * column)
    table = "\n".join(wrap.fill(f"  {left}".ljust(column) + right) for left, right in rows)
    return "\n\n".join([*(textwrap.fill(part, 80) for part in (usage, *text.split("\n\n"))), table])
