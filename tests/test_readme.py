"""What the README and the pages of docs/ print is what runs."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, clean_environment, random_state, run_fresh, write_release
from release_server import CLIENTS, Release, assert_whole, make_tools

from llama import ModelArgs
from llama.__main__ import COMMANDS
from llama.checkpoints.convert import reshard
from llama.cli.arguments import flags_of

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

PAGES = {
    path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(language: str) -> list[str]:
    """In the README, then in the other pages; each once."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return list(dict.fromkeys(block for page in PAGES.values() for block in fence.findall(page)))


def test_ci_runs_the_test_command_exactly_as_printed() -> None:
    *setup, install, command = blocks("bash")[1].strip().split(" && ")
    assert setup == ["python3 -m venv .venv", ". .venv/bin/activate"]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command == "pytest" and command in script
    assert install.replace("pip install", "pip install -q") in script


def test_the_quick_start_runs_the_example_without_torchrun() -> None:
    command = blocks("bash")[0].strip().split(" && ")[-1]
    assert command == "python example_text_completion.py"
    result = run_fresh("example_text_completion.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n> ") == 4


def commands(block: str) -> list[str]:
    """The commands of a block, without those that install, which a fresh clone runs."""
    lines = re.sub(r" *\\\n *", " ", block).replace(" && ", "\n").splitlines()
    return [
        line
        for line in lines
        if line and not re.match(r"python3 -m venv|\. \.venv|pip install|pytest|bash \.ci", line)
    ]


