"""How a program starts and ends, alone or as a rank that torchrun started.

`program` is a context manager around all that a program does. It shows the log lines of the first
rank, turns mistakes into one sentence for all ranks, gives signals and closed pipes the exit
statuses that shells expect, and repairs standard streams. What it changes of the process (signal
handlers, streams, logging) is a program's business, and no library call's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .arguments import UsageError, check_flags

# The exit statuses that shells give to a program that SIGINT, SIGPIPE or SIGTERM ended.
INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143

# A rank that fails waits so long for each rank before it, up to three, to have reported the same
# mistake. On busy cores torchrun takes seconds to stop the others.
FAIL_SECONDS = 4

# Names a file for this rank's error message. torchrun sets it.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


@contextlib.contextmanager
def program(function: Callable[..., Any] | None = None) -> Iterator[None]:
    """Around what a program does.

    `function` is one that fire will call: flags that it has no parameter for are refused at once.
    """
    level = logging.INFO if is_first() else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level)
    repair_streams()
    handle_signals()
    try:
        if function is not None:
            check_flags(function, sys.argv[1:])
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(PIPE_CLOSED)
    except UsageError as error:
        fail(f"error: {error}", status=2)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(f"error: {error}", status=1)
    finally:
        flush_or_drop()


def is_first() -> bool:
    """Whether this is the first rank, or the only one. Works before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str | None) -> None:
    """Print what a command returned, on the first rank."""
    if text is not None and is_first():
        print(text)


def fail(sentence: str, status: int) -> None:
    """Exit with the sentence as the last thing printed, once for all ranks.

    torchrun ends its report with what it finds in a rank's error file, and stops the other ranks
    as soon as one has failed. A mistake that all ranks see is therefore left to the first one:
    each waits for those before it.
    """
    report = os.environ.get(ERROR_FILE)
    if report is None:
        print(sentence, file=sys.stderr)
    else:
        time.sleep(FAIL_SECONDS * min(int(os.environ["RANK"]), 3))
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": message}))
    sys.exit(status)


def handle_signals() -> None:
    """SIGTERM and Ctrl-C raise exceptions, so that what is half written is removed.

    torchrun's own handling of SIGTERM stays, and so does a SIGINT that a shell has ignored for a
    job in the background.
    """
    if ERROR_FILE not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(*_: object) -> None:
    """The first Ctrl-C ends what runs. The next one ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def repair_streams() -> None:
    """Replace closed streams (`<&-`) by empty ones; let no character raise an encoding error."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's own stream may lack it
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def flush_or_drop() -> None:
    """Write what standard output still holds, or drop it: Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
