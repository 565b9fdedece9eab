"""A miniature release on a loopback server for download.sh, and the tools that it may find."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHARDS = {"7b": 1, "13b": 2, "70b": 8, "7b-chat": 1, "13b-chat": 2, "70b-chat": 8}
QUERY = "Policy=abc%20&Signature=x~y_&Key-Pair-Id=K"
CLIENTS = [client for client in ("curl", "wget") if shutil.which(client)]


def miniature() -> dict[str, bytes]:
    """Return the files of all six models by their path on the server."""
    rng = random.Random(0)
    files = {
        "LICENSE": b"terms\n",
        "USE_POLICY.md": b"# policy\n",
        "tokenizer.model": rng.randbytes(3000),
    }
    files["tokenizer_checklist.chk"] = checklist({"tokenizer.model": files["tokenizer.model"]})
    for name, shards in SHARDS.items():
        own = {f"consolidated.{number:02}.pth": rng.randbytes(200_000) for number in range(shards)}
        own["params.json"] = b"{}"
        files |= {f"llama-2-{name}/{file}": data for file, data in own.items()}
        files[f"llama-2-{name}/checklist.chk"] = checklist(own)
    return files


def checklist(files: dict[str, bytes]) -> bytes:
    return "".join(
        f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in files.items()
    ).encode()


class Release(ThreadingHTTPServer):
    """Serves `files`. Tests set the other attributes to cause failures."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = miniature()
        self.requests: list[tuple[str, int]] = []  # path, and first byte
        self.forbid_after = 10**9
        self.statuses: list[int] = []  # of the next responses
        self.cuts: dict[str, list[int]] = {}  # path -> bytes before its next responses are cut
        self.slow = ""  # path whose body is sent in small pieces
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/*?{QUERY}"


class Handler(BaseHTTPRequestHandler):
    server: Release

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.lstrip("/").partition("?")
        asked = self.headers.get("Range", "bytes=0-") if self.server.ranges else "bytes=0-"
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.server.requests.append((path, start))
        status = self.server.statuses.pop(0) if self.server.statuses else 206 if start else 200
        if query != QUERY or len(self.server.requests) > self.server.forbid_after:
            status = 403
        data = self.server.files.get(path)
        if data is None:
            status, data = 404, b""
        elif start >= len(data) > 0 and status == 206:
            status = 416
        self.send_response(status)
        body = data[start:] if status in (200, 206) else b"<html>denied</html>"
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header(
            "Content-Type", "text/html" if body.startswith(b"<") else "binary/octet-stream"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = self.server.cuts.get(path)
        if cuts and status in (200, 206):
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
        elif path == self.server.slow:
            for i in range(0, len(body), 2000):
                self.wfile.write(body[i : i + 2000])
                time.sleep(0.05)
        else:
            self.wfile.write(body)


def make_tools(folder: Path, *clients: str, hasher: str = "md5sum") -> Path:
    """Make a folder for PATH with these clients and no others, and 999 GB of free disk space.

    `hasher` is "md5sum", or "md5" as on macOS.
    """
    folder.mkdir()
    used = "awk bash cat cut du grep head mkdir mktemp mv rm sleep sort tail tr wc"
    for tool in [*used.split(), *clients] + ["md5sum"] * (hasher == "md5sum"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    program(folder / "df", "echo Filesystem; echo /dev/disk 1 1 999000000 1% /")
    if hasher == "md5":  # -q prints only the sum, and there is no -c
        program(
            folder / "md5",
            f'[ "$1" = -q ] && [ $# = 2 ] && {shutil.which("md5sum")} "$2" | cut -c 1-32',
        )
    return folder


def program(path: Path, body: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


def assert_whole(out: Path, release: Release, *names: str) -> None:
    for name in names:
        folder = out / f"llama-2-{name}"
        wanted = {
            path.split("/")[1]: data
            for path, data in release.files.items()
            if path.startswith(folder.name + "/")
        }
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
    assert (out / "tokenizer.model").read_bytes() == release.files["tokenizer.model"]
    assert not list(out.rglob("*.part"))
