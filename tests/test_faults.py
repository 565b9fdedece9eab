"""Faults, injected on purpose: what is said, how soon it is over, what is left.

More of files' are in their tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    GOLDEN,
    ROOT,
    TINY,
    build_golden,
    clean_environment,
    launcher,
    run_fresh,
    run_python,
    torchrun,
    wait_for_line,
)

from llama import Llama
from llama.checkpoints import load

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[1, 5, 9, 7, 12]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "gqa-mp2", tmp_path / "model"))


def build(folder: Path) -> Llama:
    return Llama.build(folder, GOLDEN / "tokenizer.model", 64, 4, device="cpu", dtype="float32")


def test_a_file_removed_between_opening_and_reading_is_still_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = build_golden("gqa-mp2").model(TOKENS, 0)

    def remove_and_load(*arguments: Any) -> None:
        (folder / "consolidated.01.pth").unlink()
        load(*arguments)

    monkeypatch.setattr("llama.checkpoints.loading.load", remove_and_load)
    assert torch.equal(build(folder).model(TOKENS, 0), wanted)


def test_a_directory_in_place_of_a_file_is_named(folder: Path) -> None:
    file = folder / "consolidated.01.pth"
    file.unlink()
    file.mkdir()
    with pytest.raises(
        OSError, match=r"01\.pth cannot be read \(Is a directory\): check that it exists, is a file"
    ):
        build(folder)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions do not hold for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked(folder: Path) -> Iterator[Path]:
    """A world-readable folder whose shard 01 is not, and which `lock` makes unreadable itself."""
    for path in (folder, *folder.parents):
        if path.is_relative_to(Path("/tmp")) and path != Path("/tmp"):
            path.chmod(0o755)
    (folder / "consolidated.01.pth").chmod(0)
    yield folder
    folder.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX file system")
def test_an_unreadable_file_is_named(locked: Path) -> None:
    with (
        unprivileged(),
        pytest.raises(
            PermissionError,
            match=r"consolidated\.01\.pth cannot be read \(Permission denied\): check",
        ),
    ):
        build(locked)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX file system")
def test_an_unreadable_folder_is_named(locked: Path) -> None:
    locked.chmod(0)
    with (
        unprivileged(),
        pytest.raises(
            PermissionError,
            match=r"model cannot be read \(Permission denied\): check its permissions",
        ),
    ):
        build(locked)


def test_values_that_are_not_finite_are_warned_of_and_found_in_the_logits(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = torch.load(folder / "consolidated.01.pth")
    shard["layers.1.feed_forward.w2.weight"][3, 4] = torch.nan
    torch.save(shard, folder / "consolidated.01.pth")
    llm = build(folder)
    assert caplog.messages == [
        "layers.1.feed_forward.w2.weight of model has values that are not finite: download it again"
    ]
    with pytest.raises(
        ValueError,
        match=r"logits are not finite \(prompt 0, position 1, float32\): check the weights with",
    ):
        llm.generate([[1, 5]], 3)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
def test_memory_that_fails_all_the_same_is_said_with_the_numbers(tmp_path: Path) -> None:
    """What is free by the system's account may still be refused to this process."""
    script = tmp_path / "limited.py"
    script.write_text("""
import resource
from conftest import GOLDEN, build_golden
from llama import Llama
from llama.cli.program import program
def main():
    build_golden()  # threads and libraries are there before the limit
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
    Llama.build(GOLDEN / "gqa-mp1", GOLDEN / "tokenizer.model", 2048, 1024, device="cpu", dtype="float32")
with program():
    main()
""")
    job = run_fresh(script)
    assert job.returncode == 1
    last = job.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: gqa-mp1 needs 0.7 MB for its weights, 1.1 GB for a cache of max_batch_size 1024 ×"
    )
    assert "and cpu refused memory: build with a smaller max_batch_size or max_seq_len" in last


