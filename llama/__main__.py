"""python -m llama: the names of the commands."""

from __future__ import annotations

from . import launch, terminal
from .batch import batch
from .checkpoints.convert import convert, reshard
from .checkpoints.folders import info, verify
from .perplexity import perplexity
from .serving import serve

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
