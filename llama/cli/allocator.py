"""What every command builds its model with, and what it tells glibc's allocator before and after.

The allocator belongs to the whole process, so that a program may set it and a library call may not.
"""

from __future__ import annotations

import ctypes
import platform

from ..generation import BuildOptions, Llama, PathLike, build

# Parameters of mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def build_llama(ckpt_dir: PathLike, options: BuildOptions) -> Llama:
    """A model for a program that does nothing else."""
    return_freed_memory()
    llm = build(ckpt_dir, options)
    if llm.engine.runner.cache.device.type == "cpu":
        keep_freed_memory()
    return llm


def return_freed_memory() -> None:
    """Give large freed blocks back to the system at once: those of loading would add up."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**23)


def keep_freed_memory() -> None:
    """Give back what is free now, and from here on keep freed memory for the next allocation.

    By default glibc gives every large temporary back to the system, which then clears its pages
    anew in each layer: that took a third of the time of a 512-token prompt. Other C libraries are
    left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
        # The most that an older glibc takes. A threshold that stayed smaller would not help.
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