def faulty_job(
    nproc: int, script: Path, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """A torchrun job whose script writes the file `fault` when its fault occurs.

    It raises TimeoutExpired if the other ranks do not end.
    """
    job = torchrun(nproc, script, *arguments)
    seconds = time.time() - (script.parent / "fault").stat().st_mtime
    print(
        f"{seconds:.1f} s from the fault to the end; last lines:",
        *job.stderr.strip().splitlines()[-3:],
        sep="\n",
    )
    return job


FAULT = """
import os, signal, sys, time
from pathlib import Path
from typing import Any
from conftest import GOLDEN, ROOT, TINY
sys.path.insert(0, str(ROOT))
import llama.checkpoints.release, llama.generation
import fire
from llama.cli.program import program
import example_text_completion as example
def run(main):
    with program(main):
        fire.Fire(main)
rank = int(os.environ["RANK"])
def fault():
    (Path(__file__).parent / "fault").touch()
"""


@pytest.mark.parametrize("when", ["loading", "generation"])
def test_a_killed_rank_ends_the_job(tmp_path: Path, when: str) -> None:
    where = {
        "loading": ("llama.checkpoints.Checkpoint", "copy", "rank == 1"),
        "generation": (
            "llama.engine.engine.Engine",
            "_decode",
            "rank == 1 and args[0].passes == 9",
        ),
    }[when]
    script = tmp_path / "killed.py"
    script.write_text(
        FAULT
        + f"""
inner = {where[0]}.{where[1]}
def dying(*args):
    if {where[2]}:
        fault()
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args)
{where[0]}.{where[1]} = dying
run(example.main)
"""
    )
    job = faulty_job(2, script, "--max_gen_len", "60")
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in job.stderr


def test_a_rank_that_fails_in_loading_ends_the_job_with_its_sentence(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(
        FAULT
        + """
inner = llama.checkpoints.release.map_tensors
def failing(path):
    if rank == 1:
        fault()
        path = path.with_name("consolidated.07.pth")
    return inner(path)
llama.checkpoints.release.map_tensors = failing
run(example.main)
"""
    )
    job = faulty_job(2, script)
    sentence = f"error: {TINY}/consolidated.07.pth cannot be read (No such file or directory): check that it exists"
    assert job.returncode != 0
    assert job.stderr.count(sentence) == 1
    assert sentence in "\n".join(job.stderr.strip().splitlines()[-3:])


def test_a_mistake_that_all_ranks_see_is_told_once_and_last(tmp_path: Path) -> None:
    script = tmp_path / "mistaken.py"
    script.write_text(FAULT + "fault()\nrun(example.main)\n")
    job = faulty_job(2, script, "--max_seq_len", "20")
    sentence = "error: prompt 3 has 55 tokens, and max_seq_len is 20: shorten it or build with a larger max_seq_len"
    assert job.returncode != 0
    assert job.stderr.count(sentence) == 1, job.stderr
    assert sentence in "\n".join(job.stderr.strip().splitlines()[-3:])


def test_a_mistake_without_torchrun_is_one_line() -> None:
    job = run_python(ROOT / "example_text_completion.py", "--ckpt_dir", "/nowhere")
    assert job.returncode == 1
    assert (
        job.stderr
        == "error: no folder /nowhere: pass the folder that holds params.json or config.json\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("nproc", [0, 2])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_cleanly(nproc: int, sent: signal.Signals) -> None:
    command = [
        sys.executable,
        *(launcher(nproc) if nproc else []),
        str(ROOT / "tests" / "workers" / "endless.py"),
    ]
    environment = clean_environment() | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    job = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_line(job, "generating")
        start = time.monotonic()
        if sent == signal.SIGINT:
            os.killpg(job.pid, sent)  # as a terminal does: to every process of the job
        else:
            job.send_signal(sent)
        _, errors = job.communicate(timeout=240)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    seconds = time.monotonic() - start
    print(f"{seconds:.1f} s from {sent.name} to the end, status {job.returncode}")
    assert job.returncode != 0
    assert "Aborted" not in errors and "core dumped" not in errors
    if not nproc:
        assert job.returncode == (130 if sent == signal.SIGINT else 143)
        assert "Traceback" not in errors


def test_two_processes_build_from_one_folder_at_once(tmp_path: Path) -> None:
    script = tmp_path / "one_of_two.py"
    script.write_text("""
from conftest import build_golden
print(build_golden("gqa-mp4").generate([[1, 30]], 9, 0)[0])
""")
    environment = clean_environment() | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, script], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [job.communicate(timeout=240)[0].splitlines()[-1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert answers[0] == answers[1] == str(build_golden("gqa-mp4").generate([[1, 30]], 9, 0)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_2000_requests_leave_memory_flat_and_the_answers_as_they_were() -> None:
    job = run_fresh(ROOT / "tests" / "workers" / "soak.py", timeout=600)
    assert job.returncode == 0, job.stdout + job.stderr
