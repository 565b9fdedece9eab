"""Building a model for a command, with glibc's allocator tuned before and after.

The allocator is global to the process. So a program may tune it, but a library call may not.
"""

from __future__ import annotations

import ctypes
import platform

from ..generation import BuildOptions, Llama, PathLike, build

# Parameters of mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def build_llama(ckpt_dir: PathLike, options: BuildOptions) -> Llama:
    """Build a model in a program that runs only this model."""
    return_freed_memory()
    llm = build(ckpt_dir, options)
    if llm.engine.runner.cache.device.type == "cpu":
        keep_freed_memory()
    return llm


def return_freed_memory() -> None:
    """Return large freed blocks to the system at once: they would accumulate during loading."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**23)


def keep_freed_memory() -> None:
    """Return free memory to the system now, and from now on keep freed memory for reuse.

    By default glibc returns every large temporary to the system, which then has to clear the pages
    again in each layer. That took a third of the time of a 512-token prompt. Other C libraries are
    not changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
        # The largest value that an older glibc accepts. A smaller threshold would not help.
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
