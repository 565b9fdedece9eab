"""A server of llama-2-tiny in a process of its own, optionally with scripted answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import forked
import httpx
import torch
from conftest import ROOT, TINY, clean_environment, launcher

# On a busy machine an answer takes longer than httpx' 5 s.
http_get = partial(httpx.get, timeout=60)
http_post = partial(httpx.post, timeout=60)

URL = re.compile(r"answers at (http://[^,]+),")


class Served:
    """A context manager that runs `python -m llama serve` with these flags.

    The server is ready when the block starts. Afterwards `status` is its exit status. `script`
    replaces `-m llama`. `ranks` above 0 start that many ranks with torchrun.
    """

    def __init__(
        self,
        *flags: str | Path,
        folder: Path = TINY,
        script: Path | None = None,
        ranks: int = 0,
        **environment: str,
    ):
        program = [str(script)] if script else ["-m", "llama"]
        words = [*program, "serve", str(folder), "--port", "0", *map(str, flags)]
        own = clean_environment() | {"OMP_NUM_THREADS": "1"} | environment
        self.folder = tempfile.TemporaryDirectory()
        self.errors = Path(self.folder.name, "stderr")
        self.job: Any
        if ranks:
            own["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
            with self.errors.open("w") as errors:
                command = [sys.executable, *launcher(ranks), *words]
                self.job = subprocess.Popen(command, cwd=ROOT, env=own, stderr=errors)
        else:
            self.job = forked.Job(words, own, [Path(os.devnull), Path(os.devnull), self.errors])
        self.status: int | None = None

    def __enter__(self) -> Served:
        try:
            self.url = self.wait_for(URL)[1]
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def log(self) -> str:
        return self.errors.read_text() if self.errors.exists() else ""

    def wait_for(self, pattern: re.Pattern[str], seconds: float = 120) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            running = self.job.poll() is None
            if found := pattern.search(self.log):
                return found
            assert running, f"the server ended: {self.log}"
            time.sleep(0.02)
        raise AssertionError(f"not in the server's log: {pattern.pattern}: {self.log}")

    def end(self) -> str:
        """Stop the server with SIGTERM unless it has ended. Returns its log."""
        if self.job.poll() is None:
            self.job.terminate()
        try:
            self.status = self.job.wait(120)
        finally:
            self.job.kill()
        return self.log


def told_to(prompt: str) -> tuple[str, float]:
    """The scripted answer to a prompt, and the seconds that each of its tokens takes."""
    asked = re.findall(r"\[INST\] (.*?) \[/INST\]", prompt, re.DOTALL) or [prompt]
    word, _, rest = asked[-1].partition(":")
    if word in ("long", "slow"):
        return " fox" * int(rest), 0.05 * (word == "slow")
    return rest if word == "say" else "Yes.", 0


def main() -> None:
    """Serve scripted answers: say:TEXT, long:N words, or slow:N words at 20 per second."""
    from llama.__main__ import main
    from llama.engine import Engine, Request, ScoredToken

    def choose(
        self: Engine, requests: list[Request], numbers: list[int], logits: torch.Tensor
    ) -> list[ScoredToken | None]:
        chosen: list[ScoredToken | None] = []
        slowest = 0.0
        for request, number in zip(requests, numbers, strict=True):
            if not hasattr(request, "script"):
                text, seconds = told_to(self.tokenizer.decode(request.prompt.token_ids))
                ids = self.tokenizer.encode(text, bos=False, eos=False)
                request.script = [*ids, self.tokenizer.eos_id], seconds  # type: ignore[attr-defined]
            ids, seconds = request.script  # type: ignore[attr-defined]
            chosen.append(ScoredToken(ids[number]))
            slowest = max(slowest, seconds)
        time.sleep(slowest)
        return chosen

    Engine.choose = choose  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    main()
