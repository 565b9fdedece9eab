"""llama-2-tiny: the promises of its README, on a sample of its evaluation."""

from __future__ import annotations

import hashlib

import pytest
from conftest import TINY


def test_the_folder_is_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 4_000_000
    for line in (TINY / "checklist.chk").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.md5((TINY / name).read_bytes()).hexdigest() == digest


def test_it_answers_its_world_as_its_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TINY)
    from evaluate import evaluate

    figures = evaluate()
    least = {"plain": 95, "system": 95, "follow_up": 90}
    for kind, (right, ended, count) in figures.items():
        assert (count, ended) == (100, 100)
        assert right >= least.get(kind, 0)
