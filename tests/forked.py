"""Programs, each a fork of one process that has imported what all of them import: that is most of a program's time.

What a program is told and what it answers is as of a process of its own: words, environment, folder, streams, status.
Only what happens before the first line of a program and after its last exit handler is not its own; where a test is
about that, or about torchrun, it starts the real thing.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forked", "llama", "llama.terminal", "llama.batch", "llama.checkpoints.convert"])


def run(
    words: list[str], environments: list[dict[str, str]], stdin: str, timeout: float
) -> subprocess.CompletedProcess[str]:
    """What `python *words` does, in a process for each environment, with their output together."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(stdin, errors="surrogateescape")
        for path in paths[1:]:
            path.touch()
        jobs = [CONTEXT.Process(target=become, args=(words, env, paths)) for env in environments]
        for job in jobs:
            job.start()
        try:
            end = time.monotonic() + timeout
            while any(job.is_alive() for job in jobs) and not any(job.exitcode for job in jobs):
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(words, timeout, *(path.read_bytes() for path in paths[1:]))
                multiprocessing.connection.wait([job.sentinel for job in jobs if job.is_alive()], timeout=0.5)
        finally:
            failed = [job.exitcode for job in jobs if job.exitcode]
            for job in jobs:
                job.kill()  # the others of a rank that failed, as torchrun does
                job.join()
        stdout, stderr = (path.read_text(errors="replace") for path in paths[1:])
        return subprocess.CompletedProcess(words, failed[0] if failed else 0, stdout, stderr)


def ranks(count: int) -> tuple[dist.TCPStore, list[dict[str, str]]]:
    """Where the ranks of a job meet, and what torchrun would put into each one's environment."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return store, [common | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def become(words: list[str], environment: dict[str, str], paths: list[Path]) -> None:
    """The program that `python *words` is."""
    for number, (path, flags) in enumerate(zip(paths, (os.O_RDONLY, *[os.O_WRONLY | os.O_APPEND] * 2), strict=True)):
        os.dup2(os.open(path, flags), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in enumerate("rww"))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    status: Any = 0
    try:
        start(words)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def start(words: list[str]) -> None:
    first, *rest = words
    if first == "-m":
        sys.argv, sys.path[0:0] = rest, [""]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0:0] = ["-c", *rest[1:]], [""]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0:0] = words, [str(Path(first).parent)]
        runpy.run_path(first, run_name="__main__")
