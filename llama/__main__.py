"""python -m llama: the names of the commands."""

from __future__ import annotations

from .checkpoints.convert import convert, reshard
from .cli import chat as terminal
from .cli import program as launch
from .cli.batch import batch
from .cli.info import info, verify
from .cli.perplexity import perplexity
from .server import serve

COMMANDS: dict[str, launch.Command] = {
    "chat": terminal.Chat,
    "run": terminal.Run,
    "serve": serve,
    "batch": batch,
    "perplexity": perplexity,
    "info": info,
    "verify": verify,
    "reshard": reshard,
    "convert": convert,
}


def main() -> None:
    launch.run(COMMANDS, name="python -m llama")


if __name__ == "__main__":
    main()
