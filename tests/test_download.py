"""download.sh against a release server on loopback: real bash, real curl and wget."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from release_server import CLIENTS, SHARDS, Release, assert_whole, make_tools, program

SCRIPT = ROOT / "download.sh"

pytestmark = pytest.mark.skipif(
    not CLIENTS or not shutil.which("bash"), reason="needs bash, and curl or wget"
)


@pytest.fixture(params=CLIENTS)
def tools(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tools(tmp_path / "bin", request.param)


def environment(tools: Path) -> dict[str, str]:
    return clean_environment() | {"PATH": str(tools), "LLAMA_RETRY_PAUSE": "0", "LLAMA_URL": ""}


def download(
    tools: Path, *arguments: str | Path, answers: str = "", **extra: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", SCRIPT, *arguments],
        env=environment(tools) | extra,
        input=answers,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_all_six_models_arrive_whole_after_the_two_questions(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    out = tmp_path / "weights"
    job = download(tools, "--out", out, answers=f"{release.url}\n\n")
    assert job.returncode == 0, job.stderr
    assert_whole(out, release, *SHARDS)
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "LLAMA-2-LICENSE", "LLAMA-2-USE_POLICY.md", "tokenizer.model", "tokenizer_checklist.chk"
    ]  # fmt: skip
    before = len(release.requests)
    job = download(tools, "--out", out, "--url", release.url, "--models", "all")
    assert (job.returncode, len(release.requests)) == (0, before), "a rerun asked for something"


def test_chosen_models_come_unattended_and_the_projects_licence_stays(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    (tmp_path / "LICENSE").write_text("ours")
    job = download(tools, "--models", "7B,13B-chat", "--out", tmp_path, LLAMA_URL=release.url)
    assert job.returncode == 0, job.stderr
    assert_whole(tmp_path, release, "7b", "13b-chat")
    assert not (tmp_path / "llama-2-70b").exists()
    assert (tmp_path / "LICENSE").read_text() == "ours"


def test_macos_md5_is_enough(release: Release, tmp_path: Path) -> None:
    tools = make_tools(tmp_path / "bin", CLIENTS[0], hasher="md5")
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 0, job.stderr
    assert_whole(tmp_path / "out", release, "7b")


def test_connections_cut_in_mid_file_are_resumed(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    path = "llama-2-7b/consolidated.00.pth"
    release.cuts[path] = [50_000] * 3
    release.statuses = [503, 429]
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 0, job.stderr
    assert_whole(tmp_path / "out", release, "7b")
    starts = [start for requested, start in release.requests if requested == path]
    assert starts == [0, 50_000, 100_000, 150_000]


def test_a_connection_that_never_gets_on_is_given_up(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    release.statuses = [503] * 100
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 1
    assert (
        "LICENSE could not be fetched (status 503) in 5 attempts: check the connection, and run the"
        in job.stderr
    )
    assert len(release.requests) == 5


def test_an_expired_link_says_so_and_a_new_one_goes_on(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    path = "llama-2-13b/consolidated.01.pth"
    release.cuts[path] = [70_000]
    release.forbid_after = 8  # the request that resumes this file
    arguments = ["--models", "13B", "--out", str(tmp_path / "out")]
    job = download(tools, "--url", release.url, *arguments)
    assert job.returncode == 5
    assert (
        f"the server refuses {path} (403): the link has expired, which it does after 24 hours"
        in job.stderr
    )
    assert (tmp_path / "out" / "llama-2-13b" / "consolidated.01.pth.part").stat().st_size == 70_000
    release.forbid_after = 10**9
    release.requests.clear()
    job = download(tools, "--url", release.url, *arguments)
    assert job.returncode == 0, job.stderr
    assert release.requests == [(path, 70_000)]
    assert_whole(tmp_path / "out", release, "13b")


def test_a_model_that_the_link_does_not_have_is_named(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    release.files = {path: data for path, data in release.files.items() if "70b" not in path}
    job = download(tools, "--url", release.url, "--models", "70B", "--out", tmp_path / "out")
    assert job.returncode == 5
    assert (
        "the server has no llama-2-70b/checklist.chk (404): the link is for another family of models"
        in job.stderr
    )


@pytest.mark.parametrize("path", ["tokenizer_checklist.chk", "llama-2-7b/consolidated.00.pth"])
def test_a_web_page_in_place_of_a_file_is_recognised(
    tools: Path, release: Release, tmp_path: Path, path: str
) -> None:
    release.files[path] = b"<!DOCTYPE html><html><body>Sign in</body></html>"
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 5
    assert f"the server sent a web page in place of {path}: the link has expired" in job.stderr
    assert not (tmp_path / "out" / path).exists() and not list((tmp_path / "out").rglob("*.part"))


def test_a_web_page_in_answer_to_a_resumption_leaves_the_part(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    path = "llama-2-7b/consolidated.00.pth"
    part = tmp_path / "out" / f"{path}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(release.files[path][:150_000])
    release.files[path], release.ranges = b"<html>Sign in</html>", False
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 5
    assert f"the server sent a web page in place of {path}: the link has expired" in job.stderr
    assert part.stat().st_size == 150_000


def test_a_server_without_ranges_that_always_cuts_is_given_up(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    path = "llama-2-7b/consolidated.00.pth"
    release.ranges, release.cuts[path] = False, [50_000] * 100
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 1
    assert len(release.requests) < 25


def test_wrong_bytes_are_named_and_a_rerun_mends_them(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    path = "llama-2-7b/consolidated.00.pth"
    whole = release.files[path]
    release.files[path] = b"\0" * len(whole)
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    got, wanted = (hashlib.md5(data).hexdigest() for data in (release.files[path], whole))
    assert job.returncode == 6
    assert (
        f"{path} has MD5 {got}, but {wanted} is expected: it was removed; run the same command again"
        in job.stderr
    )
    release.files[path] = whole
    assert (
        download(
            tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out"
        ).returncode
        == 0
    )
    assert_whole(tmp_path / "out", release, "7b")
    (tmp_path / "out" / path).write_bytes(whole[:-1] + b"?")  # damaged on disk afterwards
    assert (
        download(
            tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out"
        ).returncode
        == 0
    )
    assert_whole(tmp_path / "out", release, "7b")


def test_parts_that_cannot_be_resumed_are_fetched_anew(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "llama-2-7b"
    out.mkdir(parents=True)
    (out / "consolidated.00.pth.part").write_bytes(b"\0" * 300_000)  # longer than the file
    # Complete, but not yet renamed
    (out / "params.json.part").write_bytes(release.files["llama-2-7b/params.json"])
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 0, job.stderr
    assert_whole(tmp_path / "out", release, "7b")
    assert "llama-2-7b/params.json" not in [path for path, _ in release.requests]


def test_a_server_without_ranges_sends_files_from_their_beginning(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    release.ranges = False
    release.cuts["llama-2-7b/consolidated.00.pth"] = [50_000]
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.returncode == 0, job.stderr
    assert_whole(tmp_path / "out", release, "7b")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_kill_in_mid_file_ends_at_once_and_a_rerun_goes_on(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    path = "llama-2-7b/consolidated.00.pth"
    release.slow = path
    part = tmp_path / "out" / f"{path}.part"
    command = [
        "bash",
        str(SCRIPT),
        "--url",
        release.url,
        "--models",
        "7B",
        "--out",
        str(tmp_path / "out"),
    ]
    job = subprocess.Popen(command, env=environment(tools), stderr=subprocess.PIPE, text=True)
    while not (part.exists() and part.stat().st_size > 10_000):
        assert job.poll() is None
        time.sleep(0.02)
    start = time.monotonic()
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, time.monotonic() - start < 30) == (130, True)
    assert errors.endswith("stopped: run the same command again to resume\n")
    time.sleep(0.3)
    size = part.stat().st_size
    time.sleep(0.3)
    assert part.stat().st_size == size, "the transfer went on after the script"
    release.slow = ""
    assert download(tools, *command[2:]).returncode == 0
    assert release.requests[-1] == (path, size)
    assert_whole(tmp_path / "out", release, "7b")


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (
            ["--url", "https://l.facebook.com/l.php?u=https%3A%2F%2Fdownload"],
            2,
            "this link is the e-mail program's wrap",
        ),
        (
            ["--url", "https://download.example/x?Policy=a"],
            2,
            "the link has no * in it: copy the one that has",
        ),
        (
            ["--url", "download.example/*"],
            2,
            "the link does not begin with https://: copy all of it",
        ),
        (
            ["--url", "https://download.example/* ?Policy"],
            2,
            "the link has spaces or line breaks in it",
        ),
        (["--url", ""], 2, "no link: pass --url, set LLAMA_URL, or paste the link"),
        (
            ["--models", "7B,8B"],
            2,
            "unknown model '8B': use 7B, 13B, 70B, 7B-chat, 13B-chat, 70B-chat",
        ),
        (["--model", "7B"], 2, "unknown argument '--model': see --help"),
        (["--out"], 2, "--out needs a value: see --help"),
        (["--models", ""], 2, "no models: pass --models"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_request(
    release: Release, tmp_path: Path, arguments: list[str], status: int, sentence: str
) -> None:
    tools = make_tools(tmp_path / "bin", CLIENTS[0])
    job = download(tools, "--url", release.url, "--models", "7B", *arguments)
    assert (job.returncode, job.stdout, release.requests) == (status, "", [])
    assert f"error: {sentence}" in job.stderr


def test_missing_models_tools_and_space_are_refused_before_the_first_request(
    release: Release, tmp_path: Path
) -> None:
    tools = make_tools(tmp_path / "bin", CLIENTS[0])
    given = ["--url", release.url, "--out", str(tmp_path / "out")]
    job = download(tools, *given)  # at the prompt for models, the input ends
    assert (job.returncode, "error: no models: pass --models" in job.stderr) == (2, True)
    program(tools / "df", "echo Filesystem; echo /dev/disk 1 1 30000000 1% /")
    job = download(tools, *given, "--models", "7B,13B")
    assert job.returncode == 4
    assert (
        f"{tmp_path}/out has 30 GB free, and 39 GB are still needed: choose another --out"
        in job.stderr
    )
    (tools / "md5sum").unlink()
    job = download(tools, *given, "--models", "7B")
    assert (job.returncode, "neither md5sum nor md5 is installed" in job.stderr) == (3, True)
    (tools / CLIENTS[0]).unlink()
    job = download(tools, *given, "--models", "7B")
    assert (job.returncode, "neither curl nor wget is installed" in job.stderr) == (3, True)
    assert release.requests == []


def test_list_help_and_dry_run_fetch_nothing(release: Release, tmp_path: Path) -> None:
    tools = make_tools(tmp_path / "bin", CLIENTS[0])
    job = download(tools, "--list")
    assert job.returncode == 0 and job.stdout.splitlines()[3].split() == [
        "70B",
        "llama-2-70b",
        "8",
        "137",
        "GB",
    ]
    job = download(tools, "--help")
    assert (
        job.returncode == 0
        and job.stdout.startswith("usage: bash download.sh")
        and "exit status" in job.stdout
    )
    job = download(
        tools, "--dry-run", "--url", release.url, "--models", "13B", "--out", tmp_path / "out"
    )
    assert job.returncode == 0
    out = f"{tmp_path}/out/llama-2-13b"
    assert len(job.stdout.splitlines()) == 4 + 4
    assert (
        job.stdout.splitlines()[-1]
        == f"llama-2-13b/consolidated.01.pth -> {out}/consolidated.01.pth"
    )
    assert not (tmp_path / "out").exists() and release.requests == []


def test_progress_is_quiet_where_there_is_no_terminal(
    tools: Path, release: Release, tmp_path: Path
) -> None:
    job = download(tools, "--url", release.url, "--models", "7B", "--out", tmp_path / "out")
    assert job.stdout == ""
    assert all(line.startswith("fetching ") for line in job.stderr.splitlines()[:-1]), job.stderr
    assert job.stderr.splitlines()[-1] == "llama-2-7b is whole"


def test_the_script_is_clean_and_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, SCRIPT], check=True)
