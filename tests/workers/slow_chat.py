"""python -m llama with answers slow enough to interrupt, and a short timeout for collectives.

The timeout is shorter than the time that a person takes to think between messages.
"""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from llama import Llama
from llama.__main__ import main

if "WORLD_SIZE" in os.environ:
    store, rank, size = next(dist.rendezvous("env://"))
    store.set(f"{rank} is here", "")
    # Imports take long on busy cores.
    store.wait([f"{other} is here" for other in range(size)], timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=5)
    )
stream = Llama.stream_chat_completion


def slowly(pieces: Iterator[Any]) -> Iterator[Any]:
    for piece in pieces:
        time.sleep(0.05)
        yield piece


Llama.stream_chat_completion = lambda *args, **options: slowly(stream(*args, **options))  # type: ignore[method-assign]
main()