def run_shell(command: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        shell=True,
        cwd=folder,
        env=clean_environment() | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clone, with miniatures in the places of the models that the README names."""
    folder = tmp_path_factory.mktemp("house")
    for path in ROOT.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer.model").symlink_to(TINY / "tokenizer.model")
    (folder / "llama-2-7b").symlink_to(TINY)
    reshard(str(TINY), str(folder / "llama-2-13b-chat"), 2)
    args = ModelArgs(dim=64, n_layers=2, n_heads=8, vocab_size=1280, multiple_of=32)
    state = random_state(args)
    # EOS is at half of all steps the likeliest
    state["output.weight"][:2] = state["output.weight"][3:] = 0
    write_release(folder / "llama-2-70b-chat", args, state, 8)
    return folder


# Of pages that begin alike, what only the later one has.
SEEN: set[str] = set()
BLOCKS = [
    new
    for block in blocks("bash")
    if (new := [command for command in commands(block) if command not in SEEN])
    and not SEEN.update(new)
]


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if not re.search(r"download.sh|serve|curl", block[0])],
    ids=lambda block: re.sub(r"\W+", " ", block[0])[:50],
)
def test_every_command_runs_as_printed(block: list[str], house: Path, tmp_path: Path) -> None:
    for command in block:
        copies = 1
        if "node0" in command:  # two agents on this machine
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                command = command.replace("node0:29500", f"127.0.0.1:{free.getsockname()[1]}")
            copies = 2
        jobs = [run_shell(command, house) for _ in range(copies)]
        with ThreadPoolExecutor(copies) as pool:
            printed = list(pool.map(lambda job: job.communicate("/exit\n", timeout=300), jobs))
        assert [job.returncode for job in jobs] == [0] * copies, printed
        if "example" in command:
            answers = 4 if "text" in command else 6
            assert sum(out.count("\n=====") for out, _ in printed) == answers, (
                "the first rank of all prints, no other"
            )


def test_the_server_answers_what_the_readme_asks_it(
    house: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (serve,) = (command for block in BLOCKS for command in block if " serve " in command)
    (curl,) = (command for block in BLOCKS for command in block if command.startswith("curl"))
    (client,) = (block for block in blocks("python") if "openai" in block)
    job = run_shell(f"exec {serve} --port 0", house)
    assert job.stderr is not None
    try:
        url = next(found[0] for line in job.stderr if (found := re.search(r"http://[\d.:]+", line)))
        answer = run_shell(curl.replace("http://127.0.0.1:8000", url), house).communicate(
            timeout=60
        )[0]
        assert (
            json.loads(answer)["choices"][0]["message"]["content"] == "The owl lives in the tower."
        )
        exec(client.replace("http://127.0.0.1:8000", url), {})
        assert capfd.readouterr().out == "The owl lives in the tower.\n"
    finally:
        job.terminate()
        job.communicate(timeout=60)
    assert job.returncode == 0


def test_the_download_command_runs_as_printed(release: Release, tmp_path: Path) -> None:
    (command,) = (command for block in BLOCKS for command in block if "download.sh" in command)
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "download.sh").symlink_to(ROOT / "download.sh")
    tools = make_tools(tmp_path / "bin", *CLIENTS)
    job = run_shell(command, tmp_path / "clone", PATH=str(tools), LLAMA_URL=release.url)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert_whole(tmp_path / "clone", release, "7b", "7b-chat")


def test_the_examples_print_what_the_readme_shows() -> None:
    for name, shown in zip(("text", "chat"), blocks("text"), strict=True):
        job = run_fresh(f"example_{name}_completion.py", "--temperature", "0")
        assert shown in job.stdout, name


def names_in_source() -> set[str]:
    """Every function, class, method, attribute and constant of llama/, some as Class.name."""
    names = set()
    for file in (ROOT / "llama").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{name}" for name in members(node)}
            if isinstance(node, ast.Module):
                names |= members(node)
    return names


def members(scope: ast.ClassDef | ast.Module) -> set[str]:
    """The names that a class or module defines: methods, fields, attributes of self, constants."""
    found = set()
    for node in ast.walk(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def test_the_walks_through_the_source_name_what_exists() -> None:
    page = PAGES[ROOT / "docs" / "source.md"]
    walks = page[: page.index("## Modules")]
    known = names_in_source()
    named = set(re.findall(r"`([\w.]+(?:/[\w.]+)*)`", walks))
    files = {name for name in named if re.search(r"\.(py|c)$", name)}
    assert len(files) > 15 and len(named) > 80
    for file in files:
        assert (ROOT / "llama" / file).is_file(), file
    outside = {"Parameter", "ops.linear", "pyproject.toml"}
    for name in named - files - outside:
        assert name in known, name


def test_every_module_stands_in_the_table_of_modules() -> None:
    page = PAGES[ROOT / "docs" / "source.md"]
    table = page[page.index("## Modules") : page.index("## Your own Python")]
    for file in (ROOT / "llama").rglob("*.py"):
        if file.name == "__init__.py" and file.parent.name != "ops":
            continue
        assert re.search(rf"(?<!\w){file.name}\b", table), file


def test_every_flag_of_the_comparison_exists() -> None:
    page = PAGES[ROOT / "README.md"]
    table = page[page.index("## If you come from") : page.index("## More")]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("|")]
    ours = {flag for row in rows for flag in re.findall(r"--(\w+)", row)}
    assert len(ours) > 10
    known = {flag for command in COMMANDS.values() for flag in flags_of(command)}
    assert ours - {"nproc_per_node"} <= known


def sentences() -> list[str]:
    return re.findall(
        r"^\| `([^`]+)` \|", PAGES[ROOT / "docs" / "troubleshooting.md"], flags=re.MULTILINE
    )


def literals(source: str) -> list[str]:
    """The string literals of Python code, with … for what is put into them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_sentence_of_troubleshooting_is_in_the_code() -> None:
    assert len(sentences()) > 10
    texts = [text for file in (ROOT / "llama").rglob("*.py") for text in literals(file.read_text())]
    texts.append((ROOT / "download.sh").read_text().replace("$1", "…"))
    for sentence in sentences():
        pattern = re.compile(".*".join(map(re.escape, sentence.split("…"))))
        assert any(pattern.search(text) for text in texts), sentence


def test_the_python_examples_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in blocks("python"):
        # which asks a server, or needs a package that is not installed
        if not re.search("import (OpenAI|ray)", block):
            exec(block, names)
    printed = capsys.readouterr().out
    assert "\nGrass.\n" in printed
    assert "\nI do not talk about foxes.\n" in printed


def test_every_link_into_the_repository_leads_somewhere() -> None:
    for path, page in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_recipe_for_ray_runs(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    (recipe,) = (block for block in blocks("python") if "import ray" in block)
    names: dict[str, Any] = {}
    exec(recipe, names)
    prompts = [f"The owl number {i}" for i in range(100)]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    )
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        names["answer"](
            str(TINY), str(tmp_path / "in.jsonl"), str(tmp_path / "out"), actors=2, cpus=0.5
        )
    finally:
        ray.shutdown()
    rows = [
        json.loads(line)
        for file in (tmp_path / "out").iterdir()
        for line in file.read_text().splitlines()
    ]
    assert sorted(row["prompt"] for row in rows) == sorted(prompts) and all(
        "generation" in row for row in rows
    )
