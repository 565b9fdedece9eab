"""What the README prints is what runs."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, run_python

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_exactly_as_printed() -> None:
    setup, command = blocks("bash")[1].rstrip("\n").rsplit("\n", 1)
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command == "pytest" and command in script
    install = setup.splitlines()[-1]
    assert install.replace("pip install", "pip install -q") in script


def test_the_quick_start_runs_the_example_without_torchrun() -> None:
    command = blocks("bash")[0].rstrip("\n").rsplit("\n", 1)[1]
    assert command == "python example_text_completion.py"
    result = run_python("example_text_completion.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("initializing pipeline")[1].count("\n> ") == 4


def test_the_python_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "\nGrass.\n" in printed
    assert "\nI do not talk about foxes.\n" in printed


def test_every_link_into_the_repository_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
