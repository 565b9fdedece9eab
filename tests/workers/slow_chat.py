"""python -m llama with answers slow enough to interrupt, and collectives that a person's thinking would outlast."""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from llama import Llama
from llama.__main__ import main

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
stream = Llama.stream_chat_completion


def slowly(pieces: Iterator[Any]) -> Iterator[Any]:
    for piece in pieces:
        time.sleep(0.05)
        yield piece


Llama.stream_chat_completion = lambda *args, **options: slowly(stream(*args, **options))  # type: ignore[method-assign]
main()
