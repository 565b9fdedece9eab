"""Run programs as forks of one process that has already done their imports.

Imports take most of a program's time. Arguments, environment, working directory, streams and exit
status behave as in a separate process. Side effects of imports, the environment that imports read,
the hash seed, and the interpreter's shutdown after the last exit handler do not. Tests of these, or
of torchrun, start a real process.
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
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["llama", "llama.cli.chat", "llama.cli.batch", "llama.cli.convert"])


class Job:
    """A running program, used like subprocess.Popen."""

    def __init__(self, words: list[str], environment: dict[str, str], paths: list[Path]):
        """`paths` are the files for standard input, output and error."""
        self.words = words
        self.process = CONTEXT.Process(target=become, args=(words, environment, paths), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid, self.kill, self.terminate = (
            self.process.pid,
            self.process.kill,
            self.process.terminate,
        )

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run(
    arguments: Sequence[str | Path], environments: list[dict[str, str]], stdin: str, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` in one process per environment; return their combined output."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(stdin, errors="surrogateescape")
        jobs: list[Job] = []
        end = time.monotonic() + timeout
        try:
            jobs += (Job(words, environment, paths) for environment in environments)
            while (codes := [job.poll() for job in jobs]).count(None) and not any(codes):
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(
                        words, timeout, paths[1].read_bytes(), paths[2].read_bytes()
                    )
                multiprocessing.connection.wait(
                    [job.process.sentinel for job in jobs if job.poll() is None], 0.5
                )
        finally:
            for job in jobs:
                job.kill()  # if a rank fails, end the others, as torchrun does
                job.wait()
        stdout, stderr = (path.read_text(errors="replace") for path in paths[1:])
        return subprocess.CompletedProcess(words, next(filter(None, codes), 0), stdout, stderr)


def ranks(count: int) -> tuple[dist.TCPStore, list[dict[str, str]]]:
    """Return the store where ranks meet, and each rank's environment as torchrun would set it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return store, [
        common | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)
    ]


def become(words: list[str], environment: dict[str, str], paths: list[Path]) -> None:
    """Turn this process into the program that `python *words` runs."""
    write = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for number, (path, flags) in enumerate(zip(paths, (os.O_RDONLY, write, write), strict=True)):
        os.dup2(os.open(path, flags), number)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", cores)))
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
    threading._shutdown()  # waits for threads, as the interpreter does
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
