"""How a program starts and ends, alone or as a rank started by torchrun.

`program` is a context manager around a whole program. It shows the first rank's log messages,
reports an error as one sentence for all ranks, exits after signals and closed pipes with the
statuses that shells expect, and repairs the standard streams. It changes the state of the process
(signal handlers, streams, logging), which no library call may do.
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

# The exit statuses that shells report for a program ended by SIGINT, SIGPIPE or SIGTERM.
INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143

# A failing rank first waits this long for each rank before it, up to three, in case that rank
# reports the same error. On busy cores torchrun takes seconds to stop the other ranks.
FAIL_SECONDS = 4

# The environment variable, set by torchrun, with the path for this rank's error message.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


@contextlib.contextmanager
def program(function: Callable[..., Any] | None = None) -> Iterator[None]:
    """Run the body as a program: set up logging, streams and signals, and report errors.

    `function` is the function that fire will call. Flags that are not its parameters are rejected
    before the body runs.
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
    """Whether this is the first or only rank. Works before the process group is created."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str | None) -> None:
    """Print what a command returned, on the first rank."""
    if text is not None and is_first():
        print(text)


def fail(sentence: str, status: int) -> None:
    """Exit with the sentence as the last output, printed once for all ranks.

    torchrun ends its report with the content of a rank's error file, and stops the other ranks as
    soon as one has failed. So that the first rank reports an error that occurs on all ranks, each
    rank waits for the ranks before it.
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
    """Make SIGTERM and Ctrl-C raise exceptions, so that partly written files are removed.

    torchrun's own handling of SIGTERM is kept. So is an ignored SIGINT, which shells set for
    background jobs.
    """
    if ERROR_FILE not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(*_: object) -> None:
    """The first Ctrl-C raises KeyboardInterrupt. The next one ends the process immediately."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def repair_streams() -> None:
    """Replace closed streams (`<&-`) by os.devnull, and make encoding errors impossible."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's own stream may lack it
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def flush_or_drop() -> None:
    """Flush standard output, or discard it if that fails: Python would report an error at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
