"""The commands of `python -m llama`."""

from __future__ import annotations

import sys

from .cli.arguments import Command, call
from .cli.batch import batch
from .cli.chat import chat
from .cli.convert import convert, reshard
from .cli.info import info, verify
from .cli.perplexity import perplexity
from .cli.program import program, say
from .cli.run import run
from .cli.serve import serve

COMMANDS: dict[str, Command] = {
    "chat": chat,
    "run": run,
    "serve": serve,
    "batch": batch,
    "perplexity": perplexity,
    "info": info,
    "verify": verify,
    "reshard": reshard,
    "convert": convert,
}


def main() -> None:
    with program():
        say(call(COMMANDS, sys.argv[1:], "python -m llama"))


if __name__ == "__main__":
    main()
