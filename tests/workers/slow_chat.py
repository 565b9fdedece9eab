"""python -m llama with answers slow enough to interrupt, and collectives that a person's thinking would outlast."""

import time
from datetime import timedelta

import torch.distributed as dist

from llama import Llama
from llama.__main__ import main

dist.init_process_group("gloo", timeout=timedelta(seconds=3))
decode = Llama._decode


def slow_decode(self, requests):
    time.sleep(0.05)
    return decode(self, requests)


Llama._decode = slow_decode
main()
