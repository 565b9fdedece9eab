"""llama-2-tiny: what its README promises, on a sample of its evaluation."""

from __future__ import annotations

import hashlib

from conftest import TINY


def test_the_folder_is_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 4_000_000
    for line in (TINY / "checklist.chk").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.md5((TINY / name).read_bytes()).hexdigest() == digest
