"""How a program begins and ends: log lines of the first rank, a user's mistake as one sentence, Ctrl-C without fuss."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fire

REPORT = "TORCHELASTIC_ERROR_FILE"  # set by torchrun


def run(command: Any, name: str | None = None) -> None:
    """fire.Fire(command), for programs that torchrun may start."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if first else logging.WARNING)
    if REPORT not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    try:
        fire.Fire(command, name=name)
    except KeyboardInterrupt:
        sys.exit(130)  # the number that shells give it
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(f"error: {error}")


def fail(sentence: str) -> None:
    """Exit with status 1 and the sentence as the last thing printed, once for all ranks.

    torchrun ends its report with what it finds in a rank's error file, and stops the other ranks as soon as one has
    failed. A mistake that all of them see is therefore left to the first to tell: each waits for those before it.
    """
    report = os.environ.get(REPORT)
    if report is None:
        sys.exit(sentence)
    time.sleep(2 * min(int(os.environ["RANK"]), 3))
    message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
    Path(report).write_text(json.dumps({"message": message}))
    sys.exit(1)
